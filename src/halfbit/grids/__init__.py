"""Which values a weight can take. One file per grid, named like the grid, with its class under `GRID`."""

from typing import Any

from halfbit import config as configuration
from halfbit import registry
from halfbit.types import Grid


def to_config(grid: Grid) -> dict[str, Any]:
    """{"name": "affine", "bits": 2, ...}."""
    return configuration.to_dict(grid)


def from_config(config: Any) -> Grid:
    """The grid that `to_config` described. Raises UnknownName or FormatError."""
    name = configuration.name_of(config, "grid")
    return configuration.from_dict(registry.module("grids", name).GRID, config)
