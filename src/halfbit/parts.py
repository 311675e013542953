"""What a recipe makes of each part of a model, in bytes, before anything is solved.

Bits follow from the rule where it names them, and from the format where that has one size. Where they depend on the
weights, a few rows are rounded and encoded, and what that assumes is said:

- ternary between a row's least and greatest weight: rows of the first expert of that shape where the folder has its
  weights, else normal ones, made larger by what GPTQ feeds back (`FEEDBACK`);
- outliers by threshold: random weights, solved on random inputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property
from math import prod
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from halfbit.blueprint import Blueprint
from halfbit.experts import ExpertStack
from halfbit.families import open_family
from halfbit.family import Family
from halfbit.grids.deadzone import Deadzone
from halfbit.grids.ternary import Ternary
from halfbit.linear_groups import choose
from halfbit.linears import find_linears
from halfbit.reader import Folder, Reader
from halfbit.recipe import Recipe, Rule, Solving
from halfbit.sizes import ALL_OPTIONS, ONCE, PER_CHOICE, PER_FIELD, PER_MATRIX, PER_TENSOR
from halfbit.solving import blank_bits, solve
from halfbit.types import Solution

Kind = Literal["experts", "linear layers", "embeddings", "norms and others", "manifest and index", "tokenizer"]

# weights grow by this factor until GPTQ rounds them, see docs/LOG.md
FEEDBACK = 1.1
# rows of which sizes are taken; what they have in common and what each adds follows from two numbers of them
ROWS = 64, 128
# columns and tokens of a solved sample
COLUMNS, TOKENS = 512, 2048
# bits of an outlier in SpQR's format: 16 of value, 12 of place
OUTLIER = 28


@dataclass(frozen=True)
class Matrices:
    """Matrices of one rule, role and shape in one place.

    Attributes:
        path: of the layer or experts module.
        block: that they lie in; None: outside.
        rule: as the recipe says it; one with options, where it has them.
        shape: (out, in) of one; `count`: how many.
        bits: stored bits per weight, with everything that the format stores.
        assumes: what the bits rest on where they depend on the weights.
    """

    kind: Kind
    path: str
    block: str | None
    rule: Rule
    shape: tuple[int, int]
    count: int
    bits: float
    assumes: str | None = None

    @property
    def weights(self) -> int:
        return self.count * prod(self.shape)

    @property
    def nbytes(self) -> int:
        return round(self.weights * self.bits / 8)


@dataclass(frozen=True)
class Part:
    """One line of the table.

    Attributes:
        weights: 0 for what holds none.
        before, after: bytes.
    """

    name: Kind
    weights: int
    before: int
    after: int


def matrices(blueprint: Blueprint, recipe: Recipe) -> list[Matrices]:
    """What the recipe compresses; an experts module's input and output projections one after the other.

    Raises RecipeError as `choose`.
    """
    found = []
    family, samples = blueprint.family, _Samples(blueprint)
    for path, stack in blueprint.stacks.items():
        for names in (stack.up, (stack.down,)):
            rule = recipe.rule(f"{path}.{names[0]}")
            if rule is not None:
                shape = sum(stack.projections[p][0] for p in names), stack.projections[names[0]][1]
                sample = samples.rows(stack, names, shape) if isinstance(rule.grid, Ternary | Deadzone) else None
                bits, why = stored_bits(rule, shape, sample)
                bits += recipe.solving.added_bits(rule, shape[1]) if rule.bits is None else 0
                found.append(
                    Matrices("experts", path, family.block_of(path), rule, shape, stack.num_experts, bits, why)
                )
    head = family.model.get_output_embeddings()
    for path, (linear, rule) in choose(recipe, family).items():
        (out, width), _ = blueprint.weights[linear.name]
        bits, why = stored_bits(rule, (out, width))
        bits += recipe.solving.added_bits(rule, width) if rule.bits is None else 0
        outer = linear.kind == "embedding" or family.model.get_submodule(path) is head
        kind: Kind = "embeddings" if outer else "linear layers"
        found.append(Matrices(kind, path, family.block_of(path), rule, (out, width), 1, bits, why))
    return found


def parts(blueprint: Blueprint, packed: list[Matrices]) -> list[Part]:
    """Bytes of every part, now and in the compressed folder."""
    kinds = _kinds(blueprint)
    gone = {f"{m.path}.weight" for m in packed if m.kind != "experts"}
    rows: dict[Kind, list[int]] = {"experts": [0, 0, 0], "linear layers": [0, 0, 0], "embeddings": [0, 0, 0]}
    rows["norms and others"] = [0, 0, 0]
    plain = 0

    def add(kind: Kind, weights: int, before: float, after: float) -> None:
        rows[kind][0] += weights
        rows[kind][1] += round(before)
        rows[kind][2] += round(after)

    size = blueprint.dtype.itemsize
    covered = {m.path for m in packed if m.kind == "experts"}
    for path, stack in blueprint.stacks.items():
        weights = stack.num_experts * sum(map(prod, stack.projections.values()))
        stays = path not in covered
        plain += stack.num_experts * len(stack.projections) if stays else 0
        add("experts", weights, weights * _bytes_before(blueprint, "experts"), weights * size if stays else 0)
    for name, (shape, dtype) in blueprint.weights.items():
        weights, kind = prod(shape), kinds[name]
        stays = name not in gone
        plain += stays
        before = dtype.itemsize if len(shape) < 2 else _bytes_before(blueprint, kind)
        add(kind, weights, weights * before, weights * dtype.itemsize if stays else 0)
    for m in packed:
        rows[m.kind][2] += m.nbytes
    found = [Part(kind, *row) for kind, row in rows.items() if row[0]]
    files = blueprint.reader.auxiliary_bytes()
    described = round(_described(packed, plain))
    return [
        *found,
        Part("manifest and index", 0, 0, described),
        *([Part("tokenizer", 0, files, files)] if files else []),
    ]


def _kinds(blueprint: Blueprint) -> dict[str, Kind]:
    """Of each weight outside the experts' matrices."""
    model = blueprint.family.model
    found: dict[str, Kind] = dict.fromkeys(blueprint.weights, "norms and others")
    for path, linear in find_linears(model, blueprint.stacks, blueprint.family.claims().tied).items():
        outside = blueprint.family.block_of(path) is None
        found[linear.name] = "embeddings" if linear.kind == "embedding" or outside else "linear layers"
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        found |= {n: "embeddings" for n in found if module is not None and _owner(model, n) is module}
    return found


