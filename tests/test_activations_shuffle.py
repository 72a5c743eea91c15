"""Shuffling: each chosen row once a pass, the same for the same seed, in bounded memory, from any position."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_activations import FakeModel, write_text
from hypothesis import given, settings
from hypothesis import strategies as st

from activations import arrays
from activations.capture import capture
from activations.errors import IntegrityError, InvalidInputError, NonFiniteError, UnknownNameError
from activations.mixing import Fill, Give, Piece, mix, skip
from activations.shuffle import Selection, ShuffledBatches
from activations.source import ActivationBatch, RowFlag
from activations.store import ActivationStore
from activations.text import TextSource

RESID, Z = "blocks.1.hook_resid_post", "blocks.1.attn.hook_z"
PLENTY = 2**20
SMALL = 16_000
"""Bytes that hold a fraction of the rows."""


@pytest.fixture(scope="module", autouse=True)
def _small_chunks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "CHUNK_BYTES", 16 * 24)
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    folder = tmp_path_factory.mktemp("shuffle")
    text = TextSource(write_text(folder / "text.jsonl", n_documents=40))
    model = FakeModel()
    return capture(model, text, [RESID, Z], folder / "s.zarr", context_size=16, rows_per_group=64, batch_size=128).store


class Live:
    """The store's rows as a source that can only be read in order."""

    n_rows = None

    def __init__(self, store: ActivationStore) -> None:
        self.store, self.hooks, self.dtype, self.hook_shape = store, store.hooks, store.dtype, store.hook_shape

    def batches(self, hooks: Sequence[str], batch_size: int, start: int = 0) -> Iterator[ActivationBatch]:
        return self.store.batches(hooks, 37, start)


def chosen(store: ActivationStore) -> np.ndarray:
    flags = store.rows(0, store.n_rows).flags
    return np.flatnonzero((flags & (RowFlag.BOS | RowFlag.SPECIAL | RowFlag.HELD_OUT)) == 0)


def rows_of(batches: ShuffledBatches) -> np.ndarray:
    return np.concatenate([batch.rows for batch in batches])


@pytest.mark.parametrize("memory_bytes", [PLENTY, SMALL, 600])
@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("hooks", [RESID, (Z, RESID)])
def test_each_chosen_row_comes_once_a_pass(store: ActivationStore, hooks: Any, live: bool, memory_bytes: int) -> None:
    source: Any = Live(store) if live else store
    batches = ShuffledBatches(source, hooks, 50, seed=1, passes=2, memory_bytes=memory_bytes)
    assert batches.in_memory == (memory_bytes == PLENTY and not live)
    everything = list(batches)
    rows = np.concatenate([batch.rows for batch in everything])
    expected = chosen(store)
    assert len(rows) == 2 * len(expected)
    first, second = np.split(rows, 2)
    np.testing.assert_array_equal(np.sort(first), expected)
    np.testing.assert_array_equal(np.sort(second), expected)
    assert (first != second).any()
    assert (first != expected).any()
    assert [len(batch.rows) for batch in everything[:-1]] == [50] * (len(everything) - 1)
    for batch in everything:
        for hook in (hooks,) if isinstance(hooks, str) else hooks:
            values = batch.values if isinstance(hooks, str) else batch.values[hook]
            np.testing.assert_array_equal(values, store.read_rows(hook, batch.rows))


