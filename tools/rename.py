"""Rename names of the package in its source, tests, examples and pages, and move modules.

    python -m tools.rename tools/renames/1-names.toml

It needs a mypy that is not compiled, so that its classes can be subclassed. Install it in a separate environment that
also has the imports of the project: `pip install --no-binary mypy mypy`.

mypy resolves each name in the source to an object, so two attributes with the same name are distinguished. Names that
it cannot type (`Any`) are listed at the end, for manual review. The file has these tables:

    [modules]                       # paths below the package; whole files or whole folders
    "routing.gate" = "handshake.admission"
    [names]                         # of a module: classes, functions, constants
    "routing.gate.Caller" = "Handshake"
    [members]                       # of a class: methods, attributes, properties; `|` joins those of one protocol
    "routing.gate.Caller.answered | routing.gate.Gate.answered" = "rejected"
    [tokens]                        # words of the whole source: attributes and variables with one meaning everywhere
    caller = "handshake"
    [locals."routing/gate.py"]      # words of one file that are not attributes: parameters and variables
    slot = "reservation"
    [replace."tests/x.py"]          # texts of one file that have no type
    "old" = "new"

Names are those before the move. Names that no longer exist are skipped with a message, so a table can be run again.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import mypy.build
import mypy.modulefinder
import mypy.options
from mypy.nodes import (
    AssignmentStmt,
    CallExpr,
    ClassDef,
    FuncDef,
    ImportFrom,
    MemberExpr,
    MypyFile,
    NameExpr,
    RefExpr,
    StrExpr,
    SuperExpr,
    TypeInfo,
    Var,
)
from mypy.traverser import TraverserVisitor
from mypy.types import CallableType, Instance, Overloaded, TupleType, TypeType, TypeVarType, UnionType, get_proper_type

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PACKAGE = "fastapi_ws_stabilizer"
SOURCES = (PACKAGE, "tests", "examples", "benchmarks")
TEXTS = ("*.py", "*.md", "*.toml", "*.yml", "*.json", "Makefile", "*.txt")

Edit = tuple[int, int, str, str]  # line, column, old, new


def instances(found: Any) -> Iterator[TypeInfo]:
    """Return the classes that a type may be an instance of."""
    found = get_proper_type(found)
    if isinstance(found, Instance):
        yield found.type
    elif isinstance(found, TupleType):
        yield found.partial_fallback.type
    elif isinstance(found, UnionType):
        for item in found.items:
            yield from instances(item)
    elif isinstance(found, TypeVarType):
        yield from instances(found.upper_bound)
    elif isinstance(found, TypeType):
        yield from instances(found.item)
    elif isinstance(found, CallableType) and found.is_type_obj():
        yield from instances(found.ret_type)
    elif isinstance(found, Overloaded):
        for item in found.items:
            if item.is_type_obj():
                yield from instances(item.ret_type)


class Finder(TraverserVisitor):
    """Collector of the positions in one file at which names have to be replaced."""

    def __init__(
        self,
        types: dict[Any, Any],
        names: dict[str, str],
        members: dict[str, str],
        only: dict[str, str],
        lines: list[str],
    ) -> None:
        super().__init__()
        self._types = types
        self._names = names
        self._members = members
        self._only = only
        self._lines = lines
        self._wanted = {name.rpartition(".")[2] for name in members}
        self._class: list[TypeInfo] = []
        self.edits: set[Edit] = set()
        self.untyped: list[tuple[int, str]] = []

    def _put(self, line: int, column: int, old: str, new: str) -> None:
        text = self._lines[line - 1] if 0 < line <= len(self._lines) else ""
        at = len(text.encode()[:column].decode(errors="ignore"))  # mypy counts bytes
        for start in (at, column):
            if text[start : start + len(old)] == old:
                self.edits.add((line, start, old, new))
                return

    def _search(self, line: int, column: int, old: str, new: str, last: int = 0) -> None:
        """Return the first position of a name at or after a position."""
        for number in range(line, max(last, line + 4) + 1):
            if number > len(self._lines):
                return
            match = re.search(rf"\b{re.escape(old)}\b", self._lines[number - 1][column if number == line else 0 :])
            if match:
                self.edits.add((number, match.start() + (column if number == line else 0), old, new))
                return

    def _new_member(self, info: TypeInfo, name: str) -> str | None:
        for base in info.mro:
            new = self._members.get(f"{base.fullname}.{name}")
            if new is not None:
                return new
        return None

    def visit_name_expr(self, o: NameExpr) -> None:
        new = self._names.get(o.fullname)
        if new is not None:
            self._put(o.line, o.column, o.name, new)
        elif self._class and o.name in self._wanted and isinstance(o.node, (Var, FuncDef)):
            renamed = self._members.get(o.fullname)
            if renamed is not None:
                self._put(o.line, o.column, o.name, renamed)
        super().visit_name_expr(o)

    def visit_member_expr(self, o: MemberExpr) -> None:
        super().visit_member_expr(o)
        new = self._names.get(o.fullname or "")
        if new is None and o.name in self._wanted:
            found = self._types.get(o.expr)
            infos = list(instances(found)) if found is not None else []
            if isinstance(o.expr, RefExpr) and isinstance(o.expr.node, TypeInfo):
                infos = [o.expr.node]
            for info in infos:
                new = self._new_member(info, o.name)
                if new is not None:
                    break
            if not infos:
                new = self._only.get(o.name)
                if new is None:
                    self.untyped.append((o.end_line or o.line, o.name))
        if new is not None and o.end_line is not None and o.end_column is not None:
            self._put(o.end_line, o.end_column - len(o.name), o.name, new)

    def visit_super_expr(self, o: SuperExpr) -> None:
        if o.info is not None and o.name in self._wanted:
            for base in o.info.mro[1:]:
                new = self._members.get(f"{base.fullname}.{o.name}")
                if new is not None and o.end_line is not None and o.end_column is not None:
                    self._put(o.end_line, o.end_column - len(o.name), o.name, new)
                    break
        super().visit_super_expr(o)

    def visit_call_expr(self, o: CallExpr) -> None:
        """Handle `setattr(module, "NAME", ...)`, and pytest's equivalent."""
        super().visit_call_expr(o)
        self._keywords(o)
        called = o.callee.name if isinstance(o.callee, (NameExpr, MemberExpr)) else ""
        if not called.endswith("attr") or len(o.args) < 2 or not isinstance(o.args[1], StrExpr):
            return
        where, what = o.args[0], o.args[1]
        new = None
        if isinstance(where, RefExpr) and isinstance(where.node, MypyFile):
            symbol = where.node.names.get(what.value)
            new = self._names.get(symbol.fullname or "" if symbol else "")
        else:
            infos = list(instances(self._types.get(where)))
            if isinstance(where, RefExpr) and isinstance(where.node, TypeInfo):
                infos = [where.node]
            for info in infos:
                new = new or self._new_member(info, what.value)
            if not infos and what.value in self._wanted:
                self.untyped.append((what.line, what.value))
        if new is not None:
            self._search(what.line, what.column, what.value, new, what.end_line or what.line)

    def _keywords(self, o: CallExpr) -> None:
        """Collect fields of a dataclass or a named tuple where one is created or replaced."""
        infos = [o.callee.node] if isinstance(o.callee, RefExpr) and isinstance(o.callee.node, TypeInfo) else []
        if isinstance(o.callee, RefExpr) and o.callee.name == "replace" and o.args:
            infos = list(instances(self._types.get(o.args[0])))
        for name, argument in zip(o.arg_names, o.args, strict=True):
            for info in infos if name in self._wanted else ():
                new = self._new_member(info, name or "")
                if new is None:
                    continue
                for line in range(argument.line, max(0, argument.line - 2), -1):
                    text = self._lines[line - 1][: argument.column if line == argument.line else None]
                    if found := list(re.finditer(rf"\b{name}\s*=\s*\(?\s*$", text.rstrip("\n"))):
                        self.edits.add((line, found[-1].start(), name or "", new))
                        break

    def visit_import_from(self, o: ImportFrom) -> None:
        for name, _ in o.names:
            new = self._names.get(f"{o.id}.{name}")
            if new is not None:
                start = self._lines[o.line - 1].find(" import ") + len(" import ")
                self._search(o.line, start, name, new, o.end_line or o.line)
        super().visit_import_from(o)

    def visit_class_def(self, o: ClassDef) -> None:
        new = self._names.get(o.fullname)
        if new is not None:
            self._search(o.line, 0, o.name, new)
        for expression in o.base_type_exprs:  # mypy traverses these only in part
            expression.accept(self)
        self._class.append(o.info)
        self._slots(o)
        for statement in o.defs.body:
            for target in statement.lvalues if isinstance(statement, AssignmentStmt) else ():
                if isinstance(target, NameExpr) and (new := self._new_member(o.info, target.name)) is not None:
                    self._put(target.line, target.column, target.name, new)
        super().visit_class_def(o)
        self._class.pop()

    def _slots(self, o: ClassDef) -> None:
        end = o.end_line or o.line
        inside = False
        for number in range(o.line, end + 1):
            text = self._lines[number - 1]
            inside = inside or re.match(r"\s+__slots__\s*=", text) is not None
            if inside:
                for match in re.finditer(r'"(\w+)"', text):
                    new = self._new_member(o.info, match[1])
                    if new is not None:
                        self.edits.add((number, match.start(1), match[1], new))
                if ")" in text:
                    inside = False

    def visit_func_def(self, o: FuncDef) -> None:
        new = self._names.get(o.fullname)
        if new is None and self._class and o.info is self._class[-1] and o.name in self._wanted:
            new = self._new_member(self._class[-1], o.name)
        if new is not None:
            self._search(o.line, 0, o.name, new)
        super().visit_func_def(o)


