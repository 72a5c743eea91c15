"""Memory: a process's peak is bounded by a few batches and a few shards, and does not grow with the run.

What does grow is the ledger, which a store holds in memory: some kilobytes a row group, against the 128 MiB that a row
group's shard usually has. `test_the_ledger_in_memory` says how many.
"""

import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_nursery import Nursery

from activations import arrays
from activations.ledger import GroupRecord, Ledger
from activations.passes import GROUPS_IN_FLIGHT, RESULTS_PENDING
from activations.store import READ_AHEAD_BYTES

MIB = 2**20
WIDTH, ROWS = 2048, 512
SHARD = WIDTH * ROWS * 2
"""2 MiB."""
SHORT, LONG = 16, 96
"""Row groups of the two runs."""
BATCH = 512
SLACK = 4 * SHARD
"""How much two peaks may differ: a few shards, of the 160 MiB that one run writes more than the other."""


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    with Nursery(tmp_path_factory.mktemp("nursery")) as nursery:
        yield nursery


def write_documents(path: Path, n_documents: int, length: int, **columns: Any) -> Path:
    line = json.dumps({"text": "abcdefg " * (length // 8), **columns}) + "\n"
    path.write_text(line * n_documents)
    return path


def captured(nursery: Nursery, text: Path, out: Path, width: int, **settings: Any) -> int:
    """Capture all of a text; returns the peak of the process in bytes."""
    model = {"hooks": {"wide": [width]}, "zeros": True}
    settings = {"context_size": 256, "batch_size": BATCH, "rows_per_group": ROWS, **settings}
    ended = nursery.start("capture", text=text, hooks=["wide"], out=out, settings=settings, model=model).wait()
    assert ended.status == 0, ended
    return ended.peak_bytes


@pytest.fixture(scope="module")
def stores(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, int]]:
    """A short store and a long one by their row groups, with the peak of the process that made each."""
    folder = tmp_path_factory.mktemp("stores")
    text = write_documents(folder / "text.jsonl", 30, 2040)
    found = {}
    for groups in (SHORT, LONG):
        out = folder / f"{groups}.zarr"
        found[groups] = (out, captured(nursery, text, out, WIDTH, max_tokens=groups * ROWS))
    return found


def test_capture_at_two_lengths(stores: dict[int, tuple[Path, int]], nursery: Nursery, tmp_path: Path) -> None:
    short, long = stores[SHORT][1], stores[LONG][1]
    assert sum(path.stat().st_size for path in stores[LONG][0].rglob("c.*")) > LONG * SHARD
    assert long - short < SLACK
    # A batch is float32 in the model, with as much again to round it, and bfloat16 from there on. On a busy machine all
    # that is allowed is there at the same moment, and the allocator's own share with it.
    text = write_documents(tmp_path / "text.jsonl", 20, 2040)
    bare = captured(nursery, text, tmp_path / "s.zarr", 1, max_tokens=ROWS)
    batch = BATCH * WIDTH * 2
    bound = 6 * batch + (RESULTS_PENDING + 2) * batch + GROUPS_IN_FLIGHT * SHARD
    assert long - bare < bound + 2 * SLACK


def test_denoising_at_two_lengths(nursery: Nursery, tmp_path: Path) -> None:
    peaks = []
    for prompts in (SHORT, LONG):
        text, out = write_documents(tmp_path / f"{prompts}.jsonl", prompts, 16), tmp_path / f"{prompts}.zarr"
        settings = {"rows_per_group": ROWS}
        ended = nursery.start("denoising", text=text, hook="wide", out=out, width=WIDTH, settings=settings).wait()
        assert ended.status == 0, ended
        assert ended.said["rows"] == prompts * ROWS
        peaks.append(ended.peak_bytes)
    assert peaks[1] - peaks[0] < SLACK


def test_reading_at_two_lengths(stores: dict[int, tuple[Path, int]], nursery: Nursery) -> None:
    peaks = {}
    for groups, (store, _) in stores.items():
        ended = nursery.start("batches", store=store, hooks=["wide"], batch_size=256).wait()
        assert ended.said["rows"] == groups * ROWS
        peaks[groups] = ended.peak_bytes
    assert peaks[LONG] - peaks[SHORT] < SLACK
    bare = nursery.start("batches", store=stores[SHORT][0], hooks=[], batch_size=256).wait().peak_bytes
    assert peaks[LONG] - bare < 2 * READ_AHEAD_BYTES + SLACK


def test_shuffling_at_two_lengths(stores: dict[int, tuple[Path, int]], nursery: Nursery) -> None:
    peaks, memory = {}, 16 * MIB
    for groups, (store, _) in stores.items():
        ended = nursery.start("shuffled", store=store, hook="wide", batch_size=128, memory_bytes=memory).wait()
        assert ended.said["in_memory"] is False
        assert ended.said["rows"] > 0.9 * groups * ROWS
        peaks[groups] = ended.peak_bytes
    assert peaks[LONG] - peaks[SHORT] < 2 * SLACK
    bare = nursery.start("batches", store=stores[SHORT][0], hooks=[], batch_size=256).wait().peak_bytes
    assert peaks[LONG] - bare < 2 * memory + SLACK


def test_many_documents(nursery: Nursery, tmp_path: Path) -> None:
    """Titles and sequences are forgotten once their row group is planned."""
    peaks = []
    for n_documents in (9_000, 24_000):
        text = write_documents(tmp_path / f"{n_documents}.jsonl", n_documents, 8, title="t" * 400, note="n" * 400)
        peaks.append(captured(nursery, text, tmp_path / f"{n_documents}.zarr", 4, rows_per_group=8192, batch_size=8192))
    assert peaks[1] - peaks[0] < 15_000 * 600


def test_a_huge_document(nursery: Nursery, tmp_path: Path) -> None:
    """A document is tokenised whole, which takes some bytes for each of its tokens, and no more."""
    lengths, peaks = (2**18, 2**20), []
    for length in lengths:
        text = write_documents(tmp_path / f"{length}.jsonl", 1, length)
        peaks.append(captured(nursery, text, tmp_path / f"{length}.zarr", 4, rows_per_group=8192, batch_size=8192))
    assert (peaks[1] - peaks[0]) / (lengths[1] - lengths[0]) < 64


def test_the_ledger_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store with a hook whose shards have 128 inner chunks: under 16 KiB a row group, of 128 MiB on the disk."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    book, groups = Ledger(tmp_path), 64
    book.declare("x", {})
    digests = np.random.default_rng(0).integers(0, 2**32, (groups, 128))
    for group in range(groups):
        shard = arrays.ObjectRecord(2**27, f"{group:032x}", tuple(digests[group].tolist()))
        small = {f"tokens/{n}/c.{group}": arrays.ObjectRecord(2**15, f"{group:032x}") for n in range(7)}
        book.commit(GroupRecord("x", group, group, group + 1, {f"hooks/x/c.{group}.0": shard, **small}))
    tracemalloc.start()
    again = Ledger(tmp_path)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert again.committed_groups("x") == groups
    assert size / groups < 16 * 1024
