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
from fastapi_ws_stabilizer.connection.outbox_owner import SlowConsumer
from fastapi_ws_stabilizer.manager import WebSocketConnectionManager
from fastapi_ws_stabilizer.metrics.timings import Histogram


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
        counters = manager.counters
        memory = manager.get_memory_usage()
        sessions = manager.get_session_counts()
        queued_messages = queued_bytes = unread_messages = 0
        for socket in manager.get_sockets():
            queued_messages += socket.queued_messages
            queued_bytes += socket.queued_bytes
            unread_messages += socket.unread_messages

        yield GaugeMetricFamily("fastapi_ws_connections", "Open connections.", memory["connection_count"])
        yield GaugeMetricFamily(
            "fastapi_ws_clients",
            "Connected clients. A client can have several connections.",
            len(manager.get_active_connections()),
        )
        yield GaugeMetricFamily("fastapi_ws_queued_messages", "Messages waiting to be sent.", queued_messages)
        yield GaugeMetricFamily("fastapi_ws_queued_bytes", "Bytes waiting to be sent.", queued_bytes)
        yield GaugeMetricFamily("fastapi_ws_unread_messages", "Received messages waiting to be read.", unread_messages)
        yield GaugeMetricFamily(
            "fastapi_ws_total_memory",
            "Bytes held for connections and sessions. A message in several queues counts once.",
            memory["total_memory"],
        )
        yield GaugeMetricFamily(
            "fastapi_ws_uptime_seconds", "Seconds since the manager started.", manager.uptime_seconds
        )
        yield CounterMetricFamily(
            "fastapi_ws_connections_opened_total", "Connections opened.", counters.connections_opened
        )
        yield CounterMetricFamily(
            "fastapi_ws_messages_received_total",
            "Messages received, without control frames.",
            counters.messages_received,
        )
        yield CounterMetricFamily(
            "fastapi_ws_messages_sent_total",
            "Messages that the server accepted for sending, with control frames.",
            counters.messages_sent,
        )
        yield CounterMetricFamily(
            "fastapi_ws_messages_refused_total",
            "Messages refused because their client exceeded a rate limit.",
            counters.messages_refused,
        )
        yield CounterMetricFamily(
            "fastapi_ws_messages_discarded_total",
            "Messages not yet read, sent or acknowledged when their connection or session ended.",
            counters.messages_discarded,
        )
        yield CounterMetricFamily(
            "fastapi_ws_messages_dropped_total",
            "Messages dropped because their client is slow.",
            counters.messages_dropped,
        )
        yield CounterMetricFamily(
            "fastapi_ws_messages_coalesced_total",
            "Queued messages replaced by a newer message with the same coalesce_key.",
            counters.messages_coalesced,
        )
        yield _labelled_counter(
            "fastapi_ws_slow_clients_total",
            "Slow consumer events, by state.",
            "how",
            {**_SLOW_CLIENTS, **counters.slow_clients},
        )
        yield GaugeMetricFamily(
            "fastapi_ws_rooms", "Rooms that have a client, connected or detached.", len(manager.get_rooms())
        )
        yield GaugeMetricFamily(
            "fastapi_ws_sessions",
            "Sessions of stabilizer.v1.json clients, with or without a connection.",
            sessions["sessions"],
        )
        yield GaugeMetricFamily(
            "fastapi_ws_sessions_away", "Sessions without a connection, which a client can resume.", sessions["away"]
        )
        yield CounterMetricFamily(
            "fastapi_ws_sessions_resumed_total",
            "Sessions resumed without a gap, and states of plain clients restored.",
            counters.sessions_resumed,
        )
        yield CounterMetricFamily(
            "fastapi_ws_session_gaps_total",
            "Sessions resumed too late to replay every missed message.",
            counters.session_gaps,
        )
        yield CounterMetricFamily(
            "fastapi_ws_sessions_lost_total",
            "Resumes that failed because the session or its token is unknown or expired.",
            counters.sessions_lost,
        )
        yield CounterMetricFamily(
            "fastapi_ws_bad_messages_total", "Messages that no handler accepted.", counters.bad_messages
        )
        yield CounterMetricFamily("fastapi_ws_broadcasts_total", "Broadcasts.", counters.broadcasts)
        yield CounterMetricFamily("fastapi_ws_pings_sent_total", "Heartbeat pings sent.", counters.pings_sent)
        yield _labelled_counter(
            "fastapi_ws_refusals_total",
            "Handshakes rejected, by the option that rejected them, or by a close code.",
            "by",
            counters.refusals,
        )
        yield CounterMetricFamily(
            "fastapi_ws_evictions_total",
            "Connections, sessions and detached states removed because memory was short.",
            counters.evictions,
        )
        endings = {reason.value: count for reason, count in dict(counters.endings).items()}
        yield _labelled_counter(
            "fastapi_ws_endings_total", "Connections closed, by reason.", "reason", {**_ENDINGS, **endings}
        )
        yield GaugeMetricFamily(
            "fastapi_ws_memory_per_connection_average",
            "Bytes held, divided by the number of open connections.",
            memory["per_connection_average"],
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


# Start each series at 0, so that `increase()` counts the first event.
_SLOW_CLIENTS = {how.value: 0 for how in SlowConsumer}
_ENDINGS = {reason.value: 0 for reason in DisconnectReason}


def _labelled_counter(name: str, documentation: str, label: str, values: Mapping[str, int]) -> CounterMetricFamily:
    family = CounterMetricFamily(name, documentation, labels=[label])
    for value, count in dict(values).items():  # a copy, because the event loop may add a key while a thread scrapes
        family.add_metric([value], count)
    return family


def _histogram(name: str, documentation: str, histogram: Histogram) -> HistogramMetricFamily:
    buckets = [("+Inf" if bound == math.inf else repr(bound), float(count)) for bound, count in histogram.buckets()]
    return HistogramMetricFamily(name, documentation, buckets, histogram.total)
