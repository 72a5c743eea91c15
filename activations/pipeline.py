"""Bounded channels between threads, and threads that hand over what they died of."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

__all__ = ["Channel", "Stopped", "Worker"]

T = TypeVar("T")


class Stopped(Exception):  # noqa: N818  # a signal between threads, never an error that a caller sees
    """The channel was stopped: nobody will take or give anything any more."""


class Channel(Generic[T]):
    """A queue of bounded length: a full one makes its writer wait (backpressure), and stopping it wakes everybody.

    Args:
        size: items that it holds at most.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._items: deque[T] = deque()
        # Entered by itself: the condition's own `__enter__` is Python, where a Ctrl-C can strike with the lock taken.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._closed = self._stopped = False

    def put(self, item: T) -> None:
        """Add an item, waiting for room; raises `Stopped`."""
        with self._lock:
            while len(self._items) >= self._size and not self._stopped:
                self._changed.wait()
            if self._stopped:
                raise Stopped
            self._items.append(item)
            self._changed.notify_all()

    def get(self) -> T:
        """Take an item, waiting for one; raises `Stopped` when stopped, or when closed and empty."""
        with self._lock:
            while not self._items and not self._closed and not self._stopped:
                self._changed.wait()
            if self._stopped or not self._items:
                raise Stopped
            self._changed.notify_all()
            return self._items.popleft()

    def __iter__(self) -> Iterator[T]:
        """Items until the channel is closed and empty; raises `Stopped` if it is stopped before."""
        while True:
            try:
                item = self.get()
            except Stopped:
                if self._stopped:
                    raise
                return
            yield item

    def close(self) -> None:
        """No more items will come; what is there may still be taken."""
        with self._lock:
            self._closed = True
            self._changed.notify_all()

    def stop(self) -> None:
        """Drop everything; whoever waits gets `Stopped`."""
        with self._lock:
            self._stopped = True
            self._items.clear()
            self._changed.notify_all()


class Worker(threading.Thread):
    """A thread whose error is kept for whoever joins it.

    Args:
        name: of the thread.
        work: what it does; `Stopped` ends it quietly.
        on_error: called in the thread when it fails, to wake the others.
    """

    def __init__(self, name: str, work: Callable[[], None], on_error: Callable[[], None]) -> None:
        super().__init__(name=name, daemon=True)
        self._work, self._on_error = work, on_error
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self._work()
        except Stopped:
            pass
        except BaseException as error:
            self.error = error
            self._on_error()

    def join_fully(self) -> None:
        """Wait for the end of the thread, through any further Ctrl-C: its files must not be written by two."""
        while self.is_alive():
            try:
                self.join()
            except KeyboardInterrupt:
                continue
