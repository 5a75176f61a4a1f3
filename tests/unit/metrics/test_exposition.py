"""Tests of the text that Prometheus reads, by the parser of its own client."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from fastapi_ws_stabilizer.metrics.exposition import CONTENT_TYPE, Metric, exposition
from fastapi_ws_stabilizer.metrics.histogram import Histogram

TEXT = st.one_of(
    st.text(st.sampled_from('\\\n"n{},= ab')),
    st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\r")),
)


def read(*metrics: Metric) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """What Prometheus reads: values by name and labels."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(exposition(metrics))
        for sample in family.samples
    }


def test_each_kind_has_its_shape() -> None:
    """A counter ends in `_total`; each metric has its help and its type before its values; the last line ends too."""
    times = Histogram((0.1, 2.0))
    times.observe(0.05)
    times.observe(7)
    text = exposition(
        [
            Metric("open", "gauge", "Open ones.", 3),
            Metric("endings", "counter", "Ends.", {"idle": 2}, "reason"),
            Metric("handler_seconds", "histogram", "Took.", times),
        ]
    )
    assert text == (
        "# HELP fastapi_ws_open Open ones.\n"
        "# TYPE fastapi_ws_open gauge\n"
        "fastapi_ws_open 3\n"
        "# HELP fastapi_ws_endings_total Ends.\n"
        "# TYPE fastapi_ws_endings_total counter\n"
        'fastapi_ws_endings_total{reason="idle"} 2\n'
        "# HELP fastapi_ws_handler_seconds Took.\n"
        "# TYPE fastapi_ws_handler_seconds histogram\n"
        'fastapi_ws_handler_seconds_bucket{le="0.1"} 1\n'
        'fastapi_ws_handler_seconds_bucket{le="2.0"} 1\n'
        'fastapi_ws_handler_seconds_bucket{le="+Inf"} 2\n'
        "fastapi_ws_handler_seconds_sum 7.05\n"
        "fastapi_ws_handler_seconds_count 2\n"
    )


@example('"')
@example('a"} 1\nforged 2')
@given(TEXT)
def test_a_label_says_what_it_was_given(value: str) -> None:
    """Backslashes, quotes and line breaks are escaped, so that the reader gets the label back."""
    assert read(Metric("endings", "counter", "Ends.", {value: 2}, "reason")) == {
        ("fastapi_ws_endings_total", (("reason", value),)): 2.0
    }


@given(st.text(st.sampled_from('\\\n"ab')))
def test_a_help_is_one_line(text: str) -> None:
    """Nothing in a sentence begins a line of its own."""
    lines = exposition([Metric("open", "gauge", text, 1)]).splitlines()
    assert len(lines) == 3
    assert re.sub(r"\\(.)", lambda m: "\n" if m[1] == "n" else m[1], lines[0]) == f"# HELP fastapi_ws_open {text}"


@pytest.mark.parametrize("value", [0, 7, 0.25, 1e-9, 2**40])
def test_a_number_is_read_as_it_was(value: Any) -> None:
    """Whole and small numbers keep their value."""
    assert read(Metric("open", "gauge", "Open.", value)) == {("fastapi_ws_open", ()): float(value)}


def test_a_metric_without_values_is_named_all_the_same() -> None:
    """Its help and its type are there before something has happened."""
    (family,) = text_string_to_metric_families(exposition([Metric("refusals", "counter", "Refused.", {}, "by")]))
    assert (family.type, family.documentation, family.samples) == ("counter", "Refused.", [])


def test_the_content_type_names_the_version() -> None:
    """Prometheus chooses its parser by it."""
    assert CONTENT_TYPE == "text/plain; version=0.0.4; charset=utf-8"
