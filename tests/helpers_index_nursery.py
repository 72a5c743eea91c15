"""Child processes that build an index, quick to start, for tests that kill them: a server imports what is needed once
and forks for each build. It speaks JSON lines: it reads a job, answers the child's pid, and on the next line waits for
the child's end and answers how that came."""

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from helpers_features import FakeModel, GrowingStore, WideSAE, small_sae

import scope
from scope.features import FeatureIndex, build_indexes, encode, finish  # noqa: F401  # once for all children

__all__ = ["IndexNursery", "build_here", "source"]

FILE_EVENTS = ("open", "os.rename", "os.mkdir", "os.remove")
"""Of `sys.audit`; the first argument is the file's name."""
OPTIONS = {"batch_size": 40, "segment_firings": 200}


def source(n_rows: int) -> GrowingStore:
    """The store when it has so many rows."""
    return GrowingStore(FakeModel(), n_rows, repeats=3)


def build_here(outs: list[str], n_rows: int) -> list[FeatureIndex]:
    """Build the indexes of two SAEs in one pass."""
    store = source(n_rows)
    return build_indexes(store, [small_sae(), WideSAE(50)], outs, model=store.model, **OPTIONS)


class IndexNursery:
    """The server; a context manager."""

    def __init__(self) -> None:
        path = os.pathsep.join([str(Path(scope.__file__).parents[1]), *sys.path])
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )

    def __enter__(self) -> "IndexNursery":
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.wait() == 0

    def start(self, outs: list[str], n_rows: int, dies_at: int | None = None) -> int:
        """Begin a build in a child; its pid. With `dies_at` it kills itself at the n-th file of the indexes that it
        opens, renames, makes or removes."""
        return int(self._ask(json.dumps([outs, n_rows, dies_at])))

    def wait(self) -> int:
        """Wait for the child's end; its status, as of `os.waitpid`."""
        return int(self._ask(""))

    def _ask(self, line: str) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(line, file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())


def _die_at(number: int, folders: list[str]) -> None:
    events = itertools.count(1)

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        if event in FILE_EVENTS and str(arguments[0]).startswith(tuple(folders)) and next(events) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(look)


def _answer(number: int) -> None:
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()


def _serve() -> None:
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                outs, n_rows, dies_at = json.loads(line)
                if dies_at is not None:
                    _die_at(dies_at, outs)
                build_here(outs, n_rows)
                code = 0
            finally:
                os._exit(code)
        _answer(child)
        sys.stdin.readline()
        _answer(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.fsync = lambda descriptor: None  # type: ignore[assignment]  # it matters when the power fails, not here
    _serve()
