"""Tests of the README: its length, its quick start, its recipes and its commands."""

from __future__ import annotations

import re
import shlex
import struct
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from starlette.testclient import TestClient, WebSocketTestSession
from starlette.websockets import WebSocketDisconnect

from fastapi_ws_stabilizer import WebSocketConfig, WebSocketConnectionManager
from fastapi_ws_stabilizer.__main__ import main
from tests.docs.deadline import within
from tests.docs.pages import ROOT, Block, blocks, quick_start
from tests.docs.test_recipes import options_of

pytestmark = pytest.mark.timeout(30)

README = (ROOT / "README.md").read_text(encoding="utf-8")
MAX_LINES = 200
MAX_RECIPE_LINES = 12
MAX_PICTURE_BYTES = 150_000
RECIPES = [block for block in blocks("python") if block.is_recipe]


def recipe(text: str) -> Block:
    """Return the one recipe that contains a text."""
    (found,) = [block for block in RECIPES if text in block.code]
    return found


def receive(client: WebSocketTestSession, kind: str) -> Any:
    """Return the next message of a type."""
    while (message := client.receive_json())["type"] != kind:
        pass
    return message


def test_readme_has_at_most_200_lines() -> None:
    assert len(README.splitlines()) <= MAX_LINES


def test_introduction_has_two_short_sentences() -> None:
    """The text between the title and the picture is two sentences of at most 25 words."""
    sentences = re.split(r"(?<=\.)\s", README.split("\n![")[0].split("\n", 1)[1].strip())
    assert [len(sentence.split()) <= 25 for sentence in sentences] == [True, True]


def test_recipes_are_short() -> None:
    """The README has four recipes, and each is short."""
    assert len(RECIPES) == 4
    assert {str(block): lines for block in RECIPES if (lines := len(block.code.splitlines())) > MAX_RECIPE_LINES} == {}


def test_picture_is_small_png_of_the_repository() -> None:
    (path,) = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    picture = (ROOT / path).read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert struct.unpack(">II", picture[16:24]) >= (600, 300)
    assert len(picture) < MAX_PICTURE_BYTES


def test_script_of_the_page_sends_what_the_quick_start_handles(run: Callable[[Block], ModuleType]) -> None:
    """The script waits for `onopen`, answers pings, and its message reaches the handler of the quick start."""
    (script,) = [block.code for block in blocks("js") if block.page == ROOT / "README.md"]
    (opened,) = re.findall(r"ws\.onopen = \(\) => ws\.send\('(.*)'\);", script)
    assert re.search(r"""event\.data === '\{"type":"ping"\}' \? ws\.send\("pong"\)""", script)
    (path,) = re.findall(r"\$\{location\.host\}(/ws/tab-)\$\{", script)

    def talk() -> Any:
        with TestClient(run(quick_start()).app) as client, client.websocket_connect(f"{path}1") as ws:
            ws.send_text(opened)
            return receive(ws, "said")

    assert within(10, talk) == {"type": "said", "who": "tab-1", "text": "hello"}


def test_login_recipe_takes_the_client_id_from_the_cookie(run: Callable[[Block], ModuleType]) -> None:
    module = run(recipe("current_user"))
    connected = threading.Semaphore(0)  # the client sees the accept before the server registers the connection
    module.manager.on_connect(lambda _: connected.release())

    def talk() -> list[str]:
        with TestClient(module.app) as client:
            with pytest.raises(WebSocketDisconnect), client.websocket_connect("/me", headers={"cookie": "session=x"}):
                pass
            with client.websocket_connect("/me", headers={"cookie": "session=session-of-ann"}):
                assert connected.acquire(timeout=10)
                return list(module.manager.get_active_connections())

    assert within(10, talk) == ["ann"]