def annotations(lines: list[str], names: dict[str, str], imported: dict[str, str]) -> Iterator[Edit]:
    """Collect classes in annotations, which mypy does not store as expressions.

    Args:
        lines: The file.
        names: New names by full name.
        imported: The full name of each imported name of this file.
    """
    new_of = {
        local: names[full]
        for local, full in imported.items()
        if full in names and local.lstrip("_")[:1].isupper() and local == full.rpartition(".")[2]
    }
    if not new_of:
        return
    words = re.compile(r"\b(" + "|".join(map(re.escape, new_of)) + r")\b")
    source = "".join(lines)
    previous = ""
    for token in tokenize.generate_tokens(StringIO(source).readline):
        if token.type == tokenize.NAME and token.string in new_of and previous != ".":
            yield token.start[0], token.start[1], token.string, new_of[token.string]
        elif token.type == tokenize.STRING and re.fullmatch(r"""["'][\w\[\]|,. ]+["']""", token.string):
            for match in words.finditer(token.string) if "[" in previous or previous in (":", "->", ",", "(") else ():
                yield token.start[0], token.start[1] + match.start(), match[1], new_of[match[1]]
        if token.string.strip():
            previous = token.string


def build(paths: list[Path]) -> mypy.build.BuildResult:
    """Parse and type-check everything."""
    options = mypy.options.Options()
    options.export_types = options.preserve_asts = True
    options.check_untyped_defs = True
    options.incremental = False
    options.python_version = (3, 11)
    options.ignore_missing_imports = True
    options.namespace_packages = options.explicit_package_bases = True
    options.mypy_path = [str(ROOT)]
    options.ignore_errors = True
    sources = []
    for path in paths:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        sources.append(mypy.modulefinder.BuildSource(str(path), module))
    return mypy.build.build(sources, options)


