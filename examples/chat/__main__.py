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
    """Return a socket that listens on the first free port, starting at `first`."""
    for port in range(first, min(first + ATTEMPTS, 65536)):
        try:
            return socket.create_server((HOST, port))
        except OSError:
            continue  # in use, or not permitted
    raise SystemExit(f"no free port from {first}: choose another with --port")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.chat", description="A chat room in your browser.")
    parser.add_argument("--port", type=int, default=8000, help="first port to try; default 8000")
    listener = listen(parser.parse_args().port)
    # Warnings only, so that the address is the only line in the terminal.
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2))
    print(
        f"Chat: http://{HOST}:{listener.getsockname()[1]} "
        "(open it in two tabs, send a message, take one tab offline and watch the other; Ctrl+C stops)",
        flush=True,
    )
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listener])


if __name__ == "__main__":
    main()
