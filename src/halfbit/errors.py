"""Every error a user can meet: one class per kind of failure, values as attributes, never parsed from text.

A message says what, where, expected, got, and what to do next. The command line prints it without a traceback and
exits with code 2.
"""


class HalfbitError(Exception):
    """Base of all errors that are the input's fault, not a mistake in halfbit."""


class FormatError(HalfbitError):
    """A file or a packed tensor breaks a rule of its format (truncated, damaged, foreign)."""

    def __init__(self, message: str, *, tensor: str | None = None):
        super().__init__(message)
        self.tensor = tensor


class CheckpointError(HalfbitError):
    """A checkpoint folder or hub repository is missing something or does not fit its own config."""

    def __init__(self, message: str, *, tensor: str | None = None):
        super().__init__(message)
        self.tensor = tensor


class UnclaimedWeight(CheckpointError):
    """A weight of the checkpoint that no module of the model takes."""


class RecipeError(HalfbitError):
    """A recipe has an unknown field, an impossible value, or does not parse."""


class UnknownName(HalfbitError):
    """A name that is not registered (a codec, a grid, a solver, a family, a recipe)."""

    def __init__(self, kind: str, name: str, known: list[str]):
        super().__init__(f"unknown {kind} {name!r}; known: {', '.join(known)}")
        self.kind, self.name, self.known = kind, name, known


class Unsupported(HalfbitError):
    """A valid request that this code cannot serve (a shape, a device, an architecture)."""


class NotPositiveDefinite(HalfbitError):
    """A Hessian that no damping could repair; names the matrix."""

    def __init__(self, message: str, *, name: str | None = None):
        super().__init__(message)
        self.name = name


class NonFinite(HalfbitError):
    """NaN or infinity in a weight or an activation; names the tensor."""

    def __init__(self, message: str, *, tensor: str | None = None):
        super().__init__(message)
        self.tensor = tensor


class CoverageError(HalfbitError):
    """Too few calibration tokens reached an expert, and the recipe says to fail then."""

    def __init__(self, message: str, *, tensor: str | None = None, tokens: int | None = None):
        super().__init__(message)
        self.tensor, self.tokens = tensor, tokens


class CalibrationError(HalfbitError):
    """The calibration or evaluation text cannot give what was asked of it."""


class ClusterError(HalfbitError):
    """A Ray cluster cannot be reached, has no room for the workers, or lost one of them again and again."""


class GateError(HalfbitError):
    """Something went wrong without a word, most likely: a gate of the recipe did not let a result pass.

    Attributes:
        gate: its name in the manifest.
        where: the expert, layer, block or model.
        value, limit: what was measured, and the worst that passes; value is None for what is no finite number.
    """

    def __init__(self, message: str, *, gate: str, where: str, value: float | None, limit: float):
        super().__init__(message)
        self.gate, self.where, self.value, self.limit = gate, where, value, limit


class OutputError(HalfbitError):
    """The output folder cannot be written: it holds another model, or the disk is full."""