def unambiguous(result: mypy.build.BuildResult, members: dict[str, str]) -> dict[str, str]:
    """Return new names of members with an old name that no class keeps, so untyped uses are unambiguous."""
    new_of: dict[str, set[str]] = defaultdict(set)
    for full, new in members.items():
        new_of[full.rpartition(".")[2]].add(new)
    for tree in result.files.values():
        for symbol in tree.names.values():
            info = symbol.node
            if isinstance(info, TypeInfo) and info.module_name == tree.fullname:
                for name in info.names:
                    inherited = any(f"{base.fullname}.{name}" in members for base in info.mro)
                    if name in new_of and not inherited:
                        new_of[name].add(name)
    return {old: next(iter(new)) for old, new in new_of.items() if len(new) == 1}


def reword(path: Path, tokens: dict[str, str], variables: dict[str, str]) -> None:
    """Replace words of one file: `tokens` everywhere in the code, `variables` where they are not attributes."""
    text = path.read_text()
    edits: set[Edit] = set()
    previous, importing = "", False
    for token in tokenize.generate_tokens(StringIO(text).readline):
        if token.type == tokenize.NAME:
            if previous in ("", "\n") and token.string in ("from", "import"):
                importing = True
            elif token.string == "import":
                importing = False
            new = tokens.get(token.string) or (variables.get(token.string) if previous != "." else None)
            if new is not None and not importing:
                edits.add((*token.start, token.string, new))
        elif token.type == tokenize.STRING and (new := tokens.get(token.string[1:-1])) is not None:
            line = token.line
            if re.search(r"__slots__|attr\(", line) or re.fullmatch(r'\s+"\w+",\s*', line):
                edits.add((token.start[0], token.start[1] + 1, token.string[1:-1], new))
        if token.type == tokenize.NEWLINE:
            importing = False
        if token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT):
            previous = "\n" if token.type == tokenize.NEWLINE else token.string
    if edits:
        apply(path, edits)
    text = path.read_text()
    words = {**tokens, **variables}
    changed = re.sub(r"^(\s+)(\w+)(?=: )", lambda m: m[1] + words.get(m[2], m[2]), text, flags=re.MULTILINE)
    if changed != text:
        path.write_text(changed)


