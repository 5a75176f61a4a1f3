"""The deployment recipes of the docs satisfy the doctor."""

from __future__ import annotations

import itertools
import json
import re
import shlex
from typing import Any

import pytest

from fastapi_ws_stabilizer import WebSocketConfig, WebSocketConnectionManager
from tests.docs.pages import ROOT

SERVERS_PAGE = (ROOT / "docs/deploy/servers.md").read_text(encoding="utf-8")
DOCTOR_PAGE = (ROOT / "docs/deploy/doctor.md").read_text(encoding="utf-8")


def options_of(words: list[str]) -> dict[str, Any]:
    """Return the options of a uvicorn command by name; numbers as numbers."""
    options: dict[str, Any] = {}
    for name, value in itertools.pairwise(words):
        if name.startswith("--"):
            options[name[2:].replace("-", "_")] = int(value) if value.isdigit() else value
    return options


def test_container_recipe_passes_on_kubernetes() -> None:
    """The Dockerfile's command and the ConfigMap of the servers page fit the termination grace of a pod."""
    (command,) = re.findall(r"^CMD (\[.*\])$", SERVERS_PAGE, re.MULTILINE)
    environment = dict(re.findall(r'^  (WS_\w+): "(.*)"$', SERVERS_PAGE, re.MULTILINE))
    assert environment
    manager = WebSocketConnectionManager(WebSocketConfig.from_env(environ=environment))
    options = options_of(json.loads(command))
    assert options
    assert manager.check(server="uvicorn", server_options=options, platform="kubernetes") == []


def test_uvicorn_commands_pass_without_platform() -> None:
    """Each uvicorn command of the servers page that sets a shutdown timeout is complete."""
    commands = re.findall(r"^uvicorn app:app .*timeout-graceful.*$", SERVERS_PAGE, re.MULTILINE)
    assert commands
    for command in commands:
        found = WebSocketConnectionManager().check(server="uvicorn", server_options=options_of(shlex.split(command)))
        assert found == [], command


@pytest.mark.parametrize(
    "platform", [("aws-alb", "nginx", "kubernetes"), ("cloudflare", "nginx"), ("heroku",)], ids=str
)
def test_for_platform_and_uvicorn_options_pass_together(platform: tuple[str, ...]) -> None:
    """`for_platform` with `uvicorn_options`, as the doctor's page recommends, leaves no findings."""
    assert 'for_platform("aws-alb", "nginx", "kubernetes", trusted_proxies=["10.0.0.0/8"])' in DOCTOR_PAGE
    manager = WebSocketConnectionManager(WebSocketConfig.for_platform(*platform, trusted_proxies=["10.0.0.0/8"]))
    found = manager.check(server="uvicorn", server_options=manager.uvicorn_options(), platform=platform)
    assert found == []
