"""Structured logs on standard logging: one event name and its facts per record.

All records go to the logger `fastapi_ws_stabilizer`. The facts are attributes of the record (`record.event`,
`record.connection_id`, ...), ready for any JSON formatter, and stand in the message too, quoted, so that a client id
with a line break forges no line.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Mapping
from typing import Any, Final

from fastapi_ws_stabilizer.events import Event

ROOT: Final = "fastapi_ws_stabilizer"

_PLAIN = logging.LogRecord("", 0, "", 0, "", None, None)
_STANDARD_ATTRIBUTES: Final = frozenset(vars(_PLAIN)) | {"message", "asctime", "taskName"}
_JSON_FIELDS: Final = frozenset({"time", "level", "logger", "exception"})
_UNSAFE: Final = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What rewrites a line or the order of its characters, or cannot be written at all. JSON lets it stand in strings; in
the traceback of a text log only line feeds are left, and each line is indented."""

MAX_FACT_CHARS: Final = 500
"""How much of a text the log repeats: clients choose some of them, and as long as they like."""


def get_logger(name: str = ROOT) -> logging.Logger:
    """Return the library's logger, or the one below it that `name` says.

    `get_logger()`, `get_logger("fastapi_ws_stabilizer.hub")` and `get_logger("hub")` all lead into one tree.
    """
    if name == ROOT or name.startswith(f"{ROOT}."):
        return logging.getLogger(name)
    return logging.getLogger(f"{ROOT}.{name}")


def write_event(event: Event) -> None:
    """Write one event as a log record. A field whose name logging reserves gets a trailing underscore."""
    logger = logging.getLogger(ROOT)
    if not logger.isEnabledFor(event.level):
        return
    error = event.error
    logger.log(
        event.level,
        format_event(event.event, event.fields),
        exc_info=None if error is None else (type(error), error, error.__traceback__),
        extra={**_attributes(event.fields), "event": event.event},
    )


def _attributes(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {(f"{key}_" if key in _STANDARD_ATTRIBUTES else key): _cut(value) for key, value in fields.items()}


def _cut(value: Any) -> Any:
    if not isinstance(value, str) or len(value) <= MAX_FACT_CHARS:
        return value
    return f"{value[:MAX_FACT_CHARS]}… ({len(value)} characters)"


def format_event(event: str, fields: Mapping[str, Any]) -> str:
    """Write an event and its facts as one line: `connection_opened client_id=ann connection_id=5f3a`."""
    return " ".join([escape_control_chars(event), *(f"{key}={_quoted(value)}" for key, value in fields.items())])


def escape_control_chars(text: str) -> str:
    """Escape what would end or rewrite a line: control characters and Unicode's line separators."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _quoted(value: Any) -> str:
    text = f"{value:.3f}" if isinstance(value, float) else str(_cut(value))
    if text and text.isprintable() and not any(c in text for c in ' "='):
        return text
    return json.dumps(text, ensure_ascii=not text.isprintable())


class JsonFormatter(logging.Formatter):
    """Formats each record as one JSON object: time, level, logger, message, event and every fact."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line of JSON; a value that JSON does not know is written as its `str`."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        for key, value in vars(record).items():
            if key not in _STANDARD_ATTRIBUTES:
                line[f"{key}_" if key in _JSON_FIELDS else key] = value
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return _escaped(json.dumps(line, ensure_ascii=False, default=str))


class TextFormatter(logging.Formatter):
    """Formats each record as a line, and its traceback, whose end may be a client's words, as indented lines below."""

    def formatException(self, ei: Any) -> str:  # noqa: N802 (logging's name)
        """Return the traceback, in which no line can be taken for a record and nothing speaks to a terminal."""
        return "\n".join(f"    {line}" for line in _escaped(super().formatException(ei)).split("\n"))


def _escaped(text: str) -> str:
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def configure_logging(level: str = "INFO", *, json_lines: bool = False) -> None:
    """Write the library's log to standard error. Calling it again changes the set-up and doubles nothing.

    Applications that configure logging themselves need not call it.

    Args:
        level: DEBUG, INFO, WARNING, ERROR or CRITICAL.
        json_lines: Whether to write one JSON object per line instead of text.

    Raises:
        ValueError: `level` is not one of those.
    """
    logger = logging.getLogger(ROOT)
    logger.setLevel(level.upper())
    for ours in [handler for handler in logger.handlers if handler.get_name() == ROOT]:
        logger.removeHandler(ours)
    handler: logging.Handler = logging.StreamHandler()
    handler.set_name(ROOT)
    handler.setFormatter(
        JsonFormatter() if json_lines else TextFormatter("%(asctime)s %(levelname)s %(name)s %(message)s")
    )
    logger.addHandler(handler)
    logger.propagate = False  # the root logger's handlers would write every line a second time


class StructuredLogger:
    """Writes named events with their facts to a logger.

    Args:
        logger: Where to write; `get_logger()` is usual.
    """

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger

    def log(self, level: int, event: str, **fields: Any) -> None:
        """Write one event: the facts stand in the message and are attributes of the record."""
        if self._logger.isEnabledFor(level):
            self._logger.log(level, format_event(event, fields), extra={**_attributes(fields), "event": event})

    def log_connection(self, event: str, client_id: str, **kwargs: Any) -> None:
        """Write an event of a connection's life."""
        self.log(logging.INFO, event, client_id=client_id, **kwargs)

    def log_broadcast(self, total: int, succeeded: int, failed: int, **kwargs: Any) -> None:
        """Write what became of a broadcast."""
        self.log(logging.INFO, "broadcast", total=total, succeeded=succeeded, failed=failed, **kwargs)

    def log_heartbeat(self, event: str, client_id: str, **kwargs: Any) -> None:
        """Write an event of the heartbeat."""
        self.log(logging.DEBUG, event, client_id=client_id, **kwargs)

    def log_token(self, event: str, client_id: str, **kwargs: Any) -> None:
        """Write an event of a reconnect token. The token itself must not be among the facts."""
        self.log(logging.INFO, event, client_id=client_id, **kwargs)

    def log_error(self, error_type: str, client_id: str, error_message: str, **kwargs: Any) -> None:
        """Write an error that concerns a client."""
        self.log(
            logging.ERROR, "error", error_type=error_type, client_id=client_id, error_message=error_message, **kwargs
        )