def files_of(*patterns: str) -> list[Path]:
    """Return the files under version control."""
    listed = subprocess.run(["git", "ls-files", "-z", *patterns], cwd=ROOT, capture_output=True, check=True)
    return [ROOT / name for name in listed.stdout.decode().split("\0") if name and (ROOT / name).is_file()]


def apply(path: Path, edits: set[Edit]) -> None:
    """Replace names in a file, from its end to its beginning."""
    lines = path.read_text().splitlines(keepends=True)
    for line, column, old, new in sorted(edits, reverse=True):
        text = lines[line - 1]
        if text[column : column + len(old)] == old:
            lines[line - 1] = text[:column] + new + text[column + len(old) :]
    path.write_text("".join(lines))


def rename(names: dict[str, str], members: dict[str, str]) -> list[str]:
    """Rename in the source, and return what could not be typed."""
    paths = [path for path in files_of("*.py") if path.relative_to(ROOT).parts[0] in SOURCES]
    result = build(paths)
    untyped = []
    for path in paths:
        dotted = re.compile(rf'(?<=["\'])({PACKAGE}[\w.]*)\.(\w+)(?=["\'])')

        def by_symbol(match: re.Match[str]) -> str:
            module = result.files.get(match[1])
            symbol = module.names.get(match[2]) if module is not None else None
            new = names.get(symbol.fullname or "") if symbol is not None else None
            return match[0] if new is None else f"{match[1]}.{new}"

        text = path.read_text()
        changed = dotted.sub(by_symbol, text)
        if changed != text:
            path.write_text(changed)
    defined = {f"{tree.fullname}.{name}" for tree in result.files.values() for name in tree.names}
    for full in names:
        if full not in defined:
            print("not found:", full)
    only = unambiguous(result, members)
    for path in paths:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        tree: MypyFile | None = result.files.get(module)
        if tree is None:
            continue
        lines = path.read_text().splitlines(keepends=True)
        finder = Finder(result.types, names, members, only, lines)
        tree.accept(finder)
        imported = {name: str(node.fullname) for name, node in tree.names.items() if node.fullname}
        edits = finder.edits | set(annotations(lines, names, imported))
        if edits:
            apply(path, edits)
        untyped += [f"{path.relative_to(ROOT)}:{line}: .{name}" for line, name in finder.untyped]
    return untyped


