"""Trainings as they lie on disk, running or finished, without torch: what watches a run reads it here.

A run leaves `train.jsonl` beside its SAE `NAME` when it is done, and in its working folder `.NAME.training` until then
(`scope.training.workfolder`). Its state is told by what else is there:

1. an SAE with a manifest: *finished*;
2. a working folder that a process holds, or whose log has just grown: *running*;
3. one with `stopped.json`: *stopped*, by what that says: a NaN, Ctrl-C, a full disk;
4. one with neither: *lost*: its process ended without a word, as `kill -9` or the loss of power end it.

A working folder without a log yet is *starting* where it is held.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

__all__ = [
    "CHECKPOINT_NAME",
    "LOG_NAME",
    "QUALITY_NAME",
    "STOPPED_NAME",
    "Checkpoint",
    "LogReader",
    "Run",
    "RunState",
    "Snapshot",
    "discover",
    "finished_run",
    "levels",
    "read_checkpoint",
    "read_quality",
    "snapshots_beside",
]

LOG_NAME = "train.jsonl"
CHECKPOINT_NAME = "checkpoint.safetensors"
STOPPED_NAME = "stopped.json"
"""Why a run ended before its end."""
QUALITY_NAME = "evaluation.json"
"""How good a finished SAE is on held-out text (`scope.training.evaluate`)."""
EARLIER_QUALITY_NAME = "quality.json"
ID_LENGTH = 12
FRESH = 15.0
"""Seconds after which a log that nobody is seen to hold counts as no longer written."""
MAX_HEADER = 2**24


class RunState(StrEnum):
    """Where a run stands."""

    RUNNING = "running"
    FINISHED = "finished"
    STOPPED = "stopped"
    LOST = "lost"


@dataclass(frozen=True)
class Checkpoint:
    """Where a run can go on from."""

    steps: int
    tokens: int
    seconds: float
    """Time spent in the loop until then."""


@dataclass(frozen=True)
class Snapshot:
    """A decoder kept along the way (`scope.training.snapshots`)."""

    steps: int
    path: Path


@dataclass(frozen=True)
class Run:
    """One training run."""

    id: str
    """Twelve hex digits, of where the SAE lies or will lie: the same while the run goes on and when it is done."""
    name: str
    """The output folder's name; of a sweep's run with the sweep's before it."""
    path: Path
    """The folder that the log lies in."""
    out: Path
    """The SAE's folder, which may not be there yet."""
    state: RunState
    hook: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The fields of its `TrainConfig`."""
    problem: str | None = None
    """Why it stopped, where it did."""
    checkpoint: Checkpoint | None = None
    """The last good one, of a run that is not finished."""
    figures: Mapping[str, Any] = field(default_factory=dict)
    """Of a finished run: `TrainReport.to_dict`."""
    sae: str | None = None
    """The SAE's id, of a finished run."""
    snapshots: tuple["Snapshot", ...] = ()
    """Decoders kept along the way, the earliest first."""
    changed_at: float = 0.0
    """When its log last grew, seconds since 1970."""

    @property
    def log(self) -> Path:
        """The run log, one JSON object a line."""
        return self.path / LOG_NAME

    @property
    def total_tokens(self) -> int | None:
        """Rows that it is to be trained on."""
        tokens = self.settings.get("tokens")
        return int(tokens) if tokens else None


def discover(folders: Iterable[Path]) -> list[Run]:
    """The runs whose SAEs lie, or will lie, in some folders or in folders of those (a sweep's), the latest first."""
    found: dict[str, Run] = {}
    for folder in folders:
        for inner, prefix in levels(folder):
            for run in _runs_in(inner, prefix):
                if run.id not in found or run.state is not RunState.FINISHED:
                    found[run.id] = run
    return sorted(found.values(), key=lambda run: (run.state is not RunState.RUNNING, -run.changed_at, run.name))


def read_quality(folder: Path) -> dict[str, Any]:
    """The figures that `scope.training.evaluate` left beside an SAE; empty where there are none."""
    for name in (QUALITY_NAME, EARLIER_QUALITY_NAME):
        if (folder / name).is_file():
            return dict(json.loads((folder / name).read_text()))
    return {}


def levels(folder: Path) -> Iterator[tuple[Path, str]]:
    """A folder and those in it that are no artefacts themselves, such as a sweep's; each with what stands before the
    names in it."""
    yield folder, ""
    for child in _children(folder):
        if child.name.startswith(".") or child.name.endswith(".snapshots"):
            continue
        if child.is_dir() and not (child / "manifest.json").is_file():
            yield child, f"{child.name}/"


