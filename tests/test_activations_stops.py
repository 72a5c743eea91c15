"""Whatever stops a run, a full disk, Ctrl-C or an error in any thread: it says so, lets go, and can be resumed."""

import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_activations import FakeModel, FakePending, pythons_own_sigint, tree, write_text
from helpers_nursery import Ended, Nursery

from activations import arrays
from activations.capture import CaptureReport, capture
from activations.errors import ActivationsError, InterruptedRunError, InvalidInputError
from activations.interrupts import Interrupts
from activations.layout import PLAN
from activations.ledger import WriterLock
from activations.pipeline import Channel, Stopped
from activations.store import ActivationStore
from activations.text import TextSource

RESID, Z = "blocks.1.hook_resid_post", "blocks.1.attn.hook_z"
HOOKS = [RESID, Z]
SETTINGS: dict[str, Any] = {"context_size": 16, "rows_per_group": 32, "batch_size": 64, "max_tokens": 300}
HOW_TO_RESUME = "run the same command again to resume"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.jsonl")


def run(text: Path, out: Path, model: Any = None, **changes: Any) -> CaptureReport:
    return capture(FakeModel() if model is None else model, TextSource(text), HOOKS, out, **(SETTINGS | changes))


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return tree(run(text, tmp_path_factory.mktemp("whole") / "s.zarr").store.path)


def check_stopped(out: Path) -> int:
    """The store opens, is sound, and nobody holds it. Returns its rows."""
    assert not (out / "lock").exists()
    assert not list(out.rglob("*.tmp-*"))
    if not (out / "manifest.json").exists():
        return 0
    store = ActivationStore.open(out)
    assert store.verify() == []
    return store.n_rows