def rename_in_texts(names: dict[str, str], members: dict[str, str]) -> None:
    """Rename in backticks in docstrings, comments and pages, where a name has only one meaning."""
    new_of: dict[str, set[str]] = defaultdict(set)
    for full, new in names.items():
        new_of[full.rpartition(".")[2]].add(new)
    plain = {old: next(iter(new)) for old, new in new_of.items() if len(new) == 1 and re.search("[A-Z]", old)}
    dotted = {}
    for full, new in members.items():
        class_name, _, name = full.rpartition(".")
        class_name = class_name.rpartition(".")[2]
        dotted[f"{class_name}.{name}"] = f"{plain.get(class_name, class_name)}.{new}"
    if not plain and not dotted:
        return
    pattern = re.compile(r"\b(" + "|".join(sorted(map(re.escape, [*dotted, *plain]), key=len, reverse=True)) + r")\b")

    in_full = re.compile(r"\b(" + "|".join(re.escape(one) for one in names) + r")\b" if names else r"(?!)")

    def replaced(match: re.Match[str]) -> str:
        return pattern.sub(lambda name: dotted.get(name[1]) or plain[name[1]], match[0])

    humps = [old for old in plain if re.search("[a-z][A-Z]", old)]  # not an English word, so unambiguous
    everywhere = re.compile(r"\b(" + "|".join(humps) + r")\b(?!\()" if humps else r"(?!)")
    for path in files_of("*.py", "*.md"):
        if path.is_relative_to(ROOT / "tools"):
            continue
        text = path.read_text()
        changed = re.sub(r"(?<!`)`[^`\n]+`(?!`)", replaced, text)
        if path.suffix == ".md":
            changed = re.sub(r"^```py.*?^```", replaced, changed, flags=re.MULTILINE | re.DOTALL)
        else:  # full names in strings
            changed = in_full.sub(lambda match: f"{match[0].rpartition('.')[0]}.{names[match[0]]}", changed)
        changed = everywhere.sub(lambda match: plain[match[1]], changed)
        if changed != text:
            path.write_text(changed)


def move(modules: dict[str, str]) -> None:
    """Move modules and folders, and rewrite every path to them."""
    done = {}
    for old, new in modules.items():
        source, target = ROOT / PACKAGE / old.replace(".", "/"), ROOT / PACKAGE / new.replace(".", "/")
        if source.is_dir():
            for path in files_of(f"{PACKAGE}/{old.replace('.', '/')}/*"):
                to = target / path.relative_to(source)
                to.parent.mkdir(parents=True, exist_ok=True)
                subprocess.run(["git", "mv", str(path), str(to)], cwd=ROOT, check=True)
        elif source.with_suffix(".py").is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run(["git", "mv", f"{source}.py", f"{target}.py"], cwd=ROOT, check=True)
        else:
            print("not found:", old)
            continue
        done[old] = new
    if not done:
        return
    alternatives = "|".join(re.escape(old) for old in sorted(done, key=len, reverse=True))
    in_dots = re.compile(rf"\b{PACKAGE}\.({alternatives})\b")
    in_paths = re.compile(rf"(?<![\w/])({PACKAGE}/)?({alternatives.replace(re.escape('.'), '/')})(\.py\b|/)")
    parents = defaultdict(dict)
    for old, new in done.items():
        parent, _, name = old.rpartition(".")
        parents[parent][name] = new
    for path in files_of(*TEXTS):
        if path.is_relative_to(ROOT / "tools"):
            continue
        text = path.read_text()
        changed = in_dots.sub(lambda match: f"{PACKAGE}.{done[match[1]]}", text)
        changed = in_paths.sub(lambda m: (m[1] or "") + done[m[2].replace("/", ".")].replace(".", "/") + m[3], changed)
        if path.suffix == ".py":
            changed = from_imports(changed, parents)
        if changed != text:
            path.write_text(changed)


