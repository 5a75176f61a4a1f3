"""TCP statistics and buffer limits of the operating system for a connection, by its transport.

A transport reports the bytes that it still holds, but not those that the kernel holds. Linux counts, for each
connection, the bytes that the peer has acknowledged and the bytes received from it. A function returns `None` if the
system does not report this: another system, a Unix socket, a closed transport or one without a socket, or a sandbox
that fills the result with zeros.
"""

from __future__ import annotations

import socket
import struct
import sys
from typing import Any, Final

if sys.platform == "linux":
    import fcntl
    import termios

_TCP_NOTSENT_LOWAT: Final = {"linux": 25, "darwin": 0x201}.get(sys.platform)  # Python names it on some systems only

HAS_UNSENT_LOW_WATER: Final = _TCP_NOTSENT_LOWAT is not None
"""Whether the system has `TCP_NOTSENT_LOWAT`."""

_TCP_INFO: Final = 11  # /usr/include/linux/tcp.h; Python has a name for it on Linux only
_SIZE: Final = 136  # bytes of `struct tcp_info` up to the last field that is read here; Linux 4.1 and newer have it

_last_data_recv: Final = struct.Struct("=52xI").unpack_from
_bytes: Final = struct.Struct("=120xQQ").unpack_from  # tcpi_bytes_acked, tcpi_bytes_received


def limit_buffers(transport: Any, unsent_low_water: int | None, write_buffer_high_water: int) -> None:
    """Limit what the kernel and the transport hold for a peer that is slower than the sender.

    The limits are soft: the kernel accepts up to a segment of 64 KiB beyond the first, and the transport one write
    beyond the second. What cannot be limited stays as it is.

    Args:
        transport: The transport.
        unsent_low_water: Unsent bytes at which the kernel accepts no more; `None` for the kernel's own limits.
        write_buffer_high_water: Bytes in the transport's buffer above which it pauses its protocol.
    """
    try:
        transport.set_write_buffer_limits(high=write_buffer_high_water)
        if unsent_low_water is not None and _TCP_NOTSENT_LOWAT is not None:
            connection = transport.get_extra_info("socket")
            connection.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, unsent_low_water)
    except Exception:  # a closed transport, one without a socket, or not TCP
        return


def kernel_unacked_bytes(transport: Any) -> int | None:
    """Return the bytes in the kernel's queue that the peer has not acknowledged."""
    if sys.platform != "linux":
        return None
    try:
        answer = fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
    except Exception:  # a closed transport, or one without a socket
        return None
    return int.from_bytes(answer, sys.byteorder)


def unflushed_bytes(transport: Any) -> int | None:
    """Return the bytes that the transport has not passed to the kernel."""
    size = getattr(transport, "get_write_buffer_size", None)
    try:
        return int(size()) if callable(size) else None
    except Exception:  # a closed transport may raise
        return None


def unacked_bytes(transport: Any) -> int | None:
    """Return the bytes that were written but not acknowledged by the peer, as far as the system reports them."""
    unflushed = unflushed_bytes(transport)
    return None if unflushed is None else unflushed + (kernel_unacked_bytes(transport) or 0)


def send_progress(transport: Any) -> int | None:
    """Return a number that increases as the peer acknowledges bytes.

    On Linux it is the number of acknowledged bytes. Elsewhere it is the negative of the bytes that the transport holds,
    which grows only while nothing more is written.
    """
    info = _tcp_info(transport)
    if info is not None:
        return int(_bytes(info)[0])
    unsent = unacked_bytes(transport)
    return None if unsent is None else -unsent


def seconds_since_received(transport: Any) -> float | None:
    """Return the seconds since bytes last arrived, even part of a message."""
    info = _tcp_info(transport)
    return None if info is None else int(_last_data_recv(info)[0]) / 1000


def _tcp_info(transport: Any) -> bytes | None:
    if sys.platform != "linux":
        return None
    try:
        connection = transport.get_extra_info("socket")
        info: bytes = connection.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, _SIZE)
    except Exception:  # a closed transport, one without a socket, or not TCP
        return None
    # A WebSocket begins with a handshake in each direction, so zeros mean that the kernel does not count.
    return info if len(info) == _SIZE and all(_bytes(info)) else None