def _owner(model: torch.nn.Module, name: str) -> torch.nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _bytes_before(blueprint: Blueprint, kind: Kind) -> float:
    """Of one weight of a matrix in the source, which may be quantized."""
    if blueprint.reader.quantization == "fp8" and kind in ("experts", "linear layers"):
        return 1 + 4 / prod(blueprint.reader.block)
    if blueprint.reader.quantization == "mxfp4" and kind == "experts":
        return 4.25 / 8
    return blueprint.dtype.itemsize


def _described(packed: list[Matrices], plain: int) -> float:
    """Bytes that manifest, index and config take."""
    about = ONCE + PER_TENSOR * plain
    for m in packed:
        codecs = [option.codec for option in m.rule.options or (m.rule,) if option.codec is not None]
        names = [len(codec.parts) for codec in codecs]
        stored = max(names) + (ALL_OPTIONS * (sum(names) - max(names)) if m.count > 1 else 0)
        about += PER_TENSOR * stored
        about += PER_FIELD * max(len(fields(codec)) for codec in codecs)  # pyright: ignore[reportArgumentType]
        about += m.count * (PER_MATRIX + (PER_CHOICE if m.rule.options else 0))
    return about


class _Samples:
    """Rows of experts of a local folder. Accumulates: one sample for each shape, read when it is first asked for."""

    def __init__(self, blueprint: Blueprint):
        files = blueprint.reader.files
        whole = isinstance(files, Folder) and Path(blueprint.reader.source).is_dir()
        self._source = (
            blueprint.reader.source if whole and any(n.endswith(".safetensors") for n in files.names()) else None
        )
        self._found: dict[tuple[int, int], Tensor] = {}

    def rows(self, stack: ExpertStack, names: Sequence[str], shape: tuple[int, int]) -> Tensor | None:
        """Some rows of the first expert's projections `names`, float32; None where there are no weights."""
        if self._source is not None and shape not in self._found:
            if stack.members:
                weights = [self._reader.tensor(stack.parameters(name)[0]) for name in names]
            else:
                weights = [self._family.expert_weights(stack, name, 0, 1)[0] for name in names]
            whole = torch.cat(weights).float()
            self._found[shape] = whole[torch.linspace(0, len(whole) - 1, ROWS[1]).long()]
        return self._found.get(shape)

    @cached_property
    def _reader(self) -> Reader:
        assert self._source is not None
        return Reader(self._source)

    @cached_property
    def _family(self) -> Family:
        return open_family(self._reader)


