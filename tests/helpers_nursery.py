"""Child processes that are quick to start, for tests that kill, interrupt or measure them; torch is never imported.

A server process imports what is needed once and forks for each job. It speaks JSON lines: it reads a job, answers the
child's pid, and on the next line waits for the child's end and answers how that came. Until then a pid stays its own.
"""

import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numcodecs.zstd  # noqa: F401  # what the store imports late, once for all children
import numpy as np
import pandas  # noqa: F401
import pyarrow.parquet  # noqa: F401
from helpers_activations import FakeModel, FakePending
from helpers_denoising import Wide

import activations
from activations import ledger
from activations.capture import capture
from activations.denoising_capture import capture_denoising
from activations.shuffle import ShuffledBatches
from activations.store import ActivationStore
from activations.text import TextSource

__all__ = ["Child", "Ended", "Nursery"]

PATIENCE_SECONDS = 600
"""A child that is still there then is taken to hang."""
FILE_EVENTS = ("open", "os.rename", "os.mkdir", "os.remove")
"""Of `sys.audit`; the first argument is the file's name."""


class Ended(NamedTuple):
    """How a child ended."""

    status: int
    """As of `os.waitpid`: a signal's number, or the exit code times 256."""
    peak_bytes: int
    """Largest resident size."""
    said: dict[str, Any]
    """What it reported: `error` (type name) and `message`, `threads` still running, or what its job returned."""


class Child:
    """A child at work."""

    def __init__(self, nursery: "Nursery", pid: int, report: Path) -> None:
        self._nursery, self.pid, self._report = nursery, pid, report

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> Ended:
        """Wait for its end; one that hangs is killed, and fails the test by its status."""
        timer = threading.Timer(PATIENCE_SECONDS, os.kill, (self.pid, signal.SIGKILL))
        timer.start()
        status, peak = self._nursery.ask("")
        timer.cancel()
        said = json.loads(self._report.read_text()) if self._report.exists() else {}
        self._report.unlink(missing_ok=True)
        return Ended(status, peak * 1024, said)


class Nursery:
    """The server; a context manager.

    Args:
        folder: where children leave their reports.
        records_per_segment: of the ledgers that they write.
    """

    def __init__(self, folder: Path, records_per_segment: int = ledger.RECORDS_PER_SEGMENT) -> None:
        self._report = folder / "report.json"
        path = os.pathsep.join([str(Path(activations.__file__).parents[1]), *sys.path])
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(self._report), str(records_per_segment)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )

    def __enter__(self) -> "Nursery":
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.wait() == 0

    def ask(self, line: str) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(line, file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def start(self, job: str, **arguments: Any) -> Child:
        """Begin one of `JOBS` in a child."""
        return Child(self, self.ask(json.dumps([job, arguments], default=str)), self._report)


# ---- what children do


@dataclass
class ChildModel(FakeModel):
    """A `FakeModel` with something to go wrong, or to last."""

    delay: float = 0.0
    """Seconds that a forward pass takes."""
    file_limit_after: int | None = None
    """Forward passes after which no file may grow any more, as if the disk were full."""
    interrupt_after: int | None = None
    """Forward passes after which Ctrl-C is pressed, three times at once."""
    zeros: bool = False
    """Whether to give zeros, which costs no time at any width."""

    def forward_rows(self, *arguments: Any) -> FakePending:
        if len(self.calls) == self.file_limit_after:
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        if len(self.calls) == self.interrupt_after:
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGINT)
        pending = super().forward_rows(*arguments)
        time.sleep(self.delay)
        return pending

    def rows_at(self, hook: str, window: np.ndarray) -> np.ndarray:
        if self.zeros:
            return np.zeros((len(window), *self.hooks[hook]), np.float32)
        return super().rows_at(hook, window)


def strike_at(number: int, sign: int, folder: str) -> None:
    """Send this process a signal at the n-th time that it opens, renames, makes or removes a file of a folder."""
    events = itertools.count(1)

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        if event in FILE_EVENTS and folder in str(arguments[0]) and next(events) == number:
            os.kill(os.getpid(), sign)

    sys.addaudithook(look)


def run_capture(
    text: str,
    hooks: Sequence[str],
    out: str,
    settings: Mapping[str, Any],
    model: Mapping[str, Any],
    dies_at: int | None = None,
) -> dict[str, Any]:
    if dies_at is not None:
        strike_at(dies_at, signal.SIGKILL, out)
    report = capture(ChildModel(**model), TextSource(text), hooks, out, **settings)
    return {"rows": report.rows}


def run_denoising(text: str, hook: str, out: str, width: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    report = capture_denoising(Wide(hooks={hook: (width,)}), TextSource(text), [hook], out, **settings)
    return {"rows": report.rows}


def read_batches(store: str, hooks: Sequence[str], batch_size: int) -> dict[str, Any]:
    return {"rows": sum(len(batch.rows) for batch in ActivationStore.open(store).batches(hooks, batch_size))}


def read_shuffled(store: str, hook: str, batch_size: int, memory_bytes: int) -> dict[str, Any]:
    batches = ShuffledBatches(
        ActivationStore.open(store), hook, batch_size, seed=0, passes=1, memory_bytes=memory_bytes
    )
    return {"rows": sum(len(batch.rows) for batch in batches), "in_memory": batches.in_memory}


JOBS = {"capture": run_capture, "denoising": run_denoising, "batches": read_batches, "shuffled": read_shuffled}


@dataclass
class _Server:
    report: Path

    def child(self, job: str, arguments: Mapping[str, Any]) -> None:
        code = 0
        try:
            said = JOBS[job](**arguments)
        except BaseException as error:
            notes = getattr(error, "__notes__", [])
            said = {"error": type(error).__name__, "message": "\n".join([str(error), *notes])}
            code = 3
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        said["threads"] = [thread.name for thread in threading.enumerate()]
        written = self.report.with_suffix(".part")
        written.write_text(json.dumps(said))
        written.replace(self.report)  # whole or not at all: a test may kill at this moment too
        os._exit(code)

    def answer(self, content: Any) -> None:
        sys.stdout.write(json.dumps(content) + "\n")
        sys.stdout.flush()

    def serve(self) -> None:
        for line in sys.stdin:
            child = os.fork()
            if child == 0:
                self.child(*json.loads(line))
            self.answer(child)
            sys.stdin.readline()
            _, status, usage = os.wait4(child, 0)
            self.answer([status, usage.ru_maxrss])


if __name__ == "__main__":
    assert "torch" not in sys.modules
    os.fsync = lambda descriptor: None  # type: ignore[assignment]  # it matters when the power fails, not here
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored
    ledger.RECORDS_PER_SEGMENT = int(sys.argv[2])
    _Server(Path(sys.argv[1])).serve()
