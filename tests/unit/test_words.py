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
        ("page.md", "A client that nobody meant.\n", ["meant", "nobody"]),
        ("page.md", '```python\nwho = {"who": 1}\n```\n`who` is a key, and Azure Front Door a product.\n', []),
    ],
)
def test_banned_words_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str, found: list[str]
) -> None:
    """Words are found in names, docstrings, comments and prose, but not in code blocks, strings or longer words."""
    monkeypatch.setattr(words, "ROOT", tmp_path)
    path = tmp_path / name
    path.write_text(text)
    assert sorted(one.word for one in words.findings(path)) == found
