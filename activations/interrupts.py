"""Ctrl-C for a run that holds locks, threads and half-written files: however often it comes, the run ends in order.

Python raises `KeyboardInterrupt` between any two instructions of the main thread: within the taking of a lock, whose
other users then wait for ever, or between two steps of winding down, whose threads then write on behind a lock that is
given back. So, from `Interrupts.__enter__` to `__exit__`:

1. SIGINT raises nothing; it is noted, and a thread calls what the run gave to `stopping`, which wakes whoever waits.
   The handler cannot do so itself: it runs inside the main thread, which may hold the very lock that waking needs.
2. Inside `at_once`, which is for long computations that hold nothing of ours, the first SIGINT raises as ever.
3. On the way out a SIGINT that nobody has answered raises.

Where SIGINT is not Python's own (a caller's handler, nohup), or outside the main thread, nothing is changed.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from types import FrameType, TracebackType

__all__ = ["Interrupts"]


class Interrupts:
    """Keeps Ctrl-C away from what must run whole; a context manager, see the module."""

    def __init__(self) -> None:
        self.noted = False
        """Whether Ctrl-C was pressed."""
        self._active = self._raises = False
        # Its `put` may be called where another `put` or `get` was interrupted, which other queues cannot.
        self._wake: SimpleQueue[bool] = SimpleQueue()

    def __enter__(self) -> "Interrupts":
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._active = True
            signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._active:
            self._active = False
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if self.noted and kind is None:
                raise KeyboardInterrupt

    @contextmanager
    def stopping(self, stop: Callable[[], None]) -> Iterator[None]:
        """Within, Ctrl-C calls `stop`, in a thread of its own; one that came before calls it right away."""
        if not self._active:
            yield
            return

        def watch() -> None:
            while self._wake.get():
                stop()

        watcher = threading.Thread(name="interrupts", target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            self._wake.put(False)
            watcher.join()

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within, Ctrl-C raises `KeyboardInterrupt`, once."""
        self._raises = self._active and not self.noted
        try:
            yield
        finally:
            self._raises = False

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.noted = True
        self._wake.put(True)
        if self._raises:
            self._raises = False
            raise KeyboardInterrupt
