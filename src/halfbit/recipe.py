"""A recipe says what becomes of every weight: frozen dataclasses <-> TOML; rules by glob, the first match wins.

    name = "qmoe"
    [[rules]]
    match = "*.experts.*"                    # module path and projection, e.g. model.layers.0.mlp.experts.down_proj
    solver = "gptq"
    grid = { name = "ternary" }
    codec = { name = "qmoe", p0 = 0.885 }

    [[rules]]
    match = "*.[0-9]*.*"                     # every linear layer inside the blocks
    grid = { name = "bilevel", bits = 4, group = 16 }
    codec = { name = "spqr" }                # fields that grid and codec share are the grid's
    order = "act_order"
    damping = 1.0
    bits = 4.5                               # or outliers = 0.005 (a share), or tau = 0.2

    [[rules]]
    match = "*.experts.*"                    # each matrix gets one of the options, where it helps the model most
    bits = 1.2                               # mean stored bits per weight of all matrices of this rule
    [[rules.options]]
    grid = { name = "deadzone" }
    codec = { name = "runlength" }           # ternary, at any rate
    [[rules.options]]
    grid = { name = "bilevel", bits = 2, group = 16, supergroup = 64 }
    codec = { name = "spqr" }

Weights that no rule matches, or whose rule has neither codec nor options, are stored as they were. The recipe that made
a model lies in its folder as `recipe.toml`, with every default filled in.
"""

import re
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from fnmatch import fnmatchcase
from importlib.resources import files
from math import inf
from pathlib import Path
from typing import Any, get_args

import tomli_w
import torch

from halfbit import formats, grids, registry
from halfbit.errors import FormatError, RecipeError, UnknownName, Unsupported
from halfbit.formats._layouts import codec_in
from halfbit.grids.deadzone import Deadzone
from halfbit.solve.orders import Order
from halfbit.solve.rtn import rtn
from halfbit.types import Codec, Grid

SOLVERS = ("gptq", "rtn")
# routers choose experts by small differences and cost next to nothing; they stay as they are
ROUTERS = ("*.gate", "*.shared_expert_gate", "*router*")
# a module path with a number in it: what lies in a block
IN_BLOCKS = "*.[0-9]*.*"
ORDERS = get_args(Order)
BUDGETS = ("tau", "outliers", "bits")
UNDERSAMPLED = ("shrink", "identity", "fail")


