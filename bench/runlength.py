"""The code `runlength`: bytes against the entropy of the symbols, over densities and sizes.

Bits are counted from the tensors that are stored: stream, tiles, classes, scales. Entropy: of the three symbols of the
matrix, as frequent as they are in it. How fast its products are, `halfbit bench` tells.

    python bench/runlength.py                  # appends to bench/results.csv
    python bench/runlength.py --dry-run        # prints only
"""

import argparse
import math

import record
import torch

from halfbit.bench import matrices
from halfbit.bench.matrices import Statistics
from halfbit.formats.runlength import RunLength

SIZES = [(384, 256), (768, 2048), (2048, 2048), (2080, 6144)]
ZEROS = [0.6, 0.7, 0.8, 0.85, 0.886, 0.92, 0.95, 0.97]


def entropy(weights: torch.Tensor) -> float:
    """Bits per weight, of the signs."""
    share = torch.bincount(weights.sign().to(torch.int64).flatten() + 1, minlength=3).double() / weights.numel()
    return float(torch.special.entr(share).sum()) / math.log(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--dry-run", action="store_true", help="print, do not append to results.csv")
    options = parser.parse_args()
    rows, codec = [], RunLength()
    print(f"{codec!r}: bits per weight, and their ratio to the entropy")
    print(f"{'zeros':>7} {'entropy':>8}" + "".join(f"{f'{r}x{c}':>18}" for r, c in SIZES))
    for zeros in ZEROS:
        cells, limit = [], 0.0
        for out, columns in SIZES:
            packed = matrices.packed(codec, out, columns, Statistics(zeros))
            bits, limit = packed.bits_per_weight, entropy(codec.decode(packed))
            cells.append(f"{bits:10.4f} {bits / limit:7.4f}")
            note = (
                f"{100 * zeros:.1f} % zeros: {bits:.4f} bits per weight, entropy {limit:.4f}, ratio {bits / limit:.4f}"
            )
            rows.append({"shape": f"{out}x{columns}", "what": "runlength bytes", "note": note})
        print(f"{100 * zeros:6.1f}% {limit:8.4f}" + "".join(cells), flush=True)
    if not options.dry_run:
        record.append("runlength", rows)


if __name__ == "__main__":
    main()
