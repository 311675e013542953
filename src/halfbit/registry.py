"""A name -> an implementation. The file name is the registration: adding a format is adding one file.

Names are looked up among the files that lie in the package, never imported from what a downloaded file says. Other
packages can add to a group through entry points `halfbit.grids`, `halfbit.formats`, `halfbit.families` and
`halfbit.importers`.
"""

from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules
from types import ModuleType

from halfbit.errors import UnknownName


@cache
def names(group: str) -> tuple[str, ...]:
    """Registered names of a group ("grids", "formats", "families", "importers"), sorted."""
    package = import_module(f"halfbit.{group}")
    inside = {m.name for m in iter_modules(package.__path__) if not m.name.startswith("_")}
    return tuple(sorted(inside | {e.name for e in entry_points(group=f"halfbit.{group}")}))


@cache
def module(group: str, name: str) -> ModuleType:
    """The module registered under `name`. Raises UnknownName with the list of known names."""
    if name not in names(group):
        raise UnknownName(group.removesuffix("s"), name, list(names(group)))
    for entry in entry_points(group=f"halfbit.{group}"):
        if entry.name == name:
            return entry.load()
    return import_module(f"halfbit.{group}.{name}")
