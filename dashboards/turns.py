"""Requests that draw something take turns.

Python runs one thread at a time, so ten pages that are drawn at once are all ready when the last one is: each is ten
times as slow as alone, the large ones slowest. Drawn two at a time, in the order in which they came, each waits for
those before it and no longer. Whoever waits for the model lets go of the turn meanwhile.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["TURNS", "Turns", "in_turn"]

DRAWING = ("/_dash-update-component", "/api/token")
"""Addresses whose answers take Python's time and nothing else's."""

Application = Callable[[dict[str, Any], Any], Iterable[bytes]]


class Turns:
    """At most `n` threads at a time, first come, first served."""

    def __init__(self, n: int) -> None:
        self._free, self._waiting, self._lock = n, deque[threading.Event](), threading.Lock()
        self._own = threading.local()

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Wait for a turn, and have it within the body."""
        self._take()
        try:
            yield
        finally:
            self._give()

    @contextmanager
    def left(self) -> Iterator[None]:
        """Let others have this thread's turn within the body; where it has none, nothing happens."""
        if not getattr(self._own, "held", False):
            yield
            return
        self._give()
        try:
            yield
        finally:
            self._take()

    def _take(self) -> None:
        with self._lock:
            at_once = self._free > 0
            if at_once:
                self._free -= 1
            else:
                called = threading.Event()
                self._waiting.append(called)
        if not at_once:
            called.wait()
        self._own.held = True

    def _give(self) -> None:
        self._own.held = False
        with self._lock:
            if self._waiting:
                self._waiting.popleft().set()
            else:
                self._free += 1


TURNS = Turns(2)
"""Of all dashboards of this process."""


def in_turn(application: Application) -> Application:
    """A WSGI application whose drawing answers take turns."""

    def answer(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if environ.get("PATH_INFO") not in DRAWING:
            return application(environ, start_response)
        with TURNS.taken():
            return application(environ, start_response)

    return answer
