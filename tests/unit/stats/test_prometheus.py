"""Tests of the Prometheus collector, read by the parsers of prometheus_client."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from fastapi_ws_stabilizer.config import WebSocketConfig
from fastapi_ws_stabilizer.events import Counters
from fastapi_ws_stabilizer.manager import WebSocketConnectionManager
from fastapi_ws_stabilizer.stats.models import StatsSummary
from fastapi_ws_stabilizer.stats.prometheus import MetricsCollector, render_metrics
from tests.support.fake_websocket import FakeServer

TEXT = "text/plain; version=0.0.4; charset=utf-8"
LABELS = st.one_of(
    st.text(st.sampled_from('\\\n"n{},= ab')),
    st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\r")),
)

GAUGES = {
    "fastapi_ws_clients",
    "fastapi_ws_connections",
    "fastapi_ws_memory_per_connection_average",
    "fastapi_ws_queued_bytes",
    "fastapi_ws_queued_messages",
    "fastapi_ws_rooms",
    "fastapi_ws_running",
    "fastapi_ws_sessions",
    "fastapi_ws_sessions_away",
    "fastapi_ws_total_memory",
    "fastapi_ws_unread_messages",
    "fastapi_ws_uptime_seconds",
}
COUNTERS = {
    "fastapi_ws_bad_messages_total",
    "fastapi_ws_broadcasts_total",
    "fastapi_ws_connections_opened_total",
    "fastapi_ws_endings_total",
    "fastapi_ws_evictions_total",
    "fastapi_ws_gc_full_collections_total",
    "fastapi_ws_gc_full_seconds_total",
    "fastapi_ws_messages_coalesced_total",
    "fastapi_ws_messages_discarded_total",
    "fastapi_ws_messages_dropped_total",
    "fastapi_ws_messages_received_total",
    "fastapi_ws_messages_refused_total",
    "fastapi_ws_messages_sent_total",
    "fastapi_ws_pings_sent_total",
    "fastapi_ws_refusals_total",
    "fastapi_ws_session_gaps_total",
    "fastapi_ws_sessions_lost_total",
    "fastapi_ws_sessions_resumed_total",
    "fastapi_ws_slow_clients_total",
}
HISTOGRAMS = {"fastapi_ws_handler_seconds", "fastapi_ws_round_trip_seconds"}


def timed_manager() -> WebSocketConnectionManager:
    """Return a manager with `enable_metrics`."""
    return WebSocketConnectionManager(WebSocketConfig(enable_metrics=True))


def text_of(manager: WebSocketConnectionManager) -> str:
    """Return the metrics in the text format."""
    return render_metrics(manager)[0].decode()


def samples(families: Any) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Return the values of parsed metrics by name and labels."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def test_metric_names_and_types_are_stable() -> None:
    """Dashboards depend on each name and type."""
    lines = [line.split() for line in text_of(timed_manager()).splitlines() if line.startswith("# TYPE")]
    types = {name: kind for _, _, name, kind in lines}
    assert types == {
        **dict.fromkeys(GAUGES, "gauge"),
        **dict.fromkeys(COUNTERS, "counter"),
        **dict.fromkeys(HISTOGRAMS, "histogram"),
    }
    assert len(types) == len(lines)


def test_every_known_number_has_a_metric() -> None:
    """Each counter, each total of the stats router and each memory number has a metric."""
    manager = timed_manager()
    names = {metric.name.removeprefix("fastapi_ws_") for metric in MetricsCollector(manager).collect()}
    assert {field.name for field in dataclasses.fields(Counters)} <= set(StatsSummary.model_fields)
    assert set(StatsSummary.model_fields) <= names
    memory = {"memory_per_connection_average" if "average" in name else name for name in manager.get_memory_usage()}
    assert memory - {"connection_count"} <= names  # `connection_count` is the metric `connections`


def test_help_equals_description_in_the_stats() -> None:
    """The stats router and Prometheus describe each number with the same text."""
    helps = {metric.name: metric.documentation for metric in MetricsCollector(timed_manager()).collect()}
    for name, field in StatsSummary.model_fields.items():
        assert helps[f"fastapi_ws_{name}"] == field.description


def test_each_type_has_its_text_form() -> None:
    """A counter ends in `_total`, labels are quoted, and a histogram has buckets, a count and a sum."""
    manager = timed_manager()
    manager.counters.connections_opened = 3
    manager.counters.refusals["max_connections"] = 2
    assert manager.events.timings is not None
    manager.events.timings.handlers.observe(0.0004)
    manager.events.timings.handlers.observe(99)
    lines = text_of(manager).splitlines()
    first = lines.index("# TYPE fastapi_ws_connections gauge")
    assert lines[first - 1 : first + 2] == [
        "# HELP fastapi_ws_connections Open connections.",
        "# TYPE fastapi_ws_connections gauge",
        "fastapi_ws_connections 0.0",
    ]
    assert "fastapi_ws_connections_opened_total 3.0" in lines
    assert 'fastapi_ws_refusals_total{by="max_connections"} 2.0' in lines
    assert 'fastapi_ws_slow_clients_total{how="lagging"} 0.0' in lines
    first = lines.index('fastapi_ws_handler_seconds_bucket{le="0.0005"} 1.0')
    assert lines[first + 13 : first + 17] == [
        'fastapi_ws_handler_seconds_bucket{le="10.0"} 1.0',
        'fastapi_ws_handler_seconds_bucket{le="+Inf"} 2.0',
        "fastapi_ws_handler_seconds_count 2.0",
        "fastapi_ws_handler_seconds_sum 99.0004",
    ]


@example('"')
@example('a"} 1\nforged 2')
@given(LABELS)
def test_label_values_are_escaped(value: str) -> None:
    """The parser gets the original label, and no label adds a line."""
    manager = WebSocketConnectionManager()
    before = samples(text_string_to_metric_families(text_of(manager)))
    manager.counters.refusals[value] = 2
    after = samples(text_string_to_metric_families(text_of(manager)))
    assert {key: after[key] for key in set(after) - set(before)} == {
        ("fastapi_ws_refusals_total", (("by", value),)): 2.0
    }


def test_each_metric_has_one_help_line() -> None:
    """The help stands directly before the type, as a sentence."""
    lines = text_of(timed_manager()).splitlines()
    for number, line in enumerate(lines):
        if line.startswith("# TYPE"):
            name = line.split()[2]
            assert lines[number - 1].startswith(f"# HELP {name} ")
            assert lines[number - 1].endswith(".")
    assert sum(line.startswith("# HELP") for line in lines) == len(GAUGES | COUNTERS | HISTOGRAMS)


@pytest.mark.parametrize("value", [0, 7, 2**40, 2**53])
def test_numbers_keep_their_value(value: int) -> None:
    """The text format preserves every digit of large and small counts."""
    manager = WebSocketConnectionManager()
    manager.counters.messages_sent = value
    read = samples(text_string_to_metric_families(text_of(manager)))
    assert read["fastapi_ws_messages_sent_total", ()] == float(value)


def test_metric_without_samples_is_declared() -> None:
    """The help and the type of the rejections are present before the first rejection."""
    families = {family.name: family for family in text_string_to_metric_families(text_of(WebSocketConnectionManager()))}
    refusals = families["fastapi_ws_refusals"]
    assert (refusals.type, refusals.samples) == ("counter", [])
    assert refusals.documentation.startswith("Handshakes rejected")


def test_histograms_need_enable_metrics() -> None:
    """Without the option nothing is timed, and all other metrics are there."""
    kinds = {metric.name: metric.type for metric in MetricsCollector(WebSocketConnectionManager()).collect()}
    assert "histogram" not in kinds.values()
    assert len(kinds) == len(GAUGES | COUNTERS)


# ── formats ──


def test_text_format_is_the_default() -> None:
    """Prometheus chooses its parser by the content type."""
    assert render_metrics(WebSocketConnectionManager())[1] == TEXT


@pytest.mark.parametrize("accept", ["*/*", "text/html", "text/plain; version=abc", "text/plain;version=1.", ",;="])
def test_unknown_accept_gives_the_text_format(accept: str) -> None:
    """A header that names no known format, or a malformed version, is not an error."""
    body, content_type = render_metrics(WebSocketConnectionManager(), accept)
    assert content_type == TEXT
    assert body.endswith(b"\n")


def test_openmetrics_has_the_same_samples() -> None:
    """A scraper that asks for OpenMetrics gets it, with the same names, labels and values."""
    manager = timed_manager()
    manager.counters.refusals["max_connections"] = 2
    body, content_type = render_metrics(manager, "application/openmetrics-text;version=1.0.0,text/plain;q=0.5")
    assert content_type.startswith("application/openmetrics-text; version=1.0.0; charset=utf-8")
    assert body.endswith(b"# EOF\n")
    text = samples(text_string_to_metric_families(text_of(manager)))
    assert samples(openmetrics.text_string_to_metric_families(body.decode())) == text


# ── registries ──


@pytest.mark.parametrize("auto_describe", [False, True])
def test_collector_serves_a_registry_of_the_app(auto_describe: bool) -> None:
    """A registered collector reads the manager at each scrape, also for a selection of names."""
    manager = timed_manager()
    registry = CollectorRegistry(auto_describe=auto_describe)
    registry.register(MetricsCollector(manager))
    manager.counters.broadcasts += 1
    assert generate_latest(registry).decode() == text_of(manager)
    assert registry.get_sample_value("fastapi_ws_broadcasts_total") == 1
    manager.counters.broadcasts += 1
    selection = registry.restricted_registry(["fastapi_ws_broadcasts_total"])
    assert samples(selection.collect()) == {("fastapi_ws_broadcasts_total", ()): 2}


def test_registry_takes_one_collector() -> None:
    """A second manager would give the same series, so the registry refuses it."""
    registry = CollectorRegistry()
    registry.register(MetricsCollector(WebSocketConnectionManager()))
    with pytest.raises(ValueError, match="Duplicated timeseries"):
        registry.register(MetricsCollector(WebSocketConnectionManager()))


async def test_collector_sums_queues_of_all_connections(manager_with: Any) -> None:
    """Queued and unread messages are summed over all open connections."""
    manager, _ = manager_with()
    servers = [FakeServer(), FakeServer()]
    for number, server in enumerate(servers):
        await manager.connect(f"client-{number}", await server.accepted())
        server.block()
        server.feed_text("1", "2")
    for _ in range(3):
        await manager.broadcast("four")
    while sum(socket.unread_messages for socket in manager.get_sockets()) < 4:
        await asyncio.sleep(0)
    read = samples(MetricsCollector(manager).collect())
    sockets = manager.get_sockets()
    assert read["fastapi_ws_connections", ()] == read["fastapi_ws_clients", ()] == 2
    assert read["fastapi_ws_unread_messages", ()] == 4
    assert read["fastapi_ws_queued_messages", ()] == sum(socket.queued_messages for socket in sockets) > 0
    assert read["fastapi_ws_queued_bytes", ()] == sum(socket.queued_bytes for socket in sockets) > 0
    # Another thread, such as the one of prometheus_client.start_http_server, can read too.
    in_thread = await asyncio.to_thread(lambda: samples(MetricsCollector(manager).collect()))
    uptime = "fastapi_ws_uptime_seconds", ()
    assert in_thread.pop(uptime) >= read.pop(uptime)
    assert in_thread == read
