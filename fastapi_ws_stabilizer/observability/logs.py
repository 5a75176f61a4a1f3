"""Structured logs on standard logging: each record has the name and the fields of one event.

All records go to the logger `fastapi_ws_stabilizer`. The fields are attributes of the record (`record.event`,
`record.connection_id`, ...) for any JSON formatter. The message contains them too, in quotes, so that a client id with
a line break cannot forge a line.
"""

from __future__ import annotations

import json
import logging
import re
import time
import types
from collections.abc import Mapping
from typing import Any, Final

from fastapi_ws_stabilizer.events import Event

ROOT: Final = "fastapi_ws_stabilizer"

_LOGGER: Final = logging.getLogger(ROOT)

_PLAIN = logging.LogRecord("", 0, "", 0, "", None, None)
_STANDARD_ATTRIBUTES: Final = frozenset(vars(_PLAIN)) | {"message", "asctime", "taskName"}
_JSON_FIELDS: Final = frozenset({"time", "level", "logger", "exception"})
_UNSAFE: Final = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that end or rewrite a line, change the order of its characters, or cannot be written at all. JSON allows
them in strings. A text log leaves only line feeds in a traceback, and indents each line."""

MAX_FIELD_CHARS: Final = 500
"""Maximum characters of a field in the log. Clients choose some fields, with any length."""


def get_logger(name: str = ROOT) -> logging.Logger:
    """Return the library's logger, or the child logger with this name.

    `get_logger("hub")` and `get_logger("fastapi_ws_stabilizer.hub")` return the same child of `get_logger()`.
    """
    if name == ROOT or name.startswith(f"{ROOT}."):
        return logging.getLogger(name)
    return logging.getLogger(f"{ROOT}.{name}")


def is_logged(level: int) -> bool:
    """Return whether a handler takes the library's records of this level.

    A record costs about 40 µs, and many servers configure no handler. The answer is not stored, because handlers and
    levels can change at any time.
    """
    if not _LOGGER.isEnabledFor(level):
        return False
    if _LOGGER.filters or not _calls_only_handlers(_LOGGER):  # a filter, or a library such as Sentry, takes records too
        return True
    has_handler = False
    logger: logging.Logger | None = _LOGGER
    while logger is not None:
        for handler in logger.handlers:
            has_handler = True
            if level >= handler.level and not isinstance(handler, logging.NullHandler):
                return True
        logger = logger.parent if logger.propagate else None
    last_resort = logging.lastResort  # what logging uses without any handler
    return not has_handler and last_resort is not None and level >= last_resort.level


def _calls_only_handlers(logger: logging.Logger) -> bool:
    """Return whether the logger passes its records to handlers only, as that of the standard library does."""
    method = type(logger).callHandlers
    return type(method) is types.FunctionType and method.__module__ == logging.__name__


def write_event(event: Event) -> None:
    """Write one event as a log record. A field with a name that logging reserves gets a trailing underscore."""
    error = event.error
    _LOGGER.log(
        event.level,
        format_event(event.event, event.fields),
        exc_info=None if error is None else (type(error), error, error.__traceback__),
        extra={**_attributes(event.fields), "event": event.event},
    )


def _attributes(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {(f"{key}_" if key in _STANDARD_ATTRIBUTES else key): _truncate(value) for key, value in fields.items()}


def _truncate(value: Any) -> Any:
    if not isinstance(value, str) or len(value) <= MAX_FIELD_CHARS:
        return value
    return f"{value[:MAX_FIELD_CHARS]}… ({len(value)} characters)"


def format_event(event: str, fields: Mapping[str, Any]) -> str:
    """Return an event and its fields as one line: `connection_opened client_id=ann connection_id=5f3a`."""
    return " ".join([escape_control_chars(event), *(f"{key}={_quoted(value)}" for key, value in fields.items())])


def escape_control_chars(text: str) -> str:
    """Escape characters that end or rewrite a line: control characters and Unicode's line separators."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _quoted(value: Any) -> str:
    text = f"{value:.3f}" if isinstance(value, float) else str(_truncate(value))
    if text and text.isprintable() and not any(c in text for c in ' "='):
        return text
    return json.dumps(text, ensure_ascii=not text.isprintable())


class JsonFormatter(logging.Formatter):
    """Formatter that writes each record as one JSON object: time, level, logger, message, event and every field."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line of JSON. A value without a JSON type is written as its `str`."""
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
    """Formatter that writes each record as one line, and its traceback as indented lines below.

    The last line of a traceback can contain text of a client.
    """

    def formatException(self, ei: Any) -> str:  # noqa: N802 (logging's name)
        """Return the traceback with indented lines, which cannot look like records, and without control characters."""
        return "\n".join(f"    {line}" for line in _escaped(super().formatException(ei)).split("\n"))


def _escaped(text: str) -> str:
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def configure_logging(level: str = "INFO", *, json_lines: bool = False) -> None:
    """Write the library's log to standard error. A further call replaces the setup of the previous one.

    Applications that configure logging themselves do not need this function.

    Args:
        level: DEBUG, INFO, WARNING, ERROR or CRITICAL.
        json_lines: Whether to write one JSON object per line instead of text.

    Raises:
        ValueError: `level` is not one of these levels.
    """
    logger = logging.getLogger(ROOT)
    logger.setLevel(level.upper())
    for installed in [handler for handler in logger.handlers if handler.get_name() == ROOT]:
        logger.removeHandler(installed)
    handler: logging.Handler = logging.StreamHandler()
    handler.set_name(ROOT)
    handler.setFormatter(
        JsonFormatter() if json_lines else TextFormatter("%(asctime)s %(levelname)s %(name)s %(message)s")
    )
    logger.addHandler(handler)
    logger.propagate = False  # the root logger's handlers would write every line again


class StructuredLogger:
    """Logger of named events with fields.

    Args:
        logger: The logger to write to, usually `get_logger()`.
    """

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger

    def log(self, level: int, event: str, **fields: Any) -> None:
        """Write one event. Its fields are in the message, and are attributes of the record."""
        if self._logger.isEnabledFor(level):
            self._logger.log(level, format_event(event, fields), extra={**_attributes(fields), "event": event})

    def log_connection(self, event: str, client_id: str, **kwargs: Any) -> None:
        """Write an event of a connection."""
        self.log(logging.INFO, event, client_id=client_id, **kwargs)

    def log_broadcast(self, total: int, succeeded: int, failed: int, **kwargs: Any) -> None:
        """Write the result of a broadcast."""
        self.log(logging.INFO, "broadcast", total=total, succeeded=succeeded, failed=failed, **kwargs)

    def log_heartbeat(self, event: str, client_id: str, **kwargs: Any) -> None:
        """Write an event of the heartbeat."""
        self.log(logging.DEBUG, event, client_id=client_id, **kwargs)

    def log_token(self, event: str, client_id: str, **kwargs: Any) -> None:
        """Write an event of a reconnect token. The token itself must not be one of the fields."""
        self.log(logging.INFO, event, client_id=client_id, **kwargs)

    def log_error(self, error_type: str, client_id: str, error_message: str, **kwargs: Any) -> None:
        """Write an error of a client."""
        self.log(
            logging.ERROR, "error", error_type=error_type, client_id=client_id, error_message=error_message, **kwargs
        )
