"""Any order of capture, append, crash, resume, read, rot and verify, against rows that plain numpy holds in memory.

The model of the store is simple: a row exists when its row group's ledger record was put in place by a rename, and
every row before it too (the record says how many rows it has: that of a last row group is replaced when text is
appended); its content is `FakeModel.rows_at` of the window that the text says. A crash stops the process
at the nth change of a folder (a rename or a removal), before or after it, and leaves everything as it is then.

A longer run: `SCOPE_STATEFUL_EXAMPLES=2000 pytest tests/test_activations_stateful.py` (new random examples each time).
"""

import contextlib
import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import hypothesis.strategies as st
import numpy as np
import pytest
from helpers_activations import FakeModel, tree, write_text
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from activations import arrays, ledger
from activations.capture import capture
from activations.errors import ActivationsError, InvalidInputError, MismatchError
from activations.layout import PLAN
from activations.source import float32_to_bf16
from activations.store import ActivationStore
from activations.text import TextSource
from activations.writer import hooks_capture_id

EXAMPLES = int(os.environ.get("SCOPE_STATEFUL_EXAMPLES", "0"))
PROFILE = settings(
    max_examples=EXAMPLES or 30,
    stateful_step_count=20,
    derandomize=EXAMPLES == 0,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    # Finding the smallest example takes minutes, which only a person at the keyboard has.
    phases=[Phase.generate, Phase.shrink] if EXAMPLES else [Phase.generate],
)

RESID, Z, OTHER = "blocks.1.hook_resid_post", "blocks.1.attn.hook_z", "blocks.0.hook_resid_post"
PASSES = ((RESID, Z), (OTHER,))
"""Hooks that are captured together."""
R = 8
CONTEXT = 12
SEEDS, TOKENS = st.integers(0, 3), st.integers(3 * R - 1, 9 * R)
CHANGES = st.integers(1, 150)
"""A capture changes folders up to so often."""
FRACTIONS = st.floats(0, 1, exclude_max=True)


def windows_of(documents: list[str], max_tokens: int) -> list[np.ndarray]:
    """The windows of a text, as its documents say, without the library."""
    windows, left = [], max_tokens
    for text in documents:
        tokens = np.frombuffer(text.encode(), np.uint8).astype(np.int32) + 3
        pieces = [tokens[first : first + CONTEXT - 1] for first in range(0, len(tokens), CONTEXT - 1)]
        for piece in pieces if text.strip() else []:
            window = np.concatenate([[2], piece])[:left]
            left -= len(window)
            if len(window):
                windows.append(window)
    return windows


class Crash(BaseException):
    """The process is gone: no handler of an ordinary error may see this."""


class Disk:
    """Counts changes of folders, crashes at one of them, and remembers which records of a ledger were put in place."""

    def __init__(self, crash_at: int | None, after: bool) -> None:
        self.crash_at, self.after, self.changes = crash_at, after, 0
        self.records: list[tuple[str, int, int]] = []
        """Capture, row group, and the row at which the record says that it ends."""
        self._lock = threading.Lock()

    def change(self, do: Callable[..., None], path: Path, *arguments: Any) -> None:
        if Path(path).name == "lock":  # the system gives it back when a process dies
            do(path, *arguments)
            return
        with self._lock:
            self.changes += 1
            crash = self.crash_at is not None and self.changes >= self.crash_at
            if crash and not (self.after and self.changes == self.crash_at):
                raise Crash
            found = re.search(r"ledger/([^/]+)/(\d{8})\.json$", str(arguments[0])) if arguments else None
            row_stop = json.loads(Path(path).read_bytes())["record"]["rows"][1] if found else 0
            do(path, *arguments)
            if found:
                self.records.append((found[1], int(found[2]), row_stop))
            if crash:
                raise Crash

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        replace, unlink = os.replace, os.unlink
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "replace", lambda source, target: self.change(replace, source, target))
            patch.setattr(os, "unlink", lambda path: self.change(unlink, path))
            yield


