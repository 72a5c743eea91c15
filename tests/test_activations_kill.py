"""Kill -9 at a hundred random moments: nothing committed is lost, and the store ends byte for byte the same."""

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import helpers_models
import numpy as np
import pytest
from helpers_activations import FakeModel, expected_rows, tree, write_text
from helpers_nursery import Nursery

import activations
from activations import ledger
from activations.capture import capture
from activations.errors import InvalidInputError
from activations.source import float32_to_bf16
from activations.store import ActivationStore
from activations.text import TextSource

RESID, Z = "blocks.1.hook_resid_post", "blocks.1.attn.hook_z"
KILLS = 100
GROUPS = 11
SETTINGS = {"context_size": 16, "rows_per_group": 16, "batch_size": 32, "max_tokens": 16 * GROUPS - 5}
RECORDS_PER_SEGMENT = 4


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    monkeypatch.setattr(ledger, "RECORDS_PER_SEGMENT", RECORDS_PER_SEGMENT)


def opened(out: Path) -> ActivationStore | None:
    """The store; none before its manifest is there."""
    try:
        return ActivationStore.open(out)
    except InvalidInputError:
        assert not (out / "manifest.json").exists()
        return None


def check_rows(store: ActivationStore) -> int:
    """Every row that is there is right. Returns how many there are."""
    for hook in store.hooks:
        n_rows = store.rows_of(hook)
        assert n_rows % 16 == 0 or n_rows == SETTINGS["max_tokens"]
        if n_rows:
            expected = float32_to_bf16(expected_rows(FakeModel(), store, hook))[:n_rows]
            np.testing.assert_array_equal(store.read(hook, 0, n_rows), expected)
    return store.n_rows


def progress_of(out: Path) -> int:
    """Records in the ledger, folded or not: grows from the first row group planned to the last one captured."""
    names = [path.name for path in out.glob("ledger/*/*.json*")]
    segments = sum(name.startswith("segment-") for name in names)
    return segments * RECORDS_PER_SEGMENT + sum(name[0].isdigit() for name in names)


def test_kill_9_at_a_hundred_moments(tmp_path: Path) -> None:
    """A store's writers are killed again and again until one completes it; then it is compared with one that was never
    interrupted, and the next one is begun."""
    text = write_text(tmp_path / "text.jsonl", n_documents=12)
    whole = tree(capture(FakeModel(), TextSource(text), [RESID, Z], tmp_path / "whole.zarr", **SETTINGS).store.path)
    rng = random.Random(0)
    killed = completed = 0
    with Nursery(tmp_path, RECORDS_PER_SEGMENT) as nursery:

        def start() -> Any:
            out = tmp_path / f"{completed}.zarr"
            return nursery.start("capture", text=text, hooks=[RESID, Z], out=out, settings=SETTINGS, model={})

        for completed in range(2):  # the second one is timed, warm
            begun = time.monotonic()
            assert start().wait().said["rows"] == SETTINGS["max_tokens"]
            lasts = time.monotonic() - begun
            assert tree(tmp_path / f"{completed}.zarr") == whole
        completed, rows = 2, 0
        while killed < KILLS:
            out = tmp_path / f"{completed}.zarr"
            child = start()
            wait_for_a_moment(killed, out, rng, lasts)
            if killed % 5 == 0 and (reader := opened(out)) is not None:
                assert check_rows(reader) >= rows, "a reader while it runs"
            child.signal(signal.SIGKILL)
            ended = child.wait()
            if out.exists():
                store = opened(out)
                now = check_rows(store) if store is not None else 0
                assert now >= rows, "committed rows were lost"
                assert store is None or store.verify() == []
                rows = now
            if ended.status == signal.SIGKILL:
                killed += 1
                continue
            lasts *= 0.9  # the kill came too late
            assert ended.said.get("rows") == SETTINGS["max_tokens"], ended
            assert tree(out) == whole
            completed, rows = completed + 1, 0
    capture(FakeModel(), TextSource(text), [RESID, Z], tmp_path / f"{completed}.zarr", **SETTINGS)
    assert tree(tmp_path / f"{completed}.zarr") == whole


