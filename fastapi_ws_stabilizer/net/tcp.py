"""What the operating system counts for a TCP connection, read from its transport.

A transport tells what it still holds, and nothing of the bytes that the kernel holds behind it. Linux counts, for each
connection, the bytes that the other machine has acknowledged and those that have come from it. Each function answers
`None` where the system does not say: another system, a Unix socket, a transport that is gone or has no socket, a
sandbox that fills the answer with zeros.
"""

from __future__ import annotations

import socket
import struct
import sys
from typing import Any, Final

if sys.platform == "linux":
    import fcntl
    import termios

_TCP_INFO: Final = 11  # /usr/include/linux/tcp.h; Python names it on Linux only
_SIZE: Final = 136  # bytes of `struct tcp_info` up to the last field that is read here; Linux 4.1 and newer have it

_last_data_recv: Final = struct.Struct("=52xI").unpack_from
_bytes: Final = struct.Struct("=120xQQ").unpack_from  # tcpi_bytes_acked, tcpi_bytes_received


def unacknowledged_bytes(transport: Any) -> int | None:
    """Bytes in the kernel's queue that the other machine has not acknowledged."""
    if sys.platform != "linux":
        return None
    try:
        answer = fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
    except Exception:  # a transport that is gone, or has no socket
        return None
    return int.from_bytes(answer, sys.byteorder)


def unflushed_bytes(transport: Any) -> int | None:
    """Bytes that the transport has not given to the kernel."""
    size = getattr(transport, "get_write_buffer_size", None)
    try:
        return int(size()) if callable(size) else None
    except Exception:  # a transport that is gone may refuse the question
        return None


def unsent_bytes(transport: Any) -> int | None:
    """Bytes that were written and that the other machine has not acknowledged, as far as they can be seen."""
    unflushed = unflushed_bytes(transport)
    return None if unflushed is None else unflushed + (unacknowledged_bytes(transport) or 0)


def progress(transport: Any) -> int | None:
    """A number that has grown if the other machine has taken bytes since it was read before.

    On Linux it is what that machine has acknowledged. Elsewhere it is what has left the transport, and grows only while
    nothing more is written.
    """
    info = _tcp_info(transport)
    if info is not None:
        return int(_bytes(info)[0])
    unsent = unsent_bytes(transport)
    return None if unsent is None else -unsent


def seconds_since_received(transport: Any) -> float | None:
    """Seconds since bytes last came from the other machine, be they only a part of a message."""
    info = _tcp_info(transport)
    return None if info is None else int(_last_data_recv(info)[0]) / 1000


def _tcp_info(transport: Any) -> bytes | None:
    if sys.platform != "linux":
        return None
    try:
        connection = transport.get_extra_info("socket")
        info: bytes = connection.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, _SIZE)
    except Exception:  # a transport that is gone, or has no socket, or one that is not of TCP
        return None
    # A WebSocket begins with a handshake in each direction, so where the kernel counts nothing has been left at zero.
    return info if len(info) == _SIZE and all(_bytes(info)) else None
