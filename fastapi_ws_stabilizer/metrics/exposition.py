"""The text exposition format 0.0.4 of Prometheus.

https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from fastapi_ws_stabilizer.metrics.histogram import Histogram

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

PREFIX: Final = "fastapi_ws_"

Value = float | Mapping[str, float] | Histogram
"""A number; numbers by the value of a label; or durations."""


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: Its name, without the prefix, and of a counter without `_total`.
        kind: `counter`, `gauge` or `histogram`.
        help: What it says, in a sentence.
        value: Its value now.
        label: The name of the label, where there are several numbers.
    """

    name: str
    kind: str
    help: str
    value: Value
    label: str = ""


def exposition(metrics: Iterable[Metric]) -> str:
    """The text in which Prometheus reads them."""
    return "".join(f"{line}\n" for metric in metrics for line in _lines(metric))


def _lines(metric: Metric) -> Iterator[str]:
    name = f"{PREFIX}{metric.name}{'_total' if metric.kind == 'counter' else ''}"
    yield f"# HELP {name} {_escape(metric.help)}"
    yield f"# TYPE {name} {metric.kind}"
    value = metric.value
    if isinstance(value, Histogram):
        for bound, count in value.buckets():
            yield f'{name}_bucket{{le="{_number(bound)}"}} {count}'
        yield f"{name}_sum {_number(value.total)}"
        yield f"{name}_count {value.count}"
    elif isinstance(value, Mapping):
        for key, number in value.items():
            yield f'{name}{{{metric.label}="{_escape(key, quotes=True)}"}} {_number(number)}'
    else:
        yield f"{name} {_number(value)}"


def _number(value: float) -> str:
    return "+Inf" if value == math.inf else repr(value)


def _escape(text: str, *, quotes: bool = False) -> str:
    """A text in which nothing ends its line, nor, within quotes, the quotes."""
    text = text.replace("\\", "\\\\").replace("\n", "\\n")
    return text.replace('"', '\\"') if quotes else text
