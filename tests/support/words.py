"""Words that the project does not use in names and prose: metaphors, and pronouns for clients and users.

    python -m tests.support.words fastapi_ws_stabilizer/hub docs

prints each place where one is left. The style guide (`docs/contributing/style.md`) has the words to use instead.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import textwrap
import tokenize
from collections.abc import Callable, Iterator, Mapping
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
"""Never in a name. In prose neither: the subject is the server, the client, the connection, the handler, your code."""

ALLOWED: Final = re.compile(
    r"(?<![a-z])in[ _-]place(?![a-z])|\bfront[ _-]?door\b|\btraverser_visitor\b|\\?\"lobby\\?\""
    r"|\bplace-items\b|\bmessage\.who\b|\"who\"(?=:)",
    re.IGNORECASE,
)
"""Plain English, names of products, libraries and CSS, the name of a room, and a key of the examples' JSON."""

VALUES: Final = frozenset({"lobby", "who"})
"""Words that a string may have as its value: the name of a room, and a key of the examples' messages."""

_WORDS: Final = (*METAPHORS, *PRONOUNS)
_NAME: Final = re.compile(rf"(?<![a-z])({'|'.join(_WORDS)}|thrown_out)(?![a-z])")
_PROSE: Final = re.compile(rf"\b({'|'.join(_WORDS)}|thrown out)\b", re.IGNORECASE)
_LOWER, _TITLE = "|".join((*_WORDS, "thrown")), "|".join(word.title() for word in (*_WORDS, "thrown"))
_ANY: Final = re.compile(rf"(?:(?<![A-Za-z])|(?<=\\n))(?:{_LOWER}|{_LOWER.upper()})(?![a-z])|(?:{_TITLE})(?![a-z])")
_HUMP: Final = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


class Finding(NamedTuple):
    """A word that is left.

    Attributes:
        path: The file, from the root of the project.
        line: Its line, or 0 if the word is in the path itself.
        word: The word.
        text: The line itself.
    """

    path: str
    line: int
    word: str
    text: str


def findings(path: Path) -> list[Finding]:
    """Return the words that are left in one file and in its path, by line."""
    name = path.relative_to(ROOT).as_posix()
    found = [Finding(name, 0, word, name) for word in _in_name(name.replace("-", "_"))]
    read = _READERS.get(path.suffix)
    if read is None:
        return found
    text = path.read_text()
    if not _ANY.search(text):  # most files: reading their tokens takes a hundred times as long
        return found
    lines = text.splitlines()
    return found + [
        Finding(name, line, word.lower(), lines[line - 1].strip()) for line, word in sorted(read(path, text))
    ]


def _in_name(name: str) -> Iterator[str]:
    for match in _NAME.finditer(ALLOWED.sub("", _HUMP.sub("_", name)).lower()):
        yield match[1]


def _in_prose(text: str, first: int) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(ALLOWED.sub("", text).split("\n"), first):
        for match in _PROSE.finditer(re.sub(r"`[^`]*`", "", line)):
            yield number, match[1]


def _in_python(path: Path, text: str) -> Iterator[tuple[int, str]]:
    yield from _in_tokens(text)
    yield from _in_strings(path, text)


def _in_tokens(text: str) -> Iterator[tuple[int, str]]:
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.NAME:
            for word in _in_name(token.string):
                yield token.start[0], word
        elif token.type == tokenize.COMMENT:
            yield from _in_prose(token.string, token.start[0])


def _in_strings(path: Path, text: str) -> Iterator[tuple[int, str]]:
    """Yield from docstrings and all other strings: errors, log lines, close reasons, ids of parameters, test data."""
    in_package = "fastapi_ws_stabilizer" in path.parts
    docstrings = set()
    for node in ast.walk(ast.parse(text)):  # a docstring's expression comes before its string
        if isinstance(node, ast.Expr):
            docstrings.add(node.value)
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
            continue
        if node in docstrings:
            yield from _in_prose(node.value, node.lineno)
            continue
        one_line = node.value.replace("\n", " ")
        values = VALUES if " " not in one_line else frozenset() if in_package else frozenset({"lobby"})
        for line, word in _in_prose(one_line.replace("_", " "), node.lineno):
            if word.lower() not in values:
                yield line, word


def _in_markup(_: Path, text: str) -> Iterator[tuple[int, str]]:
    """Yield from every line as it is: names, strings, comments and text of JavaScript, HTML or JSON."""
    for number, line in enumerate(text.splitlines(), 1):
        for match in _PROSE.finditer(_HUMP.sub(" ", ALLOWED.sub("", line)).replace("_", " ")):
            yield number, match[1]


def _in_markdown(_: Path, text: str) -> Iterator[tuple[int, str]]:
    language: str | None = None
    code: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            if language == "python":
                first = number - len(code) - 1
                block = _in_tokens(textwrap.dedent("\n".join((*code, ""))))
                yield from ((first + below, word) for below, word in block)
            language, code = (line.strip().strip("`"), []) if language is None else (None, [])
        elif language is not None:
            code.append(line)
        else:
            yield from _in_prose(re.sub(r"\]\([^)]*\)", "]", line), number)


_READERS: Final[Mapping[str, Callable[[Path, str], Iterator[tuple[int, str]]]]] = {
    ".py": _in_python,
    ".md": _in_markdown,
    ".js": _in_markup,
    ".html": _in_markup,
    ".json": _in_markup,
}


def files(*roots: str) -> list[Path]:
    """Return the files of the project below some folders, or the files themselves."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *roots],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    found = [ROOT / name for name in listed.stdout.splitlines()]
    return [path for path in found if path.is_file() and path.name not in ("words.py", "test_words.py", "style.md")]


if __name__ == "__main__":
    for one in files(*(sys.argv[1:] or (".",))):
        for found in findings(one):
            print(f"{found.path}:{found.line}: {found.word}: {found.text}")