@dataclass(frozen=True)
class Rule:
    """What happens to the matrices whose name matches `match`: a shell glob over `module.path.projection` of experts
    and over the module path of linear layers and of the embedding."""

    match: str
    solver: str = "gptq"
    grid: Grid | None = None
    codec: Codec | None = None
    order: str = "identity"
    """In which order columns are solved and stored: identity, act_order (falling diagonal of the Hessian: what matters
    most is rounded first) or sensitivity."""
    damping: float | None = None
    """In units of the mean of the Hessian's diagonal; None: that of [solving]."""
    tau: float | None = None
    """Outliers by SpQR's relative threshold."""
    outliers: float | None = None
    """Outliers by their share; the threshold is searched for every matrix."""
    bits: float | None = None
    """Stored bits per weight, everything included: by outliers, whose threshold is searched for every matrix, or by the
    spread of the grid deadzone, searched for every batch of experts; with options the mean over all matrices."""
    options: "tuple[Rule, ...]" = ()
    """In place of grid and codec: ways to store a matrix, of which `probe.py` and `allocate.py` choose for each."""

    def __post_init__(self):
        if self.options:
            self._check_options()
            return
        if self.solver not in SOLVERS:
            raise UnknownName("solver", self.solver, list(SOLVERS))
        if (self.grid is None) != (self.codec is None):
            raise RecipeError(f"rule {self.match!r}: a grid needs a codec and a codec a grid; give both, or neither")
        where = f"rule {self.match!r}"
        if self.order not in ORDERS:
            raise RecipeError(f"{where}: order must be one of {', '.join(ORDERS)}; got {self.order!r}")
        if self.damping is not None and not 0 < self.damping < inf:
            raise RecipeError(f"{where}: damping must be > 0, got {self.damping}")
        budgets = {k: getattr(self, k) for k in BUDGETS if getattr(self, k) is not None}
        if len(budgets) > 1:
            raise RecipeError(f"{where}: {' and '.join(budgets)} are ways to say one thing; give one of them")
        if (self.outliers or 0) >= 1 or any(not 0 <= v < inf for v in budgets.values()):
            raise RecipeError(f"{where}: {budgets} is out of range; outliers is a share below 1, tau and bits are >= 0")
        if self.solver == "rtn" and (budgets or self.order != "identity"):
            raise RecipeError(f"{where}: rtn has neither outliers nor a column order; use solver = 'gptq'")
        parts = () if self.codec is None else self.codec.parts
        if any(not self.takes(budget) for budget in budgets):
            raise RecipeError(f"{where}: {' '.join(budgets)}: this codec stores no outliers; use codec 'spqr'")
        if self.order != "identity" and "order" not in parts:
            raise RecipeError(f"{where}: this codec stores no column order; use codec 'spqr' or 'grouped'")
        if self.grid is not None and self.codec is not None:
            try:  # on a matrix of two weights, now and not after an hour
                (solution,) = rtn(torch.tensor([[[-1.0, 1.0]]]), None, self.grid, names=[self.match])
                self.codec.encode(replace(solution, rotated=self.codec.rotated))
            except Unsupported as e:
                raise RecipeError(f"{where}: grid and codec do not fit together: {e}") from e

    def _check_options(self) -> None:
        where = f"rule {self.match!r}"
        if self.grid or self.codec or self.order != "identity" or self.damping or self.tau or self.outliers:
            raise RecipeError(
                f"{where}: has options, so grid, codec and the like belong in them; beside them only bits"
            )
        if self.bits is None or not 0 < self.bits < inf:
            raise RecipeError(f"{where}: options need bits, the mean of all matrices, above 0; got {self.bits}")
        for option in self.options:
            if option.codec is None or option.options:
                raise RecipeError(f"{where}: every option needs a grid and a codec, and has no options of its own")
            if option.solver != "gptq" or option.bits is not None:
                raise RecipeError(f"{where}: an option is solved by gptq, and its bits are not given: they are chosen")

    @property
    def packs(self) -> bool:
        """False: matrices of this rule stay as they are."""
        return self.codec is not None or bool(self.options)

    def at(self, option: int, bits: float, spread: float | None) -> "Rule":
        """The rule of one matrix: one of the options, a ternary one at so many bits, searched from `spread` on."""
        found = self.options[option]
        if spread is None or not isinstance(found.grid, Deadzone):
            return found
        return replace(found, bits=bits, grid=replace(found.grid, spread=spread))

    def in_layout(self, layout: str) -> "Rule":
        """The rule with its ternary matrices stored in a layout, see `formats/_layouts.py`."""
        options = tuple(option.in_layout(layout) for option in self.options)
        return replace(self, codec=None if self.codec is None else codec_in(self.codec, layout), options=options)

    def takes(self, budget: str) -> bool:
        """Whether there is something in the rule that can be chosen to keep such a budget."""
        if self.options:
            return budget == "bits"
        if self.solver == "rtn" or self.codec is None:
            return False
        return "outlier_values" in self.codec.parts or (budget == "bits" and isinstance(self.grid, Deadzone))


