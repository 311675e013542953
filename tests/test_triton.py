"""Triton: kernels, interpreted in a process of their own; launch configurations; the experts layer without waiting."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from halfbit import triton_support
from halfbit.errors import FormatError
from halfbit.nn import experts_forward

HERE = Path(__file__).parent
KERNELS = sorted(HERE.glob("triton_*.py"))


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("file", KERNELS, ids=lambda path: path.stem)
def test_kernels_when_interpreted(file: Path):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(file)],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_kernels_compile_without_a_gpu_and_spill_nothing(target: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(HERE.parent / "bench")
    import triton_compile  # pyright: ignore[reportMissingImports]

    calls = triton_compile.grid_products(256, 512)
    with triton_compile.compiling(triton_compile.TARGETS[target]) as found:
        calls["spqr 3 bit, 1 tokens"]()
    assert found[0].name == "_product"
    assert all(k.registers > 0 and k.spilled == 0 for k in found)


def test_launch_configurations_are_the_users_then_the_packages_then_the_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shipped = tmp_path / "shipped.json"
    shipped.write_text(json.dumps({"interpreter": {"k 1": {"BLOCK": 2, "num_warps": 8}, "k 2": {"BLOCK": 3}}}))
    monkeypatch.setattr(triton_support, "SHIPPED", shipped)
    triton_support._known.cache_clear()
    device, default = torch.device("cpu"), {"BLOCK": 1, "num_warps": 4}
    assert triton_support.launch("k", [1], default, device) == {"BLOCK": 2, "num_warps": 8}
    assert triton_support.launch("k", [3], default, device) == default
    triton_support.remember("k 2", {"BLOCK": 9}, device)
    with triton_support.trying({"k 1": {"num_warps": 2}}) as asked:
        assert triton_support.launch("k", [1], default, device) == {"BLOCK": 1, "num_warps": 2}
        assert triton_support.launch("k", [3], default, device) == default
    assert asked == {"k 1": "k", "k 3": "k"}
    assert triton_support.launch("k", [1], default, device) == {"BLOCK": 2, "num_warps": 8}
    assert triton_support.launch("k", [2], default, device) == {"BLOCK": 9, "num_warps": 4}
    assert json.loads(triton_support.user_file().read_text()) == {"interpreter": {"k 2": {"BLOCK": 9}}}
    triton_support.user_file().write_text("{")
    triton_support._known.cache_clear()
    with pytest.raises(FormatError, match="delete the file"):
        triton_support.launch("k", [2], default, device)
    triton_support._known.cache_clear()


def test_experts_without_waiting_are_those_with():
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 12, generator=random)
    # an index outside takes no expert
    index = torch.randint(-1, 6, (9, 3), generator=random)
    weights = torch.rand(9, 3, generator=random)
    up, down = torch.randn(5, 8, 12, generator=random), torch.randn(5, 12, 8, generator=random)
    biases = [torch.randn(5, n, generator=random) for n in (8, 12)]

    def product(w: torch.Tensor):
        def multiply(x: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
            y = x.new_full((len(x), w.shape[1]), torch.nan)
            for g in range(5):
                those = slice(int(starts[g]), int(starts[g + 1]))
                y[those] = x[those] @ w[g].T
            return y

        return multiply

    given = hidden, index, weights, 5, product(up), product(down), torch.relu, biases[0], biases[1]
    torch.testing.assert_close(experts_forward(*given, waiting=False), experts_forward(*given))