@pytest.mark.parametrize("memory_bytes", [PLENTY, SMALL])
def test_the_seed_decides(store: ActivationStore, memory_bytes: int) -> None:
    orders = [
        rows_of(ShuffledBatches(store, RESID, 50, seed, passes=2, memory_bytes=memory_bytes)) for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(orders[0], orders[1])
    assert (orders[0] != orders[2]).any()


@pytest.mark.parametrize("memory_bytes", [PLENTY, SMALL])
@pytest.mark.parametrize("live", [False, True])
def test_a_run_goes_on_from_any_batch(store: ActivationStore, live: bool, memory_bytes: int) -> None:
    source: Any = Live(store) if live else store
    settings: dict[str, Any] = {"passes": 3, "tokens": 2222, "memory_bytes": memory_bytes}
    everything = list(ShuffledBatches(source, (RESID, Z), 40, 5, **settings))
    for start in (1, 7, 30, len(everything) - 1, len(everything)):
        rest = list(ShuffledBatches(source, (RESID, Z), 40, 5, start=start, **settings))
        assert len(rest) == len(everything) - start
        for again, before in zip(rest, everything[start:], strict=True):
            np.testing.assert_array_equal(again.rows, before.rows)
            np.testing.assert_array_equal(again.values[Z], before.values[Z])


def test_it_goes_on_for_ever(store: ActivationStore) -> None:
    batches = iter(ShuffledBatches(store, RESID, 500, seed=0))
    assert {len(next(batches).rows) for _ in range(20)} == {500}


def test_tokens_are_exact(store: ActivationStore) -> None:
    lengths = [len(batch.rows) for batch in ShuffledBatches(store, RESID, 500, seed=0, tokens=3210)]
    assert lengths == [500] * 6 + [210]


def test_a_buffer_mixes_well(store: ActivationStore) -> None:
    """With a buffer of a third of the rows, neighbours in a batch are strangers in the store."""
    batches = ShuffledBatches(store, RESID, 64, seed=0, passes=1, memory_bytes=25_000)
    assert not batches.in_memory
    rows = rows_of(batches)
    assert (np.abs(np.diff(rows)) <= 16).mean() < 0.15
    rank = np.searchsorted(chosen(store), rows)
    assert abs(np.corrcoef(rank, np.arange(len(rank)))[0, 1]) < 0.35


def test_selection_by_flags(store: ActivationStore) -> None:
    flags = store.rows(0, store.n_rows).flags
    held_out = Selection(exclude_flags=RowFlag.BOS, require_flags=RowFlag.HELD_OUT)
    rows = rows_of(ShuffledBatches(store, RESID, 50, 0, passes=1, select=held_out))
    np.testing.assert_array_equal(np.sort(rows), np.flatnonzero((flags & 17) == RowFlag.HELD_OUT))
    everything = rows_of(ShuffledBatches(store, RESID, 50, 0, passes=1, select=Selection(RowFlag(0))))
    np.testing.assert_array_equal(np.sort(everything), np.arange(store.n_rows))


@pytest.mark.parametrize("live", [False, True])
def test_selection_by_norm(store: ActivationStore, live: bool) -> None:
    source: Any = Live(store) if live else store
    batches = ShuffledBatches(source, (RESID, Z), 50, 0, passes=1, select=Selection(max_norm_ratio=1.2))
    expected = chosen(store)
    for hook in (RESID, Z):
        norms = store.norms(hook, 0, store.n_rows)
        median = np.median(norms[chosen(store)])
        expected = expected[norms[expected] <= 1.2 * median]
    np.testing.assert_array_equal(np.sort(rows_of(batches)), expected)
    assert batches.norm_limits[RESID] == pytest.approx(
        1.2 * np.median(store.norms(RESID, 0, store.n_rows)[chosen(store)])
    )


def test_bad_input(store: ActivationStore) -> None:
    with pytest.raises(InvalidInputError, match="leaves no row"):
        ShuffledBatches(store, RESID, 5, 0, select=Selection(require_flags=RowFlag.IMAGE))
    with pytest.raises(InvalidInputError, match="batch_size is 0"):
        ShuffledBatches(store, RESID, 0, 0)
    with pytest.raises(InvalidInputError, match="0 hooks"):
        ShuffledBatches(store, [], 5, 0)
    with pytest.raises(UnknownNameError):
        ShuffledBatches(store, "blocks.9", 5, 0)
    with pytest.raises(InvalidInputError, match="max_norm_ratio is 0"):
        Selection(max_norm_ratio=0)
    with pytest.raises(InvalidInputError, match="both excludes and requires"):
        Selection(require_flags=RowFlag.BOS)


def test_a_live_source_that_fits_is_read_once(store: ActivationStore) -> None:
    """From then on passes are shuffled as those of a store in memory, and equal them."""
    source = Live(store)
    read = []
    batches = source.batches

    def counting(*arguments: Any) -> Iterator[ActivationBatch]:
        for batch in batches(*arguments):
            read.append(batch.rows)
            yield batch

    source.batches = counting  # type: ignore[method-assign]
    settings: dict[str, Any] = {"passes": 3, "memory_bytes": PLENTY}
    rows = rows_of(ShuffledBatches(source, RESID, 50, 1, **settings))  # type: ignore[arg-type]
    np.testing.assert_array_equal(rows, rows_of(ShuffledBatches(store, RESID, 50, 1, **settings)))
    np.testing.assert_array_equal(np.concatenate(read), np.arange(store.n_rows))


@pytest.mark.parametrize("passes", [None, 2])
def test_a_live_source_without_a_chosen_row_is_refused(store: ActivationStore, passes: int | None) -> None:
    source: Any = Live(store)
    batches = ShuffledBatches(source, RESID, 5, 0, passes=passes, select=Selection(require_flags=RowFlag.IMAGE))
    with pytest.raises(InvalidInputError, match=r"leaves no row of .*Live"):
        next(iter(batches))


@pytest.mark.parametrize("max_norm_ratio", [None, 10.0])
def test_a_nan_of_a_live_source_is_named(store: ActivationStore, max_norm_ratio: float | None) -> None:
    """Also in a row that the selection leaves out: the model is broken there, too."""

    class Broken(Live):
        def batches(self, *arguments: Any) -> Iterator[ActivationBatch]:
            for batch in super().batches(*arguments):
                norms = {hook: np.where(batch.rows == 130, np.nan, of_hook) for hook, of_hook in batch.norms.items()}
                yield batch._replace(norms=norms)

        def document_at(self, row: int) -> dict[str, Any]:
            return self.store.document_at(row)

    title = store.document_at(130)["title"]
    source: Any = Broken(store)
    batches = ShuffledBatches(source, (Z, RESID), 50, 0, select=Selection(max_norm_ratio=max_norm_ratio))
    with pytest.raises(NonFiniteError, match=f"The hook {Z} gave a NaN or Inf at row 130, in the document '{title}'"):
        list(batches)


def test_rot_reaches_the_consumer(tmp_path: Path) -> None:
    text = TextSource(write_text(tmp_path / "text.jsonl"))
    store = capture(FakeModel(), text, [RESID], tmp_path / "s.zarr", context_size=16, rows_per_group=64).store
    (store.path / "hooks" / RESID / "c.1.0").unlink()
    with pytest.raises(IntegrityError, match="missing"):
        list(ShuffledBatches(store, RESID, 50, 0, passes=1, memory_bytes=SMALL))


def test_leaving_early_ends_the_reader(store: ActivationStore) -> None:
    import threading

    for _ in ShuffledBatches(store, RESID, 50, 0, memory_bytes=SMALL):
        break
    assert not [thread for thread in threading.enumerate() if thread.name == "reader"]


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), max_size=12),
    capacity=st.integers(1, 40),
    share=st.floats(0.05, 1.0),
    skipped=st.integers(0, 60),
)
def test_schedules(sizes: list[int], capacity: int, share: float, skipped: int) -> None:
    """A schedule never overwrites what was not handed out, hands every row out once, and can be skipped into."""

    def pieces() -> Iterator[Piece]:
        start = 0
        for size in sizes:
            yield Piece(np.arange(start, start + size), None)
            start += size

    def run(events: Iterator[Fill | Give], strict: bool) -> list[int]:
        slots, out = np.full(capacity, -1), []
        for event in events:
            if isinstance(event, Fill):
                assert not strict or (slots[event.slots] == -1).all()
                slots[event.slots] = event.rows
            else:
                out += slots[event.slots].tolist()
                slots[event.slots] = -1
        return out

    def schedule() -> Iterator[Fill | Give]:
        return mix(pieces(), capacity, share, np.random.default_rng(3))

    everything = run(schedule(), strict=True)
    assert sorted(everything) == list(range(sum(sizes)))
    assert run(skip(schedule(), skipped, capacity), strict=False) == everything[skipped:]