def test_killed_at_files_all_along_it_goes_on(tmp_path: Path) -> None:
    """From the first file of a store to its last, whatever is under way then; each store is completed by the next."""
    text = write_text(tmp_path / "text.jsonl", n_documents=12)
    whole = tree(capture(FakeModel(), TextSource(text), [RESID, Z], tmp_path / "whole.zarr", **SETTINGS).store.path)
    rows_seen = set()
    with Nursery(tmp_path, RECORDS_PER_SEGMENT) as nursery:
        for number in itertools.count(1, 30):
            out = tmp_path / f"{number}.zarr"
            job = {"text": text, "hooks": [RESID, Z], "out": out, "settings": SETTINGS, "model": {}}
            ended = nursery.start("capture", dies_at=number, **job).wait()
            if ended.status == 0:
                break
            assert ended.status == signal.SIGKILL
            store = opened(out) if out.exists() else None
            rows_seen.add(check_rows(store) if store is not None else 0)
            assert store is None or store.verify() == []
            assert nursery.start("capture", **job).wait().said["rows"] == SETTINGS["max_tokens"]
            assert tree(out) == whole
    assert number > 60
    assert {0} < rows_seen  # how many of them there are depends on which thread was first


def wait_for_a_moment(number: int, out: Path, rng: random.Random, lasts: float) -> None:
    """A random moment of a run: half of the times any, else at a commit, or while the store's files are made."""
    deadline = time.monotonic() + 2 * lasts
    if number % 2:
        time.sleep(rng.uniform(0, lasts))
        return
    if number % 4:
        wanted = rng.randint(0, 2 * GROUPS)
        while progress_of(out) < wanted and time.monotonic() < deadline:
            time.sleep(0.0005)
    else:
        wanted = rng.randint(0, 12)
        while len(list(out.rglob("*"))) < wanted and time.monotonic() < deadline:
            time.sleep(0.0001)
    time.sleep(rng.uniform(0, 0.003))


CHILD = """
import os, signal, time
from pathlib import Path
from activations.capture import capture
from activations.text import TextSource
from scope.models import LanguageModel
def die(done, total):
    if done >= 512:  # the first row group is written, or waits for nobody but its writer
        began = time.monotonic()
        while not list(Path({out!r}).glob("ledger/hooks-*/0*.json")):
            assert time.monotonic() < began + 120
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
load = lambda: LanguageModel.load("gemma-3-270m", device="cpu", dtype="float32")
capture(load, TextSource({text!r}), [{hook!r}], {out!r}, progress=die, **{settings!r})
"""


@pytest.mark.real
def test_kill_9_with_the_real_model(tmp_path: Path) -> None:
    hook, out = "blocks.8.hook_resid_post", tmp_path / "killed.zarr"
    text = write_text(tmp_path / "text.jsonl", n_documents=60)
    settings = {"context_size": 64, "rows_per_group": 256, "batch_size": 256, "max_tokens": 1400}
    code = CHILD.format(text=str(text), hook=hook, out=str(out), settings=settings)
    path = os.pathsep.join([str(Path(activations.__file__).parents[1]), *sys.path])
    child = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path})
    assert child.wait() == -signal.SIGKILL
    killed = ActivationStore.open(out)
    assert 0 <= killed.n_rows < 1400
    before = killed.read(hook, 0, killed.n_rows)
    report = capture(helpers_models.real_model(), TextSource(text), [hook], out, **settings)
    assert report.new_rows == 1400 - len(before)
    assert (report.store.n_rows, report.store.verify()) == (1400, [])
    np.testing.assert_array_equal(report.store.read(hook, 0, len(before)), before)
    whole = capture(helpers_models.real_model(), TextSource(text), [hook], tmp_path / "whole.zarr", **settings)
    assert tree(out) == tree(whole.store.path)
