"""What gpu_all.py is made of. Where packages lie, and that Triton interprets, is said before they are imported."""
# ruff: noqa: E402

import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
INTERPRET = "--interpret" in sys.argv
if INTERPRET:
    os.environ["TRITON_INTERPRET"] = "1"
    # what is tuned there is worth nothing
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()
# from a checkout that is not installed, too
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests"), str(ROOT / "bench")]

import torch

DEVICE = torch.device("cpu" if INTERPRET else "cuda")
