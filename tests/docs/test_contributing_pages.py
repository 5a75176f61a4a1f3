"""Tests of the pages for contributors: what they name exists."""

from __future__ import annotations

import re

import pytest

from tests.docs.pages import ROOT, prose, table

SOURCES = "\n".join(path.read_text() for path in (ROOT / "fastapi_ws_stabilizer").rglob("*.py"))


@pytest.mark.parametrize("page", ["architecture", "extend"])
def test_every_class_of_the_page_exists(page: str) -> None:
    """A class that a page for contributors names is defined in the package."""
    named = set(re.findall(r"`([A-Z][a-z]\w*[a-z])`", prose(ROOT / f"docs/contributing/{page}.md"))) - {"None"}
    assert named
    assert {name for name in named if not re.search(rf"^class {name}\b", SOURCES, flags=re.MULTILINE)} == set()


def test_layers_of_the_page_are_those_of_the_contract() -> None:
    """The architecture page shows the layers that import-linter checks, in order."""
    contract = re.search(r"^layers = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)
    assert contract is not None
    layers = re.findall(r'"([^"]+)"', contract[1])
    page = (ROOT / "docs/contributing/architecture.md").read_text().partition("\n## Layers\n")[2]
    shown = re.search(r"^```\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert shown is not None
    assert shown[1].splitlines() == layers


def test_folders_table_has_every_module_of_the_package() -> None:
    """Each folder and each module of the package's root is in the table, and nothing else."""
    rows = table("docs/contributing/architecture.md", "| Folder or module |")
    shown = {name for row in rows for name in re.findall(r"`(\w+/|\w+\.py)`", row[0])}
    package = ROOT / "fastapi_ws_stabilizer"
    folders = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    assert shown == folders | {path.name for path in package.glob("[a-z]*.py")}
