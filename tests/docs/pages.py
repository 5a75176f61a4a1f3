"""The pages of the project, and the parts of them that tests read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tools import reference

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def name_of(page: Path) -> str:
    """Return the page's path, relative to the checkout."""
    return page.relative_to(ROOT).as_posix()


@dataclass(frozen=True)
class Block:
    """One fenced block of code.

    Attributes:
        page: The page that contains it.
        line: The line of its opening fence.
        language: The word after that fence.
        code: Its text, without the fences.
        before: The last non-empty line before it.
        section: The last heading of the second level before it.
    """

    page: Path
    line: int
    language: str
    code: str
    before: str
    section: str

    def __str__(self) -> str:
        return f"{name_of(self.page)}:{self.line}"

    @property
    def is_recipe(self) -> bool:
        """Whether it is a recipe of the README. Each recipe extends the quick start."""
        return name_of(self.page) == "README.md" and self.section == "Recipes"

    @property
    def module(self) -> str:
        """The module that its reader runs: the block itself, after the quick start if it is a recipe."""
        return f"{quick_start().code}\n\n{self.code}" if self.is_recipe else self.code

    @property
    def complete(self) -> bool:
        """Whether its module runs without other code. A fragment does not begin with imports."""
        return self.module.startswith(("import ", "from ", '"""'))

    @property
    def source(self) -> str | None:
        """The example that the line before the block names."""
        named = re.search(r"`(examples/[\w/]+\.py)`.*:$", self.before)
        return named.group(1) if named else None


def blocks(language: str) -> list[Block]:
    """Return all blocks of one language."""
    return [block for page in PAGES for block in _blocks(page) if block.language == language]


def quick_start() -> Block:
    """Return the first Python block of the README."""
    return next(block for block in _blocks(ROOT / "README.md") if block.language == "python")


def _blocks(page: Path) -> Iterator[Block]:
    before = section = ""
    opened: tuple[int, str, str] | None = None
    code: list[str] = []
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if opened is None and line.startswith("```"):
            opened, code = (number, line[3:].strip(), before), []
        elif opened is not None and line.startswith("```"):
            yield Block(page, opened[0], opened[1], "\n".join(code) + "\n", opened[2], section)
            opened, before = None, ""
        elif opened is not None:
            code.append(line)
        elif line.strip():
            before = line.strip()
            section = line[3:].strip() if line.startswith("## ") else section
    assert opened is None, f"{name_of(page)}: the fence in line {opened} is not closed"


def prose(page: Path) -> str:
    """Return a page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Sentence:
    """One sentence of a page.

    Attributes:
        line: The line on which its paragraph, list item or table row begins.
        text: Its text, without link targets and emphasis.
    """

    line: int
    text: str

    @property
    def words(self) -> int:
        """The number of its words, without code."""
        return len([word for word in _CODE.sub("", self.text).split() if re.search(r"\w", word)])


_CODE = re.compile(r"`[^`]+`(?:'s)?")
_ITEM = re.compile(r"(?:[-*+]|\d+\.)\s+")
_SENTENCE_END = re.compile(r"""(?<=[.!?])["')]*\s+""")


def sentences(text: str, *, with_tables: bool) -> Iterator[Sentence]:
    """Yield the sentences of paragraphs, list items and table cells, but no headings and no blocks of code."""
    for line, part in _parts(text, with_tables=with_tables):
        plain = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", part).replace("*", "")
        joined = _CODE.sub(lambda code: code[0].replace(" ", "\0"), plain)  # a full stop in code ends no sentence
        for sentence in filter(None, _SENTENCE_END.split(joined)):
            yield Sentence(line, sentence.replace("\0", " "))


def _parts(text: str, *, with_tables: bool) -> Iterator[tuple[int, str]]:
    """Yield the first line and the text of each paragraph, list item and table cell."""
    in_code = False
    first, part = 0, ""
    for number, line in enumerate([*text.splitlines(), ""], 1):
        bare = line.strip()
        is_fence, item = bare.startswith("```"), _ITEM.match(bare)
        is_other = in_code or is_fence or not bare or bare.startswith(("#", "<!--", "|"))
        if part and (is_other or item):
            yield first, part
            part = ""
        in_code ^= is_fence
        if not is_other:
            text_of_line = bare[item.end() :] if item else bare
            first, part = (first, f"{part} {text_of_line}") if part else (number, text_of_line)
        elif with_tables and not in_code and bare.startswith("|") and set(bare) - set("|-: "):
            yield from ((number, cell) for cell in cells(bare) if cell)


def rendered(page: Path) -> str:
    """Return a page with the tables that MkDocs inserts."""
    return reference.on_page_markdown(page.read_text())


def table(page: str, header: str, *, build: bool = False) -> list[list[str]]:
    """Return the rows of the only table with this header; each cell without surrounding spaces.

    Args:
        page: Path of the page.
        header: Beginning of the header.
        build: Whether to read the page as MkDocs renders it.
    """
    text = rendered(ROOT / page) if build else prose(ROOT / page)
    found = [rows for rows in tables(text) if rows[0].startswith(header)]
    assert len(found) == 1, f"{page} has {len(found)} tables that begin {header!r}"
    return [cells(row) for row in found[0][2:]]


def tables(text: str) -> list[list[str]]:
    """Return the lines of each table of a text."""
    return [found.splitlines() for found in re.findall(r"^(?:\|.*\n?)+", text, flags=re.MULTILINE)]


def cells(row: str) -> list[str]:
    """Return the cells of a row, each without surrounding spaces."""
    return [cell.strip() for cell in row.strip("|").split("|")]