def _children(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _runs_in(folder: Path, prefix: str) -> Iterator[Run]:
    for child in _children(folder):
        working = child.name.startswith(".") and child.name.endswith(".training")
        try:
            if working and child.is_dir():
                name = child.name.removeprefix(".").removesuffix(".training")
                yield _unfinished(child, child.with_name(name), prefix + name)
            elif (child / LOG_NAME).is_file() and (child / "manifest.json").is_file():
                yield finished_run(child, prefix + child.name)
        except OSError:
            continue  # it has just been finished or deleted


def _id_of(out: Path) -> str:
    return hashlib.sha256(os.fsencode(out.resolve())).hexdigest()[:ID_LENGTH]


def finished_run(out: Path, name: str) -> Run:
    """The run that left its log beside an SAE."""
    manifest = _read_json(out / "manifest.json")
    metadata = _read_json(out / "cfg.json").get("metadata") or {}
    figures = manifest.get("training") or {}
    return Run(
        id=_id_of(out),
        name=name,
        path=out,
        out=out,
        state=RunState.FINISHED,
        hook=str(figures.get("hook") or metadata.get("hook_name") or ""),
        settings=metadata.get("training") or {},
        figures=figures,
        sae=str(manifest.get("fingerprint", ""))[:ID_LENGTH] or None,
        snapshots=_snapshots(out),
        changed_at=(out / LOG_NAME).stat().st_mtime,
    )


def _unfinished(folder: Path, out: Path, name: str) -> Run:
    described = _read_json(folder / "run.json")
    log = folder / LOG_NAME
    changed = log.stat().st_mtime if log.is_file() else folder.stat().st_mtime
    stopped = _read_json(folder / STOPPED_NAME)
    running = _is_held(folder / "lock") or (not stopped and time.time() - changed < FRESH)
    state = RunState.RUNNING if running else RunState.STOPPED if stopped else RunState.LOST
    problem = stopped.get("message") if state is RunState.STOPPED else None
    if state is RunState.LOST:
        problem = "Its process ended without a word: it was killed, or the machine went down."
    return Run(
        id=_id_of(out),
        name=name,
        path=folder,
        out=out,
        state=state,
        hook=str(described.get("hook", "")),
        settings=described.get("config") or {},
        problem=problem,
        checkpoint=read_checkpoint(folder / CHECKPOINT_NAME),
        snapshots=_snapshots(out),
        changed_at=changed,
    )


def snapshots_beside(out: Path) -> Path:
    """The folder of the decoders that were kept along the way to an SAE."""
    return out.with_name(f"{out.name}.snapshots")


def _snapshots(out: Path) -> tuple[Snapshot, ...]:
    return tuple(
        Snapshot(int(path.stem.removeprefix("step-")), path)
        for path in sorted(snapshots_beside(out).glob("step-*.safetensors"))
        if path.stem.removeprefix("step-").isdigit()
    )


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none, or one that is just being written."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _is_held(lock: Path) -> bool:
    """Whether a process of this machine holds a lock, told without asking for it: a trainer that starts at the same
    instant would be refused. Only Linux says; elsewhere the log's age tells."""
    try:
        number = str(lock.stat().st_ino)
        held = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return False
    return any(line.split()[5].rpartition(":")[2] == number for line in held if len(line.split()) > 5)


def read_checkpoint(path: Path) -> Checkpoint | None:
    """Where a checkpoint was taken, from the header of its file; None where there is none that can be read."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MAX_HEADER:
                return None
            state = json.loads(json.loads(file.read(length))["__metadata__"]["state"])
        return Checkpoint(int(state["steps_done"]), int(state["tokens_done"]), float(state.get("seconds", 0.0)))
    except (OSError, ValueError, KeyError, TypeError):
        return None


class LogReader:
    """Reads run logs as they grow: each byte once. Safe across threads.

    A log that became shorter, or is another file than before, is read anew: a resume cuts it back to its checkpoint.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._known: dict[str, _Tail] = {}

    def read(self, run: Run) -> list[dict[str, Any]]:
        """The lines of a run's log so far. Shared: copy before changing it."""
        with self._lock:
            tail = self._known.setdefault(run.id, _Tail())
            tail.advance(run.log)
            return tail.lines


class _Tail:
    """What has been read of one log."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self._file: tuple[int, int] = (0, 0)
        self._offset = 0

    def advance(self, path: Path) -> None:
        try:
            with open(path, "rb") as file:
                about = os.fstat(file.fileno())
                if (about.st_dev, about.st_ino) != self._file or about.st_size < self._offset:
                    self._restart((about.st_dev, about.st_ino))
                if about.st_size == self._offset:
                    return
                fresh = self._read(file, about.st_size)
                if self.lines and fresh and _step(fresh[0]) <= _step(self.lines[-1]):  # cut back, and grown past
                    self._restart(self._file)
                    fresh = self._read(file, about.st_size)
        except OSError:
            return
        self.lines = [*self.lines, *fresh]

    def _restart(self, file: tuple[int, int]) -> None:
        self.lines, self._file, self._offset = [], file, 0

    def _read(self, file: BinaryIO, end: int) -> list[dict[str, Any]]:
        file.seek(self._offset)
        content = file.read(end - self._offset)
        whole = content[: content.rfind(b"\n") + 1]  # a line that is just being written waits
        self._offset += len(whole)
        return [record for line in whole.splitlines() if (record := _record(line)) is not None]


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "step" in record else None


def _step(record: Mapping[str, Any]) -> float:
    return float(record["step"])
