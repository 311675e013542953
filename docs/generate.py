"""Writes docs/cli.md and the README's file map from the code; `make docs` runs it, a test compares."""

import ast
import re
from pathlib import Path

import click
import typer
from typer.main import get_command

from halfbit import cli

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "halfbit"
OTHERS = {
    "tests/": "conformance.py: shared checks of grids, solvers, codecs; fuzz.py; golden/: published bytes; test_*.py; "
    "triton_*.py: run by test_triton.py, interpreted",
    "bench/": "generation.py, gguf_model.py: tokens per second; loading.py: verification; generate.py: models of any "
    "size; trillion.py: Switch c2048; gpu_all.py, gpu/: all of it on a GPU; triton_compile.py: what compilers make of "
    "kernels; plot.py; results.csv",
    "docs/": "guide.md, speed.md, folder.md, cli.md (generated), LOG.md: dated experiments, the negative ones too",
    "examples/": "demo.py; tiny-moe/: a small trained model with its texts; configs/: of large models, for plan",
}


def first_line(path: Path) -> str:
    """What a file says of itself first."""
    text = path.read_text("utf-8")
    if path.suffix == ".py":
        return (ast.get_docstring(ast.parse(text)) or "").split("\n")[0]
    if path.suffix == ".md":
        return text.split("\n")[0].lstrip("# ")
    found = re.match(r"(?://|#) ?(.*)", text)
    return found.group(1).strip() if found else ""


def file_map() -> str:
    """The package as a tree, one line per file."""
    lines = ["src/halfbit/"]
    found = [p for p in SOURCE.rglob("*") if p.suffix in (".py", ".cpp", ".h", ".toml", ".md")]
    # files first, then the folders, each in order
    folder: tuple[str, ...] = ()
    for path in sorted(found, key=lambda p: [(part != p.name, part) for part in p.parts]):
        parts = path.relative_to(SOURCE).parts
        if parts[:-1] != folder:
            folder = parts[:-1]
            lines.append("  " * len(folder) + folder[-1] + "/")
        said = first_line(path)
        lines.append(f"{'  ' * len(parts)}{parts[-1]:<22} {said}".rstrip())
    lines += [f"{name:<24} {said}" for name, said in OTHERS.items()]
    return "\n".join(lines)


def readme(text: str) -> str:
    """The README with a fresh file map."""
    before, rest = text.split("## File map\n", 1)
    after = rest.split("```", 2)[2]
    return f"{before}## File map\n\n```\n{file_map()}\n```{after}"


def command_line() -> str:
    """docs/cli.md: the help of every command."""
    group = get_command(cli.app)
    assert isinstance(group, typer.core.TyperGroup)
    parts = ["# The command line\n\nGenerated from `--help` by `make docs`.\n"]
    for name in ("", *group.commands):
        command = group.commands[name] if name else group
        context = click.Context(group, info_name="halfbit") if name else None
        with click.Context(command, info_name=name or "halfbit", parent=context, terminal_width=100) as shown:
            parts.append(f"## halfbit {name}".rstrip() + f"\n\n```\n{command.get_help(shown).rstrip()}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    (ROOT / "docs" / "cli.md").write_text(command_line(), "utf-8")
    (ROOT / "README.md").write_text(readme((ROOT / "README.md").read_text("utf-8")), "utf-8")