@cache
def stored_bits(rule: Rule, shape: tuple[int, int], sample: Tensor | None = None) -> tuple[float, str | None]:
    """Stored bits per weight of matrices `[out, in]` under a rule, and what that assumes of the weights or None.

    `sample` is ROWS[1] rows of such a matrix; None: normal weights.
    """
    if rule.bits is not None:
        return rule.bits, None
    if isinstance(rule.grid, Ternary | Deadzone):
        w = torch.randn(ROWS[1], shape[1], generator=torch.Generator().manual_seed(0)) if sample is None else sample
        few, many = (_rounded(rule, w[torch.linspace(0, len(w) - 1, rows).long()]) for rows in ROWS)
        like = "normal ones" if sample is None else f"{len(w)} rows of an expert"
        return _extended(shape, few[0], many[0]), f"{many[1]:.1%} of the ternary weights are 0, as of {like}"
    few, many = (blank_bits((rows, shape[1]), rule) * rows * shape[1] / 8 for rows in ROWS)
    bits, share = _extended(shape, few, many), 0.0
    if rule.outliers is not None:
        share = rule.outliers
    elif rule.tau is not None:
        share = _outliers(rule, min(shape[1], COLUMNS))
    told = f"{share:.2%} outliers, as of random weights" if rule.tau is not None else None
    return bits + OUTLIER * share, told


def _extended(shape: tuple[int, int], few: float, many: float) -> float:
    """Bits per weight, from the bytes of the two numbers of rows."""
    each = (many - few) / (ROWS[1] - ROWS[0])
    return 8 * (few + (shape[0] - ROWS[0]) * each) / prod(shape)


def _rounded(rule: Rule, w: Tensor) -> tuple[float, float]:
    """Bytes of some rows, and their share of zeros."""
    assert rule.grid is not None
    assert rule.codec is not None
    params = rule.grid.fit(w)
    larger = w if rule.solver == "rtn" else FEEDBACK * w
    codes = rule.grid.nearest(larger, rule.grid.ready(params))
    zeros = float((rule.grid.values(codes, params) == 0).float().mean())
    stacked = {key: value[:, None] for key, value in params.items()}
    return rule.codec.encode(Solution(rule.grid, codes, stacked)).nbytes, zeros


@cache
def _outliers(rule: Rule, columns: int) -> float:
    """Share of outliers in random weights, solved on random inputs that are large in some columns."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(1, ROWS[0], columns, generator=generator)
    w += 0.1 * w**3
    x = torch.randn(TOKENS, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    x *= torch.randn(columns, generator=generator).exp()
    (found,) = solve(w, (x.T @ x)[None], [replace(rule, order="identity")], Solving(), ["sample"], [])
    return 0.0 if found.outliers is None else len(found.outliers) / w.numel()
