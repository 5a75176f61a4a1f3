"""Payloads: texts of a given size, JSON as applications send it, and texts that carry the time of sending."""

from __future__ import annotations

import json
import random
import time

STAMP_DIGITS = 20
"""Digits of the time at the beginning of a stamped message."""

_VENUES = ("XNAS", "XNYS", "XLON", "XETR", "XPAR", "XTKS")
_STATES = ("open", "halted", "auction", "closed")


def text(number: int, size: int) -> str:
    """Return a JSON message of exactly `size` bytes, with a text that depends on the number."""
    head = f'{{"type":"news","number":{number:08d},"text":"'
    return head + "x" * (size - len(head) - 2) + '"}'


def quotes(number: int, size: int) -> str:
    """Return a JSON list of quotes of at least `size` bytes, with values that differ for each number."""
    rng = random.Random(number)
    items: list[str] = []
    length = 0
    while length < size - 30:
        bid = rng.uniform(1, 900)
        quote = {
            "symbol": "".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=rng.randint(2, 5))),
            "venue": rng.choice(_VENUES),
            "bid": round(bid, 2),
            "ask": round(bid + rng.uniform(0.01, 0.2), 2),
            "volume": rng.randint(1, 5_000_000),
            "state": rng.choices(_STATES, weights=(20, 1, 2, 1))[0],
            "at": f"2026-03-{rng.randint(1, 28):02d}T{rng.randint(7, 20):02d}:{rng.randint(0, 59):02d}"
            f":{rng.randint(0, 59):02d}.{rng.randint(0, 999):03d}Z",
        }
        items.append(json.dumps(quote, separators=(",", ":")))
        length += len(items[-1]) + 1
    return f'{{"type":"quotes","items":[{",".join(items)}]}}'


def stamped(size: int) -> str:
    """Return a text of `size` bytes that begins with the monotonic time, which all processes share."""
    return f"{time.monotonic_ns():0{STAMP_DIGITS}d}" + "x" * (size - STAMP_DIGITS)


MAKERS = {"text": text, "quotes": quotes}
"""Makers of messages, by their name in the commands."""
