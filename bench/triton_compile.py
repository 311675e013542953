"""What Triton's compilers make of the kernels, without a GPU: registers, spills, shared memory and instructions.

Products are called as on a GPU, with a driver that compiles and launches nothing. For NVIDIA the ptxas that comes with
Triton assembles, and cuobjdump and nvdisasm read; for AMD the assembly's own notes are read. Used by a test, too, which
holds that every kernel compiles for every target.

    python bench/triton_compile.py                       # sm_90, a table
    python bench/triton_compile.py --target sm_80 --loop # and the instructions of each kernel, by kind
    python bench/triton_compile.py --target gfx942
"""

import argparse
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from halfbit import triton_support
from halfbit.formats import _grid_triton as grid
from halfbit.formats import _triton_experts as experts

TARGETS = {
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_80": GPUTarget("cuda", 80, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# multiprocessors that launches are chosen for: an H200's
PROCESSORS = 132


class NoDevice:
    """A driver that knows its target and nothing else."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass(frozen=True)
class Compiled:
    """One kernel: its name, what it takes, and how often which instruction is in it."""

    name: str
    grid: tuple[int, ...]
    registers: int
    spilled: int
    shared: int
    instructions: Counter


@contextmanager
def compiling(target: GPUTarget) -> Iterator[list[Compiled]]:
    """Launches within only compile, for `target`; what they made is in the list."""
    found: list[Compiled] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        found.append(_read(self.fn.__name__, grid, kernel))
        return kernel

    processors = triton_support.processors
    triton.runtime.driver.set_active(NoDevice(target))  # type: ignore[arg-type]
    JITFunction.run = compile_only
    triton_support.processors = lambda device: PROCESSORS
    try:
        yield found
    finally:
        JITFunction.run = run
        triton_support.processors = processors
        triton.runtime.driver._active = None


def _read(name: str, size: tuple[int, ...], kernel: Any) -> Compiled:
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        told = {key: int(re.search(rf"\.{key}:\s+(\d+)", text)[1]) for key in ("vgpr_count", "vgpr_spill_count")}  # type: ignore[index]
        lines = Counter(line.split()[0] for line in text.splitlines() if re.match(r"\t[vsdbg]\w*_", line))
        return Compiled(name, size, told["vgpr_count"], told["vgpr_spill_count"], kernel.metadata.shared, lines)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        text = _tool("nvdisasm", "-c", file.name)
    registers, stack = (int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK"))  # type: ignore[index]
    lines = Counter(m[1] for m in re.finditer(r"^\s+/\*\w+\*/\s+(?:@!?\w+ )?([A-Z0-9]+)", text, re.MULTILINE))
    return Compiled(name, size, registers, stack, kernel.metadata.shared, lines)


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def operands(
    form: grid.Form, rows: int, columns: int, outliers: int, ordered: bool, matrices: int = 1
) -> list[torch.Tensor]:
    """Of the right shapes and dtypes; their values are not looked at."""
    groups, tiles, blocks = form.groups(columns), -(-rows // 16), -(-columns // 32)
    words = (matrices, tiles, blocks, form.bits, 16) if form.tiled else (matrices * rows, blocks * form.bits)
    statistics = torch.uint8 if form.scale_bits < 5 else torch.int16 if form.zero == grid.MIDDLE else torch.int32
    stored = torch.float16 if form.tiled else torch.bfloat16
    pairs = 2 * ((form.scale_bits != 16) + (form.zero == grid.BILEVEL))
    return list(
        grid.Operands(
            torch.zeros(words, dtype=torch.int32),
            torch.zeros((matrices, tiles, groups, 16) if form.tiled else (matrices * rows, groups), dtype=statistics),
            torch.zeros(matrices, -(-rows // form.supergroup), groups, pairs, dtype=stored),
            torch.zeros(matrices * tiles * 16 + 1 if outliers else 1, dtype=torch.int32),
            torch.zeros(outliers + 1, dtype=torch.int16),
            torch.zeros(outliers + 1, dtype=torch.float16),
            torch.zeros(int(ordered), columns, dtype=torch.int32),
            torch.empty(rows, columns, 0),
        )
    )


def grid_products(rows: int, columns: int) -> dict[str, Callable[[], object]]:
    """Every kernel of `_grid_triton.py`, in the configurations that matter."""
    forms = {
        "spqr 3 bit": (grid.Form(3, 16, 3, grid.BILEVEL, 16, False, True), 64, True),
        "spqr 4 bit": (grid.Form(4, 16, 3, grid.BILEVEL, 16, False, True), 64, True),
        "grouped 2 bit, 128": (grid.Form(2, 128, 16, grid.CODE, 1, False, False), 0, False),
        "grouped 4 bit, 128, symmetric": (grid.Form(4, 128, 16, grid.MIDDLE, 1, False, False), 0, False),
    }
    found: dict[str, Callable[[], object]] = {}
    for name, (form, outliers, ordered) in forms.items():
        one = operands(form, rows, columns, outliers, ordered)
        # the last decodes rows for the library's product
        for tokens in (1, 4, 16, 64, grid.DENSE_TOKENS):
            x, starts = torch.zeros(tokens, columns, dtype=torch.bfloat16), torch.tensor([0, tokens])
            found[f"{name}, {tokens} tokens"] = lambda x=x, s=starts, o=one, f=form: grid.product(x, s, o, f, "compile")
        which = torch.zeros(3, dtype=torch.int64)
        found[f"{name}, lookup"] = lambda w=which, o=one, f=form: grid.lookup(w, o, f)
        several = operands(form, rows, columns, outliers, ordered, 16)
        x, starts = torch.zeros(8, columns, dtype=torch.float16), torch.zeros(17, dtype=torch.int64)
        found[f"{name}, 16 matrices"] = lambda x=x, s=starts, o=several, f=form: grid.product(x, s, o, f, "compile")
        square = operands(form, columns, columns, outliers, ordered, 16)
        for tokens in (1, 8):
            found[f"{name}, layer, {tokens} tokens"] = partial(layer, form, square, columns, tokens)
    return found


def layer(form: grid.Form, of_both: list[torch.Tensor], columns: int, tokens: int) -> None:
    """An experts layer without gates, 16 experts of `columns` x `columns`, two for each token."""
    x, weights = torch.zeros(tokens, columns, dtype=torch.bfloat16), torch.zeros(tokens, 2)
    plan = partial(grid.plan, of_both, form, columns, x.dtype)
    members, index = [experts.Member(plan)], torch.zeros(tokens, 2, dtype=torch.int64)
    experts.experts(x, index, weights, members, members, None, None, 16, [columns, columns], "plain:relu", [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--target", default="sm_90", choices=sorted(TARGETS))
    parser.add_argument("--shape", default="4096x4096", help="out x in")
    parser.add_argument("--only", default="", help="a part of the name")
    parser.add_argument("--loop", action="store_true", help="instructions by kind")
    options = parser.parse_args()
    rows, columns = map(int, options.shape.split("x"))
    print(f"{'product':36} {'kernel':14} {'grid':>14} {'regs':>5} {'spilled':>8} {'shared':>7} {'instructions':>13}")
    with compiling(TARGETS[options.target]) as found:
        for name, call in grid_products(rows, columns).items():
            if options.only not in name:
                continue
            found.clear()
            call()
            for k in found:
                size, total = "x".join(map(str, k.grid)), sum(k.instructions.values())
                print(f"{name:36} {k.name:14} {size:>14} {k.registers:>5} {k.spilled:>8} {k.shared:>7} {total:>13}")
                if options.loop:
                    print("    " + ", ".join(f"{what} {count}" for what, count in k.instructions.most_common(18)))


if __name__ == "__main__":
    main()
