"""Tests of the Prometheus metrics of a manager, read by the parser of prometheus-client."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from fastapi_ws_stabilizer.close_codes import DisconnectReason
from fastapi_ws_stabilizer.config import WebSocketConfig
from fastapi_ws_stabilizer.dependencies import StableSocketDep
from fastapi_ws_stabilizer.events import Counters
from fastapi_ws_stabilizer.manager import WebSocketConnectionManager
from fastapi_ws_stabilizer.stats.router import EXPORTER
from tests.unit.stats.test_router import make

PREFIX = "fastapi_ws_"


def made(**options: Any) -> WebSocketConnectionManager:
    """Return a manager that collects metrics."""
    return WebSocketConnectionManager(WebSocketConfig(enable_metrics=True, **options))


def scraped(client: TestClient) -> dict[str, Any]:
    """Return the metric families by name, without the prefix."""
    text = client.get("/ws-stats/metrics").text
    families = list(text_string_to_metric_families(text))
    assert all(family.name.startswith(PREFIX) and family.documentation for family in families)
    return {family.name.removeprefix(PREFIX): family for family in families}


def value(families: dict[str, Any], name: str, **labels: str) -> float:
    """Return one value."""
    (found,) = [
        sample.value
        for family in families.values()
        for sample in family.samples
        if sample.name == f"{PREFIX}{name}" and sample.labels == labels
    ]
    return float(found)


def test_metrics_without_enable_metrics_return_404() -> None:
    """The answer is 404 with the option that enables them, and nothing is timed."""
    manager = WebSocketConnectionManager()
    assert manager.events.timings is None
    with TestClient(make(manager)) as client:
        answer = client.get("/ws-stats/metrics")
    assert answer.status_code == 404
    assert "enable_metrics" in answer.json()["detail"]


def test_metrics_response_has_format_0_0_4() -> None:
    """The content type names the format, and the parser finds all families with their types."""
    with TestClient(make(made())) as client:
        assert client.get("/ws-stats/metrics").headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        families = scraped(client)
    kinds = {name: family.type for name, family in families.items()}
    assert kinds["connections"] == kinds["total_memory"] == kinds["uptime_seconds"] == "gauge"
    assert kinds["handler_seconds"] == kinds["round_trip_seconds"] == "histogram"
    assert all(kinds[name] == "counter" for name in {field.name for field in dataclasses.fields(Counters)})


def test_openmetrics_is_negotiated() -> None:
    """A scraper that accepts OpenMetrics in any of its `Accept` headers gets it."""
    headers = [("accept", "text/html"), ("accept", "application/openmetrics-text;version=1.0.0")]
    with TestClient(make(made())) as client:
        answer = client.get("/ws-stats/metrics", headers=headers)  # type: ignore[arg-type]
    assert answer.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0; charset=utf-8")
    assert answer.text.endswith("# EOF\n")
    assert "fastapi_ws_connections 0.0\n" in answer.text


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without prometheus-client the endpoint answers 501 with the command, and all other endpoints work."""
    for name in [name for name in sys.modules if name.split(".")[0] == "prometheus_client"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, EXPORTER, raising=False)
    with TestClient(make(made())) as client:
        answer = client.get("/ws-stats/metrics")
        assert client.get("/ws-stats/").status_code == 200
        assert client.get("/ws-stats/health").status_code == 200
    assert answer.status_code == 501
    assert 'pip install "fastapi-ws-stabilizer[metrics]"' in answer.json()["detail"]


def test_other_import_errors_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken module of the library is a bug, and is not reported as a missing extra."""
    monkeypatch.delitem(sys.modules, EXPORTER, raising=False)
    monkeypatch.setitem(sys.modules, "fastapi_ws_stabilizer.metrics.timings", None)
    with TestClient(make(made())) as client, pytest.raises(ModuleNotFoundError, match="timings"):
        client.get("/ws-stats/metrics")


def test_metrics_count_connections_and_close_causes() -> None:
    """Connections, closes by cause, rejections by option and memory are included; unused values are 0."""
    manager = made(max_connections=1)
    with TestClient(make(manager)) as client:
        with client.websocket_connect("/ws/ann") as ann:
            ann.send_text("hi")
            ann.receive_text()
            manager.get_sockets()[0].user_data["text"] = "x" * 10_000
            with pytest.raises(WebSocketDisconnect), client.websocket_connect("/ws/bob"):
                pass
            during = scraped(client)
        after = scraped(client)
    assert value(during, "connections") == 1
    assert value(during, "total_memory") > 10_000
    assert value(during, "memory_per_connection_average") == value(during, "total_memory")
    assert value(during, "refusals_total", by="max_connections") == 1
    assert value(during, "endings_total", reason="client_close") == 0
    assert value(after, "endings_total", reason="client_close") == 1
    assert value(after, "messages_received_total") == 1
    assert value(after, "total_memory") == 0
    assert {sample.labels["reason"] for sample in after["endings"].samples} == {one.value for one in DisconnectReason}
    assert {sample.labels["how"] for sample in after["slow_clients"].samples} == {"lagging", "dropping", "disconnected"}


def test_handlers_and_round_trips_are_timed() -> None:
    """A handler is timed once for each message, also one that is rejected; a round trip for each answered ping."""
    manager = made(heartbeat_interval=0.01)
    app = make(manager)

    @manager.on_message("say")
    async def say(ws: Any) -> None:
        await ws.send("said")

    @app.websocket("/run/{client_id}")
    async def run(ws: StableSocketDep) -> None:
        await ws.run()

    with TestClient(app) as client, client.websocket_connect("/run/ann") as ann:
        ann.send_json({"type": "say"})
        answers = [ann.receive_text(), ann.receive_text()]
        assert set(answers) == {"said", '{"type":"ping"}'}
        ann.send_json({"type": "no handler"})
        ann.send_text("pong")
        ann.send_json({"type": "say"})
        while ann.receive_text() != "said":
            pass
        families = scraped(client)
    assert value(families, "handler_seconds_count") == 2
    assert value(families, "handler_seconds_bucket", le="+Inf") == 2
    assert 0 < value(families, "handler_seconds_sum") < 5
    assert value(families, "round_trip_seconds_count") == 1
    assert 0 < value(families, "round_trip_seconds_sum") < 5
