"""How fast are products: launches tuned at the goals' shapes, then every format against cuBLAS."""

from functools import partial
from typing import Any

import torch
from torch.nn.functional import linear

from gpu import DEVICE, INTERPRET
from gpu.correctness import excess
from gpu.matrices import copies, operands_of, random_operands
from gpu.measuring import Report, bandwidth, compared, guarded, replayed, timed
from halfbit import registry, triton_support
from halfbit.bench.tuning import tune
from halfbit.formats._grouped_product import one_group
from halfbit.types import Codec

PUBLISHED = [(768, 3072), (3072, 768), (1024, 4096), (4096, 1024), (2080, 6144), (6144, 2080)]
# of each format: shapes, tokens and the configuration that the goals name
SPQR_SHAPES = [(4096, 4096), (4096, 11008), (11008, 4096), (8192, 8192), (8192, 28672)]
GOALS: dict[str, list[tuple[dict[str, Any], list[tuple[int, int]], list[int]]]] = {
    "qmoe": [({}, [*PUBLISHED, (768, 2048)], [1, 16])],
    "runlength": [({}, [*PUBLISHED, (768, 2048), (4096, 4096)], [1, 16])],
    "spqr": [
        ({"bits": 3}, SPQR_SHAPES, [1, 4, 16]),
        ({"bits": 4}, SPQR_SHAPES[:2], [1, 16, 512]),
    ],
    "grouped": [({"bits": 4, "group": 128, "symmetric": True}, [(4096, 4096), (8192, 8192)], [1, 16]),
                ({"bits": 2, "group": 128}, [(4096, 4096)], [1])],
}  # fmt: skip
TINY = {"qmoe": [(48, 64)], "runlength": [(48, 64)], "spqr": [(48, 64)], "grouped": [(48, 64)]}

TUNED = [
    ({"bits": 3}, (4096, 4096), 1),
    ({"bits": 3}, (8192, 28672), 1),
    ({"bits": 3}, (4096, 4096), 16),
    ({"bits": 4}, (4096, 4096), 16),
]


def tuning_step(report: Report) -> None:
    """Launches of grid kernels at the goals' shapes: the fastest are remembered for the steps below, and copied to the
    results, from where they can be shipped as `launches.json`."""
    for options, (rows, columns), tokens in TUNED:
        codec = registry.module("formats", "spqr").CODEC(**options)
        with guarded(report, "tuning", f"{codec!r} {rows}x{columns}, {tokens} tokens"):
            _tuned(report, codec, *((48, 64) if INTERPRET else (rows, columns)), tokens)
    if triton_support.user_file().is_file():
        (report.out / "launches.json").write_text(triton_support.user_file().read_text("utf-8"), "utf-8")


def _tuned(report: Report, codec: Codec, rows: int, columns: int, tokens: int) -> None:
    operands, nbytes = random_operands(codec, rows, columns)
    every = copies(codec, operands, 2 if INTERPRET else max(4, min(64, (1 << 28) // nbytes)))
    x, starts = torch.randn(tokens, columns, device=DEVICE, dtype=torch.bfloat16), one_group(tokens)
    for tuned in tune(repr(codec), [partial(codec.product, x, starts, t, rows) for t in every], DEVICE):
        tried = zip(tuned.candidates, tuned.microseconds, strict=True)
        told = f"{tuned.entry}: {tuned.best}; " + ", ".join(f"{c}: {m:.2f} us" for c, m in tried)
        shape, best = f"{rows}x{columns}", min(tuned.microseconds)
        report.add("tuning", repr(codec), shape=shape, tokens=tokens, microseconds=best, note=told)


def products_step(report: Report) -> None:
    for name, cases in GOALS.items():
        if not triton_support.has_kernels(name):
            report.add("products", name, ok=False, note="no Triton kernels are registered for this format")
            continue
        for options, shapes, tokens in cases:
            codec = registry.module("formats", name).CODEC(**options)
            for rows, columns in TINY[name] if INTERPRET else shapes:
                with guarded(report, "products", f"{codec!r} {rows}x{columns}"):
                    _products(report, codec, rows, columns, tokens)


def _products(report: Report, codec: Codec, rows: int, columns: int, tokens: list[int]) -> None:
    operands, nbytes, w = operands_of(codec, rows, columns)
    cache = 1 << 20 if INTERPRET else 4 * torch.cuda.get_device_properties(0).L2_cache_size
    count = 2 if INTERPRET else max(4, min(512, -(-cache // nbytes)))
    ours = copies(codec, operands, count)
    dense_count = 2 if INTERPRET else max(4, -(-cache // (2 * rows * columns)))
    dense = [torch.randn(rows, columns, device=DEVICE, dtype=torch.bfloat16) for _ in range(dense_count)]
    for number in tokens:
        x = torch.randn(number, columns, device=DEVICE, dtype=torch.bfloat16)
        starts = one_group(number)
        if w is not None:
            off = excess(codec.product(x, starts, operands, rows), x, w)
            if not off <= 1:
                raise AssertionError(f"wrong result: error {off:.3g} of what is allowed; nothing was timed")
        elif number <= 16:
            # by another kernel, which has little but the unpacking of words in common with that for few tokens
            times = 4 if number == 16 else 33
            many = codec.product(x.repeat(times, 1), one_group(times * number), operands, rows)
            few = codec.product(x, starts, operands, rows).double()
            off = float((many[:number].double() - few).abs().max() / few.abs().max())
            if not off <= 0.02:
                raise AssertionError(f"wrong result: kernels for few and many tokens differ by {off:.3g}")
        kinds = {
            "ours": (replayed([partial(codec.product, x, starts, t, rows) for t in ours]), count),
            "cuBLAS bf16": (replayed([partial(linear, x, d) for d in dense]), dense_count),
        }
        told = compared(report, timed(kinds), "ours", ["cuBLAS bf16"])
        told |= bandwidth(report, nbytes, told["microseconds"]) | {"bits": 8 * nbytes / (rows * columns)}
        report.add("products", repr(codec), shape=f"{rows}x{columns}", tokens=number, dtype="bfloat16", **told)
        del kinds