@dataclass(frozen=True)
class Solving:
    """How the solver runs. Defaults are QMoE's (Frantar & Alistarh 2023, section 3.2, and its code)."""

    damping: float = 0.1
    """Added to the Hessian's diagonal, in units of its mean."""
    experts_per_batch: int = 16
    true_sequential: bool = False
    """Solve the output projection on inputs that come from the compressed input projection."""
    router_weights: bool = False
    """An expert's tokens count in its Hessians as much as in the layer's output: by the router's weights, squared."""

    asymmetric: bool = False
    """Experts are solved towards what the original model computes from its own activations, so that each makes up for
    what was compressed before it (GPTAQ); output projections then see what comes from the compressed input projections.
    The original's activations are kept beside the compressed model's."""
    output_weights: float = 0.0
    """Rows of an expert's input projections share its bits by what their errors cost in its answers: the grid deadzone
    is as much narrower as that cost, to this power, is larger (`solve/rows.py`). 0: all rows alike."""
    mean_correction: bool = False
    """What a matrix answers wrongly on the mean over its tokens is stored, 16 bits for each row, and added to its
    products; of matrices that are not rounded to nearest."""

    def __post_init__(self):
        if not 0 < self.damping < inf or self.experts_per_batch < 1 or not 0 <= self.output_weights <= 1:
            raise RecipeError(f"damping must be > 0, experts_per_batch >= 1, output_weights in [0, 1]; got {self}")

    def added_bits(self, rule: Rule, columns: int) -> float:
        """Of a matrix, stored bits per weight that are not its codec's."""
        return 16 / columns if self.mean_correction and rule.solver != "rtn" else 0.0

    def beside_correction(self, rule: Rule, columns: int) -> Rule:
        """The rule with what bits a correction leaves, where it says bits. Raises RecipeError where there are none."""
        added = self.added_bits(rule, columns)
        if rule.bits is None or not added:
            return rule
        if added >= rule.bits:
            raise RecipeError(
                f"rule {rule.match!r}: mean_correction alone takes {added:.3f} of {rule.bits:g} bits per weight of "
                f"matrices of {columns} columns; allow more, or set [solving] mean_correction = false"
            )
        return replace(rule, bits=rule.bits - added)


@dataclass(frozen=True)
class Coverage:
    """What happens to experts that few calibration tokens reach. Never silent: the coverage table lists them."""

    undersampled: str = "shrink"
    """shrink: every Hessian moves towards the layer's pooled one with weight n / (n + shrink_tokens);
    identity: an expert below `floor` tokens is rounded to nearest, as QMoE does with unseen experts;
    fail: an expert below `floor` tokens stops the run."""
    shrink_tokens: float = 64.0
    floor: int = 1
    max_tokens: float = 4.0
    """Cap of training tokens per expert, in units of the mean (QMoE: 4)."""

    def __post_init__(self):
        if self.undersampled not in UNDERSAMPLED:
            raise RecipeError(f"undersampled must be one of {', '.join(UNDERSAMPLED)}; got {self.undersampled!r}")
        if not 0 < self.shrink_tokens < inf or self.floor < 1 or not 0 < self.max_tokens < inf:
            raise RecipeError(f"shrink_tokens and max_tokens must be > 0, floor >= 1; got {self}")

    def known(self, tokens: int) -> float:
        """How much a mean over so many tokens counts, against knowing nothing."""
        return tokens / (tokens + self.shrink_tokens)


@dataclass(frozen=True)
class Calibration:
    """What the model is shown while it is compressed."""

    samples: int = 128
    sequence_length: int = 0
    """Tokens per sample; 0: the model's maximum, at most 2048."""
    seed: int = -1
    """-1: the first windows of the text in order, as QMoE; otherwise a draw of windows with this seed."""
    mask_special: bool = True
    """Keep special tokens, and those that predict them, out of the Hessians (QMoE, Table 2)."""
    corruption: str = "t5"
    """Of encoder-decoder models: t5 (random spans, as T5 and QMoE) or fixed (spans of 3, closed by end-of-sequence)."""
    noise: float = 0.0
    """Share of the tokens that are replaced at random in every second sample, so that what is solved for one kind of
    text serves others too."""

    def __post_init__(self):
        if self.corruption not in ("t5", "fixed"):
            raise RecipeError(f"corruption must be t5 or fixed, got {self.corruption!r}")
        if self.samples < 1 or self.sequence_length < 0:
            raise RecipeError(f"samples must be >= 1 and sequence_length >= 0 (0: automatic); got {self}")
        if not 0 <= self.noise < 1:
            raise RecipeError(f"noise must be in [0, 1), got {self.noise:g}")


