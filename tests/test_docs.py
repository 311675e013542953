"""Documents that are made from the code say what the code says; the repository stands alone."""

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
SPEC = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
assert SPEC is not None
assert SPEC.loader is not None
generate = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(generate)


def test_the_command_line_page_is_that_of_the_code() -> None:
    assert (ROOT / "docs" / "cli.md").read_text("utf-8") == generate.command_line(), "run `make docs`"


def test_the_file_map_is_that_of_the_package() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    assert text == generate.readme(text), "run `make docs`"


def test_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", ROOT / "CHANGELOG.md", *ROOT.glob("docs/*.md"), *ROOT.glob("src/**/*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text("utf-8")):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"