class StoreMachine(RuleBasedStateMachine):
    """The store at `self.out`, and what is known of it.

    `_take_text` says which text the next capture is of, and sets `self.truth`, the rows of each hook. A store takes one
    more text, which is captured until a crash and then to its end.
    """

    golden: ClassVar[dict[tuple[Any, ...], dict[str, bytes]]] = {}
    """Stores that were never interrupted, as bytes, by what was captured in which order."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.out = self.folder / "s.zarr"
        self.model = FakeModel()

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    @initialize(seed=SEEDS, max_tokens=TOKENS, crash_at=CHANGES, after=st.booleans())
    def begin(self, seed: int, max_tokens: int, crash_at: int, after: bool) -> None:
        shutil.rmtree(self.out, ignore_errors=True)
        self.committed: dict[str, dict[int, int]] = {name: {} for name in (PLAN, *map(hooks_capture_id, PASSES))}
        """Per capture the row at which each of its row groups ends."""
        self.appended: tuple[TextSource, int] | None = None
        self.begun: list[tuple[str, ...]] = []
        """Passes in the order in which they were declared, as far as the disk knows."""
        self.reader: ActivationStore | None = None
        self.reader_rows: dict[str, int] = {}
        self._take_text(seed, max_tokens)
        self._capture(PASSES[seed % 2], self.text, crash_at, after)

    @precondition(lambda self: all(map(self.is_complete, PASSES)))
    @rule(seed=SEEDS, max_tokens=TOKENS, crash_at=CHANGES, after=st.booleans())
    def begin_another_store(self, seed: int, max_tokens: int, crash_at: int, after: bool) -> None:
        self.begin(seed, max_tokens, crash_at, after)

    def _take_text(self, seed: int, max_tokens: int) -> None:
        self.text = TextSource(write_text(self.folder / "text.jsonl", n_documents=8, seed=seed, longest=40))
        self.identity = (seed, max_tokens)
        self.max_tokens = max_tokens
        windows = windows_of([document.text for document in self.text.documents()], max_tokens)
        hooks = [hook for hooks in PASSES for hook in hooks]
        self.truth = {hook: np.concatenate([self.model.rows_at(hook, window) for window in windows]) for hook in hooks}
        self.token_ids = np.concatenate(windows)
        self.n_rows = len(self.token_ids)

    # ---- what the store must hold

    def rows_known(self, capture_id: str) -> int:
        """Rows that are committed, from the first on without a gap."""
        rows = group = 0
        while group in self.committed[capture_id] and rows == group * R:
            rows = self.committed[capture_id][group]
            group += 1
        return rows

    def rows_of(self, hook: str) -> int:
        (hooks,) = (hooks for hooks in PASSES if hook in hooks)
        return min(self.rows_known(PLAN), self.rows_known(hooks_capture_id(hooks)))

    def is_complete(self, hooks: tuple[str, ...]) -> bool:
        return all(self.rows_known(name) == self.n_rows for name in (PLAN, hooks_capture_id(hooks)))

    def opened(self) -> ActivationStore | None:
        return ActivationStore.open(self.out) if (self.out / "manifest.json").exists() else None

    def check_rows(self, store: ActivationStore, hook: str, start: int, stop: int, n_rows: int) -> None:
        """Rows `[start, stop)` of a store that has `n_rows` of this hook."""
        if stop > n_rows:
            with pytest.raises(InvalidInputError, match=f"has {n_rows:,} committed rows"):
                store.read(hook, start, stop)
            return
        expected = self.truth[hook][start:stop]
        np.testing.assert_array_equal(store.read(hook, start, stop), float32_to_bf16(expected))
        np.testing.assert_array_equal(store.rows(start, stop).token_id, self.token_ids[start:stop])
        norms = np.sqrt((expected**2).sum(axis=tuple(range(1, expected.ndim))))
        np.testing.assert_allclose(store.norms(hook, start, stop), norms, rtol=1e-6)

    # ---- writing

    def _capture(
        self,
        hooks: tuple[str, ...],
        text: TextSource | None,
        crash_at: int | None,
        after: bool,
        appended: int | None = None,
    ) -> None:
        """Capture until a crash; `appended` are the rows of a text that is appended."""
        disk = Disk(crash_at, after)
        try:
            with disk.in_place(), contextlib.suppress(Crash):
                capture(
                    *(self.model, text, list(hooks), self.out),
                    context_size=CONTEXT,
                    rows_per_group=R,
                    batch_size=3 * CONTEXT,
                    max_tokens=appended or (None if text is None else self.max_tokens),
                    append=appended is not None,
                )
        finally:
            for capture_id, group, row_stop in disk.records:
                self.committed[capture_id][group] = row_stop
            if (
                hooks in PASSES
                and hooks not in self.begun
                and (self.out / "ledger" / hooks_capture_id(hooks) / "capture.json").exists()
            ):
                self.begun.append(hooks)
        if crash_at is None or disk.changes < crash_at:
            assert all(map(self.is_complete, [hooks] if appended is None else PASSES))

    @precondition(lambda self: not all(map(self.is_complete, PASSES)))
    @rule(hooks=st.sampled_from(PASSES), crash_at=CHANGES, after=st.booleans())
    def capture_until_a_crash(self, hooks: tuple[str, ...], crash_at: int, after: bool) -> None:
        self._capture(hooks, self.text, crash_at, after)

    @rule(hooks=st.sampled_from(PASSES))
    def capture_to_the_end(self, hooks: tuple[str, ...]) -> None:
        self._capture(hooks, self.text, None, after=False)
        created_for = ActivationStore.open(self.out).manifest["hooks_at_creation"]
        first = next(hooks for hooks in PASSES if sorted(hooks) == created_for)
        if first in self.begun and all(map(self.is_complete, self.begun)):
            assert tree(self.out) == self._never_interrupted(first)

    @rule(hooks=st.sampled_from(PASSES))
    def capture_hooks_without_text(self, hooks: tuple[str, ...]) -> None:
        if self.rows_known(PLAN) < self.n_rows:
            with pytest.raises(InvalidInputError, match="does not have all of its text yet"):
                self._capture(hooks, None, None, after=False)
        else:
            self._capture(hooks, None, None, after=False)

    @precondition(lambda self: self.appended is None and all(map(self.is_complete, PASSES)))
    @rule(seed=SEEDS, n_tokens=st.integers(1, 4 * R), crash_at=CHANGES, after=st.booleans())
    def append(self, seed: int, n_tokens: int, crash_at: int, after: bool) -> None:
        (self.folder / "more").mkdir(exist_ok=True)
        text = TextSource(write_text(self.folder / "more" / "text.jsonl", n_documents=8, seed=seed, longest=40))
        if seed == self.identity[0]:
            with pytest.raises(InvalidInputError, match="holds the text"):
                self._capture((), text, None, after, appended=n_tokens)
            return
        windows = windows_of([document.text for document in text.documents()], n_tokens)
        more = {hook: [self.model.rows_at(hook, window) for window in windows] for hook in self.truth}
        self.truth = {hook: np.concatenate([rows, *more[hook]]) for hook, rows in self.truth.items()}
        self.token_ids = np.concatenate([self.token_ids, *windows])
        self.n_rows = len(self.token_ids)
        self.identity, self.appended = (*self.identity, seed, n_tokens), (text, n_tokens)
        self._capture((), text, crash_at, after, appended=n_tokens)
        self.what_is_committed_is_there_and_sound()
        if self.reader is not None:
            self.read_from_the_reader(0.5, beyond=True)
        self._capture((), text, None, after=False, appended=n_tokens)
        first = ActivationStore.open(self.out).manifest["hooks_at_creation"]
        assert tree(self.out) == self._never_interrupted(next(hooks for hooks in PASSES if sorted(hooks) == first))

    @precondition(lambda self: self.begun)
    @rule()
    def capture_of_something_else_is_refused(self) -> None:
        before = tree(self.out)
        with pytest.raises(MismatchError, match="max_tokens"):
            capture(self.model, self.text, [RESID, Z], self.out, context_size=CONTEXT, rows_per_group=R, max_tokens=5)
        assert tree(self.out) == before

    def _never_interrupted(self, first: tuple[str, ...]) -> dict[str, bytes]:
        """What the store would be, created for these hooks: its manifest says so."""
        order = (first, *(hooks for hooks in self.begun if hooks != first))
        key = (*self.identity, order)
        if key not in self.golden:
            out = self.folder / "golden.zarr"
            for hooks in order:
                capture(
                    *(FakeModel(), self.text, list(hooks), out),
                    context_size=CONTEXT,
                    rows_per_group=R,
                    batch_size=5 * CONTEXT,
                    max_tokens=self.max_tokens,
                )
            if self.appended is not None:
                text, n_tokens = self.appended
                capture(FakeModel(), text, [], out, batch_size=5 * CONTEXT, max_tokens=n_tokens, append=True)
            self.golden[key] = tree(out)
            shutil.rmtree(out)
        return self.golden[key]

    # ---- reading

    @precondition(lambda self: self.begun)
    @rule(first=FRACTIONS, length=FRACTIONS)
    def read(self, first: float, length: float) -> None:
        store = ActivationStore.open(self.out)
        start = int(first * self.n_rows)
        stop = start + int(length * (self.n_rows - start + 1))
        for hook in store.hooks:
            self.check_rows(store, hook, start, stop, self.rows_of(hook))

    @precondition(lambda self: self.begun)
    @rule(places=st.lists(FRACTIONS, max_size=9))
    def read_scattered(self, places: list[float]) -> None:
        store = ActivationStore.open(self.out)
        for hook in store.hooks:
            rows = np.array([int(place * self.rows_of(hook)) for place in places if self.rows_of(hook)], np.int64)
            np.testing.assert_array_equal(store.read_rows(hook, rows), float32_to_bf16(self.truth[hook][rows]))

    @precondition(lambda self: self.begun)
    @rule()
    def open_a_reader(self) -> None:
        self.reader = ActivationStore.open(self.out)
        self._note_readers_rows()

    @precondition(lambda self: self.reader is not None)
    @rule()
    def refresh_the_reader(self) -> None:
        assert self.reader is not None
        self.reader.refresh()
        self._note_readers_rows()

    def _note_readers_rows(self) -> None:
        assert self.reader is not None
        self.reader_rows = {hook: self.rows_of(hook) for hook in self.reader.hooks}

    @precondition(lambda self: self.reader_rows)
    @rule(first=FRACTIONS, beyond=st.booleans())
    def read_from_the_reader(self, first: float, beyond: bool) -> None:
        """It sees what was committed when it was opened, however the store grew since."""
        assert self.reader is not None
        for hook, n_rows in self.reader_rows.items():
            assert self.reader.rows_of(hook) == n_rows
            self.check_rows(self.reader, hook, int(first * n_rows), n_rows + beyond, n_rows)

    # ---- rot

    @precondition(lambda self: self.begun)
    @rule(
        damages=st.lists(
            st.tuples(st.sampled_from(["flip", "truncate", "delete", "swap"]), FRACTIONS, FRACTIONS, st.integers(0, 7)),
            min_size=2,
            max_size=6,
        )
    )
    def damage_and_restore(self, damages: list[tuple[str, float, float, int]]) -> None:
        for damage in damages:
            self._damage_and_restore(*damage)

    def _damage_and_restore(self, how: str, which: float, place: float, bit: int) -> None:
        victims = self._victims(how)
        victim = victims[int(which * len(victims))]
        other = victims[int(place * len(victims))]
        good, others = victim.read_bytes(), other.read_bytes()
        if how == "swap" and good == others:
            return
        spoil(victim, good, how, place, bit, others)
        if how == "swap":
            other.write_bytes(good)
        self._check_that_it_is_found({str(path.relative_to(self.out)) for path in (victim, other)})
        victim.write_bytes(good)
        if how == "swap":
            other.write_bytes(others)

    def _victims(self, how: str) -> list[Path]:
        """Files whose damage shows: what the ledger knows, the ledger, and the manifest.

        Records of a store that is not complete may be missing because they were never made.
        """
        books = ActivationStore.open(self.out).ledger.records.values()
        known = [name for book in books for record in book.values() for name in record.objects]
        in_ledger = [path for path in self.out.glob("ledger/*/*") if ".tmp-" not in path.name]
        if how == "delete" and not all(map(self.is_complete, self.begun)):
            in_ledger = []
        return sorted([*(self.out / name for name in known), *in_ledger, self.out / "manifest.json"])

    def _check_that_it_is_found(self, names: set[str]) -> None:
        """Opening or verifying names one of these files, and what can be read is what was written."""
        try:
            store = ActivationStore.open(self.out)
        except ActivationsError as error:
            found = str(error)
        else:
            found = " ".join(fault.object for fault in store.verify())
            for hook in store.hooks:
                self._check_reads_or_raises(store, hook)
        assert found
        # A manifest that speaks of another format or version is refused as such.
        assert any(name in found for name in names) or "manifest.json" in names, found

    def _check_reads_or_raises(self, store: ActivationStore, hook: str) -> None:
        for start in range(0, self.rows_of(hook), R // 2):
            try:
                found = store.read(hook, start, start + 1)
            except ActivationsError:
                continue
            np.testing.assert_array_equal(found, float32_to_bf16(self.truth[hook][start : start + 1]))

    # ---- what always holds

    @invariant()
    def what_is_committed_is_there_and_sound(self) -> None:
        store = self.opened()
        if store is None:
            assert not any(self.committed.values())
            return
        assert set(store.hooks) == {hook for hooks in self.begun for hook in hooks}
        for hook in store.hooks:
            assert store.rows_of(hook) == self.rows_of(hook)
        assert store.verify() == []
        assert not (self.out / "lock").exists()


def spoil(path: Path, good: bytes, how: str, place: float, bit: int, others: bytes) -> None:
    if how == "flip":
        rotten = bytearray(good)
        rotten[int(place * len(good))] ^= 1 << bit
        path.write_bytes(rotten)
    elif how == "truncate":
        path.write_bytes(good[: int(place * len(good))])
    elif how == "delete":
        path.unlink()
    else:
        path.write_bytes(others)


def test_any_order_of_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    monkeypatch.setattr(arrays, "CHUNK_BYTES", 4 * 24)
    monkeypatch.setattr(ledger, "RECORDS_PER_SEGMENT", 4)
    StoreMachine.TestCase.settings = PROFILE
    StoreMachine.TestCase("runTest").runTest()