# ---- a full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path | None]:
    """A file system of 1 MiB; None where this process may not mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_fills_up(text: Path, whole: dict[str, bytes], small_disk: Path | None, tmp_path: Path) -> None:
    """With less and less room for it, a run stops early, or at once; with room again, it goes on to the same bytes."""
    if small_disk is None:
        files_that_cannot_grow(text, whole, tmp_path)
        return
    out, ballast = small_disk / "s.zarr", small_disk / "ballast"
    rows = []
    for pages_left in (128, 64, 32, 24, 20, 16, 12, 8, 6, 4, 3, 2, 1, 0):
        shutil.rmtree(out, ignore_errors=True)
        ballast.write_bytes(bytes(2**20 - pages_left * 4096))
        with pytest.raises(ActivationsError, match="No space left on device") as caught:
            run(text, out)
        said = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
        assert HOW_TO_RESUME in said or isinstance(caught.value, InvalidInputError), said
        assert str(out) in said
        rows.append(check_stopped(out))
        if rows[-1]:
            assert f"{rows[-1]:,} rows are committed" in said
        with pytest.raises(ActivationsError, match="No space left on device"):
            run(text, out)  # still no room
        ballast.unlink()
        assert run(text, out).store.verify() == []
        assert tree(out) == whole
    assert rows[0] > rows[-1] == 0, rows


def files_that_cannot_grow(text: Path, whole: dict[str, bytes], folder: Path) -> None:
    """The same where nothing can be mounted: from some forward pass on, no file of the process may grow."""
    rows = []
    for passes in range(0, 10, 2):
        out = folder / f"{passes}.zarr"
        with Nursery(folder) as nursery:
            model = {"file_limit_after": passes}
            arguments = {"text": text, "hooks": HOOKS, "out": out, "settings": SETTINGS}
            ended = nursery.start("capture", **arguments, model=model).wait()
            assert ended.said["error"] == "InterruptedRunError", ended
            assert "File too large" in ended.said["message"]
            assert HOW_TO_RESUME in ended.said["message"]
            rows.append(check_stopped(out))
            assert f"{rows[-1]:,} rows are committed" in ended.said["message"]
            assert nursery.start("capture", **arguments, model={}).wait().status == 0
        assert tree(out) == whole
    assert max(rows) > rows[0] == 0, rows


def test_files_that_cannot_grow(text: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    files_that_cannot_grow(text, whole, tmp_path)


# ---- Ctrl-C


def test_ctrl_c_at_random_moments(text: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """Pressed once, twice or ten times: the child ends, says what to do, has given the lock back, and no thread of it
    is left; then the same run goes on."""
    rng = random.Random(0)
    ends: list[str] = []
    with Nursery(tmp_path) as nursery:
        arguments = {"text": text, "hooks": HOOKS, "settings": SETTINGS, "model": {"delay": 0.005}}
        for number in range(2):
            begun = time.monotonic()
            nursery.start("capture", out=tmp_path / f"whole-{number}.zarr", **arguments).wait()
            lasts = time.monotonic() - begun
        out, number, rows = tmp_path / "0.zarr", 0, 0
        while len(ends) < 30:
            child = nursery.start("capture", out=out, **arguments)
            time.sleep(rng.uniform(0, lasts))
            for _ in range((1, 2, 10)[len(ends) % 3]):
                child.signal(signal.SIGINT)
                time.sleep(rng.uniform(0, 0.004))
            ended = child.wait()
            if "rows" in ended.said:
                lasts *= 0.9  # it came too late
                assert tree(out) == whole
                number += 1
                out, rows = tmp_path / f"{number}.zarr", 0
                continue
            ends.append(check_interrupted(ended))
            now = check_stopped(out)
            assert now >= rows
            rows = now
    assert run(text, out).store.verify() == []
    assert tree(out) == whole


@pytest.mark.parametrize("passes", [0, 1, 3])
def test_ctrl_c_while_the_model_runs(text: Path, whole: dict[str, bytes], tmp_path: Path, passes: int) -> None:
    out = tmp_path / "s.zarr"
    arguments = {"text": text, "hooks": HOOKS, "out": out, "settings": SETTINGS}
    with Nursery(tmp_path) as nursery:
        ended = nursery.start("capture", **arguments, model={"interrupt_after": passes}).wait()
        assert check_interrupted(ended) == "InterruptedRunError"
        assert check_stopped(out) < SETTINGS["max_tokens"]
        assert nursery.start("capture", **arguments, model={}).wait().said["rows"] == SETTINGS["max_tokens"]
    assert tree(out) == whole


def check_interrupted(ended: Ended) -> str:
    """How a child ended that was interrupted before or after its store was open, or while it was."""
    assert ended.status != signal.SIGKILL, "it hung"
    if not ended.said:  # before the job was begun, or after its end
        return "nothing"
    assert ended.said["threads"] == ["MainThread"], ended
    if ended.said["error"] == "InterruptedRunError":
        assert ended.said["message"].startswith("Interrupted. ")
        assert HOW_TO_RESUME in ended.said["message"]
    else:
        assert ended.said["error"] == "KeyboardInterrupt"
    return str(ended.said["error"])


def press() -> None:
    """Ctrl-C; when this returns, its handler has run."""
    signal.raise_signal(signal.SIGINT)


def test_interrupts_are_held_back_until_the_end() -> None:
    steps = []

    def work(error: Exception | None = None) -> None:
        with Interrupts() as interrupts:
            press()
            press()
            assert interrupts.noted
            steps.append("held back")
            if error is not None:
                raise error

    with pythons_own_sigint():
        with pytest.raises(KeyboardInterrupt):
            work()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        with pytest.raises(BrokenError):
            work(BrokenError())
        with pytest.raises(KeyboardInterrupt):
            press()
    assert steps == ["held back", "held back"]


def test_an_interrupt_wakes_who_waits_and_strikes_a_long_computation_once() -> None:
    channel: Channel[int] = Channel(1)

    def work() -> None:
        with Interrupts() as interrupts, interrupts.stopping(channel.stop):
            with pytest.raises(KeyboardInterrupt), interrupts.at_once():
                press()
            press()
            with interrupts.at_once():
                press()
            with pytest.raises(Stopped):
                channel.get()

    with pythons_own_sigint(), pytest.raises(KeyboardInterrupt):
        work()
    assert not any(thread.name == "interrupts" for thread in threading.enumerate())


def test_a_handler_of_the_callers_is_left_in_place() -> None:
    pressed = []
    before = signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    try:
        with Interrupts() as interrupts, interrupts.stopping(lambda: None), interrupts.at_once():
            press()
    finally:
        signal.signal(signal.SIGINT, before)
    assert pressed == [signal.SIGINT]


def test_capture_in_a_thread_needs_no_signals(text: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    thread = threading.Thread(target=run, args=(text, tmp_path / "s.zarr"))
    thread.start()
    thread.join()
    assert tree(tmp_path / "s.zarr") == whole


# ---- an error in any thread


class BrokenError(Exception):
    pass


class BrokenModel(FakeModel):
    """Raises at the nth call, in the model, the collector's thread, or the planner's."""

    def __init__(self, where: str, at: int) -> None:
        super().__init__()
        self.where, self.left = where, at

    def _count(self, where: str) -> None:
        if where == self.where:
            self.left -= 1
            if self.left < 0:
                raise BrokenError(f"the {where} broke")

    def encode_documents(self, texts: Any) -> list[np.ndarray]:
        if threading.current_thread().name == "planner":
            self._count("planner")
        return super().encode_documents(texts)

    def forward_rows(self, *arguments: Any) -> FakePending:
        self._count("model")
        pending = super().forward_rows(*arguments)
        model = self

        class Pending(FakePending):
            def wait(self) -> Any:
                model._count("collector")
                return pending.wait()

        return Pending({})


@pytest.mark.parametrize("where", ["model", "collector", "planner", "writer", "progress"])
@pytest.mark.parametrize("at", [0, 3])
def test_an_error_in_any_thread(
    where: str, at: int, text: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, model = tmp_path / "s.zarr", BrokenModel(where, at)
    monkeypatch.setattr("activations.plan.ENCODE_DOCUMENTS", 1)
    settings: dict[str, Any] = {}
    if where == "writer":
        finish = arrays.ShardBuffer.finish

        def finish_or_break(self: Any, n_rows: int) -> Any:
            model._count("writer")
            return finish(self, n_rows)

        monkeypatch.setattr(arrays.ShardBuffer, "finish", finish_or_break)
    if where == "progress":
        settings["progress"] = lambda done, total: model._count("progress")
    before = set(threading.enumerate())
    with pytest.raises(BrokenError, match=f"the {where} broke") as caught:
        run(text, out, model, **settings)
    rows = check_stopped(out)
    assert f"{rows:,} rows are committed in {out}; {HOW_TO_RESUME}." in caught.value.__notes__
    assert not [thread.name for thread in threading.enumerate() if thread not in before]
    monkeypatch.undo()
    planned = ActivationStore.open(out).ledger.committed_rows(PLAN)
    assert run(text, out).resumed == (planned > 0)
    assert tree(out) == whole


def test_a_lock_that_cannot_be_written_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"), WriterLock(tmp_path):
        pass
    monkeypatch.undo()
    with WriterLock(tmp_path):
        pass


def test_a_file_error_between_passes_says_how_to_resume(
    text: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    out = tmp_path / "s.zarr"
    for function in ("_create", "_declare", "declare_hooks"):
        monkeypatch.setattr(f"activations.writer.StoreWriter.{function}", full)
        with pytest.raises(InterruptedRunError, match=f"No space left on device.*{HOW_TO_RESUME}"):
            run(text, out)
        assert not (out / "lock").exists()
        monkeypatch.undo()
        monkeypatch.setattr("os.fsync", lambda descriptor: None)
    run(text, out)
    assert tree(out) == whole
