"""CPU time of products from compressed form against torch's F.linear in bfloat16 and float32.

Both sides start from weights that are not in a core's own cache: every call takes the next of many matrices, more than
`--dense-mib` of bfloat16 in all (float32: twice that), and as many compressed ones. Repetitions are interleaved, one
call of each kind in turn, so that a busy machine slows all of them; this also means that each product finds its tables
displaced from the cache by the dense ones, unlike the second expert of a layer. The result is checked against float64
first. GB/s are the bytes of the compressed matrix in the median time; the line above each table says how fast a sum
reads as much memory.

What bounds QMoE's: instructions. Per codeword (about 22 weights) g++ 12 emits 30 of them: 2 loads for the codeword
and its terms, 3 for levels, 3 multiply-adds with x, 6 shifts, 6 masks, 8 register copies, 2 for the next column and the
loop. A core that issues 6 per cycle (Intel since Golden Cove) needs 5.0 cycles; the loads (8, 3 per cycle) and the
shifts (6, 2 per cycle) alone would need 3. Measured, best of 40 calls in a row on a Xeon at 4.0 GHz: one token 1.55 to
1.6 ns, 6.2 to 6.5 cycles with everything around the loop, 5.6 for the loop on its own; eight tokens 1.9 to 2.0 ns,
because x no longer fits the first-level cache. The interleaved medians below are a quarter to a half above that. Bytes
are no bound: 2 per codeword, 1.2 MB for 12.8 million weights, where bfloat16 reads 25.6 MB.

What bounds SpQR's with one token: instructions on CPUs without VNNI, one shift, one permutation and one multiply-add
for 16 weights; two of the three can start in a cycle, so 1.5 cycles. With VNNI five instructions for 64 weights, 0.6
cycles; statistics of groups of 16 and the sums of groups add as much again, one outlier in a hundred about 1 cycle, and
then memory bounds it. With many tokens: multiply-adds, as torch's product.

    python bench/products.py                                        # QMoE, about a minute; appends to bench/results.csv
    python bench/products.py --format spqr --tokens 1 16 512        # SpQR
    python bench/products.py --dry-run                              # prints only
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import cycle

import record
import torch
from torch import Tensor
from torch.nn.functional import linear

from halfbit import native
from halfbit.formats._grouped_product import one_group
from halfbit.formats.qmoe import QMoE
from halfbit.formats.spqr import SpQR
from halfbit.grids.bilevel import Bilevel
from halfbit.grids.ternary import Ternary
from halfbit.types import Codec, Outliers, Packed, Solution

# [out, in]: Switch c2048's wo and wi; projections of a 7B model
SHAPES = {"qmoe": [(2080, 6144), (6144, 2080)], "spqr": [(4096, 4096), (4096, 11008)]}
ZEROS = 0.885


def ternary(rows: int, columns: int) -> Solution:
    random = torch.Generator().manual_seed(0)
    draw = torch.rand(rows, columns, generator=random)
    codes = (draw > ZEROS).to(torch.uint8) + (draw > (1 + ZEROS) / 2)
    levels = (torch.rand(rows, 1, 2, generator=random) + 0.5) * torch.tensor([-1.0, 1.0])
    return Solution(Ternary(), codes, {"levels": levels.bfloat16()})


def bilevel(grid: Bilevel, rows: int, columns: int, outliers: float) -> Solution:
    """Normal weights on their grid, some of them kept, columns in a random order."""
    random = torch.Generator().manual_seed(0)
    w = torch.randn(rows, columns, generator=random)
    width = grid.group or columns
    parts, params = [], []
    for part in w.split(width, dim=1):
        params.append(grid.fit(part))
        parts.append(grid.nearest(part, params[-1]))
    there = torch.rand(rows, columns, generator=random) < outliers
    at = torch.nonzero(there, as_tuple=True)
    codes = torch.cat(parts, 1).masked_fill(there, 0)
    kept = Outliers(at[0], at[1], w[there].to(getattr(torch, grid.dtype)))
    stacked = {key: torch.stack([p[key] for p in params], 1) for key in params[0]}
    return Solution(grid, codes, stacked, outliers=kept, order=torch.randperm(columns, generator=random))


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def read_speed(mib: int) -> float:
    """Bytes per second of a sum over more memory than the caches hold."""
    memory = torch.ones(mib * 2**18)
    return max(4 * len(memory) / seconds(memory.sum) for _ in range(5))


class Case:
    """Many matrices of one shape: dense in two dtypes, and compressed."""

    def __init__(self, codec: Codec, solution: Solution, dense_mib: int):
        self.codec, (self.out, self.columns) = codec, solution.shape
        self.count = max(2, -(-dense_mib * 2**20 // (2 * self.out * self.columns)))
        self.encode_seconds = min(seconds(lambda: codec.encode(solution)) for _ in range(3))
        self.packed: Packed = codec.encode(solution)
        w = codec.decode(self.packed)
        tensors = codec.runtime(self.packed)
        # the same values in every matrix, in memory of their own
        self.bf16 = [w.bfloat16() for _ in range(self.count)]
        self.fp32 = [w.clone() for _ in range(self.count)]
        # a dictionary is one for all, as in a model
        shared = {id(t) for t in tensors if codec.name == "qmoe" and t is tensors[-1]}
        self.operands = [[t if id(t) in shared else t.clone() for t in tensors] for _ in range(self.count)]

    def check(self, tokens: int, dtype: torch.dtype) -> None:
        x = torch.randn(tokens, self.columns).to(dtype)
        exact = x.double() @ self.fp32[0].double().T
        plain = linear(x, self.fp32[0].to(dtype)).double()
        allowed = 2 * float((plain - exact).abs().max()) + 2 * torch.finfo(dtype).eps * float(exact.abs().max())
        got = float((self.product(x, self.operands[0]).double() - exact).abs().max())
        if not got <= allowed:
            raise SystemExit(f"wrong result: error {got:.3g}, allowed {allowed:.3g}; nothing was timed")

    def product(self, x: Tensor, operands: list[Tensor]) -> Tensor:
        return self.codec.product(x, one_group(x.shape[0]), operands, self.out)

    def time(self, tokens: int, dtype: torch.dtype, repetitions: int) -> dict[str, list[float]]:
        x = torch.randn(tokens, self.columns)
        half, given = x.bfloat16(), x.to(dtype)
        matrices = cycle(zip(self.bf16, self.fp32, self.operands, strict=True))
        ours = self.codec.name
        times: dict[str, list[float]] = {ours: [], "bf16": [], "fp32": []}
        for i in range(repetitions + self.count):
            bf16, fp32, operands = next(matrices)
            row = {
                ours: seconds(partial(self.product, given, operands)),
                "bf16": seconds(partial(linear, half, bf16)),
                "fp32": seconds(partial(linear, x, fp32)),
            }
            if i >= self.count:  # the first round touches the pages
                for what, value in row.items():
                    times[what].append(value)
        return times


def table_rows(times: dict[str, list[float]], case: Case, about: str, tokens: int, threads: int) -> list[dict]:
    median = {what: statistics.median(t) for what, t in times.items()}
    rows = []
    for what, t in times.items():
        low, *_, high = statistics.quantiles(t, n=10)
        note = f"median of {len(t)}, 10-90 % {1e3 * low:.3f}-{1e3 * high:.3f} ms, best {1e3 * min(t):.3f} ms, "
        note += f"{case.count} matrices in turn, {about}, load average {os.getloadavg()[0]:.1f}"
        shape = f"{case.out}x{case.columns}"
        row = {"shape": shape, "tokens": tokens, "threads": threads, "what": what, "seconds": f"{median[what]:.6f}"}
        row |= {f"ratio_to_{other}": f"{median[what] / median[other]:.3f}" for other in ("bf16", "fp32")}
        rows.append(row | {"note": note})
    return rows


def printed(times: dict[str, list[float]], case: Case, tokens: int, threads: int) -> str:
    median = {what: statistics.median(t) for what, t in times.items()}
    ours = case.codec.name
    cells = []
    for what, t in times.items():
        low, *_, high = statistics.quantiles(t, n=10)
        cells.append(f"{1e3 * median[what]:.3f} ({1e3 * low:.2f}-{1e3 * high:.2f})".rjust(20))
    ratios = f"{median[ours] / median['bf16']:7.3f}  {median[ours] / median['fp32']:7.3f}"
    best = min(times[ours]) / min(min(times["bf16"]), min(times["fp32"]))
    gigabytes = f"{case.packed.nbytes / median[ours] / 1e9:6.2f}"
    return (
        f"{case.out}x{case.columns:<6} {tokens:>6} {threads:>7} {' '.join(cells)}  {ratios}  {best:11.3f}  {gigabytes}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--format", default="qmoe", choices=sorted(SHAPES))
    parser.add_argument("--shapes", nargs="+", help="out x in, like 4096x11008")
    parser.add_argument("--bits", type=int, default=3, help="spqr: per weight")
    parser.add_argument("--group", type=int, default=16, help="spqr: columns that share statistics; 0: the whole row")
    parser.add_argument("--supergroup", type=int, default=16, help="spqr: rows that share second-level statistics")
    parser.add_argument("--outliers", type=float, default=0.01, help="spqr: share of the weights")
    parser.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16"], help="of x for the compressed side"
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repetitions", type=int, default=100)
    parser.add_argument("--dense-mib", type=int, default=1200, help="bfloat16 matrices to cycle through")
    parser.add_argument("--isa", default="best", choices=["best", "portable", "avx2", "avx512", "avx512vnni"])
    parser.add_argument("--dry-run", action="store_true", help="print, do not append to results.csv")
    options = parser.parse_args()
    if native.extension is None:
        raise SystemExit(f"nothing to time: {native.reason}")
    native.extension.set_isa(options.isa)
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    spqr = SpQR(bits=options.bits, group=options.group or None, supergroup=options.supergroup)
    codec: Codec = spqr if options.format == "spqr" else QMoE()
    named = [tuple(map(int, shape.split("x"))) for shape in options.shapes or ()]
    rows = []
    print(f"{record.machine()}, torch {torch.__version__}, {options.repetitions} repetitions, median and 10-90 % range")
    for out, columns in named or SHAPES[options.format]:
        torch.set_num_threads(1)
        if options.format == "spqr":
            case = Case(codec, bilevel(spqr.grid, out, columns, options.outliers), options.dense_mib)
            about = f"{spqr!r}, {100 * options.outliers:g} % outliers, column order, x in {options.dtype}"
        else:
            case = Case(codec, ternary(out, columns), options.dense_mib)
            about = f"{100 * ZEROS:.1f} % zeros"
        shape = f"{out}x{columns}"
        million = out * columns / case.encode_seconds / 1e6
        encode = {"shape": shape, "threads": 1, "what": f"{codec.name} encode", "seconds": f"{case.encode_seconds:.6f}"}
        rows.append(encode | {"note": f"{million:.0f} million weights/s, best of 3, {about}"})
        bits, megabytes = case.packed.bits_per_weight, case.packed.nbytes / 1e6
        print(f"\n{shape}, {case.count} matrices, {about}")
        print(f"{bits:.3f} bits per weight, {megabytes:.2f} MB each, encode {million:.0f} million weights/s")
        speeds = []
        for threads in options.threads:
            torch.set_num_threads(threads)
            speeds.append(f"{read_speed(options.dense_mib) / 1e9:.1f} GB/s on {threads} threads")
        print(f"memory is read with {', '.join(speeds)}")
        titles = " ".join(f"{what + ' ms':>20}" for what in (codec.name, "bf16", "fp32"))
        print(f"{'shape':>11} {'tokens':>6} {'threads':>7} {titles}  of bf16  of fp32  best/best  GB/s")
        for threads in options.threads:
            torch.set_num_threads(threads)
            for tokens in options.tokens:
                case.check(tokens, dtype)
                times = case.time(tokens, dtype, max(5, min(options.repetitions, 2000 // tokens)))
                rows += table_rows(times, case, f"{about}, {megabytes:.2f} MB", tokens, threads)
                print(printed(times, case, tokens, threads), flush=True)
    if not options.dry_run:
        record.append("products", rows)


if __name__ == "__main__":
    main()
