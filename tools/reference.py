"""Tables of docs/reference, generated from the code while MkDocs builds a page.

A line such as `<!-- generated: options -->` is replaced by a table. The table below `<!-- generated: events -->` is
part of its page and has a name and a meaning in each row. The build adds the level and the fields of each log event,
which it reads from the calls that emit it.
"""

from __future__ import annotations

import ast
import functools
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any, Final, get_args, get_type_hints

from fastapi import WebSocketDisconnect
from pydantic.fields import FieldInfo

import fastapi_ws_stabilizer
import fastapi_ws_stabilizer.client
from fastapi_ws_stabilizer import DisconnectReason, WebSocketConfig, WebSocketStabilizerError
from fastapi_ws_stabilizer.client import ClientError
from fastapi_ws_stabilizer.close_codes import CLOSE_POLICIES

PACKAGE: Final = Path(fastapi_ws_stabilizer.__file__).parent
MARKER: Final = re.compile(r"^<!-- generated: ([a-z ]+) -->$", flags=re.MULTILINE)
EVENTS: Final = re.compile(r"^<!-- generated: events -->\n+((?:\|.*\n)+)", flags=re.MULTILINE)
LEVELS: Final = ("DEBUG", "INFO", "WARNING", "ERROR")
HELP_WIDTH: Final = "100"

Rows = list[list[str]]


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill the markers of one page; MkDocs calls this hook."""
    markdown = EVENTS.sub(lambda found: events_table(found[1]), markdown)
    return MARKER.sub(lambda found: TABLES[found[1]](), markdown)


def table(*columns: str, rows: Rows) -> str:
    """Return a Markdown table; cells may hold any text."""
    lines = [list(columns), ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)


def code(text: object) -> str:
    """Return a text as inline code."""
    return f"`{text}`"


# ── docstrings ──


def attribute_docs(kind: type) -> dict[str, str]:
    """Return the string below each attribute of a class, as one line."""
    (node,) = ast.parse(inspect.cleandoc("\n" + inspect.getsource(kind))).body
    assert isinstance(node, ast.ClassDef)
    docs: dict[str, str] = {}
    for attribute, text in zip(node.body, node.body[1:], strict=False):
        if not (isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)):
            continue
        if isinstance(attribute, ast.AnnAssign) and isinstance(attribute.target, ast.Name):
            docs[attribute.target.id] = _one_line(text.value.value)
        elif isinstance(attribute, ast.Assign) and isinstance(attribute.targets[0], ast.Name):
            docs[attribute.targets[0].id] = _one_line(text.value.value)
    return docs


def sections(kind: type) -> tuple[str, dict[str, str]]:
    """Return the text of a class's docstring, and the text for each attribute in its section `Attributes`."""
    text, _, attributes = (inspect.cleandoc(kind.__doc__ or "")).partition("\nAttributes:\n")
    found = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", attributes, flags=re.MULTILINE)
    return _one_line(text), {name: _one_line(words) for name, words in found}


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


# ── options ──


def options() -> str:
    """Return the table of `WebSocketConfig`."""
    docs = attribute_docs(WebSocketConfig)
    schema = WebSocketConfig.model_json_schema()
    hints = get_type_hints(WebSocketConfig, include_extras=True)
    rows = [
        [
            code(name),
            ", ".join([_kind(schema["properties"][name], schema.get("$defs", {})), *_bounds(hints[name], field)]),
            code(_literal(field.default)),
            docs[name],
        ]
        for name, field in WebSocketConfig.model_fields.items()
    ]
    return table("Option", "Type", "Default", "Meaning", rows=rows)


def values() -> str:
    """Return the table of the values that options accept."""
    rows: Rows = []
    for name, field in WebSocketConfig.model_fields.items():
        if isinstance(field.default, Enum):
            kind = type(field.default)
            docs = attribute_docs(kind)
            rows += [
                [code(name), code(_literal(member)), code(f"{kind.__name__}.{member.name}"), docs[member.name]]
                for member in kind
            ]
    return table("Option", "Value", "Enum member", "Meaning", rows=rows)


