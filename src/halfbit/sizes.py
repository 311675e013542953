"""From the size of a folder, or bits per weight of a whole model, to the bits of those weights whose rate is free.

size of the folder = rates that can be chosen x their weights
                   + packed matrices whose codec has one size (counted on a blank of each shape)
                   + tensors that stay + tokenizer and other files + what is written about all of these
"""

import re
from dataclasses import dataclass, fields
from math import prod

from halfbit.errors import RecipeError, UnknownName
from halfbit.families import open_family
from halfbit.grids.deadzone import Deadzone
from halfbit.linear_groups import choose
from halfbit.reader import Reader
from halfbit.recipe import Recipe, Rule
from halfbit.solving import blank_bits
from halfbit.storing import packed_tensors

# bytes that manifest, index and config hold of each stored tensor, each matrix, and all in all
PER_TENSOR, PER_MATRIX, ONCE = 560, 300, 8000
# the same of a codec's configuration, for each of its fields, and of the choice of a matrix that has options
PER_FIELD, PER_CHOICE = 220, 90
# of eight stacks whose rule has options about one has all of them
ALL_OPTIONS = 0.15
# what ternary codes can be asked for, and with how many bits outliers are everything
TERNARY = 0.3, 1.5
OUTLIERS = 16.0
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


@dataclass(frozen=True)
class Account:
    """What a folder is made of.

    Attributes:
        free: rules whose bits a budget sets: those of the experts that take bits, else all that do.
        weights: of these rules.
        least, most: bits per weight that they can be asked for.
        fixed: bytes of all other tensors.
        about: bytes of what is no tensor.
        model: weights of the whole model.
    """

    free: list[Rule]
    weights: int
    least: float
    most: float
    fixed: int
    about: int
    model: int

    @classmethod
    def of(cls, source: str, recipe: Recipe) -> "Account":
        """Raises RecipeError where the recipe takes no bits."""
        reader = Reader(source)
        family = open_family(reader)
        linears = choose(recipe, family)
        # (rule, shape, how many)
        matrices: list[tuple[Rule, tuple[int, int], int]] = []
        # bits per weight beside the codec's
        added: list[float] = []
        stacks = []
        for stack in family.experts.values():
            for names in (stack.up, (stack.down,)):
                rule = recipe.rule(f"{stack.path}.{names[0]}")
                if rule is not None:
                    shape = sum(stack.projections[p][0] for p in names), stack.projections[names[0]][1]
                    matrices.append((rule, shape, stack.num_experts))
                    added.append(recipe.solving.added_bits(rule, shape[1]))
                    stacks.append(stack)
        free = [rule for rule, _, _ in matrices if rule.takes("bits")]
        for linear, rule in linears.values():
            rows, columns = family.model.get_parameter_or_buffer(linear.name).shape
            matrices.append((rule, (rows, columns), 1))
            added.append(recipe.solving.added_bits(rule, columns))
        free = free or [rule for rule, _, _ in matrices if rule.takes("bits")]
        if not free:
            raise RecipeError(f"recipe {recipe.name!r}: no weight of {source} has a rule whose rate can be chosen")
        packed = packed_tensors(family.claims(), stacks, [linear for linear, _ in linears.values()])
        plain = [n for n in reader.names() if n not in packed]
        fixed = float(sum(prod(reader.shape(n)) * reader.dtype(n).itemsize for n in plain))
        weights, least, most, parts, described = 0, 0.0, 0.0, 0.0, 0
        for (rule, shape, count), more in zip(matrices, added, strict=True):
            size = count * prod(shape)
            codecs = [option.codec for option in rule.options or (rule,) if option.codec is not None]
            names = [len(codec.parts) for codec in codecs]
            parts += (more > 0) + max(names) + (ALL_OPTIONS * (sum(names) - max(names)) if count > 1 else 0)
            described += max(len(fields(codec)) for codec in codecs)  # pyright: ignore[reportArgumentType]
            if any(rule is other for other in free):
                low, high = _range(rule, shape)
                weights, least, most = weights + size, least + (low + more) * size, most + (high + more) * size
            else:
                fixed += size * (blank_bits(shape, rule) + more if rule.bits is None else rule.bits) / 8
        files = sum(reader.path(n).stat().st_size for n in reader.auxiliary_files())
        about = files + int(PER_TENSOR * (len(plain) + parts)) + PER_FIELD * described + ONCE
        about += sum(count * (PER_MATRIX + (PER_CHOICE if rule.options else 0)) for rule, _, count in matrices)
        model = sum(prod(reader.shape(n)) for n in reader.names())
        return cls(free, weights, least / weights, most / weights, int(fixed), about, model)

    def bits(self, size: int) -> float:
        """Bits per weight, of the free rules, at which the whole folder has `size` bytes.

        Raises RecipeError where no rate does; it names the sizes that are possible.
        """
        rest = self.fixed + self.about
        bits = 8 * (size - rest) / self.weights
        if not self.least <= bits <= self.most:
            low, high = (int(rest + rate * self.weights / 8) for rate in (self.least, self.most))
            raise RecipeError(
                f"a folder of {size:,} bytes leaves {bits:.3f} bits for each of the {self.weights:,} weights whose "
                f"rate can be chosen; possible with this recipe are {low:,} to {high:,} bytes ({self.least:.3g} to "
                f"{self.most:.3g} bits)"
            )
        return bits


def with_bits(source: str, recipe: Recipe, bits: float) -> Recipe:
    """The recipe with `bits` per weight: of the experts where a rule of theirs takes bits, else of all such rules."""
    return recipe.budgeted("bits", bits, Account.of(source, recipe).free)


def with_size(source: str, recipe: Recipe, size: int) -> Recipe:
    """The recipe with the bits at which the whole folder has `size` bytes. Raises RecipeError as `Account.bits`."""
    account = Account.of(source, recipe)
    return recipe.budgeted("bits", account.bits(size), account.free)


def with_model_bits(source: str, recipe: Recipe, bits: float) -> Recipe:
    """The same for `bits` per weight of the whole model, tensors only."""
    account = Account.of(source, recipe)
    return recipe.budgeted("bits", account.bits(int(bits * account.model / 8) + account.about), account.free)


def _range(rule: Rule, shape: tuple[int, int]) -> tuple[float, float]:
    """The least and the most bits per weight that a rule which takes bits can give a matrix `[out, in]`."""
    found = []
    for option in rule.options or (rule,):
        if isinstance(option.grid, Deadzone):
            found.append(TERNARY)
        else:
            blank = blank_bits(shape, option)
            # what is left goes to outliers where there is but one way
            found.append((blank, blank if rule.options else OUTLIERS))
    return min(low for low, _ in found), max(high for _, high in found)
