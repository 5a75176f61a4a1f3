"""Tests of the pages for contributors: what they name exists."""

from __future__ import annotations

import re

import pytest

from tests.docs.pages import ROOT, prose

SOURCES = "\n".join(path.read_text() for path in (ROOT / "fastapi_ws_stabilizer").rglob("*.py"))


@pytest.mark.parametrize("page", ["architecture", "extend"])
def test_every_class_of_the_page_exists(page: str) -> None:
    """A class that a page for contributors names is defined in the package."""
    named = set(re.findall(r"`([A-Z][a-z]\w*[a-z])`", prose(ROOT / f"docs/contributing/{page}.md"))) - {"None"}
    assert named
    assert {name for name in named if not re.search(rf"^class {name}\b", SOURCES, flags=re.MULTILINE)} == set()
