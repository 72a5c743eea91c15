"""The folder of a run under way: `.NAME.training` beside the output folder `NAME`.

run.json               what the run is: settings, hook, width, source; a resume with others is refused
checkpoint.safetensors the last checkpoint
train.jsonl            the run log, one line every `log_steps` steps
stopped.json           why the last process that worked on it left before the end; not there while one does
lock                   held while a process works on the run
"""

import contextlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from activations.manifest import write_atomically
from scope.errors import LockedError, OccupiedError
from scope.training.checkpoints import Progress, load_checkpoint, save_checkpoint
from scope.training.runs import CHECKPOINT_NAME, LOG_NAME, STOPPED_NAME
from scope.training.trainer import SAETrainer

__all__ = ["CHECKPOINT_NAME", "LOG_NAME", "WorkFolder", "clear_beside", "folder_beside"]


def folder_beside(out: Path) -> Path:
    """The working folder of an output folder."""
    return out.with_name(f".{out.name}.training")


def clear_beside(out: Path) -> None:
    """Delete the working folder of an output folder, and what a process that was killed while saving has left.

    The checkpoint goes first: what a kill leaves of the folder is then nothing to go on from.
    """
    with contextlib.suppress(OSError):
        (folder_beside(out) / CHECKPOINT_NAME).unlink(missing_ok=True)
    shutil.rmtree(folder_beside(out), ignore_errors=True)
    for path in list(out.parent.iterdir()) if out.parent.is_dir() else []:
        if path.name.startswith(f".{out.name}.tmp-"):
            shutil.rmtree(path, ignore_errors=True)


class WorkFolder:
    """Opened for one output folder and one description of a run; a context manager that holds the lock.

    On leaving, the folder goes unless there is a checkpoint in it to go on from.

    Raises:
        OccupiedError: the output folder holds something, or the run in the working folder is another.
        LockedError: another process works on it.
    """

    def __init__(self, out: Path, description: dict[str, Any]) -> None:
        self.out = out
        self.path = folder_beside(out)
        self._checkpoint = self.path / CHECKPOINT_NAME
        self._log = self.path / LOG_NAME
        self._description = json.loads(json.dumps(description))
        if out.is_file() or (out.is_dir() and any(out.iterdir())):
            raise OccupiedError(f"{out} holds something already. Give another output folder, or move that one away.")
        self._require_same_run()
        self._lock = FileLock(self.path / "lock", timeout=0)

    def __enter__(self) -> "WorkFolder":
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire()
        except Timeout as error:
            raise LockedError(
                f"Another process trains {self.out}. Wait for it, or give another output folder."
            ) from error
        (self.path / STOPPED_NAME).unlink(missing_ok=True)
        write_atomically(self.path / "run.json", json.dumps(self._description, indent=2, sort_keys=True).encode())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if error is not None and self.has_checkpoint:
            self._say_why(error)
        self._lock.release()
        if not self.has_checkpoint:
            self.remove()

    def _say_why(self, error: BaseException) -> None:
        """For whoever looks at the run afterwards. A disk that is full must not hide the error itself."""
        told = {"type": type(error).__name__, "message": str(error), "at": time.time()}
        with contextlib.suppress(OSError):
            write_atomically(self.path / STOPPED_NAME, json.dumps(told).encode())

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is something to go on from."""
        return self._checkpoint.is_file()

    def resume(self, trainer: SAETrainer) -> float:
        """Put the trainer and the log where the checkpoint was taken; returns the seconds spent until then."""
        if not self.has_checkpoint:
            self._log.write_bytes(b"")
            return 0.0
        progress = load_checkpoint(self._checkpoint, trainer)
        with open(self._log, "r+b") as file:
            file.truncate(progress.log_bytes)
        return progress.seconds

    def checkpoint(self, tensors: Mapping[str, Tensor], counters: Mapping[str, Any], seconds: float) -> None:
        """Replace the checkpoint by a trainer's `state_tensors` and `counters`."""
        with open(self._log, "rb") as file:
            os.fsync(file.fileno())  # the checkpoint says how long the log is, so the log must last first
        save_checkpoint(self._checkpoint, tensors, counters, Progress(self._log.stat().st_size, seconds))

    def tracker_key(self) -> str:
        """What stands for this run in trackers; the same when it is taken up again."""
        path = self.path / "tracker-key"
        if not self.has_checkpoint or not path.is_file():
            path.write_text(secrets.token_hex(8))
        return path.read_text()

    def append(self, line: dict[str, Any]) -> None:
        """Add a line to the run log."""
        with open(self._log, "a") as file:
            file.write(json.dumps(line) + "\n")

    def log(self) -> bytes:
        """The run log."""
        return self._log.read_bytes()

    def remove(self) -> None:
        """Delete the working folder: the run is done."""
        clear_beside(self.out)

    def _require_same_run(self) -> None:
        try:
            there = json.loads((self.path / "run.json").read_text())
        except (OSError, ValueError):
            return
        if there == self._description or not self.has_checkpoint:
            return
        mine, theirs = _flat(self._description), _flat(there)
        differing = [
            f"{name} is {mine.get(name)!r}, there {theirs.get(name)!r}"
            for name in sorted(mine.keys() | theirs.keys())
            if mine.get(name) != theirs.get(name)
        ]
        raise OccupiedError(
            f"{self.path} holds an unfinished run with other settings: {'; '.join(differing)}. Finish it with those, "
            "delete it, or give another output folder."
        )


def _flat(content: dict[str, Any]) -> dict[str, Any]:
    return {**{name: value for name, value in content.items() if name != "config"}, **content.get("config", {})}
