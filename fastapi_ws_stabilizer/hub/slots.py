"""A limit on how much goes on at the same time, for work that is not one task each."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable


class CallbackSemaphore:
    """At most `limit` pieces of work at one time; what comes later waits in line.

    A semaphore for code that runs in no task. Who finds no slot leaves a function that is called, once, when it may
    look again. It returns whether it will; who then needs no slot after all must `pass_on`.

    Attributes:
        limit: How many slots there are.
        taken: How many are taken now.
        line: Who waits.
    """

    __slots__ = ("limit", "taken", "waiters")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.taken = 0
        self.waiters: deque[Callable[[], bool]] = deque()

    def __len__(self) -> int:
        """How many wait in line."""
        return len(self.waiters)

    @property
    def free(self) -> bool:
        """Whether a slot can be taken."""
        return self.taken < self.limit

    def take(self) -> None:
        """Take a slot."""
        self.taken += 1

    def release(self) -> None:
        """Give a slot back and let the first in line look."""
        self.taken -= 1
        self.wake_next()

    def wait(self, look_again: Callable[[], bool]) -> None:
        """Stand in line."""
        self.waiters.append(look_again)

    def wake_next(self) -> None:
        """Let the first in line that wants to look, if there is a slot."""
        while self.waiters and self.free:
            if self.waiters.popleft()():
                break
