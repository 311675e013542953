"""CPU time of QMoE's product from compressed form against torch's F.linear in bfloat16 and float32.

Both sides start from weights that are not in a core's own cache: every call takes the next of many matrices, more than
`--dense-mib` of bfloat16 in all (float32: twice that), and as many compressed ones. Repetitions are interleaved, one
call of each kind in turn, so that a busy machine slows all of them; this also means that each product finds its tables
displaced from the cache by the dense ones, unlike the second expert of a layer. The result is checked against float64
first.

What bounds the kernel: instructions. Per codeword (about 22 weights) g++ 12 emits 30 of them: 2 loads for the codeword
and its terms, 3 for levels, 3 multiply-adds with x, 6 shifts, 6 masks, 8 register copies, 2 for the next column and the
loop. A core that issues 6 per cycle (Intel since Golden Cove) needs 5.0 cycles; the loads (8, 3 per cycle) and the
shifts (6, 2 per cycle) alone would need 3. Measured, best of 40 calls in a row on a Xeon at 4.0 GHz: one token 1.55 to
1.6 ns, 6.2 to 6.5 cycles with everything around the loop, 5.6 for the loop on its own; eight tokens 1.9 to 2.0 ns,
because x no longer fits the first-level cache. The interleaved medians below are a quarter to a half above that. Bytes
are no bound: 2 per codeword, 1.2 MB for 12.8 million weights, where bfloat16 reads 25.6 MB.

    python bench/products.py                 # about a minute; appends to bench/results.csv
    python bench/products.py --dry-run       # prints only
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
from halfbit.formats.qmoe import cpu
from halfbit.formats.qmoe.dictionary import dictionary

SHAPES = [(2080, 6144), (6144, 2080)]  # Switch c2048's wo and wi, [out, in]
ZEROS = 0.885


def ternary(rows: int, columns: int, seed: int) -> Tensor:
    draw = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))
    return ((draw > ZEROS).to(torch.uint8) + (draw > (1 + ZEROS) / 2)).to(torch.uint8)


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class Case:
    """Many matrices of one shape: dense in two dtypes, and compressed."""

    def __init__(self, out: int, columns: int, dense_mib: int):
        count = max(2, -(-dense_mib * 2**20 // (2 * out * columns)))
        self.out, self.columns, self.count = out, columns, count
        symbols = ternary(out, columns, seed=0)
        self.levels = (
            torch.stack([torch.zeros(out), -torch.rand(out) - 0.5, torch.rand(out) + 0.5], 1).bfloat16().float()
        )
        w = self.levels.gather(1, symbols.long())
        book = dictionary()
        self.encode_seconds = min(seconds(lambda: cpu.encode(symbols, book.trie)) for _ in range(5))
        codewords, lengths = cpu.encode(symbols, book.trie)
        self.codewords = len(codewords)
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        # the same values in every matrix, in memory of their own
        self.bf16 = [w.bfloat16() for _ in range(count)]
        self.fp32 = [w.clone() for _ in range(count)]
        self.packed = [(codewords.clone(), offsets.clone(), self.levels.clone(), book.entries) for _ in range(count)]

    def check(self, tokens: int) -> None:
        x = torch.randn(tokens, self.columns)
        exact = x.double() @ self.fp32[0].double().T
        allowed = 2 * float((linear(x, self.fp32[0]) - exact).abs().max())
        got = float((self.product(x, self.packed[0]) - exact).abs().max())
        if not got <= allowed:
            raise SystemExit(f"wrong result: error {got:.3g}, allowed {allowed:.3g}; nothing was timed")

    def product(self, x: Tensor, packed: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        return cpu.product(x, torch.tensor([0, len(x)]), *packed, self.out)

    def time(self, tokens: int, repetitions: int) -> dict[str, list[float]]:
        x = torch.randn(tokens, self.columns)
        half = x.bfloat16()
        matrices = cycle(zip(self.bf16, self.fp32, self.packed, strict=True))
        times: dict[str, list[float]] = {"qmoe": [], "bf16": [], "fp32": []}
        for i in range(repetitions + self.count):
            bf16, fp32, packed = next(matrices)
            row = {
                "qmoe": seconds(partial(self.product, x, packed)),
                "bf16": seconds(partial(linear, half, bf16)),
                "fp32": seconds(partial(linear, x, fp32)),
            }
            if i >= self.count:  # the first round touches the pages
                for what, value in row.items():
                    times[what].append(value)
        return times


def table_rows(times: dict[str, list[float]], count: int, shape: str, tokens: int, threads: int) -> list[dict]:
    median = {what: statistics.median(t) for what, t in times.items()}
    rows = []
    for what, t in times.items():
        low, *_, high = statistics.quantiles(t, n=10)
        note = f"median of {len(t)}, 10-90 % {1e3 * low:.3f}-{1e3 * high:.3f} ms, best {1e3 * min(t):.3f} ms, "
        row = {"shape": shape, "tokens": tokens, "threads": threads, "what": what, "seconds": f"{median[what]:.6f}"}
        row |= {f"ratio_to_{other}": f"{median[what] / median[other]:.3f}" for other in ("bf16", "fp32")}
        rows.append(
            row
            | {
                "note": note
                + f"{count} matrices in turn, {100 * ZEROS:.1f} % zeros, load average {os.getloadavg()[0]:.1f}"
            }
        )
    return rows


def printed(times: dict[str, list[float]], codewords: int, shape: str, tokens: int, threads: int) -> str:
    median = {what: statistics.median(t) for what, t in times.items()}
    cells = []
    for what, t in times.items():
        low, *_, high = statistics.quantiles(t, n=10)
        cells.append(f"{1e3 * median[what]:.3f} ({1e3 * low:.2f}-{1e3 * high:.2f})".rjust(20))
    ratios = f"{median['qmoe'] / median['bf16']:7.3f}  {median['qmoe'] / median['fp32']:7.3f}"
    return f"{shape:>10} {tokens:>6} {threads:>7} {' '.join(cells)}  {ratios}  {1e9 * median['qmoe'] / codewords:11.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repetitions", type=int, default=100)
    parser.add_argument("--dense-mib", type=int, default=1200, help="bfloat16 matrices to cycle through")
    parser.add_argument("--isa", default="best", choices=["best", "portable", "avx2", "avx512"])
    parser.add_argument("--dry-run", action="store_true", help="print, do not append to results.csv")
    options = parser.parse_args()
    if native.extension is None:
        raise SystemExit(f"nothing to time: {native.reason}")
    native.extension.set_isa(options.isa)
    torch.manual_seed(0)
    rows = []
    print(f"{record.machine()}, torch {torch.__version__}, {options.repetitions} repetitions, median and 10-90 % range")
    titles = " ".join(f"{what + ' ms':>20}" for what in ("qmoe", "bf16", "fp32"))
    print(f"{'shape':>10} {'tokens':>6} {'threads':>7} {titles}  of bf16  of fp32  ns/codeword")
    for out, columns in SHAPES:
        torch.set_num_threads(1)
        case = Case(out, columns, options.dense_mib)
        shape = f"{out}x{columns}"
        million = out * columns / case.encode_seconds / 1e6
        encode = {"shape": shape, "threads": 1, "what": "encode", "seconds": f"{case.encode_seconds:.6f}"}
        rows.append(encode | {"note": f"{million:.0f} million weights/s, best of 5"})
        bits = 16 * case.codewords / (out * columns)
        print(f"{shape:>10} {case.count} matrices, {bits:.3f} bits per weight, encode {million:.0f} million weights/s")
        for threads in options.threads:
            torch.set_num_threads(threads)
            for tokens in options.tokens:
                case.check(tokens)
                times = case.time(tokens, options.repetitions)
                rows += table_rows(times, case.count, shape, tokens, threads)
                print(printed(times, case.codewords, shape, tokens, threads))
    if not options.dry_run:
        record.append("products", rows)


if __name__ == "__main__":
    main()
