"""Words that the project does not use: metaphors in names, and pronouns for clients and users in prose.

    python -m tests.support.words fastapi_ws_stabilizer/hub docs

prints each place where one is left. The style guide (`docs/contributing/style.md`) has the words to use instead.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

ROOT: Final = Path(__file__).parents[2]

METAPHORS: Final = (
    *("door", "doors", "knock", "knocks", "knocked", "knocking", "visitor", "visitors", "place", "places"),
    *("lobby", "guest", "guests", "reception", "greet", "greets", "greeted", "greeting", "face", "faces", "luggage"),
    *("kept", "way", "ways", "told", "meant", "mute", "farewell", "farewells", "goodbye", "goodbyes"),
)
"""Never in a name. In prose neither: a native sentence says the same with the term of the field."""

PRONOUNS: Final = (
    *("who", "whoever", "nobody", "somebody", "everybody", "everyone", "someone", "anybody"),
    *("meanwhile", "dearer"),
)
"""Never in prose: the subject is the server, the client, the connection, the handler, your code."""

ALLOWED: Final = re.compile(
    r"(?<![a-z])in[ _-]place(?![a-z])|\bfront[ _-]?door\b|\btraverser_visitor\b|\"lobby\"", re.IGNORECASE
)
"""Plain English, names of products and libraries, and the name of a room in an example of JSON."""

_METAPHOR: Final = re.compile(rf"(?<![a-z])({'|'.join(METAPHORS)}|thrown_out)(?![a-z])")
_PROSE: Final = re.compile(rf"\b({'|'.join((*METAPHORS, *PRONOUNS))}|thrown out)\b", re.IGNORECASE)
_WORDS: Final = (*METAPHORS, *PRONOUNS, "thrown")
_LOWER, _TITLE = "|".join(_WORDS), "|".join(word.title() for word in _WORDS)
_ANY: Final = re.compile(rf"(?<![A-Za-z])(?:{_LOWER}|{_LOWER.upper()})(?![a-z])|(?:{_TITLE})(?![a-z])")
_HUMP: Final = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


class Finding(NamedTuple):
    """A word that is left.

    Attributes:
        path: The file, from the root of the project.
        line: Its line.
        word: The word.
        text: The line itself.
    """

    path: str
    line: int
    word: str
    text: str


def findings(path: Path) -> list[Finding]:
    """Return the words that are left in one file, by line."""
    text = path.read_text()
    if not _ANY.search(text):  # most files: reading their tokens takes a hundred times as long
        return []
    read = _in_python if path.suffix == ".py" else _in_markdown
    lines = text.splitlines()
    name = path.relative_to(ROOT).as_posix()
    return [Finding(name, line, word.lower(), lines[line - 1].strip()) for line, word in sorted(read(path, text))]


def _in_prose(text: str, first: int) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(ALLOWED.sub("", text).split("\n"), first):
        for match in _PROSE.finditer(re.sub(r"`[^`]*`", "", line)):
            yield number, match[1]


def _in_python(path: Path, text: str) -> Iterator[tuple[int, str]]:
    said = _texts_of_users(path, text)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.NAME:
            for match in _METAPHOR.finditer(ALLOWED.sub("", _HUMP.sub("_", token.string)).lower()):
                yield token.start[0], match[1]
        elif token.type == tokenize.COMMENT:
            yield from _in_prose(token.string, token.start[0])
    for first, string in said:
        yield from _in_prose(string, first)


def _texts_of_users(path: Path, text: str) -> Iterator[tuple[int, str]]:
    """Yield the docstrings of a module, and in the package the other texts too: errors, log lines, close reasons."""
    everything = "fastapi_ws_stabilizer" in path.parts
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value
        elif everything and isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.lineno, node.value.replace("\n", " ")


def _in_markdown(_: Path, text: str) -> Iterator[tuple[int, str]]:
    fenced = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced:
            yield from _in_prose(re.sub(r"\]\([^)]*\)", "]", line), number)


def files(*roots: str) -> list[Path]:
    """Return the Python files and pages of the project below some folders, or the files themselves."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *roots],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    found = [ROOT / name for name in listed.stdout.splitlines() if name.endswith((".py", ".md"))]
    return [path for path in found if path.is_file() and path.name not in ("words.py", "test_words.py", "style.md")]


if __name__ == "__main__":
    for one in files(*(sys.argv[1:] or (".",))):
        for found in findings(one):
            print(f"{found.path}:{found.line}: {found.word}: {found.text}")
