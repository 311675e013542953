"""Imports point to lower layers only: who may know whom, as the README's file map says."""

import ast
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src" / "halfbit"

LAYERS = (
    {"errors", "rotation", "learner"},
    {"disk", "heap", "pages", "pipeline"},
    {"types", "native", "events", "triton_support"},
    {"untrusted"},
    {"registry", "bits", "config", "dequantize"},
    {"grids", "reader", "experts", "linears"},
    {"solve", "formats", "claims", "blocks"},
    {"family", "layout"},
    {"manifest"},
    {"journal"},
    {"families", "writer", "recipe", "routing"},
    {"blueprint"},
    {"activations", "samples", "nn"},
    {"outputs", "flow", "solving", "storing", "evaluate", "tunable"},
    {"expert_groups", "linear_groups"},
    {"teacher", "sizes", "probe", "gates", "bench"},
    {"tune", "tune_group", "allocation", "machine", "parts", "model_gate"},
    {"plan_memory", "crew"},
    {"plan_time", "expert_pipeline", "cluster"},
    {"compress", "folder", "importers", "repack"},
    {"hf", "search", "plan"},
    {"commands"},
    {"__init__", "cli"},
)
# packages whose members are found through the registry, which imports them by name when asked
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imports(path: Path) -> set[str]:
    """Top-level parts of halfbit that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("halfbit"):
            rest = node.module.split(".")[1:]
            found |= {rest[0]} if rest else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("halfbit.")}
    return found


def test_imports_point_to_lower_layers() -> None:
    wrong = []
    for path in sorted(SOURCE.rglob("*.py")):
        own = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        if own == "recipes":
            continue
        assert own in LEVEL, f"{own} has no layer; add it to LAYERS"
        wrong += [f"{path.relative_to(SOURCE)} imports {i}" for i in imports(path) - {own} if LEVEL[i] >= LEVEL[own]]
    assert not wrong
