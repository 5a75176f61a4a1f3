"""Tests of the example that streams answers: stopped, ended with its session, complete after a reconnect."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from starlette.testclient import TestClient, WebSocketTestSession

from examples import stream_answers
from fastapi_ws_stabilizer.client import connect as connect_client
from tests.docs.deadline import within
from tests.support.server import LiveServer

pytestmark = pytest.mark.timeout(60)

QUESTION = " ".join(str(number) for number in range(200))
ANSWER = f"You have asked: {QUESTION} "


def receive(client: WebSocketTestSession, kind: str) -> Any:
    """Return the next message of one type."""
    while (message := client.receive_json())["type"] != kind:
        pass
    return message


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace the model by an endless one; return the list to which each of its streams appends its end."""
    ended: list[str] = []

    async def tokens(question: str) -> AsyncGenerator[str, None]:
        try:
            while True:
                await asyncio.sleep(0.001)
                yield "and "
        finally:
            ended.append(question)

    monkeypatch.setattr(stream_answers, "tokens", tokens)
    return ended


def test_stop_message_cancels_the_answer(endless: list[str]) -> None:
    """After `stop` the model is cancelled and no further part arrives; a new question stops the previous one."""

    def play() -> None:
        with TestClient(stream_answers.app) as client, client.websocket_connect("/ws/ann") as ann:
            ann.send_json({"type": "ask", "question": "first"})
            receive(ann, "part")
            ann.send_json({"type": "ask", "question": "second"})
            receive(ann, "stopped")
            assert receive(ann, "started")
            receive(ann, "part")
            ann.send_json({"type": "stop"})
            receive(ann, "stopped")
            ann.send_json({"type": "stop"})  # nothing to stop
            ann.send_json({"type": "nonsense"})
            while (message := ann.receive_json())["type"] == "ping":
                pass
            assert message["code"] == "unknown_type"

    within(10.0, play)
    assert endless == ["first", "second"]


def test_end_of_the_session_cancels_the_answer(endless: list[str]) -> None:
    """When a client closes with 1000, its session ends and its answer is cancelled."""

    def play() -> None:
        with TestClient(stream_answers.app) as client:
            with client.websocket_connect("/ws/ann") as ann:
                ann.send_json({"type": "ask", "question": "first"})
                receive(ann, "part")
            with client.websocket_connect("/ws/bob") as bob:
                receive(bob, "token")

    within(10.0, play)
    assert endless == ["first"]


def test_plain_client_gets_the_text_so_far() -> None:
    """A plain client that resumes with its token has missed parts, so it gets the whole text instead."""

    def play() -> None:
        with TestClient(stream_answers.app) as client:
            with client.websocket_connect("/ws/ann") as ann:
                token = receive(ann, "token")["token"]
                ann.send_json({"type": "ask", "question": QUESTION})
                receive(ann, "part")
                ann.close(1001)
            with client.websocket_connect(f"/ws/ann?reconnect_token={token}") as ann:
                so_far = receive(ann, "so far")
                assert ANSWER.startswith(so_far["text"])
                assert not so_far["done"]
                text = so_far["text"]
                while text != ANSWER:
                    text += receive(ann, "part")["text"]
                receive(ann, "done")

    within(20.0, play)


def test_failure_of_the_model_reaches_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the model's API is logged and reported to the client."""

    async def tokens(question: str) -> AsyncGenerator[str, None]:
        yield "Well, "
        raise ConnectionError(question)

    monkeypatch.setattr(stream_answers, "tokens", tokens)

    def play() -> None:
        with TestClient(stream_answers.app) as client, client.websocket_connect("/ws/ann") as ann:
            ann.send_json({"type": "ask", "question": "first"})
            assert receive(ann, "part")["text"] == "Well, "
            receive(ann, "failed")

    within(10.0, play)


@pytest.mark.live
async def test_session_client_misses_no_part_of_the_answer() -> None:
    """With the Python client every part arrives once and in order, although its connection is replaced twice."""
    with LiveServer("uvicorn-stable", app="examples.stream_answers:app") as server:
        async with connect_client(server.url("/ws/ann"), base_delay=0.05, min_delay=0.01) as ann:
            await ann.send({"question": QUESTION}, event="ask")
            text, parts = "", 0
            async for message in ann:
                if message.data["type"] == "done":
                    break
                if message.data["type"] == "part":
                    text += message.data["text"]
                    parts += 1
                    if parts in (20, 90):
                        ann.reconnect()
            assert text == ANSWER
