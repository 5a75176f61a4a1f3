"""Tests of the page about platforms: its tables match the package."""

from __future__ import annotations

from fastapi_ws_stabilizer import WebSocketConfig
from fastapi_ws_stabilizer.platforms.registry import PLATFORMS
from tests.docs.pages import table

PAGE = "docs/deploy/platforms.md"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def _sets(name: str) -> str:
    if PLATFORMS[name].unsupported_reason is not None:
        return "unsupported"
    config = WebSocketConfig.for_platform(name)
    options = [
        option
        for option in ("heartbeat_interval", "max_lifetime", "drain_window", "drain_timeout")
        if option in config.model_fields_set
    ]
    return ", ".join(f"`{option}={getattr(config, option):g}`" for option in options) or "-"


def test_platforms_table_matches_package() -> None:
    """Every platform is in the table, in order, with its values and the options that follow from them."""
    assert table(PAGE, "| Name | Platform | Idle timeout |") == [
        [
            f"`{platform.name}`",
            platform.title,
            _seconds(platform.idle_timeout),
            _seconds(platform.max_lifetime),
            _seconds(platform.grace),
            _sets(platform.name),
        ]
        for platform in PLATFORMS.values()
    ]


def test_facts_table_matches_package() -> None:
    """Every fact is in the table, in order, with its source, the date on which it was read, and how."""
    assert table(PAGE, "| Name | Fact | Source |") == [
        [
            f"`{platform.name}`",
            fact.statement,
            f"<{fact.source}>",
            fact.checked + (", quoted" if fact.second_hand else ""),
        ]
        for platform in PLATFORMS.values()
        for fact in platform.facts
    ]