def _literal(default: Any) -> str:
    """Return a default as it is written in Python."""
    if isinstance(default, Enum):
        default = default.value
    if isinstance(default, str):
        return f'"{default}"'
    if isinstance(default, int) and not isinstance(default, bool):
        return f"{default:_}" if default >= 10_000 else str(default)
    return str(default) if not hasattr(default, "total_seconds") else f"timedelta(seconds={default.total_seconds():g})"


def _kind(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    """Return the type and the bounds of an option from its JSON schema."""
    (schema,) = schema.get("allOf", [schema])  # pydantic before 2.9 writes a reference like this
    if "$ref" in schema:
        schema = {**definitions[schema["$ref"].rpartition("/")[2]], **schema}
    if choices := schema.get("anyOf"):
        return " or ".join(_kind(choice, definitions) for choice in choices)
    if words := schema.get("enum"):
        return ", ".join(code(_literal(word)) for word in words)
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {}), definitions)}"
    formats = {"duration": "timedelta", "password": "str", "regex": "re.Pattern"}
    types = {"number": "float", "integer": "int", "boolean": "bool", "string": "str", "null": "None", None: "any"}
    return code(formats.get(schema.get("format", ""), types[schema.get("type")]))


def _bounds(hint: Any, field: FieldInfo) -> list[str]:
    """Return the bounds of an option, such as `≥ 0`, from its annotation."""
    parts = list(field.metadata)
    for inner in [hint, *get_args(hint)]:
        for part in getattr(inner, "__metadata__", ()):
            parts += part.metadata if isinstance(part, FieldInfo) else [part]
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    found = {
        f"{sign} {limit:g}" if isinstance(limit, (int, float)) else f"{sign} 0": None
        for part in parts
        for bound, sign in signs.items()
        if (limit := getattr(part, bound, None)) is not None
    }
    return list(found)


# ── close codes ──


def reasons() -> str:
    """Return the table of `DisconnectReason` with the close policy of each."""
    docs = attribute_docs(DisconnectReason)
    rows = [
        [
            code(reason.value),
            str(policy.code),
            next(text for text in vars(policy).values() if isinstance(text, str)) or "-",
            "yes" if policy.flush else "no",
            "yes" if policy.deliver else "no",
            docs[reason.name],
        ]
        for reason, policy in CLOSE_POLICIES.items()
    ]
    return table("Cause", "Code", "Close reason", "Sends queued", "Delivers unread", "When", rows=rows)


# ── errors ──


def errors_of(module: ModuleType) -> list[type[WebSocketStabilizerError]]:
    """Return the public errors of a module in the order of their definition, those of the package only once."""
    found = [getattr(module, name) for name in module.__all__]
    kinds = [kind for kind in found if inspect.isclass(kind) and issubclass(kind, WebSocketStabilizerError)]
    if module is fastapi_ws_stabilizer.client:
        kinds = [kind for kind in kinds if issubclass(kind, ClientError)]
    return sorted(kinds, key=lambda kind: inspect.getsourcelines(kind)[1])


def errors() -> str:
    """Return the table of the package's errors."""
    rows = [
        [code(kind.__name__), _bases(kind), _close_code(kind), kind.close_text or "-", sections(kind)[0]]
        for kind in errors_of(fastapi_ws_stabilizer)
    ]
    return table("Error", "Is also a", "Code", "Close reason", "Raised when", rows=rows)


def client_errors() -> str:
    """Return the table of the errors of the Python client."""
    kinds = errors_of(fastapi_ws_stabilizer.client)
    rows = [[code(kind.__name__), _bases(kind), sections(kind)[0]] for kind in kinds]
    return table("Error", "Is also a", "Raised when", rows=rows)


def error_attributes() -> str:
    """Return the table of the attributes of all errors."""
    kinds = errors_of(fastapi_ws_stabilizer) + errors_of(fastapi_ws_stabilizer.client)
    rows = [[code(kind.__name__), code(name), meaning] for kind in kinds for name, meaning in sections(kind)[1].items()]
    return table("Error", "Attribute", "Meaning", rows=rows)


