"""Stores in an object store, over a real connection: the bytes of one on a disk, nothing lost, one writer at a time."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_activations import FakeModel, expected_rows, tree, write_text
from helpers_storage import objects, pending_uploads, put, raw, s3_server

from activations import locks, objectstore
from activations.arrays import ObjectRecord
from activations.capture import capture
from activations.errors import (
    IntegrityError,
    InterruptedRunError,
    InvalidInputError,
    LockedError,
    OccupiedError,
    UnknownNameError,
)
from activations.ledger import GroupRecord, Ledger
from activations.objectstore import ObjectStorage
from activations.source import float32_to_bf16
from activations.storage import LocalStorage, OtherSizeError, below, storage_at
from activations.store import ActivationStore
from activations.text import TextSource

RESID, Z = "blocks.1.hook_resid_post", "blocks.1.attn.hook_z"
SETTINGS: dict[str, Any] = {"context_size": 16, "rows_per_group": 32, "batch_size": 64, "max_tokens": 150}
PATIENCE = 120.0
"""Seconds."""


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[None]:
    with s3_server() as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.jsonl")


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a store that was captured to a disk, never interrupted."""
    return tree(run(text, tmp_path_factory.mktemp("whole") / "acts.zarr").storage.for_zarr())


@pytest.fixture
def address(request: pytest.FixtureRequest) -> str:
    """An address of this test alone."""
    return f"s3://bucket/{request.node.name}/acts.zarr"


def run(text: Path, out: str | Path, model: FakeModel | None = None) -> ActivationStore:
    return capture(model or FakeModel(), TextSource(text), [RESID, Z], out, **SETTINGS).store


# ---- the same store, wherever it lies


def test_a_store_has_the_same_bytes_as_on_a_disk(text: Path, whole: dict[str, bytes], address: str) -> None:
    import obstore

    store = run(text, address)
    assert store.path == address
    assert objects(address) == whole
    events = [
        json.loads(obstore.get(raw(address), known["path"]).bytes().to_bytes())["event"] for known in journal(address)
    ]
    assert events == ["start", "end"]
    again = ActivationStore.open(address)
    for hook in (RESID, Z):
        rows = float32_to_bf16(expected_rows(FakeModel(), again, hook))
        np.testing.assert_array_equal(again.read(hook, 0, 150), rows)
        np.testing.assert_array_equal(again.read(hook, 33, 34), rows[33:34])
        np.testing.assert_array_equal(again.read_rows(hook, np.array([149, 0, 77])), rows[[149, 0, 77]])
        np.testing.assert_array_equal(again.zarr()[f"hooks/{hook}"][40:50], rows[40:50])
    assert again.complete
    assert again.verify() == []
    assert again.info()["path"] == address
    assert len(again.documents()) == again.info()["documents"] > 1
    assert run(text, address).n_rows == 150, "a second run has nothing to do"
    assert objects(address) == whole


def journal(address: str) -> list[Any]:
    import obstore

    return sorted(obstore.list_with_delimiter(raw(address), "journal")["objects"], key=lambda known: known["path"])


@pytest.mark.parametrize("kind", ["disk", "object store"])
def test_both_storages_behave_alike(kind: str, tmp_path: Path, address: str) -> None:
    storage = storage_at(tmp_path / "a" if kind == "disk" else address.replace(" ", "-"))
    assert storage.names("") == []
    assert storage.size("b/c") is None
    with pytest.raises(FileNotFoundError):
        storage.read("b/c")
    with pytest.raises(FileNotFoundError):
        list(storage.read_ranges("b/c", 5, [(0, np.empty(2, np.uint8))]))
    storage.make_folder("b")
    content = np.random.default_rng(0).bytes(1000)
    assert storage.write("b/c", content) == storage.write("b/d e%20é", memoryview(content))
    storage.create("f", b"first")
    storage.create("f", b"first")
    for changed in (b"second", b"second", b"third"):
        storage.replace("f", changed)
        assert storage.read("f") == changed
    storage.replace("g", b"new")
    storage.delete(["g"])
    storage.replace("f", b"first")
    assert storage.names("") == ["b/", "f"]
    assert storage.names("b") == ["c", "d e%20é"]
    assert storage.size("b/c") == 1000
    assert list(storage.map(storage.read, ["f", "b/c"] * 20)) == [b"first", content] * 20
    buffers = [np.empty(n, np.uint8) for n in (10, 1, 400)]
    for done, _ in enumerate(storage.read_ranges("b/c", 1000, list(zip((3, 500, 600), buffers, strict=True)))):
        start, n = (3, 500, 600)[done], len(buffers[done])
        assert buffers[done].tobytes() == content[start : start + n], "an array is full when its turn is yielded"
    for ranges in ([], [(0, buffers[0])], [(900, buffers[2])], [(2000, buffers[2])]):
        with pytest.raises(OtherSizeError) as caught:
            list(storage.read_ranges("b/c", 1300, ranges))
        assert caught.value.size == 1000
    storage.delete(["f", "not there"])
    assert storage.names("") == ["b/"]


