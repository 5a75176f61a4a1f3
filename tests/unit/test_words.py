"""Tests of the words that names and prose use."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import words

ALLOWANCE: dict[str, int] = {}
"""Words that a file may still have. An entry only shrinks."""


def test_files_have_no_banned_words() -> None:
    """Names, docstrings, comments, texts of the package and pages use the terms of the glossary."""
    counts: dict[str, int] = {}
    left: list[words.Finding] = []
    for path in words.files("."):
        found = words.findings(path)
        left += found
        if found:
            counts[found[0].path] = len(found)
    over = {path for path, count in counts.items() if count > ALLOWANCE.get(path, 0)}
    assert [one for one in left if one.path in over] == []
    assert {path: allowed for path, allowed in ALLOWANCE.items() if counts.get(path, 0) < allowed} == {}, "lower them"


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("code.py", "class FrontDesk:\n    door = 1\n", ["door"]),
        ("code.py", "def let_in_at_the_door() -> None: ...\n", ["door"]),
        ("code.py", "class OpenDoors: ...\n", ["doors"]),
        ("code.py", '"""Who comes is told."""\n', ["told", "who"]),
        ("code.py", "x = 1  # nobody reads it\n", ["nobody"]),
        ("code.py", "outdoors = indoors = 1\n", []),
        ("code.py", 'x = {"who": "ann"}\n', []),
        ("code.py", 'y = {"room": "lobby"}\n', []),
        ("code.py", "nobody = everyone = 1\n", ["everyone", "nobody"]),
        ("code.py", "def test_somebody_or_whoever() -> None: ...\n", ["somebody", "whoever"]),
        ("code.py", "def test_client_who_leaves_is_closed() -> None: ...\n", ["who"]),
        ("code.py", "whole = whose = 1\n", []),
        ("test_code.py", "pytest.param(1, id='nobody_is_told')\n", ["nobody", "told"]),
        ("test_code.py", 'def test_x() -> None:\n    """Everybody leaves."""\n', ["everybody"]),
        ("test_code.py", "ids = ['the client who leaves', 'lobby']\n", ["who"]),
        ("fastapi_ws_stabilizer/code.py", 'e("goodbye")\n', ["goodbye"]),
        ("fastapi_ws_stabilizer/code.py", 'e(f"{x} is\\ntold")\n', ["told"]),
        ("fastapi_ws_stabilizer/code.py", 'e("the lobby is full")\n', ["lobby"]),
        ("page.md", "A client that nobody meant.\n", ["meant", "nobody"]),
        ("page.md", '```python\nx = {"who": 1}\n```\n`who` is a key, and Azure Front Door a product.\n', []),
        ("page.md", "```python\nlobby = 1\n```\n", ["lobby"]),
        ("page.md", "- A list:\n\n    ```python\n    x = 1  # everyone\n    ```\n", ["everyone"]),
        ("page.md", "```text\nlobby\n```\n", []),
        ("page.js", "const KEPT = 1; // nobody\n", ["kept", "nobody"]),
        ("page.js", "showDoor(message.who.id);\n", ["door"]),
        ("page.html", '<p class="who">Goodbye</p><p style="place-items: center">\n', ["goodbye", "who"]),
        ("data.json", '{"about": "Nobody listens.", "room": "lobby", "who": 1}\n', ["nobody"]),
        ("test_ways_in.py", "", ["ways"]),
        ("front-desk/two-doors/page.png", "", ["doors"]),
        ("in-place/always.md", "", []),
    ],
)
def test_banned_words_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str, found: list[str]
) -> None:
    """Words are found in paths, names, strings, docstrings, comments and prose, but not in longer words or keys."""
    monkeypatch.setattr(words, "ROOT", tmp_path)
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    assert sorted(one.word for one in words.findings(path)) == found


def test_line_of_finding_in_python_block_is_that_of_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finding in a Python block has the line of the page."""
    monkeypatch.setattr(words, "ROOT", tmp_path)
    path = tmp_path / "page.md"
    path.write_text("Text.\n\n```python\nx = 1\nlobby = 2\n```\n")
    assert words.findings(path) == [words.Finding("page.md", 5, "lobby", "lobby = 2")]
