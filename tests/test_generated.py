"""What bench/generate.py writes is a checkpoint that transformers takes whole, of the size that was asked for."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

SCRIPT = Path(__file__).parent.parent / "bench" / "generate.py"


def test_a_generated_checkpoint_is_whole(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    sizes = ["--gigabytes", "0.004", "--experts", "4", "--width", "64", "--expert-width", "64", "--vocabulary", "300"]
    command = [sys.executable, str(SCRIPT), str(folder), *sizes, "--shard", "0.001"]
    subprocess.run(command, check=True, capture_output=True)
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 3
    assert max(shard.stat().st_size for shard in shards) < 1.1e6
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.bfloat16)
    model, info = loaded
    assert not any(info.values()), info
    count = sum(p.numel() for p in model.parameters())
    assert abs(2 * count - 4e6) < 2e5
    ids = AutoTokenizer.from_pretrained(folder)("Once upon a time", return_tensors="pt").input_ids
    assert ids.shape == (1, 16)
    logits = model.float()(ids).logits
    assert logits.isfinite().all()
    assert 0.3 < logits.std() < 3
    w = model.get_parameter("model.layers.0.mlp.experts.down_proj").float()
    kurtosis = (w.flatten() ** 4).mean() / (w.flatten() ** 2).mean() ** 2
    assert kurtosis > 5