@dataclass(frozen=True)
class Tuning:
    """Towards the original: experts group by group while compressing, then the whole model by KL divergence."""

    group_steps: int = 0
    """For each group of experts, on the solver's samples, before the next group; 0: none."""
    steps: int = 0
    """For the whole model, after compressing, on all of the calibration text, of all that stays continuous; 0: none."""
    batch_tokens: int = 2048
    learning_rate: float = 0.02
    """Of Adam, in units of each tensor's root mean square; smaller where the compressed model is near the original."""
    codes: bool = True
    """Let ternary codes change too (straight-through); takes the memory of the experts in float32, four times."""
    dense: bool = True
    """Linear layers that are not compressed learn too, not only norms, biases, routers and scales."""
    noise: float = 0.3
    """Share of the tokens that are replaced at random in every second sample. The original is asked about what stands
    there then; it keeps the compressed model near the original on text of other kinds."""
    held_back: float = 0.05
    """Share of the text that is not learned from; if it does not gain, nothing is changed."""
    seed: int = 0

    def __post_init__(self):
        if (
            self.steps < 0
            or self.group_steps < 0
            or self.batch_tokens < 1
            or not 0 < self.learning_rate < 1
            or not 0 < self.held_back < 1
            or not 0 <= self.noise < 1
        ):
            raise RecipeError(
                "tuning: steps and group_steps must be >= 0, batch_tokens >= 1, learning_rate and held_back in (0, 1), "
                f"noise in [0, 1); got {self}"
            )


@dataclass(frozen=True)
class Gates:
    """What stops a run, because something went wrong without a word, most likely. `docs/guide.md` tells what each
    figure is; the limits are far from what was measured on honest runs (docs/LOG.md)."""

    held_back: int = 4
    """Samples that nothing is solved on, of the text behind the calibration samples; gates look at them. 0: none, and
    experts and layers are judged by their weights."""
    text: float = 0.2
    """Least share of distinct runs of 8 tokens in the calibration text."""
    coverage: float = 0.95
    """Most experts of a module that fewer tokens reach than [coverage] floor, as a share."""
    error: float = 2.0
    """Most squared error of an expert's or a layer's answers, relative to the original's."""
    noise: float = 8.0
    """The same, or its part that no scaling mends, in units of what the solver's losses let expect."""
    outlier: float = 5.0
    """The same, against the module's other experts: a robust z-score."""
    dead: float = 0.02
    """Least size of an expert's or a layer's answers, in units of what the solver expected."""
    block: float = 4.0
    """Most squared error of what a block adds, or its part that no scaling mends, in units of what the errors of its
    experts and layers let expect."""
    model: bool = True
    """Whether the finished model is loaded and looked at."""
    perplexity: float = 4.0
    """Most perplexity on held-back text, in units of the original's. This and the next limits of the model hold where
    one that knows nothing but how frequent each token is would be better still; see `model_gate.py`."""
    divergence: float = 2.0
    """Most KL divergence from the original there, in nats per token."""
    written: int = 24
    """Tokens that the finished model writes after each held-back sample's beginning, for the next three; 0: none."""
    regret: float = 2.0
    """Most nats per token by which the original would rather have written something else."""
    entropy: float = 2.0
    """Farthest entropy of what comes next from what the original's is there, in nats."""
    repetition: float = 0.7
    """Farthest share of repetition from that of what the original would write there."""

    def __post_init__(self):
        limits = {k: v for k, v in asdict(self).items() if k not in ("model", "held_back", "written")}
        if self.held_back < 0 or self.written < 0 or not all(0 <= limit < inf for limit in limits.values()):
            raise RecipeError(f"gates: held_back, written and all limits must be finite and >= 0; got {self}")


SECTIONS = {"solving": Solving, "coverage": Coverage, "calibration": Calibration, "tuning": Tuning, "gates": Gates}


