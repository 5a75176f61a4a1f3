"""Tests of the structured logs."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastapi_ws_stabilizer import WebSocketConnectionManager
from fastapi_ws_stabilizer.events import Event
from fastapi_ws_stabilizer.observability.logs import (
    MAX_FIELD_CHARS,
    ROOT,
    JsonFormatter,
    StructuredLogger,
    configure_logging,
    escape_control_chars,
    format_event,
    get_logger,
    is_logged,
    write_event,
)

FORGERY = 'ann\n2026-01-01 ERROR forged event=x\r\x1b[2J\u2028"quoted"'


def record(**fields: Any) -> logging.LogRecord:
    """Return a record as the library writes it."""
    made = logging.LogRecord(ROOT, logging.INFO, __file__, 1, "hello %s", ("there",), None)
    vars(made).update(fields)
    return made


@pytest.mark.parametrize("name", [ROOT, f"{ROOT}.hub", "hub"])
def test_every_logger_is_below_package_logger(name: str) -> None:
    """A short and a long name give the same logger, with the package's name in it once."""
    logger = get_logger(name)
    assert logger.name.count(ROOT) == 1
    assert logger is get_logger(logger.name)
    assert logger is get_logger() or logger.parent is get_logger()


def test_event_becomes_one_record_with_its_fields(caplog: pytest.LogCaptureFixture) -> None:
    """An event is written once: its name and fields are attributes of the record and part of its message."""
    with caplog.at_level(logging.INFO, logger=ROOT):
        write_event(Event("connection_opened", logging.INFO, {"client_id": "ann", "connection_id": "5f3a"}))
    (written,) = caplog.records
    assert (written.event, written.client_id, written.connection_id) == ("connection_opened", "ann", "5f3a")
    assert written.getMessage() == "connection_opened client_id=ann connection_id=5f3a"
    assert written.exc_info is None


@pytest.fixture
def bare_logging(monkeypatch: pytest.MonkeyPatch) -> logging.Logger:
    """Return the library's logger at INFO, below a root logger without the handlers of pytest."""
    logger = get_logger()
    monkeypatch.setattr(logger, "parent", logging.RootLogger(logging.WARNING))
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", True)
    logger.setLevel(logging.INFO)
    return logger


def test_level_without_handler_is_not_logged(bare_logging: logging.Logger) -> None:
    """Without any handler, logging writes warnings to standard error, so only these levels are logged."""
    assert [is_logged(level) for level in (logging.DEBUG, logging.INFO, logging.WARNING)] == [False, False, True]