def test_nothing_goes_on_when_one_of_several_calls_fails(address: str) -> None:
    running, done = [], []

    def call(number: int) -> None:
        if number == 0:
            raise OSError("no")
        running.append(number)
        time.sleep(0.05)
        done.append(number)

    with pytest.raises(OSError, match="no"):
        list(storage_at(address).map(call, range(100)))
    assert sorted(running) == sorted(done)
    assert len(running) < 100


def test_large_objects_go_up_and_come_down_in_parts(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import obstore

    monkeypatch.setattr(objectstore, "PART_BYTES", 5 * 2**20)  # the least that servers take
    monkeypatch.setattr(objectstore, "REQUEST_BYTES", 2**21)
    storage = storage_at(address)
    content = np.random.default_rng(0).integers(0, 256, 12 * 2**20, dtype=np.uint8)
    digest = storage.write("large", content.data)
    assert obstore.head(raw(address), "large")["e_tag"].endswith('-3"')
    out = np.empty_like(content)
    pieces = [(start, out[start : start + 2**20]) for start in range(0, len(out), 2**20)]
    assert len(list(storage.read_ranges("large", len(out), pieces))) == 12
    np.testing.assert_array_equal(out, content)
    assert storage.write("small", storage.read("large")) == digest


# ---- nothing lost


NURSERY = """
import itertools, os, signal, sys
sys.path.insert(0, {tests!r})
from helpers_activations import FakeModel
import pyarrow.parquet, numcodecs.zstd
from activations.capture import capture
from activations.text import TextSource
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        import obstore
        number, last, put = itertools.count(1), int(line), obstore.put
        def dying(*arguments, **options):
            mine = next(number)
            if mine == last and {before!r}:
                os.kill(os.getpid(), signal.SIGKILL)
            result = put(*arguments, **options)
            if mine == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return result
        obstore.put = dying
        capture(FakeModel(), TextSource({text!r}), {hooks!r}, {out!r}, **{settings!r})
        os._exit(0)
    print(os.waitpid(child, 0)[1], flush=True)
"""
"""Starts a capture that is killed at its n-th put, for each n that it reads, and says how it ended."""


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_kill_9_at_a_put_loses_nothing(before: bool, text: Path, whole: dict[str, bytes], address: str) -> None:
    """One store, killed again and again just before or after a put, ends with the bytes of one that never was."""
    code = NURSERY.format(
        tests=str(Path(__file__).parent),
        text=str(text),
        hooks=[RESID, Z],
        out=address,
        settings=SETTINGS,
        before=before,
    )
    nursery = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert nursery.stdin is not None
    assert nursery.stdout is not None
    rows = [0]
    killed = 0
    for moment in (4, 14, 42, 22, 11, 10):
        print(moment, file=nursery.stdin, flush=True)
        status = int(nursery.stdout.readline())
        assert status in (0, signal.SIGKILL)  # 0 where fewer puts were left: how many depends on which thread was first
        killed += status == signal.SIGKILL
        rows.append(check_what_is_there(address))
    nursery.stdin.close()
    assert nursery.wait() == 0
    assert killed >= 3
    assert rows == sorted(rows), "committed rows were lost"
    assert run(text, address).verify() == []
    assert objects(address) == whole


def check_what_is_there(address: str) -> int:
    """The store opens and each row in it is right; returns how many there are."""
    try:
        store = ActivationStore.open(address)
    except UnknownNameError:  # killed before the manifest was there
        return 0
    for hook in store.hooks:
        if n_rows := store.rows_of(hook):
            expected = float32_to_bf16(expected_rows(FakeModel(), store, hook))[:n_rows]
            np.testing.assert_array_equal(store.read(hook, 0, n_rows), expected)
    return store.n_rows


def test_kill_9_within_an_upload_in_parts_shows_nothing(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from moto.s3.models import S3Backend

    code = (
        "import numpy as np; from activations.storage import storage_at\n"
        f"storage_at({address!r}).write('large', np.zeros(96 * 2**20, np.uint8).data)"
    )
    begun, go_on = threading.Event(), threading.Event()
    upload_part = S3Backend.upload_part

    def held_back(*arguments: Any, **options: Any) -> Any:
        begun.set()
        go_on.wait(PATIENCE)
        return upload_part(*arguments, **options)

    monkeypatch.setattr(S3Backend, "upload_part", held_back)
    child = subprocess.Popen([sys.executable, "-c", code])
    try:
        assert begun.wait(PATIENCE)
    finally:
        child.kill()
        child.wait()
        go_on.set()
    assert pending_uploads()
    storage = storage_at(address)
    assert storage.names("") == []
    assert storage.size("large") is None
    storage.write("large", b"again")
    assert storage.read("large") == b"again"


def test_a_failing_server_stops_the_run_and_says_how_to_resume(
    text: Path, whole: dict[str, bytes], address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import obstore

    real = obstore.put
    committed: list[str] = []
    both = threading.Event()

    def failing(store: Any, name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith("hooks/") and "c.2." in name:
            assert both.wait(PATIENCE), "the two row groups before it are written first"
            raise obstore.exceptions.GenericError(
                "Generic S3 error: 500 <Code>InternalError</Code><Message>no</Message>"
            )
        done = real(store, name, *arguments, **options)
        if name.startswith("ledger/hooks-") and name.rsplit("/", 1)[1][0].isdigit():
            committed.append(name)
            if len(committed) == 2:
                both.set()
        return done

    monkeypatch.setattr(obstore, "put", failing)
    with pytest.raises(
        InterruptedRunError, match=r"InternalError: no.*64 rows are committed in s3://.*run the same command"
    ):
        run(text, address)
    monkeypatch.undo()
    assert run(text, address).verify() == []
    assert objects(address) == whole


# ---- damage


@pytest.fixture(scope="module")
def sound(text: Path) -> str:
    """A store that is as it was written, once each `damaged` has ended."""
    return str(run(text, "s3://bucket/sound/acts.zarr").path)


@contextlib.contextmanager
def damaged(address: str, name: str, damage: Callable[[bytes], bytes | None]) -> Iterator[ActivationStore]:
    """The store with one object changed, or deleted where `damage` gives None."""
    import obstore

    content = storage_at(address).read(name)
    changed = damage(content)
    if changed is None:
        obstore.delete(raw(address), name)
    else:
        put(address, name, changed)
    try:
        yield ActivationStore.open(address)
    finally:
        put(address, name, content)


def flipped(place: int) -> Callable[[bytes], bytes]:
    return lambda content: content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]


def test_a_flipped_byte_is_found(sound: str) -> None:
    name = f"hooks/{Z}/c.1.0.0"
    with damaged(sound, name, flipped(100)) as store:
        (fault,) = store.verify()
        assert fault[:4] == (Z, 32, 64, name)
        assert "checksum" in fault.problem
        with pytest.raises(IntegrityError, match=rf"{sound}/{name} \(hooks/{Z}, rows 40 to 41\) is damaged"):
            store.read(Z, 40, 41)
        np.testing.assert_array_equal(store.read(Z, 0, 32), float32_to_bf16(expected_rows(FakeModel(), store, Z))[:32])
    with (
        damaged(sound, "tokens/flags/c.0", flipped(3)) as store,
        pytest.raises(IntegrityError, match="tokens/flags, rows 0 to 32"),
    ):
        store.flags(0, 1)


@pytest.mark.parametrize("problem", ["missing", "truncated", "swapped"])
def test_missing_cut_and_swapped_objects(problem: str, sound: str) -> None:
    name, other = (f"hooks/{RESID}/c.{group}.0" for group in (3, 2))
    changed = {
        "missing": lambda content: None,
        "truncated": lambda content: content[:-1],
        "swapped": lambda content: storage_at(sound).read(other),
    }
    with damaged(sound, name, changed[problem]) as store:
        (fault,) = store.verify()
        assert fault[:4] == (RESID, 96, 128, name)
        assert fault.problem.startswith(problem)
        with pytest.raises(IntegrityError, match=rf"c\.3\.0 \(hooks/{RESID}, rows 96 to 128\) is damaged"):
            store.read(RESID, 0, 150)


def test_a_rotten_record_of_the_ledger_is_named(sound: str) -> None:
    name = f"ledger/{ActivationStore.open(sound).capture_of(RESID)}/00000002.json"
    with (
        pytest.raises(IntegrityError, match=rf"{sound}/ledger/.*00000002\.json is damaged"),
        damaged(sound, name, flipped(40)),
    ):
        pass


# ---- one writer at a time


def test_a_second_writer_is_refused_with_host_and_pid(text: Path, address: str) -> None:
    with (
        storage_at(address).lock(),
        pytest.raises(LockedError, match=rf"process {os.getpid()} on host {socket.gethostname()}.*runs out at .* UTC"),
    ):
        run(text, address)
    assert objects(address) == {}
    with storage_at(address).lock():  # given back
        pass


def lease(seconds: float, **changes: Any) -> bytes:
    """A lease of another writer."""
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "boot_id": locks._boot_id(), "token": "another"}
    return json.dumps({**mine, "namespace": locks._namespace(), "expires": time.time() + seconds, **changes}).encode()


def ended() -> int:
    """The pid of a process that is no more."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


@pytest.mark.parametrize(
    ("content", "free"),
    [
        (lambda: lease(600), False),
        (lambda: lease(600, host="elsewhere", pid=7), False),
        (lambda: lease(-1, host="elsewhere"), False),  # clocks differ
        (lambda: lease(-601, host="elsewhere"), True),
        (lambda: lease(600, pid=ended()), True),
        (lambda: lease(600, pid=ended(), boot_id="another kernel"), False),
        (lambda: lease(600, pid=ended(), namespace="another container"), False),
        (lambda: b"not json", True),
        (lambda: b"{}", True),
    ],
)
def test_leases_that_are_free(
    content: Callable[[], bytes], free: bool, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "SKEW_SECONDS", 600.0)  # more than the test may take
    address = address.partition("[")[0] + f"/{time.time_ns()}"
    put(address, "lock", content())
    if free:
        with storage_at(address).lock():
            assert json.loads(storage_at(address).read("lock"))["pid"] == os.getpid()
        return
    holder = json.loads(storage_at(address).read("lock"))
    with pytest.raises(LockedError, match=f"process {holder['pid']} on host {holder['host']}"):
        storage_at(address).lock().__enter__()
    assert json.loads(storage_at(address).read("lock")) == holder


def test_a_lease_is_renewed_while_it_is_held(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "LEASE_SECONDS", 0.6)
    storage = storage_at(address)
    with storage.lock():
        first = json.loads(storage.read("lock"))
        while json.loads(storage.read("lock"))["expires"] < first["expires"] + 0.6:
            time.sleep(0.05)
        storage.write("object", b"content")
    assert storage.read("lock") == b"{}"


def test_a_writer_without_its_lease_writes_nothing_more(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "LEASE_SECONDS", 0.3)
    storage = storage_at(address)
    with storage.lock():
        storage.write("a", b"1")
        put(address, "lock", lease(60, host="elsewhere", pid=7))
        time.sleep(0.3)
        for write in (
            lambda: storage.write("a", b"2"),
            lambda: storage.create("b", b"2"),
            lambda: storage.delete(["a"]),
        ):
            with pytest.raises(
                LockedError, match=rf"\({os.getpid()}\) lost its lease.*process 7 on host elsewhere now"
            ):
                write()
        storage.append("journal.jsonl", b"an event")
    assert objects(address) == {"a": b"1"}
    assert json.loads(storage.read("lock"))["host"] == "elsewhere", "it is not given back by who lost it"


def test_a_record_is_committed_once(address: str) -> None:
    mine, theirs = Ledger(address), Ledger(address)
    for ledger in (mine, theirs):
        ledger.declare("x", {})
    record = GroupRecord("x", 3, 12, 16, {"a/c.3": ObjectRecord(1, "0" * 32)})
    mine.commit(record)
    theirs.commit(record)  # the same rows, the same bytes: nobody is wronged
    with pytest.raises(LockedError, match=r"Another writer has committed row group 3 of x in s3://bucket"):
        theirs.commit(GroupRecord("x", 3, 12, 16, {"a/c.3": ObjectRecord(1, "1" * 32)}))
    assert Ledger(address).records["x"] == {3: record}


def test_what_changed_meanwhile_is_not_replaced(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that stops between its look and its put, and goes on when another has been there."""
    storage = storage_at(address)
    put_if = ObjectStorage.put_if

    def slow(self: ObjectStorage, name: str, content: bytes, tag: str | None) -> str:
        put(address, name, b"of another writer")
        return put_if(self, name, content, tag)

    for before in (None, b"old"):
        if before is not None:
            put(address, "zarr.json", before)
        monkeypatch.setattr(ObjectStorage, "put_if", slow)
        with pytest.raises(FileExistsError, match=r"zarr\.json was put there by another writer"):
            storage.replace("zarr.json", b"mine")
        monkeypatch.undo()
        assert objects(address) == {"zarr.json": b"of another writer"}


FIRST = """
import sys, time
sys.path.insert(0, {tests!r})
from helpers_activations import FakeModel
from activations import locks, objectstore
from activations.capture import capture
from activations.text import TextSource
locks.LEASE_SECONDS = 1.0
class Slow(FakeModel):
    def forward_rows(self, *arguments):
        print("batch", flush=True)
        time.sleep(0.2)
        return super().forward_rows(*arguments)
capture(Slow(), TextSource({text!r}), {hooks!r}, {out!r}, **{settings!r})
"""


def test_a_writer_that_slept_through_its_lease_stops(
    text: Path, whole: dict[str, bytes], address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**SETTINGS, "batch_size": 16}
    code = FIRST.format(
        tests=str(Path(__file__).parent), text=str(text), hooks=[RESID, Z], out=address, settings=settings
    )
    first = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert first.stdout is not None
    for _ in range(5):
        assert first.stdout.readline() == "batch\n"
    first.send_signal(signal.SIGSTOP)
    monkeypatch.setattr(locks, "SKEW_SECONDS", 600.0)  # it holds, however late it is looked at
    with pytest.raises(LockedError, match=f"process {first.pid} on host"):
        run(text, address)
    monkeypatch.setattr(locks, "SKEW_SECONDS", 0.0)
    while json.loads(storage_at(address).read("lock"))["expires"] > time.time():
        time.sleep(0.05)
    assert run(text, address).complete
    first.send_signal(signal.SIGCONT)
    _, said = first.communicate(timeout=300)
    assert first.returncode == 1
    assert f"LockedError: This process ({first.pid}) lost its lease on {address}." in said
    assert "Another writer has had it since" in said
    assert objects(address) == whole


class Memory:
    """A conditional store whose answers may get lost, and which may ignore conditions."""

    address = "memory"

    def __init__(self, ignores: Sequence[str] = (), loses: int = 0) -> None:
        self.ignores, self.loses = ignores, loses
        self.content: bytes | None = None
        self.version = 0
        self.lock = threading.Lock()

    def read_tagged(self, name: str) -> tuple[bytes, str]:
        if self.content is None:
            raise FileNotFoundError(name)
        return self.content, str(self.version)

    def put_if(self, name: str, content: bytes, tag: str | None) -> str:
        with self.lock:
            current = None if self.content is None else str(self.version)
            condition = "If-None-Match" if tag is None else "If-Match"
            if tag != current and condition not in self.ignores:
                raise FileExistsError(name)
            self.content, self.version = content, self.version + 1
            if self.loses:  # and the attempt after it finds what this one did
                self.loses -= 1
                raise FileExistsError(name)
            return str(self.version)


@pytest.mark.parametrize("before", [None, b"{}"], ids=["new", "expired"])
def test_of_many_writers_one_gets_the_lease(before: bytes | None) -> None:
    store, together = Memory(), threading.Barrier(8)
    store.content = before
    got: list[locks.Lease] = []
    refused: list[LockedError] = []

    def try_it() -> None:
        lease = locks.Lease(store)
        together.wait()
        try:
            got.append(lease.__enter__())
        except LockedError as error:
            refused.append(error)

    threads = [threading.Thread(target=try_it) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(got), len(refused)) == (1, 7)
    got[0].require_held()
    got[0].__exit__(None, None, None)


@pytest.mark.parametrize("condition", ["If-None-Match", "If-Match"])
def test_a_server_that_ignores_conditions_is_refused(condition: str) -> None:
    store = Memory(ignores=[condition])
    with pytest.raises(InvalidInputError, match=f"ignores the condition {condition} "), locks.Lease(store):
        pass
    assert store.content == b"{}"


def test_lost_answers_are_no_lost_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "LEASE_SECONDS", 0.2)
    store = Memory(loses=1)
    with locks.Lease(store) as held:
        held.require_held()
        store.loses = 1
        time.sleep(0.25)
        held.require_held()
        assert store.loses == 0
    with locks.Lease(store):  # it was given back
        pass
    with locks.Lease(store) as held:
        store.content = None  # deleted by hand
        time.sleep(0.25)
        with pytest.raises(LockedError, match=r"lost its lease.*or it was deleted"):
            held.require_held()


# ---- what was given


def test_wrong_addresses(text: Path, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    for wrong in ("s3://", "s3://bucket", "s3://bucket/", "s3://bucket//x", "s3://bucket/../x", "s4://bucket/x"):
        with pytest.raises(InvalidInputError, match=r"expected s3://BUCKET/NAME"):
            storage_at(wrong)
    assert isinstance(storage_at("a/b"), LocalStorage)
    assert storage_at("s3://bucket/a/b/").location == "s3://bucket/a/b"
    assert below("s3://bucket/a/", "acts.zarr") == "s3://bucket/a/acts.zarr"
    assert below("folder", "acts.zarr") == "folder/acts.zarr"
    for name in ("s3://bucket/b", "/tmp/b"):
        with pytest.raises(InvalidInputError, match="cannot lie below"):
            below("s3://bucket/a", name)
    put(address, "something/else", b"")
    with pytest.raises(OccupiedError, match=r"something else \(something…\)"):
        run(text, address)
    with pytest.raises(OSError, match=r"NoSuchBucket: The specified bucket does not exist"):
        run(text, "s3://no-such-bucket/acts.zarr")
    monkeypatch.delenv("AWS_ALLOW_HTTP")
    with pytest.raises(InvalidInputError, match=r"no TLS.*Set AWS_ALLOW_HTTP=true"):
        ActivationStore.open(address)
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(InvalidInputError, match=r"pip install 'scope-workbench\[s3\]'"):
        ActivationStore.open(address)


def test_a_store_that_is_not_there_suggests_its_neighbours(sound: str) -> None:
    with pytest.raises(UnknownNameError, match=rf"Did you mean {sound}"):
        ActivationStore.open(sound.replace("acts", "act"))


def test_importing_is_light() -> None:
    code = "import sys, activations.capture, activations.storage; assert not {'obstore', 'zarr'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_a_store_that_was_fetched_goes_on_as_a_local_one(
    text: Path, whole: dict[str, bytes], sound: str, tmp_path: Path
) -> None:
    import obstore

    for name in [known["path"] for page in obstore.list(raw(sound)) for known in page]:
        path = tmp_path / "acts.zarr" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(storage_at(sound).read(name))
    store = run(text, tmp_path / "acts.zarr")
    assert store.verify() == []
    ours = {name: content for name, content in tree(tmp_path / "acts.zarr").items() if not name.startswith("journal/")}
    assert ours == whole


def test_a_servers_refusal_is_told_in_its_own_words(address: str) -> None:
    storage = storage_at(address)
    assert isinstance(storage, ObjectStorage)
    from obstore.exceptions import GenericError, PermissionDeniedError

    refusal = "Server returned 403:\n<Error><Code>AccessDenied</Code><Message>Not yours</Message></Error>"
    for error, kind, words in (
        (PermissionDeniedError(refusal), PermissionError, r"x is not allowed \(AccessDenied: Not yours\)"),
        (GenericError("GET http://169.254.169.254/latest failed\nmore"), OSError, "there are no credentials: set AWS_"),
        (GenericError("Generic S3 error: timed out\n\nDebug source: …"), OSError, r"\(Generic S3 error: timed out\)$"),
    ):
        with pytest.raises(kind, match=words), storage._errors("x"):
            raise error


def test_obstore_has_one_door() -> None:
    root = Path(locks.__file__).parents[1]
    sources = (path for package in ("activations", "scope", "dashboards") for path in (root / package).rglob("*.py"))
    doors = {path.name for path in sources if re.search(r"^\s*(import|from) obstore", path.read_text(), re.MULTILINE)}
    assert doors == {"objectstore.py"}
