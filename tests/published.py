"""The published checkpoints in `golden/`: imported as they are, and copies with something changed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import halfbit

GOLDEN = Path(__file__).parent / "golden"
SPQR, QMOE = GOLDEN / "spqr" / "checkpoint", GOLDEN / "qmoe" / "checkpoint"
EPSILON = torch.finfo(torch.float32).eps
Edit = Callable[[dict[str, Any]], object]


def run(source: Path, out: Path, **options: Any) -> list:
    return list(halfbit.import_checkpoint(str(source), out, **options))


def problems(folder: Path) -> list:
    return [found for found in halfbit.verify(folder) if not isinstance(found, str)]


def spqr_with(folder: Path, edit: Edit = lambda t: None, config: Edit = lambda c: None) -> Path:
    """A copy of the SpQR checkpoint with other tensors or another quantization_config; `shapes` fit the tensors."""
    shutil.copytree(SPQR, folder)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    content = json.loads((folder / "config.json").read_text())
    shapes = content["quantization_config"]["shapes"]
    for name in shapes:
        if name.removesuffix(".shape") in tensors:
            shapes[name] = tensors[name.removesuffix(".shape")].numel()
    config(content)
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def qmoe_with(folder: Path, file: str, edit: Edit) -> Path:
    """A copy of the QMoE checkpoint with one file changed."""
    shutil.copytree(QMOE, folder)
    content = torch.load(folder / file, weights_only=True)
    edit(content)
    torch.save(content, folder / file)
    return folder


def change(part: str, edit: Callable[[Tensor], Tensor]) -> Edit:
    return lambda parts: parts.update({part: edit(parts[part])})


def put(index: int, value: int) -> Callable[[Tensor], Tensor]:
    def edit(t: Tensor) -> Tensor:
        t[index] = value
        return t

    return edit
