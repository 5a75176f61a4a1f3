"""Tests of the length of sentences on the pages."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.pages import PAGES, name_of, sentences

MAX_WORDS = 25
"""The limit of `docs/contributing/style.md`."""


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_sentences_of_page_are_short(page: Path) -> None:
    """A sentence has at most 25 words. Code does not count, and neither does a table of the reference."""
    in_reference = page.parent.name == "reference"
    found = sentences(page.read_text(), with_tables=not in_reference)
    assert [f"{name_of(page)}:{one.line}: {one.text}" for one in found if one.words > MAX_WORDS] == []


WORDS = " ".join(["word"] * 25)


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        (f"{WORDS}.\n", [25]),
        (f"{WORDS} more.\n", [26]),
        ("One two.\nThree four five.\n", [2, 3]),
        ("One two\nthree.\n\nFour\n", [3, 1]),
        ("- One two:\n    - Three.\n1. Four five.\n", [2, 1, 2]),
        ("One `a.b(c, d)` two, `x. Y` three.\n", [3]),
        ("**One.** Two [three four](page.md#part) five.\n", [1, 4]),
        ("![One two.](picture.png)\n", [2]),
        ('One ("two three.") Four: five, 0.5 of v1.2.\n', [3, 5]),
        ("# One two\n\n<!-- three -->\n\n```text\nfour\n```\n\n    ```js\n    five\n    ```\n\nSix - seven.\n", [2]),
        ("| One | Two |\n|---|---|\n| Three four. Five | `six` |\n", [1, 1, 2, 1, 0]),
    ],
)
def test_words_of_sentences_are_counted(text: str, counts: list[int]) -> None:
    """Paragraphs, list items and cells are split into sentences. Code, link targets and headings do not count."""
    assert [one.words for one in sentences(text, with_tables=True)] == counts


def test_sentence_has_line_of_its_paragraph() -> None:
    """A sentence has the line on which its paragraph, list item or table row begins, and its text without links."""
    found = sentences("One.\n\n- Two `a`,\n  [three](x.md).\n\n| Four |\n", with_tables=True)
    assert [(one.line, one.text) for one in found] == [(1, "One."), (3, "Two `a`, three."), (6, "Four")]
    assert [one.text for one in sentences("One.\n\n| Four |\n", with_tables=False)] == ["One."]
