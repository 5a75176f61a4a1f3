"""What a manager holds and has counted, as metrics."""

from __future__ import annotations

from collections.abc import Iterator

from fastapi_ws_stabilizer.close_codes import DisconnectReason
from fastapi_ws_stabilizer.connection.outbox_owner import SlowConsumer
from fastapi_ws_stabilizer.manager import WebSocketConnectionManager
from fastapi_ws_stabilizer.metrics.exposition import Metric
from fastapi_ws_stabilizer.metrics.histogram import Timings
from fastapi_ws_stabilizer.stats.overview import StatsSummary, overview_of


def metrics_of(manager: WebSocketConnectionManager, timings: Timings) -> Iterator[Metric]:
    """All metrics of a manager, each with the sentence that its overview says of it."""
    overview = overview_of(manager)
    for name, field in StatsSummary.model_fields.items():
        value = getattr(overview, name)
        kind = "gauge" if name in _GAUGES else "counter"
        label = _LABELS.get(name, "")
        if label:  # what has not happened yet is 0 from the beginning on, or its first time would be no increase
            value = {**dict.fromkeys(_KNOWN.get(name, ()), 0), **value}
        yield Metric(name, kind, str(field.description), value, label)
    memory = manager.get_memory_usage()
    yield Metric(
        "memory_per_connection_average", "gauge", "Bytes held, by connections.", memory["per_connection_average"]
    )
    yield Metric("running", "gauge", "Whether connections are taken: 1, or 0.", int(manager.running))
    yield Metric("handler_seconds", "histogram", "Seconds that a message handler took.", timings.handlers)
    yield Metric("round_trip_seconds", "histogram", "Seconds from a ping to its pong.", timings.round_trips)


_GAUGES = frozenset(
    {
        "connections",
        "clients",
        "queued_messages",
        "queued_bytes",
        "unread_messages",
        "total_memory",
        "uptime_seconds",
        "rooms",
        "sessions",
        "sessions_away",
    }
)
"""What can become less."""

_LABELS = {"slow_clients": "how", "refusals": "by", "endings": "reason"}

_KNOWN = {"slow_clients": [how.value for how in SlowConsumer], "endings": [reason.value for reason in DisconnectReason]}