def test_room_recipe_shows_members_and_tells_the_others(run: Callable[[Block], ModuleType]) -> None:
    app = run(recipe("class Join")).app

    def talk() -> list[Any]:
        with TestClient(app) as client, client.websocket_connect("/ws/ann") as ann:
            ann.send_json({"type": "join", "room": "lobby"})
            receive(ann, "members")
            with client.websocket_connect("/ws/bob") as bob:
                bob.send_json({"type": "join", "room": "lobby"})
                return [receive(bob, "members"), receive(ann, "entered")]

    assert within(10, talk) == [{"type": "members", "members": ["ann", "bob"]}, {"type": "entered", "who": "bob"}]


def test_push_recipe_reaches_connected_clients(run: Callable[[Block], ModuleType]) -> None:
    app = run(recipe("/announce")).app

    def talk() -> list[Any]:
        with TestClient(app) as client, client.websocket_connect("/ws/ann") as ann:
            answers = [
                client.post("/notify/ann", params={"text": "one"}).json(),
                client.post("/notify/bob", params={"text": "none"}).json(),
                client.post("/announce", params={"text": "two"}).json(),
            ]
            return [*answers, receive(ann, "news")["text"], receive(ann, "news")["text"]]

    assert within(10, talk) == [True, False, 1, "one", "two"]


def test_resume_recipe_gives_user_data_back(run: Callable[[Block], ModuleType]) -> None:
    module = run(recipe("reconnect_token"))

    def talk() -> tuple[Any, Any]:
        with TestClient(module.app) as client:
            with client.websocket_connect("/ws/ann") as ann:
                token = receive(ann, "token")["token"]
                module.manager.get_sockets("ann")[0].user_data["cart"] = "pears"
                ann.close(1001)  # a page that is reloaded; 1000 would end the session
            with client.websocket_connect(f"/ws/ann?reconnect_token={token}") as ann:
                return receive(ann, "token")["token"] != token, module.manager.get_sockets("ann")[0].user_data

    assert within(10, talk) == (True, {"cart": "pears"})


def test_on_resume_decorator_runs_joined_after_resume(run: Callable[[Block], ModuleType]) -> None:
    """As the README says, a resume runs `on_resume` only: the others see it if `joined` has that decorator too."""
    module = run(recipe("reconnect_token"))
    assert "`on_resume` then runs instead of `on_connect`" in README
    module.manager.on_resume(module.joined)

    def talk() -> list[str]:
        with TestClient(module.app) as client, client.websocket_connect("/ws/bob") as bob:
            receive(bob, "joined")
            with client.websocket_connect("/ws/ann") as ann:
                token = receive(ann, "token")["token"]
                ann.close(1001)
            with client.websocket_connect(f"/ws/ann?reconnect_token={token}"):
                return [receive(bob, kind)["who"] for kind in ("joined", "left", "joined")]

    assert within(10, talk) == ["ann", "ann", "ann"]


def test_uvicorn_command_of_the_checklist_passes_the_doctor() -> None:
    (command,) = re.findall(r"`(uvicorn app:app --[^`]+)`", README)
    options = options_of(shlex.split(command))
    assert options["ws_max_size"] == WebSocketConfig().max_message_size
    assert WebSocketConnectionManager().check(server="uvicorn", server_options=options) == []


def test_doctor_command_of_the_checklist_finds_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """The command runs as written on the quick start, with a platform that fits the default timeouts."""
    (arguments,) = re.findall(r"`python -m fastapi_ws_stabilizer (doctor [^`]+)`", README)
    words = shlex.split(arguments.replace("app:app", "examples.quickstart:app"))
    with pytest.raises(SystemExit) as done:
        raise SystemExit(main(words))
    assert done.value.code in (None, 0), capsys.readouterr().out


def test_platforms_of_the_checklist_are_known() -> None:
    (call,) = re.findall(r"`WebSocketConfig\.for_platform\(([^)]*)\)`", README)
    assert WebSocketConfig.for_platform(*re.findall(r'"([\w-]+)"', call)).changed_options() == {
        "heartbeat_interval",
        "drain_timeout",
    }