def from_imports(text: str, parents: dict[str, dict[str, str]]) -> str:
    """Rewrite `from package.folder import module` of modules that have moved."""

    def replaced(match: re.Match[str]) -> str:
        folder = match[2] or ""
        moved = parents.get(folder, {})
        names = [name.strip() for name in match[3].split(",")]
        remaining, lines = [], []
        for name in names:
            module, _, alias = name.partition(" as ")
            if module in moved:
                parent, _, new = moved[module].rpartition(".")
                source = f"{PACKAGE}.{parent}" if parent else PACKAGE
                lines.append(
                    f"{match[1]}from {source} import {new} as {alias or module}".replace(f"{new} as {new}", new)
                )
            else:
                remaining.append(name)
        if not lines:
            return match[0]
        if remaining:
            lines.insert(0, f"{match[1]}from {PACKAGE}{'.' + folder if folder else ''} import {', '.join(remaining)}")
        return "\n".join(lines)

    return re.sub(rf"^([ \t]*)from {PACKAGE}(?:\.([\w.]+))? import ([\w ,]+)$", replaced, text, flags=re.MULTILINE)


def wrap(path: Path, width: int = 120) -> None:
    """Move words beyond the line width in a docstring or comment to the next line of their paragraph."""
    lines = path.read_text().splitlines()
    number = 0
    inside = False
    while number < len(lines):
        line = lines[number]
        quotes = line.count('"""') % 2 == 1
        text = inside or quotes or line.lstrip().startswith("#") or '"""' in line
        if len(line) > width and text and " " in line.strip():
            head, _, word = line.rstrip().rpartition(" ")
            prefix = re.match(r"\s*(# )?", line)[0]  # type: ignore[index]
            closes = word.endswith('"""') and not quotes
            following = lines[number + 1] if number + 1 < len(lines) else ""
            goes_on = (
                following.startswith(prefix)
                and following[len(prefix) : len(prefix) + 1].isalnum() | following[len(prefix) :].startswith("`")
                and not closes
            )
            lines[number] = head
            if goes_on:
                lines[number + 1] = f"{prefix}{word} {following[len(prefix) :]}"
            else:
                lines.insert(number + 1, prefix + word)
            continue
        inside = inside != quotes
        number += 1
    path.write_text("\n".join(lines) + "\n")


def main() -> None:
    """Apply a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path)
    table = tomllib.loads(parser.parse_args().table.read_text())
    names = {f"{PACKAGE}.{old}": new for old, new in table.get("names", {}).items()}
    members = {
        f"{PACKAGE}.{one.strip()}": new for old, new in table.get("members", {}).items() for one in old.split("|")
    }
    if names or members:
        for line in rename(names, members):
            print("untyped:", line)
        rename_in_texts(names, members)
    variables = {ROOT / PACKAGE / name: words for name, words in table.get("locals", {}).items()}
    for path in files_of("*.py") if "tokens" in table or variables else ():
        if path.relative_to(ROOT).parts[0] in SOURCES:
            everywhere = table.get("locals", {}).get("*", {})
            reword(path, table.get("tokens", {}), {**everywhere, **variables.get(path, {})})
    for name, words in table.get("replace", {}).items():
        path = ROOT / name
        text = path.read_text()
        for old, new in words.items():
            if old not in text and new not in text:
                print("not found:", name, old)
            text = text.replace(old, new)
        path.write_text(text)
    move(table.get("modules", {}))
    for path in files_of("*.py"):
        if any(len(line) > 120 for line in path.read_text().splitlines()):
            wrap(path)


if __name__ == "__main__":
    main()
