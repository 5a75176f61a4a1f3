"""Start the chat on this machine: `python -m examples.chat [--port N]`."""

from __future__ import annotations

import argparse
import contextlib
import socket

import uvicorn

from examples.chat.app import app

HOST = "127.0.0.1"
ATTEMPTS = 100


def listen(first: int) -> socket.socket:
    """Return a socket that listens on the first free port from `first` on."""
    for port in range(first, min(first + ATTEMPTS, 65536)):
        try:
            return socket.create_server((HOST, port))
        except OSError:
            continue  # taken, or not allowed
    raise SystemExit(f"no free port from {first} on: choose another one with --port")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.chat", description="A chat room in your browser.")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on, or the next free one (8000)")
    listener = listen(parser.parse_args().port)
    # Warnings only: the address should be the one line that is seen.
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2))
    print(
        f"Chat: http://{HOST}:{listener.getsockname()[1]} "
        "(open it in two tabs, say something, pull the plug of one and watch the other; Ctrl+C stops)",
        flush=True,
    )
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listener])


if __name__ == "__main__":
    main()
