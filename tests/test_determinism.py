"""The same bytes whatever the machine does beside it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compressed import add_tokenizer, text
from transformers import LlamaConfig, LlamaForCausalLM

from halfbit.native import CPU


@pytest.mark.skipif(
    "GenuineIntel" not in (CPU.read_text() if CPU.is_file() else ""), reason="asked of MKL on Intel only"
)
def test_any_number_of_threads_gives_the_same_bytes(tmp_path: Path) -> None:
    """Wide enough for MKL to share one product among threads; without its strict mode the files differ."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=61, num_hidden_layers=1, **sizes)).save_pretrained(tmp_path / "source")
    add_tokenizer(tmp_path / "source")
    given = ["--calibration", text(tmp_path / "source", 2200), "--samples", "8", "--sequence-length", "256"]
    for threads in ("1", "2"):
        command = [sys.executable, "-m", "halfbit.cli", "compress", tmp_path / "source", tmp_path / threads, *given]
        environment = {k: v for k, v in os.environ.items() if k != "MKL_CBWR"} | {"OMP_NUM_THREADS": threads}
        subprocess.run([*command, "--recipe", "gptq-3-g128"], env=environment, check=True, capture_output=True)
    shards = sorted(path.name for path in (tmp_path / "1").glob("*.safetensors"))
    assert len(shards) > 1
    for name in shards:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes(), name