@dataclass(frozen=True)
class Recipe:
    name: str
    rules: tuple[Rule, ...]
    solving: Solving = field(default_factory=Solving)
    coverage: Coverage = field(default_factory=Coverage)
    calibration: Calibration = field(default_factory=Calibration)
    tuning: Tuning = field(default_factory=Tuning)
    gates: Gates = field(default_factory=Gates)

    def rule(self, matrix: str) -> Rule | None:
        """The first rule that matches `module.path.projection`, or None: stored as it was."""
        found = self.first(matrix)
        return found if found is not None and found.packs else None

    def first(self, matrix: str) -> Rule | None:
        """The first rule that matches, also one that says to keep the matrix as it was."""
        return next((r for r in self.rules if fnmatchcase(matrix, r.match)), None)

    def calibrated(self, **changes: Any) -> "Recipe":
        """The recipe with some calibration fields replaced (what the command line gives wins over the file)."""
        return replace(self, calibration=replace(self.calibration, **changes))

    def tuned(self, **changes: Any) -> "Recipe":
        """The recipe with some tuning fields replaced."""
        return replace(self, tuning=replace(self.tuning, **changes))

    def gated(self, **changes: Any) -> "Recipe":
        """The recipe with some limits of gates replaced."""
        return replace(self, gates=replace(self.gates, **changes))

    def in_layout(self, layout: str) -> "Recipe":
        """The recipe with ternary matrices stored in a layout, "compact" or "fast"; bits are then counted in that."""
        return replace(self, rules=tuple(rule.in_layout(layout) for rule in self.rules))

    def budgeted(self, budget: str, value: float, among: Sequence[Rule] | None = None) -> "Recipe":
        """The recipe with one of BUDGETS for every rule that can keep it, in place of what the rule said.

        Args:
            among: no others than these.
        """
        clean = dict.fromkeys(BUDGETS)
        among = self.rules if among is None else among
        takes = [rule.takes(budget) and any(rule is other for other in among) for rule in self.rules]
        if not any(takes):
            raise RecipeError(
                f"recipe {self.name!r} has no rule that could keep it: {budget} says nothing to it; rules with the "
                "codec 'spqr' take all budgets, those with the grid 'deadzone' or with options bits"
            )
        return replace(
            self,
            rules=tuple(
                replace(rule, **{**clean, budget: value}) if t else rule
                for rule, t in zip(self.rules, takes, strict=True)
            ),
        )

    def to_toml(self) -> str:
        table: dict[str, Any] = {"name": self.name, "rules": [_row(rule) for rule in self.rules]}
        table |= {k: asdict(getattr(self, k)) for k in SECTIONS}
        return tomli_w.dumps(table)

    @classmethod
    def from_toml(cls, text: str, origin: str = "recipe") -> "Recipe":
        try:
            table = tomllib.loads(text)
        except tomllib.TOMLDecodeError as e:
            raise RecipeError(f"{origin}: not valid TOML: {e}") from e
        _only(table, {"name", "rules", *SECTIONS}, origin)
        if not isinstance(table.get("rules"), list) or not table["rules"]:
            raise RecipeError(f"{origin}: needs at least one [[rules]] table with match, solver, grid and codec")
        rules = []
        for number, row in enumerate(table["rules"], 1):
            where = f"{origin}, rule {number}"
            _only(row, {f.name for f in fields(Rule)}, where)
            if not isinstance(row.get("match"), str):
                raise RecipeError(f"{where}: needs match, a glob over module paths such as '*.experts.*'")
            options = row.get("options", [])
            if not isinstance(options, list):
                raise RecipeError(f"{where}: options must be [[rules.options]] tables, got {options!r}")
            found = []
            for count, option in enumerate(options, 1):
                inner = f"{where}, option {count}"
                _only(option, {f.name for f in fields(Rule)} - {"match", "options"}, inner)
                found.append(_rule({**option, "match": row["match"]}, inner))
            rules.append(_rule({**row, "options": tuple(found)}, where))
        parts = {k: _section(kind, table.get(k, {}), f"{origin}, [{k}]") for k, kind in SECTIONS.items()}
        return cls(name=str(table.get("name", origin)), rules=tuple(rules), **parts)


def _row(rule: Rule) -> dict[str, Any]:
    row: dict[str, Any] = {"match": rule.match, "solver": rule.solver}
    if rule.grid is not None and rule.codec is not None:
        row |= {"grid": _without_none(grids.to_config(rule.grid))}
        row |= {"codec": _without_none(formats.to_config(rule.codec))}
    if rule.packs:
        row |= _without_none({k: getattr(rule, k) for k in ("order", "damping", *BUDGETS)})
    if rule.options:
        # what it matches is said once
        row["options"] = [{k: v for k, v in _row(o).items() if k != "match"} for o in rule.options]
    return row


