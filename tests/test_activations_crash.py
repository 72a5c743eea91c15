"""Nothing lost: crashes at every write, locks, and a ledger that folds. Kills are in `test_activations_kill`."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_activations import FakeModel, expected_rows, tree, write_text

from activations import arrays, disk, ledger, manifest
from activations.capture import CaptureReport, capture
from activations.errors import IntegrityError, InvalidInputError, LockedError
from activations.ledger import GroupRecord, Ledger, WriterLock
from activations.source import float32_to_bf16
from activations.store import ActivationStore
from activations.text import TextSource

RESID, Z = "blocks.1.hook_resid_post", "blocks.1.attn.hook_z"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def run(text: Path, out: Path, **settings: Any) -> CaptureReport:
    settings = {"context_size": 16, "rows_per_group": 32, "batch_size": 64, "max_tokens": 150, **settings}
    return capture(FakeModel(), TextSource(text), [RESID, Z], out, **settings)


def check_what_is_there(out: Path) -> int:
    """The store opens, holds whole committed row groups, and every row in it is right. Returns how many there are."""
    try:
        store = ActivationStore.open(out)
    except InvalidInputError:  # killed before the manifest was there
        assert not (out / "manifest.json").exists()
        return 0
    for hook in store.hooks:
        n_rows = store.rows_of(hook)
        assert store.complete or n_rows % store.spec.rows_per_group == 0
        if n_rows:
            expected = float32_to_bf16(expected_rows(FakeModel(), store, hook))[:n_rows]
            np.testing.assert_array_equal(store.read(hook, 0, n_rows), expected)
    assert store.verify() == []
    return store.n_rows


class Crash(BaseException):
    """The process is gone: no handler of an ordinary error may see this."""


@pytest.mark.parametrize("kind", ["before the rename", "after the rename"])
def test_a_crash_at_any_write_loses_nothing(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = write_text(tmp_path / "text.jsonl")
    expected = tree(run(text, tmp_path / "whole.zarr").store.path)
    replace = os.replace
    point = total = 0
    seen = set()
    while point <= total:
        out, count = tmp_path / f"{point}.zarr", [0]

        def crashing(source: Path, target: Path, count: list[int] = count, point: int = point) -> None:
            count[0] += 1
            if count[0] >= point and kind == "before the rename":
                raise Crash
            replace(source, target)
            if count[0] >= point and kind == "after the rename":
                raise Crash

        monkeypatch.setattr(os, "replace", crashing)
        with contextlib.suppress(Crash):
            run(text, out)
        monkeypatch.setattr(os, "replace", replace)
        total = max(total, count[0])
        if point == 0:
            total = len(expected) + 4  # about all renames of a run
        seen.add(check_what_is_there(out))
        run(text, out)
        assert tree(out) == expected
        point += 3
    assert {0} < seen  # how many rows a crash leaves depends on which thread was first


def test_threads_that_replace_one_file_leave_one_of_theirs_whole(tmp_path: Path) -> None:
    contents = [str(number).encode() * 100_000 for number in range(4)]
    with ThreadPoolExecutor(4) as pool:
        writes = [pool.submit(disk.write_file, tmp_path / "file", contents[number % 4]) for number in range(80)]
        assert all(write.result() for write in writes)
    assert (tmp_path / "file").read_bytes() in contents
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_leftovers_of_a_dead_writer_are_cleared(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.jsonl")
    store = run(text, tmp_path / "s.zarr").store
    before = tree(store.path)
    capture_id = store.capture_of(RESID)
    for name in ("", f"hooks/{RESID}/", "tokens/flags/", "documents/", f"ledger/{capture_id}/"):
        (store.path / f"{name}x.tmp-123").write_bytes(b"half")
    (store.path / "lock").write_text(json.dumps({"host": socket.gethostname(), "pid": 999_999}))
    assert store.verify() == [], "files that the ledger does not know are no faults"
    run(text, tmp_path / "s.zarr")
    assert tree(store.path) == before


def test_zarr_metadata_left_behind_is_brought_up_to_date(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.jsonl")
    store = run(text, tmp_path / "s.zarr").store
    before = tree(store.path)
    layout = store.layout.hook(store.hook_shape(RESID))
    (store.path / "hooks" / RESID / "zarr.json").write_bytes(layout.metadata(32))
    assert store.verify() == []
    (store.path / "hooks" / Z / "zarr.json").unlink()
    run(text, tmp_path / "s.zarr")
    assert tree(store.path) == before


# ---- locks


def test_a_second_writer_is_refused_with_host_and_pid(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.jsonl")
    out = tmp_path / "s.zarr"
    run(text, out, max_tokens=40)
    before = tree(out)
    with (
        WriterLock(out),
        pytest.raises(LockedError, match=rf"process {os.getpid()} on host {socket.gethostname()}"),
    ):
        run(text, out, max_tokens=40)
    assert tree(out) == before


def test_a_lock_held_by_another_process(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from activations.ledger import WriterLock\n"
        f"with WriterLock(Path({str(tmp_path)!r})):\n    print('held', flush=True); time.sleep(600)"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    with pytest.raises(LockedError, match=f"process {child.pid} on host"), WriterLock(tmp_path):
        pass
    child.kill()
    child.wait()
    assert (tmp_path / "lock").exists()
    with WriterLock(tmp_path):  # its holder is dead: taken over
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    assert not (tmp_path / "lock").exists()


@pytest.mark.parametrize(
    ("holder", "stale"),
    [
        ({"host": "elsewhere", "pid": 1, "boot_id": "another kernel"}, False),
        ({"host": socket.gethostname(), "pid": 1, "boot_id": "before the reboot"}, True),
        ({}, True),
        ("not json", True),
    ],
)
def test_stale_locks(holder: Any, stale: bool, tmp_path: Path) -> None:
    (tmp_path / "lock").write_text(holder if isinstance(holder, str) else json.dumps(holder))
    if stale:
        with WriterLock(tmp_path):
            pass
        assert not (tmp_path / "lock").exists()
        return
    with pytest.raises(LockedError, match=r"process 1 on host elsewhere.*delete .*lock"), WriterLock(tmp_path):
        pass
    assert (tmp_path / "lock").exists()


# ---- the ledger by itself


def record(group: int) -> GroupRecord:
    objects = {f"a/c.{group}": arrays.ObjectRecord(10 + group, f"{group:032x}", (group, 2**32 - 1))}
    return GroupRecord("x", group, group * 4, group * 4 + 4, objects, {"n": group})


@pytest.fixture
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "RECORDS_PER_SEGMENT", 4)


@pytest.mark.usefixtures("small_segments")
def test_records_fold_into_segments_whatever_their_order(tmp_path: Path) -> None:
    trees = []
    for name, order in (("a", range(10)), ("b", [3, 1, 9, 0, 2, 8, 7, 5, 6, 4])):
        book = Ledger(tmp_path / name)
        book.declare("x", {"hooks": {}})
        for group in order:
            book.commit(record(group))
        trees.append(tree(tmp_path / name))
        again = Ledger(tmp_path / name)
        assert again.records == {"x": {group: record(group) for group in range(10)}}
        assert again.declarations == {"x": {"hooks": {}}}
        assert (again.committed_groups("x"), again.committed_rows("x"), again.committed_rows("none")) == (10, 40, 0)
    assert trees[0] == trees[1]
    names = sorted(Path(name).name for name in trees[0])
    assert names == ["00000008.json", "00000009.json", "capture.json", "segment-000000.jsonl", "segment-000001.jsonl"]


@pytest.mark.usefixtures("small_segments")
def test_a_fold_that_was_cut_short_is_finished(tmp_path: Path) -> None:
    book = Ledger(tmp_path)
    book.declare("x", {})
    for group in range(4):
        book.commit(record(group))
    done = tree(tmp_path)
    folder = tmp_path / "ledger" / "x"
    for group in (1, 2):  # the segment is there, its records are not all gone
        manifest.write_atomically(folder / f"{group:08d}.json", record(group).to_line())
    again = Ledger(tmp_path)
    assert again.committed_groups("x") == 4
    again.tidy()
    assert tree(tmp_path) == done
    (folder / "segment-000000.jsonl").unlink()  # the records are there, the segment is not
    for group in range(4):
        manifest.write_atomically(folder / f"{group:08d}.json", record(group).to_line())
    Ledger(tmp_path).tidy()
    assert tree(tmp_path) == done


@pytest.mark.usefixtures("small_segments")
def test_rows_after_a_gap_do_not_exist_yet(tmp_path: Path) -> None:
    book = Ledger(tmp_path)
    book.declare("x", {})
    for group in (0, 1, 3):
        book.commit(record(group))
    assert book.committed_rows("x") == 8
    book.commit(record(2))
    assert book.committed_rows("x") == 16


def test_a_rotten_record_is_an_error_that_names_its_file(tmp_path: Path) -> None:
    book = Ledger(tmp_path)
    book.declare("x", {})
    book.commit(record(7))
    path = tmp_path / "ledger" / "x" / "00000007.json"
    good = path.read_bytes()
    for place in range(0, len(good) - 1, 5):
        rotten = bytearray(good)
        rotten[place] ^= 2
        path.write_bytes(rotten)
        with pytest.raises(IntegrityError, match=r"00000007\.json is damaged"):
            Ledger(tmp_path)
    path.write_bytes(good)
    assert Ledger(tmp_path).records["x"][7] == record(7)
