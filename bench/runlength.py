"""The code `runlength`: bytes against the entropy of the symbols over densities and sizes, and time of its products.

Bits are counted from the tensors that are stored: stream, tiles, classes, scales. Entropy: of the three symbols of the
matrix, as frequent as they are in it. Times as in `products.py`: against torch's F.linear in bfloat16 and float32, both
sides out of the core's own cache, calls interleaved, the result checked first. Experts of 768 x 2048 are timed one by
one, and as a layer takes them: eight in one call, some tokens each, against eight calls of F.linear.

    python bench/runlength.py                  # appends to bench/results.csv
    python bench/runlength.py --dry-run        # prints only
"""

import argparse
import math
from functools import partial

import products
import record
import torch
from products import seconds
from torch.nn.functional import linear

from halfbit import native
from halfbit.formats.runlength import RunLength
from halfbit.grids.deadzone import Deadzone
from halfbit.types import Solution

SIZES = [(384, 256), (768, 2048), (2048, 2048), (2080, 6144)]
ZEROS = [0.6, 0.7, 0.8, 0.85, 0.886, 0.92, 0.95, 0.97]
SHAPES = [(2080, 6144), (768, 2048)]
EXPERTS = 8


def deadzone(rows: int, columns: int, zeros: float, codec: RunLength) -> Solution:
    """Independent symbols of either sign."""
    scale_bits = codec.scale_bits or 5
    random = torch.Generator().manual_seed(0)
    draw = torch.rand(rows, columns, generator=random)
    codes = (draw > zeros).to(torch.uint8) + (draw > (1 + zeros) / 2)
    params = Deadzone(scale_bits).store(torch.rand(rows, generator=random) + 0.5)
    return Solution(
        Deadzone(scale_bits), codes, {key: value[:, None] for key, value in params.items()}, rotated=codec.rotated
    )


def entropy(codes: torch.Tensor) -> float:
    """Bits per weight."""
    share = torch.bincount(codes.flatten(), minlength=3).double() / codes.numel()
    return float(torch.special.entr(share).sum()) / math.log(2)


def size_rows(codec: RunLength) -> list[dict]:
    rows = []
    print(f"{codec!r}: bits per weight, and their ratio to the entropy")
    print(f"{'zeros':>7} {'entropy':>8}" + "".join(f"{f'{r}x{c}':>18}" for r, c in SIZES))
    for zeros in ZEROS:
        cells = []
        for out, columns in SIZES:
            solution = deadzone(out, columns, zeros, codec)
            bits, limit = codec.encode(solution).bits_per_weight, entropy(solution.codes)
            cells.append(f"{bits:10.4f} {bits / limit:7.4f}")
            note = (
                f"{100 * zeros:.1f} % zeros: {bits:.4f} bits per weight, entropy {limit:.4f}, ratio {bits / limit:.4f}"
            )
            rows.append({"shape": f"{out}x{columns}", "what": "runlength bytes", "note": note})
        print(f"{100 * zeros:6.1f}% {limit:8.4f}" + "".join(cells), flush=True)
    return rows


