"""A frozen dataclass <-> the dict that config.json and manifests hold: {"name": "qmoe", "p0": 0.885}."""

from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any, get_args, get_origin

from halfbit.errors import FormatError, RecipeError
from halfbit.untrusted import short

# of a whole number in a configuration; products of some of them fit in 64 bits
LARGEST = 2**31 - 1


def to_dict(value: Any) -> dict[str, Any]:
    """The name and all fields, defaults included: a later change of a default must not change an old file.

    A field that is a tuple holds dataclasses of the same kind, and becomes a list of theirs.
    """
    given = {field.name: getattr(value, field.name) for field in fields(value)}
    return {"name": value.name, **{k: [to_dict(m) for m in v] if type(v) is tuple else v for k, v in given.items()}}


def name_of(config: Any, kind: str) -> str:
    """The name in `config`, which comes from a file and may be anything."""
    name = config.get("name") if isinstance(config, dict) else None
    if not isinstance(name, str):
        raise FormatError(f"{kind}: expected an object with a name, got {short(config)}")
    return name


def from_dict(kind: type, config: dict[str, Any], member: Callable[[Any], Any] | None = None) -> Any:
    """An instance of the dataclass `kind`. Raises FormatError on unknown fields and impossible values.

    Args:
        member: makes one member of a field that is a tuple, and raises what it likes; None: there may be no such field.
    """
    given = {key: value for key, value in config.items() if key != "name"}
    known = [field.name for field in fields(kind)]
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise FormatError(f"{kind.__name__}: unknown field {short(unknown[0])}; known: {', '.join(known)}")
    for field in fields(kind):
        value = given.get(field.name, None if field.default is MISSING else field.default)
        if get_origin(field.type) is tuple:
            if member is None:
                raise FormatError(f"{kind.__name__}: cannot be inside of another of its kind")
            if not isinstance(value, list):
                raise FormatError(f"{kind.__name__}: {field.name} must be a list, got {short(value)}")
            given[field.name] = tuple(member(m) for m in value)
            continue
        # not isinstance: bool is an int in Python; an int will do where a float is meant
        allowed = get_args(field.type) or (field.type,)
        allowed = (*allowed, *((int,) if float in allowed else ()))
        if type(value) not in allowed:
            names = " or ".join(getattr(t, "__name__", str(t)) for t in allowed)
            raise FormatError(f"{kind.__name__}: {field.name} must be {names}, got {short(value)}")
        if type(value) is int and abs(value) > LARGEST:
            raise FormatError(f"{kind.__name__}: {field.name} must be {LARGEST} or less, got {short(value)}")
    try:
        return kind(**given)
    except (RecipeError, TypeError) as error:
        raise FormatError(str(error)) from error
