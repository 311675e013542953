"""From the size of a folder, or bits per weight of a whole model, to the bits of those weights whose rate is free.

size of the folder = rates that can be chosen x their weights
                   + packed matrices whose codec has one size (counted on a blank of each shape)
                   + tensors that stay + tokenizer and other files + what is written about all of these
"""

import re
from math import prod

from halfbit.errors import RecipeError, UnknownName
from halfbit.families import open_family
from halfbit.linear_groups import choose
from halfbit.reader import Reader
from halfbit.recipe import Recipe, Rule
from halfbit.solving import blank_bits
from halfbit.storing import packed_tensors

# bytes that manifest, index and config hold of each stored tensor, each matrix, and all in all
PER_TENSOR, PER_MATRIX, ONCE = 560, 300, 8000
# what ternary codes can be asked for
LOWEST, HIGHEST = 0.3, 1.5
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}


def parse_size(text: str) -> int:
    """Bytes: "12GB", "1.5 GiB", "900MB", "250000". Raises UnknownName for another unit, RecipeError for no number."""
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text)
    if found is None:
        raise RecipeError(f"size: expected a number and a unit such as 12GB or 900MiB, got {text!r}")
    if found[2].upper() not in UNITS:
        raise UnknownName("unit of size", found[2], ["B", "KB", "MB", "GB", "TB", "KiB", "MiB", "GiB", "TiB"])
    return int(float(found[1]) * UNITS[found[2].upper()])


def bits_for_size(source: str, recipe: Recipe, size: int) -> float:
    """Bits per weight, for the rules that take bits, at which the whole folder has `size` bytes.

    Raises RecipeError where no rate does; it names the sizes that are possible.
    """
    chosen, fixed = _count(source, recipe)
    bits = 8 * (size - fixed) / chosen
    if not LOWEST <= bits <= HIGHEST:
        least, most = (int(fixed + rate * chosen / 8) for rate in (LOWEST, HIGHEST))
        raise RecipeError(
            f"a folder of {size:,} bytes leaves {bits:.3f} bits for each of the {chosen:,} weights whose rate can be "
            f"chosen; possible with this recipe are {least:,} to {most:,} bytes ({LOWEST} to {HIGHEST} bits)"
        )
    return bits


def bits_for_model_bits(source: str, recipe: Recipe, bits: float) -> float:
    """The same for `bits` per weight of the whole model, tensors only."""
    reader = Reader(source)
    weights = sum(prod(reader.shape(n)) for n in reader.names())
    return bits_for_size(source, recipe, int(bits * weights / 8) + _written(source, recipe)[1])


def _count(source: str, recipe: Recipe) -> tuple[int, int]:
    """Weights whose rate can be chosen, and the bytes of everything else."""
    tensors, about = _written(source, recipe)
    chosen, fixed = tensors
    if chosen == 0:
        raise RecipeError(f"recipe {recipe.name!r}: no weight of {source} has a rule whose rate can be chosen")
    return chosen, fixed + about


def _written(source: str, recipe: Recipe) -> tuple[tuple[int, int], int]:
    """((weights to choose for, bytes of other tensors), bytes of what is no tensor)."""
    reader = Reader(source)
    family = open_family(reader)
    chosen = fixed = matrices = parts = 0
    stacks, linears = [], choose(recipe, family)

    def add(rule: Rule, shape: tuple[int, int], count: int) -> None:
        nonlocal chosen, fixed, matrices
        matrices += count
        if rule.takes("bits"):
            chosen += count * prod(shape)
        else:
            fixed += int(count * prod(shape) * blank_bits(shape, rule) / 8)

    for stack in family.experts.values():
        for names in (stack.up, (stack.down,)):
            rule = recipe.rule(f"{stack.path}.{names[0]}")
            if rule is None or rule.codec is None:
                continue
            shape = sum(stack.projections[p][0] for p in names), stack.projections[names[0]][1]
            add(rule, shape, stack.num_experts)
            parts += len(rule.codec.parts)
            stacks.append(stack)
    for linear, rule in linears.values():
        shape = family.model.get_parameter_or_buffer(linear.name).shape
        add(rule, (shape[0], shape[1]), 1)
        parts += 0 if rule.codec is None else len(rule.codec.parts)
    packed = packed_tensors(family.claims(), stacks, [linear for linear, _ in linears.values()])
    plain = [n for n in reader.names() if n not in packed]
    fixed += sum(prod(reader.shape(n)) * reader.dtype(n).itemsize for n in plain)
    files = sum(reader.path(n).stat().st_size for n in reader.auxiliary_files())
    return (chosen, fixed), files + PER_TENSOR * (len(plain) + parts) + PER_MATRIX * matrices + ONCE