def _bases(kind: type) -> str:
    return ", ".join(code(base.__name__) for base in kind.__bases__ if base is not WebSocketStabilizerError) or "-"


def _close_code(kind: type[WebSocketStabilizerError]) -> str:
    return "-" if issubclass(kind, WebSocketDisconnect) else str(kind.close_code)


# ── log events ──


class Emitted:
    """Levels and fields in the calls that emit one log event."""

    def __init__(self) -> None:
        self.levels: set[str] = set()
        self.fields: dict[str, None] = {}


def events_table(written: str) -> str:
    """Return the table of log events, with the level and the fields of each event that a page names."""
    emitted = emitted_events()
    rows: Rows = []
    for line in written.splitlines()[2:]:
        name, meaning = (cell.strip() for cell in line.strip("| ").split(" | ", 1))
        found = emitted[name.strip("`")]
        levels = ", ".join(level for level in LEVELS if level in found.levels)
        rows.append([name, levels, ", ".join(map(code, found.fields)), meaning])
    return table("Event", "Level", "Fields", "Meaning", rows=rows) + "\n"


def emitted_events() -> dict[str, Emitted]:
    """Return every log event that the source emits, by name."""
    modules = {path: Source(ast.parse(path.read_text("utf-8"))) for path in sorted(PACKAGE.rglob("*.py"))}
    others = [module for path, module in modules.items() if path != BUS_FILE]
    shared = {name: keys for module in others for name, keys in module.wrappers.items()}
    found: dict[str, Emitted] = {}
    for module in modules.values():
        for name, levels, fields in module.emitted(shared):
            event = found.setdefault(name, Emitted())
            event.levels |= levels
            event.fields |= dict.fromkeys(fields)
    return found


BUS: Final = type(fastapi_ws_stabilizer.WebSocketConnectionManager().events)
BUS_FILE: Final = Path(inspect.getfile(BUS))
EMITTERS: Final = {
    name: inspect.signature(method).parameters
    for name, method in inspect.getmembers(BUS, inspect.isfunction)
    if "event" in inspect.signature(method).parameters
}
"""Methods of the event bus that emit an event. Methods with the same names elsewhere call them."""


