"""Prometheus metrics of a manager; needs the extra `metrics`.

The manager counts in plain integers. This module reads them when a scrape arrives.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from fastapi_ws_stabilizer.close_codes import DisconnectReason
from fastapi_ws_stabilizer.connection.outbox import SlowConsumer
from fastapi_ws_stabilizer.manager import WebSocketConnectionManager
from fastapi_ws_stabilizer.metrics.timings import Histogram
from fastapi_ws_stabilizer.stats.models import StatsSummary, summarize


class MetricsCollector(Collector):
    """Collector of all metrics of one manager, for a registry of `prometheus_client`.

    The stats router serves the same metrics at `GET .../metrics`. Register a collector if your app already exposes a
    registry:

    ```python
    from prometheus_client import REGISTRY

    from fastapi_ws_stabilizer.stats.prometheus import MetricsCollector

    REGISTRY.register(MetricsCollector(manager))
    ```

    The two histograms need `WebSocketConfig(enable_metrics=True)`; all other metrics work without it. A scrape visits
    every open connection once, to add up the queues. A registry accepts one collector of this class, because the
    metrics have no label that distinguishes two managers.

    A collector reports its own process only. With several worker processes, each scrape reaches one of them, so give
    each worker its own address. The multiprocess mode of `prometheus_client` does not support custom collectors.

    Args:
        manager: The manager.
    """

    def __init__(self, manager: WebSocketConnectionManager) -> None:
        self._manager = manager

    def describe(self) -> Iterable[Metric]:
        """Return the metrics, so that every registry knows their names."""
        return self.collect()

    def collect(self) -> Iterator[Metric]:
        """Read all metrics.

        Any thread may call this. Outside the event loop's thread, the numbers may come from different moments.
        """
        manager = self._manager
        summary = summarize(manager)
        for name, field in StatsSummary.model_fields.items():
            documentation, value = field.description or "", getattr(summary, name)
            if name in _GAUGES:
                yield GaugeMetricFamily(f"fastapi_ws_{name}", documentation, value)
            elif name in _LABELS:
                label, zeros = _LABELS[name]
                yield _labelled_counter(f"fastapi_ws_{name}_total", documentation, label, {**zeros, **value})
            else:
                yield CounterMetricFamily(f"fastapi_ws_{name}_total", documentation, value)
        yield GaugeMetricFamily(
            "fastapi_ws_memory_per_connection_average",
            "Bytes held, divided by the number of open connections.",
            manager.get_memory_usage()["per_connection_average"],
        )
        yield GaugeMetricFamily(
            "fastapi_ws_running", "1 while the manager accepts connections, else 0.", int(manager.running)
        )
        timings = manager.events.timings
        if timings is not None:
            yield _histogram("fastapi_ws_handler_seconds", "Seconds that a message handler ran.", timings.handlers)
            yield _histogram("fastapi_ws_round_trip_seconds", "Seconds from a ping to its pong.", timings.round_trips)


def render_metrics(manager: WebSocketConnectionManager, accept: str = "") -> tuple[bytes, str]:
    """Write all metrics of a manager in the format that a scraper asks for.

    Args:
        manager: The manager.
        accept: The `Accept` header of the scraper. OpenMetrics if it asks for that, else the text format.

    Returns:
        The body and its content type.
    """
    try:
        encode, content_type = choose_encoder(accept)
    except (TypeError, ValueError):  # a version in the header that is not a number
        encode, content_type = choose_encoder("")
    return encode(MetricsCollector(manager)), content_type


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
"""Fields of `StatsSummary` that can fall; all others are counters."""

_LABELS: dict[str, tuple[str, dict[str, int]]] = {
    "slow_clients": ("how", {how.value: 0 for how in SlowConsumer}),
    "refusals": ("by", {}),
    "endings": ("reason", {reason.value: 0 for reason in DisconnectReason}),
}
"""Label of each counter with several series, and its known series at 0, so that `increase()` counts the first event."""


def _labelled_counter(name: str, documentation: str, label: str, values: Mapping[str, int]) -> CounterMetricFamily:
    family = CounterMetricFamily(name, documentation, labels=[label])
    for value, count in values.items():
        family.add_metric([value], count)
    return family


def _histogram(name: str, documentation: str, histogram: Histogram) -> HistogramMetricFamily:
    buckets = [("+Inf" if bound == math.inf else repr(bound), float(count)) for bound, count in histogram.buckets()]
    return HistogramMetricFamily(name, documentation, buckets, histogram.total)