class Layer(products.Case):
    """Eight experts of one shape, one call; torch takes them one after another."""

    def __init__(self, codec: RunLength, solution: Solution, dense_mib: int):
        super().__init__(codec, solution, dense_mib)
        packed = codec.stack([codec.encode(solution)] * EXPERTS)
        self.packed = packed
        # the same experts in memory of their own, as often as there are dense ones
        self.count = max(2, self.count // EXPERTS)
        self.operands = [[t.clone() for t in codec.runtime(packed)] for _ in range(self.count)]
        self.bf16, self.fp32 = self.bf16[: self.count * EXPERTS], self.fp32[: self.count * EXPERTS]

    def time(self, tokens: int, dtype: torch.dtype, repetitions: int) -> dict[str, list[float]]:
        x = torch.randn(EXPERTS * tokens, self.columns)
        starts = torch.arange(EXPERTS + 1) * tokens
        halves, parts = x.bfloat16().split(tokens), x.split(tokens)
        times: dict[str, list[float]] = {self.codec.name: [], "bf16": [], "fp32": []}
        for i in range(repetitions + self.count):
            first = i % self.count * EXPERTS
            bf16, fp32 = self.bf16[first : first + EXPERTS], self.fp32[first : first + EXPERTS]
            operands = self.operands[i % self.count]
            row = {
                self.codec.name: seconds(partial(self.codec.product, x, starts, operands, self.out)),
                "bf16": seconds(lambda h=halves, ws=bf16: [linear(t, w) for t, w in zip(h, ws, strict=True)]),
                "fp32": seconds(lambda p=parts, ws=fp32: [linear(t, w) for t, w in zip(p, ws, strict=True)]),
            }
            if i >= self.count:  # the first round touches the pages
                for what, value in row.items():
                    times[what].append(value)
        return times

    def check(self, tokens: int, dtype: torch.dtype) -> None:
        """The first expert's rows; the single case is checked as well."""
        x = torch.randn(EXPERTS * tokens, self.columns)
        y = self.codec.product(x, torch.arange(EXPERTS + 1) * tokens, self.operands[0], self.out)
        exact = x.double() @ self.fp32[0].double().T
        if not float((y - exact).abs().max()) <= 1e-5 * float(exact.abs().max()):
            raise SystemExit("wrong result; nothing was timed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--zeros", type=float, default=0.886, help="of the matrices that are timed")
    parser.add_argument("--rotated", action="store_true", help="columns are rotated, as the recipe halfbit has them")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repetitions", type=int, default=100)
    parser.add_argument("--dense-mib", type=int, default=400, help="bfloat16 matrices to cycle through")
    parser.add_argument("--isa", default="best", choices=["best", "portable", "avx2", "avx512"])
    parser.add_argument("--dry-run", action="store_true", help="print, do not append to results.csv")
    options = parser.parse_args()
    if native.extension is None:
        raise SystemExit(f"nothing to time: {native.reason}")
    native.extension.set_isa(options.isa)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    codec = RunLength(rotated=options.rotated)
    rows = size_rows(codec)
    print(
        f"\n{record.machine()}, torch {torch.__version__}, {options.repetitions} repetitions, median and 10-90 % range"
    )
    cases = [(products.Case, *SHAPES[0]), (products.Case, *SHAPES[1]), (Layer, *SHAPES[1])]
    for kind, out, columns in cases:
        torch.set_num_threads(1)
        case = kind(codec, deadzone(out, columns, options.zeros, codec), options.dense_mib)
        about = f"{EXPERTS} experts in one call, " if kind is Layer else ""
        about += "rotated, " if options.rotated else ""
        about += f"{100 * options.zeros:.1f} % zeros, {case.packed.nbytes / 1e6:.2f} MB"
        million = out * columns / case.encode_seconds / 1e6
        print(f"\n{out}x{columns}, {case.count} matrices, {about}, encode {million:.0f} million weights/s")
        note = f"{million:.0f} million weights/s, best of 3, {about}"
        encode = {"shape": f"{out}x{columns}", "threads": 1, "what": "runlength encode"}
        rows.append(encode | {"seconds": f"{case.encode_seconds:.6f}", "note": note})
        titles = " ".join(f"{what + ' ms':>20}" for what in (codec.name, "bf16", "fp32"))
        print(f"{'shape':>11} {'tokens':>6} {'threads':>7} {titles}  of bf16  of fp32  best/best  GB/s")
        for threads in options.threads:
            torch.set_num_threads(threads)
            for tokens in options.tokens:
                case.check(tokens, torch.float32)
                times = case.time(tokens, torch.float32, max(5, min(options.repetitions, 2000 // tokens)))
                rows += products.table_rows(times, case, about, tokens, threads)
                print(products.printed(times, case, tokens, threads), flush=True)
    if not options.dry_run:
        record.append("runlength", rows)


if __name__ == "__main__":
    main()