class Source:
    """One module of the package, and its calls that emit events.

    Attributes:
        wrappers: Methods that call the event bus, by name, with the fields that each adds.
    """

    def __init__(self, module: ast.Module) -> None:
        self._module = module
        functions = [node for node in ast.walk(module) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
        self._functions = {function.name: function for function in functions}
        self._function_of = {node: function for function in functions for node in ast.walk(function)}
        self.wrappers = {
            function.name: fields
            for function in functions
            if _emitter(function.name) and "event" in {argument.arg for argument in function.args.args}
            for call in ast.walk(function)
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and _emitter(call.func.attr)
            if (fields := self._fields(call))
        }

    def emitted(self, shared: dict[str, list[str]]) -> Iterator[tuple[str, set[str], list[str]]]:
        """Yield name, levels and fields of each event that is emitted here."""
        for call in ast.walk(self._module):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
                continue
            if (parameters := _emitter(call.func.attr)) is not None:
                has_level = "level" in parameters
                levels = self._levels(call) if has_level else {"ERROR"}
                of_caller = ast.unparse(call.func.value).rpartition(".")[2].strip("_") in ("self", "connection")
                fields = {**shared, **self.wrappers}.get(call.func.attr, []) if of_caller else []
                more = ["more"] if "kind" in parameters else []
                for name in self._names(call, 2 if has_level else 1) if levels else ():
                    yield name, levels, fields + self._fields(call) + more
            yield from self._logged(call)

    def _logged(self, call: ast.Call) -> Iterator[tuple[str, set[str], list[str]]]:
        """Yield the event of a call of a logger itself."""
        extra = next((word.value for word in call.keywords if word.arg == "extra"), None)
        if isinstance(extra, ast.Dict) and isinstance(call.func, ast.Attribute):
            entries = {ast.literal_eval(key): value for key, value in zip(extra.keys, extra.values, strict=True) if key}
            name = entries.pop("event", None)
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                level = {"exception": "ERROR"}.get(call.func.attr, call.func.attr.upper())
                yield name.value, {level}, list(entries)

    def _fields(self, call: ast.Call) -> list[str]:
        fields: list[str] = []
        for keyword in call.keywords:
            if keyword.arg is None:
                fields += self._keys(keyword.value, call)
            elif keyword.arg != "error":
                fields.append(keyword.arg)
        return fields

    def _keys(self, value: ast.expr, call: ast.Call) -> list[str]:
        """Return the constant keys of a dict from the function of a call, or from a function of the module."""
        if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id in self._functions:
            return [key for node in ast.walk(self._functions[value.func.id]) for key in _constant_keys(node)]
        if not isinstance(value, ast.Name):
            return []
        keys: list[str] = []
        for node in self._assigned(value, call):
            keys += [key for part in ast.walk(node) for key in _constant_keys(part)]
        for part in ast.walk(self._function_of[call]):
            if isinstance(part, ast.Subscript) and ast.unparse(part.value) == value.id:
                keys += [str(part.slice.value)] if isinstance(part.slice, ast.Constant) else []
        return keys

    def _names(self, call: ast.Call, arguments: int) -> list[str]:
        """Return the possible values of the first argument of a call."""
        found: list[str] = []
        for argument in call.args[:arguments]:
            nodes = [argument, *self._assigned(argument, call)]
            if isinstance(argument, ast.Subscript):  # from a dict of the module
                for node in self._assigned(argument.value, self._module):
                    nodes += node.values if isinstance(node, ast.Dict) else []
            nodes += [part for node in nodes if isinstance(node, ast.IfExp) for part in (node.body, node.orelse)]
            found += [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        return found

    def _levels(self, call: ast.Call) -> set[str]:
        nodes = [part for argument in call.args for part in [argument, *self._assigned(argument, call)]]
        return {
            part.attr
            for node in nodes
            for part in ast.walk(node)
            if isinstance(part, ast.Attribute) and part.attr in LEVELS and ast.unparse(part.value) == "logging"
        }

    def _assigned(self, name: ast.expr, near: ast.AST) -> list[ast.expr]:
        """Return what is assigned to a name in the function around a node, or in the module."""
        scope = self._function_of.get(near, self._module)
        return [
            node.value
            for node in ast.walk(scope)
            if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)) and node.value is not None
            for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
            if isinstance(name, ast.Name) and any(part == name.id for part in _target_names(target))
        ]


def _emitter(method: str) -> Any:
    name = method.lstrip("_")
    return EMITTERS.get("emit_exception" if name == "report_bug" else name)  # a connection's own, which also runs hooks


def _constant_keys(node: ast.AST) -> list[str]:
    keys = node.keys if isinstance(node, ast.Dict) else ()
    return [
        part.value
        for key in keys
        if key is not None
        for part in ([key.body, key.orelse] if isinstance(key, ast.IfExp) else [key])
        if isinstance(part, ast.Constant) and isinstance(part.value, str)
    ]


def _target_names(target: ast.expr) -> list[str]:
    return [part.id for part in ast.walk(target) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)]


# ── command line ──


def commands() -> str:
    """Return the help of each command of the command line."""
    names = re.search(r"{([a-z,-]+)}", help_of())
    assert names is not None
    parts = [f"## {name}\n\n```text\n{help_of(name)}```" for name in names[1].split(",")]
    return "\n\n".join(parts)


@functools.cache
def help_of(*words: str) -> str:
    """Return what `python -m fastapi_ws_stabilizer ... --help` prints."""
    command = [sys.executable, "-m", "fastapi_ws_stabilizer", *words, "--help"]
    plain = {**os.environ, "COLUMNS": HELP_WIDTH, "NO_COLOR": "1"}
    return subprocess.run(command, env=plain, capture_output=True, text=True, check=True).stdout


TABLES: Final[dict[str, Callable[[], str]]] = {
    "options": options,
    "values": values,
    "reasons": reasons,
    "errors": errors,
    "client errors": client_errors,
    "error attributes": error_attributes,
    "commands": commands,
}