def test_level_without_handler_or_last_resort_is_not_logged(
    bare_logging: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An application can remove the last resort of logging. Then nothing is logged without a handler."""
    monkeypatch.setattr(logging, "lastResort", None)
    assert not is_logged(logging.CRITICAL)


def test_handler_added_later_is_found(bare_logging: logging.Logger) -> None:
    """A handler that is added to the root logger later takes the next event."""
    assert not is_logged(logging.INFO)
    assert bare_logging.parent is not None
    bare_logging.parent.addHandler(logging.StreamHandler())
    assert is_logged(logging.INFO)
    bare_logging.propagate = False
    assert not is_logged(logging.INFO)


def test_handler_above_level_takes_no_event(bare_logging: logging.Logger) -> None:
    """A handler takes the events from its own level on, and any handler replaces the last resort of logging."""
    handler = logging.StreamHandler()
    handler.setLevel(logging.ERROR)
    bare_logging.addHandler(handler)
    assert [is_logged(level) for level in (logging.INFO, logging.WARNING, logging.ERROR)] == [False, False, True]


def test_null_handler_takes_no_event(bare_logging: logging.Logger) -> None:
    """A `NullHandler` writes nothing, and silences the last resort of logging."""
    bare_logging.addHandler(logging.NullHandler())
    assert not is_logged(logging.WARNING)


def test_disabled_level_is_not_logged(bare_logging: logging.Logger) -> None:
    """A level that the application has disabled for all loggers is not logged."""
    bare_logging.addHandler(logging.StreamHandler())
    logging.disable(logging.WARNING)
    try:
        assert [is_logged(level) for level in (logging.WARNING, logging.ERROR)] == [False, True]
    finally:
        logging.disable(logging.NOTSET)


def test_filter_of_logger_gets_events_without_handler(
    bare_logging: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A filter of the library's logger sees each record, even if no handler takes it."""
    monkeypatch.setattr(bare_logging, "filters", [lambda _: True])
    assert is_logged(logging.INFO)


def test_wrapped_logger_gets_events_without_handler(
    bare_logging: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Error trackers replace `Logger.callHandlers` to take each record, so events are then created for them."""
    original = logging.Logger.callHandlers

    def tracked(self: logging.Logger, record: logging.LogRecord) -> None:
        original(self, record)

    monkeypatch.setattr(logging.Logger, "callHandlers", tracked)
    assert is_logged(logging.INFO)


def test_manager_creates_no_event_without_log_handler(
    bare_logging: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A manager's INFO events cost no record while no handler takes them."""
    records: list[logging.LogRecord] = []
    monkeypatch.setattr(bare_logging, "handle", records.append)
    manager = WebSocketConnectionManager()
    manager.events.emit("connection_opened", logging.INFO, client_id="ann")
    manager.events.emit("server_full", logging.WARNING)
    assert [record.event for record in records] == ["server_full"]  # type: ignore[attr-defined]


def test_event_below_logger_level_is_not_written(caplog: pytest.LogCaptureFixture) -> None:
    """An event below the logger's level is not written."""
    with caplog.at_level(logging.WARNING, logger=ROOT):
        write_event(Event("connection_opened", logging.INFO, {}))
    assert not caplog.records


def test_error_event_has_traceback(caplog: pytest.LogCaptureFixture) -> None:
    """The exception of an event is the exception of its record."""
    error = ValueError("no")
    write_event(Event("endpoint_failed", logging.ERROR, {}, error))
    assert caplog.records[0].exc_info == (ValueError, error, None)


@pytest.mark.parametrize("name", ["name", "message", "args", "msg", "exc_info", "taskName", "asctime", "module"])
def test_field_named_like_record_attribute_is_renamed(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """A field with the name of a record attribute does not break the logging."""
    with caplog.at_level(logging.INFO, logger=ROOT):
        write_event(Event("x", logging.INFO, {name: "mine"}))
        StructuredLogger(get_logger()).log(logging.INFO, "x", **{name: "mine"})
    assert [getattr(written, f"{name}_") for written in caplog.records] == ["mine", "mine"]


def test_hostile_client_id_does_not_forge_log_line(caplog: pytest.LogCaptureFixture) -> None:
    """Line breaks, escape sequences and quotes of a client id are escaped, so that the record stays one line."""
    with caplog.at_level(logging.INFO, logger=ROOT):
        write_event(Event("connection_opened", logging.INFO, {"client_id": FORGERY}))
    message = caplog.records[0].getMessage()
    assert len(message.splitlines()) == 1
    assert "\x1b" not in message
    assert caplog.records[0].client_id == FORGERY


@pytest.mark.parametrize("json_lines", [False, True])
def test_hostile_traceback_does_not_forge_log_line(json_lines: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Text of a client in an exception starts no line of the log, and sends no command to a terminal."""
    configure_logging(json_lines=json_lines)
    try:
        raise ValueError(FORGERY + "\x9b2J\u202e\ud800")
    except ValueError as error:
        write_event(Event("endpoint_failed", logging.ERROR, {"client_id": "ann"}, error))
    first, *rest = capsys.readouterr().err.split("\n")
    assert "endpoint_failed" in first
    if json_lines:
        assert rest == [""]
        assert "2026-01-01 ERROR forged" in json.loads(first)["exception"]
    else:
        assert any("2026-01-01 ERROR forged" in line for line in rest)
        assert all(line.startswith("    ") for line in rest[:-1])
        assert all(line.isprintable() for line in rest)


@pytest.mark.parametrize("json_lines", [False, True])
def test_long_client_text_is_truncated_in_log(json_lines: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """A megabyte of client text is truncated in the log, with a note."""
    configure_logging(json_lines=json_lines)
    write_event(Event("connection_opened", logging.INFO, {"client_id": "x" * 1_000_000, "count": 10**6}))
    StructuredLogger(get_logger()).log_connection("connected", "y" * 1_000_000)
    written = capsys.readouterr().err
    assert len(written) < 6 * MAX_FIELD_CHARS
    assert "x" * MAX_FIELD_CHARS + "… (1000000 characters)" in written


@given(st.text(), st.dictionaries(st.sampled_from(["client_id", "cause", "path"]), st.text()))
def test_formatted_event_is_one_parsable_line(event: str, fields: dict[str, str]) -> None:
    """With any event and fields, the message is one printable line; a quoted field is JSON."""
    line = format_event(event, fields)
    assert line.isprintable()
    assert len(line.splitlines()) <= 1
    alone = format_event("e", fields)
    for key, value in fields.items():
        quoted = value if value and value.isprintable() and not set(value) & set(' "=') else None
        assert f"{key}={quoted if quoted is not None else ''}" in alone
        if quoted is None:
            written = alone.split(f"{key}=", 1)[1]
            assert json.JSONDecoder().raw_decode(written)[0] == value


@pytest.mark.parametrize(
    ("value", "written"),
    [("ann", "f=ann"), ("", 'f=""'), ("a b", 'f="a b"'), ("a=b", 'f="a=b"'), (1.23456, "f=1.235"), (None, "f=None")],
)
def test_field_is_quoted_only_when_ambiguous(value: Any, written: str) -> None:
    """Plain words and numbers are not quoted; ambiguous values are."""
    assert format_event("e", {"f": value}) == f"e {written}"


def test_escape_control_chars_leaves_printable_text_unchanged() -> None:
    """Only characters that would end or rewrite a line are escaped."""
    assert escape_control_chars("grün 🌱") == "grün 🌱"
    assert escape_control_chars("a\nb\u2029c") == "a\\nb\\u2029c"


def test_json_line_contains_event_and_fields() -> None:
    """A record formatted as JSON has time, level, logger, message, and every field; unknown values as `str`."""
    made = record(event="connection_opened", client_id="ann", odd={1})
    line = json.loads(JsonFormatter().format(made))
    assert line["time"].endswith("Z")
    assert (line["level"], line["logger"], line["message"]) == ("INFO", ROOT, "hello there")
    assert (line["event"], line["client_id"], line["odd"]) == ("connection_opened", "ann", "{1}")
    assert "exception" not in line


def test_json_line_contains_traceback() -> None:
    """The traceback of a record is one JSON string."""
    made = record()
    error = ValueError("no")
    made.exc_info = (ValueError, error, None)
    assert json.loads(JsonFormatter().format(made))["exception"] == "ValueError: no"


def test_json_line_contains_no_line_separator() -> None:
    """No character of a field, not even Unicode's line separators, splits a JSON line."""
    assert len(JsonFormatter().format(record(client_id=FORGERY + "\x85")).splitlines()) == 1


@pytest.mark.parametrize("name", ["time", "level", "logger"])
def test_field_does_not_replace_record_field_in_json_line(name: str) -> None:
    """Time, level and logger of a JSON line are the record's, regardless of the names of fields."""
    plain = json.loads(JsonFormatter().format(record()))
    forged = json.loads(JsonFormatter().format(record(**{name: "forged"})))
    assert forged[name] != "forged"
    assert type(forged[name]) is type(plain[name])


def test_configure_logging_twice_writes_each_line_once(capsys: pytest.CaptureFixture[str]) -> None:
    """The second `configure_logging` replaces the first, and no line is written twice."""
    root_handler = logging.StreamHandler()
    logging.getLogger().addHandler(root_handler)
    try:
        configure_logging()
        configure_logging("debug")
        get_logger("hub").debug("only once")
    finally:
        logging.getLogger().removeHandler(root_handler)
    assert capsys.readouterr().err.count("only once") == 1
    assert get_logger().level == logging.DEBUG


def test_configure_logging_retains_application_handlers() -> None:
    """A handler that the application has added to the logger stays."""
    own = logging.NullHandler()
    get_logger().addHandler(own)
    configure_logging()
    configure_logging()
    assert own in get_logger().handlers
    assert len(get_logger().handlers) == 2


def test_configure_logging_supports_json_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """`configure_logging(json_lines=True)` writes each record as one JSON object."""
    configure_logging(json_lines=True)
    StructuredLogger(get_logger()).log_connection("connection_opened", "a\nb")
    line = json.loads(capsys.readouterr().err)
    assert (line["event"], line["client_id"]) == ("connection_opened", "a\nb")


@pytest.mark.parametrize("level", ["LOUD", ""])
def test_configure_logging_rejects_unknown_level(level: str) -> None:
    """An unknown level is a `ValueError`, and changes nothing."""
    before = list(get_logger().handlers)
    with pytest.raises(ValueError, match="level"):
        configure_logging(level)
    assert get_logger().handlers == before


@pytest.mark.parametrize(
    ("method", "args", "event", "fields"),
    [
        ("log_connection", ("connected", "ann"), "connected", {"client_id": "ann"}),
        ("log_broadcast", (3, 2, 1), "broadcast", {"total": 3, "succeeded": 2, "failed": 1}),
        ("log_heartbeat", ("ping", "ann"), "ping", {"client_id": "ann"}),
        ("log_token", ("issued", "ann"), "issued", {"client_id": "ann"}),
        ("log_error", ("Bug", "ann", "it broke"), "error", {"error_type": "Bug", "error_message": "it broke"}),
    ],
)
def test_structured_logger_writes_events_with_fields(
    method: str, args: tuple[Any, ...], event: str, fields: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Each method of `StructuredLogger` writes one record with its event, its fields and the extra ones."""
    with caplog.at_level(logging.DEBUG, logger=ROOT):
        getattr(StructuredLogger(get_logger()), method)(*args, extra_fact=7)
    (written,) = caplog.records
    assert written.event == event
    assert written.extra_fact == 7
    for name, value in fields.items():
        assert getattr(written, name) == value
    assert written.getMessage().startswith(event)


def test_structured_logger_respects_level(caplog: pytest.LogCaptureFixture) -> None:
    """An event below the level is not written."""
    with caplog.at_level(logging.INFO, logger=ROOT):
        StructuredLogger(get_logger()).log_heartbeat("ping", "ann")
    assert not caplog.records
