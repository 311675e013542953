"""Is it right: every codec that has kernels, against float64, with everything that only a device can show."""

import json
import time

import torch
from torch import Tensor

from gpu import DEVICE, INTERPRET
from gpu.measuring import Report, guarded, replayed
from halfbit import formats, nn, triton_support
from halfbit.formats._grouped_product import one_group
from halfbit.types import Codec, Packed


def correctness(report: Report) -> None:
    """Every codec of the conformance tests that has kernels, small and odd, then each check of a real device."""
    import conformance  # pyright: ignore[reportMissingImports]

    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty gives NaN
    try:
        for codec in _one_each(conformance.codecs()) if INTERPRET else conformance.codecs():
            if triton_support.has_kernels(codec.name):
                with guarded(report, "correctness", repr(codec)):
                    begin = time.perf_counter()
                    told = _correct(codec)
                    report.add("correctness", repr(codec), seconds=time.perf_counter() - begin, note=told)
    finally:
        torch.use_deterministic_algorithms(False)


def _one_each(codecs: list[Codec]) -> list[Codec]:
    return list({codec.name: codec for codec in reversed(codecs)}.values())


def _correct(codec: Codec) -> str:
    import conformance  # pyright: ignore[reportMissingImports]

    rows, columns = (21, 70) if INTERPRET else (333, 518)
    *_, solution = conformance.solutions_for(codec, rows, columns)
    one = codec.encode(solution)
    packed = codec.stack([one, one, one])
    w = solution.dense().to(DEVICE)
    device_packed, device_one = (
        Packed(codec, p.shape, {n: t.to(DEVICE) for n, t in p.tensors.items()}) for p in (packed, one)
    )
    several, single = codec.runtime(device_packed), codec.runtime(device_one)
    worst = 0.0
    for dtype in (torch.bfloat16,) if INTERPRET else (torch.float32, torch.bfloat16, torch.float16):
        for tokens in (0, 2, 17) if INTERPRET else (0, 1, 2, 3, 4, 5, 17, 33, 200):
            x = torch.randn(tokens, 2 * columns, device=DEVICE).to(dtype)[:, ::2]
            worst = max(worst, excess(codec.product(x, one_group(tokens), single, rows), x, w))
        starts = torch.tensor([0, 3, 3, 8], device=DEVICE)
        x = torch.randn(9, columns, device=DEVICE).to(dtype)
        worst = max(worst, excess(codec.product(x, starts, several, rows)[:8], x[:8], w))
    if not worst <= 1:
        raise AssertionError(f"error {worst:.3g} of what is allowed")
    told = f"error at most {worst:.2f} of what is allowed"
    config = json.dumps(formats.to_config(codec))
    if not INTERPRET:
        x = torch.randn(3, columns, device=DEVICE, dtype=torch.bfloat16)
        plain = nn.linear_op(x, single, config, rows)
        y = torch.empty_like(plain)
        run = replayed([lambda: y.copy_(nn.linear_op(x, single, config, rows))])
        y.fill_(torch.nan)
        run()
        torch.cuda.synchronize()
        assert torch.equal(y, plain), "a CUDA graph gives other results"
        compiled = torch.compile(lambda x: nn.linear_op(x * 1, single, config, rows) + 0, fullgraph=True)
        assert torch.equal(compiled(x), plain), "torch.compile gives other results"
        torch.library.opcheck(nn.linear_op, (x, single, config, rows), test_utils=("test_schema", "test_faketensor"))
        told += "; CUDA graph, torch.compile(fullgraph), opcheck"
    return told


def excess(y: Tensor, x: Tensor, w: Tensor) -> float:
    """The largest error against float64, as a share of what the 2x rule allows; NaN where a result was not written."""
    if not y.numel():
        return 0.0
    exact = x.double() @ w.double().T
    plain = (x @ w.to(x.dtype).T).double()
    allowed = 2 * (plain - exact).abs().max() + 2 * torch.finfo(x.dtype).eps * exact.abs().max()
    return float(((y.double() - exact).abs() / allowed).amax().nan_to_num(float("inf")))