def _rule(row: dict[str, Any], where: str) -> Rule:
    """A rule from its table; options are rules already."""
    try:
        if "grid" in row:
            row["grid"] = grids.from_config(row["grid"])
        if "codec" in row:
            row["codec"] = formats.from_config(_completed(row["codec"], row.get("grid")))
    except FormatError as e:
        raise RecipeError(f"{where}: {e}") from e
    for key in ("damping", *BUDGETS):
        if key in row and type(row[key]) not in (int, float):
            raise RecipeError(f"{where}: {key} must be a number, got {row[key]!r}")
    return Rule(**row)


def _completed(config: Any, grid: Grid | None) -> Any:
    """A codec's table with the fields that it shares with the grid, where it does not say them itself."""
    if grid is None or not isinstance(config, dict) or not isinstance(config.get("name"), str):
        return config
    known = {f.name for f in fields(registry.module("formats", config["name"]).CODEC)}
    return {k: v for k, v in asdict(grid).items() if k in known} | config  # pyright: ignore[reportArgumentType]


def _without_none(config: dict[str, Any]) -> dict[str, Any]:
    """TOML has no null: a field that is None (group: the whole row) is one that is left out."""
    return {k: v for k, v in config.items() if v is not None}


def _only(table: Any, allowed: set[str], where: str) -> None:
    if not isinstance(table, dict):
        raise RecipeError(f"{where}: expected a table, got {type(table).__name__}")
    unknown = sorted(set(table) - allowed)
    if unknown:
        raise RecipeError(f"{where}: unknown field {unknown[0]!r}; known: {', '.join(sorted(allowed))}")


def _section(kind: type, table: Any, where: str) -> Any:
    assert is_dataclass(kind)
    _only(table, {f.name for f in fields(kind)}, where)
    for f in fields(kind):
        value = table.get(f.name, f.default)
        # not isinstance: bool is an int in Python; an int will do where a float is meant
        if type(value) is not f.type and (f.type, type(value)) != (float, int):
            raise RecipeError(f"{where}: {f.name} must be {getattr(f.type, '__name__', f.type)}, got {value!r}")
    return kind(**table)


# {rtn|gptq}-BITS-gGROUP: what everybody else does, under every linear layer and all experts
BASELINE = re.compile(r"(rtn|gptq)-([2-8])-g([1-9][0-9]*)(-noact)?")


def _baseline(name: str) -> "Recipe | None":
    """Grouped round to nearest or grouped GPTQ (act-order unless `-noact`, damping 0.01), by its name."""
    found = BASELINE.fullmatch(name)
    if found is None or (found[1] == "rtn" and found[4]):
        return None
    shared = {"bits": int(found[2]), "group": int(found[3])}
    grid = grids.from_config({"name": "affine", **shared})
    codec = formats.from_config({"name": "grouped", **shared})
    how = {} if found[1] == "rtn" else {"damping": 0.01, "order": "identity" if found[4] else "act_order"}
    rules = [Rule(match) for match in ROUTERS]
    return Recipe(name, (*rules, Rule(IN_BLOCKS, found[1], grid, codec, **how)))


def names() -> list[str]:
    """Recipes that come with the package as files; `rtn-BITS-gGROUP` and `gptq-BITS-gGROUP[-noact]` are known too."""
    return sorted(p.name.removesuffix(".toml") for p in files("halfbit.recipes").iterdir() if p.name.endswith(".toml"))


def load(name_or_file: str) -> Recipe:
    """A recipe by name, or from a TOML file. Raises UnknownName with the known names, or RecipeError."""
    if name_or_file in names():
        text = files("halfbit.recipes").joinpath(f"{name_or_file}.toml").read_text("utf-8")
        return Recipe.from_toml(text, name_or_file)
    if (baseline := _baseline(name_or_file)) is not None:
        return baseline
    path = Path(name_or_file)
    if path.is_file():
        try:
            return Recipe.from_toml(path.read_text("utf-8"), str(path))
        except UnicodeDecodeError as e:
            raise RecipeError(f"{path}: not UTF-8 text ({e.reason} at byte {e.start})") from e
    if path.suffix == ".toml":
        raise RecipeError(f"recipe file {name_or_file} does not exist")
    known = [*names(), "rtn-BITS-gGROUP", "gptq-BITS-gGROUP", "gptq-BITS-gGROUP-noact", "a path to a .toml file"]
    raise UnknownName("recipe", name_or_file, known)
