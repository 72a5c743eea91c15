"""The plan: how documents become rows, row groups and batches."""

import math
from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np
import pytest
from helpers_activations import BOS, FakeModel
from hypothesis import given, settings
from hypothesis import strategies as st

from activations.batching import OVERHEAD_SHARE, Window, group_windows, pack_batches
from activations.plan import PlannedGroup, PlanState, Windowing, plan_groups
from activations.source import RowFlag
from activations.text import Document, is_held_out


class Documents:
    """A text source of given texts."""

    def __init__(self, texts: list[str]) -> None:
        self.all = [Document(text, title=f"title {i}", language="en") for i, text in enumerate(texts)]

    def documents(self, start: int = 0) -> Any:
        return iter(self.all[start:])


def windowing(**changes: Any) -> Windowing:
    settings = {"context_size": 5, "bos_token_id": BOS, "special_token_ids": frozenset({BOS}), "rows_per_group": 8}
    return Windowing(**{**settings, **changes})


def plan(texts: list[str], state: PlanState = PlanState(), **changes: Any) -> list[PlannedGroup]:  # noqa: B008
    return list(plan_groups(Documents(texts), FakeModel().encode_documents, windowing(**changes), state))  # type: ignore[arg-type]


def joined(groups: list[PlannedGroup], column: str) -> list[int]:
    return np.concatenate([group.columns[column] for group in groups]).tolist()


def test_windows_by_hand() -> None:
    groups = plan(["abcdef", "", "x\x00y"])
    a = ord("a") + 3
    tokens = [BOS, a, a + 1, a + 2, a + 3, BOS, a + 4, a + 5, BOS, ord("x") + 3, 3, ord("y") + 3]
    assert joined(groups, "token_id") == tokens
    assert joined(groups, "position") == [0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3]
    assert joined(groups, "sequence") == [0] * 5 + [1] * 3 + [2] * 4
    assert [(group.row_start, group.row_stop, group.state.complete) for group in groups] == [
        (0, 8, False),
        (8, 12, True),
    ]
    assert groups[0].sequences["start_row"] == [0, 5]
    assert groups[0].sequences["document_offset"] == [0, 4]
    assert groups[1].documents == {
        "document": [1],
        "title": ["title 2"],
        "source": [""],
        "language": ["en"],
        "license": [""],
        "extra": [""],
        "n_tokens": [3],
        "held_out": [is_held_out(Document("", title="title 2"))],
    }
    state = groups[1].state
    assert (state.n_documents, state.windowed_documents, state.empty_documents, state.n_sequences) == (2, 1, 1, 3)


def test_flags() -> None:
    groups = plan(["abc"], special_token_ids=frozenset({BOS, ord("b") + 3}))
    held_out = RowFlag.HELD_OUT if is_held_out(Document("", title="title 0")) else 0
    assert joined(groups, "flags") == [RowFlag.BOS | held_out, held_out, RowFlag.SPECIAL | held_out, held_out]


def test_no_bos() -> None:
    groups = plan(["abcdefg"], bos_token_id=None)
    assert joined(groups, "token_id") == [ord(c) + 3 for c in "abcdefg"]
    assert joined(groups, "position") == [0, 1, 2, 3, 4, 0, 1]
    assert groups[0].sequences["document_offset"] == [0, 5]


TEXTS = st.lists(st.text(alphabet="abc \x00", max_size=30), max_size=12)


@settings(max_examples=50, deadline=None)
@given(
    data=st.data(),
    texts=TEXTS,
    context=st.integers(2, 9),
    rows_per_group=st.sampled_from([1, 2, 4, 8, 16, 64]),
    bos=st.sampled_from([BOS, None]),
    max_tokens=st.none() | st.integers(1, 60),
)
def test_plan_properties(
    data: st.DataObject, texts: list[str], context: int, rows_per_group: int, bos: int | None, max_tokens: int | None
) -> None:
    changes = {"context_size": context, "bos_token_id": bos, "max_tokens": max_tokens}
    groups = plan(texts, rows_per_group=rows_per_group, **changes)
    whole = plan(texts, rows_per_group=1 << 16, **changes)
    for column in ("token_id", "sequence", "position", "flags"):
        rows = list(chain.from_iterable(group.columns[column].tolist() for group in groups))
        assert rows == (joined(whole, column) if whole else [])
    for table in ("sequences", "documents"):
        parts = [getattr(group, table) for group in groups]
        for name in getattr(whole[0], table) if whole else ():
            assert list(chain.from_iterable(part[name] for part in parts)) == getattr(whole[0], table)[name]
    if not whole:
        assert not any(text.strip() for text in texts)
        return
    # Every group but the last is full; only the last is complete.
    assert [g.row_stop - g.row_start for g in groups[:-1]] == [rows_per_group] * (len(groups) - 1)
    assert [g.state.complete for g in groups] == [False] * (len(groups) - 1) + [True]
    assert groups[-1].state == whole[-1].state
    # The text comes back from the rows, up to the cut.
    tokens, position = joined(whole, "token_id"), joined(whole, "position")
    kept = [t for t, p in zip(tokens, position, strict=True) if bos is None or p > 0]
    expected = [t + 3 for text in texts if text.strip() for t in text.encode()]
    assert kept == expected[: len(kept)]
    if max_tokens is None or max_tokens > len(tokens):
        assert kept == expected
    else:
        assert len(tokens) == max_tokens
    documents = whole[0].documents
    assert sum(documents["n_tokens"]) == len(kept)
    # Planning goes on from any group's state as if it had never stopped.
    if len(groups) > 1:
        index = data.draw(st.integers(0, len(groups) - 2))
        rest = plan(texts, groups[index].state, rows_per_group=rows_per_group, **changes)
        assert len(rest) == len(groups) - index - 1
        for again, before in zip(rest, groups[index + 1 :], strict=True):
            assert (again.state, again.sequences, again.documents) == (before.state, before.sequences, before.documents)
            assert all((again.columns[name] == before.columns[name]).all() for name in before.columns)


def test_max_document_tokens() -> None:
    groups = plan(["abcdefgh", "ij"], max_document_tokens=3)
    assert groups[0].documents["n_tokens"] == [3, 2]


def test_long_texts_are_encoded_in_portions() -> None:
    calls: list[int] = []

    def encode(texts: Any) -> list[np.ndarray]:
        calls.append(len(texts))
        return FakeModel().encode_documents(texts)

    texts = ["ab"] * 150 + ["c" * 300_000] + ["d"] * 3
    list(plan_groups(Documents(texts), encode, windowing(rows_per_group=1 << 16, context_size=256)))  # type: ignore[arg-type]
    assert calls == [64, 64, 23, 3]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=20),
    rows_per_group=st.sampled_from([1, 2, 8, 32]),
    batch_size=st.integers(1, 64),
)
def test_batches_hold_each_row_of_a_group_once(lengths: list[int], rows_per_group: int, batch_size: int) -> None:
    position = np.concatenate([np.arange(length) for length in lengths])
    token = np.arange(len(position), dtype=np.int32)
    for start in range(0, len(position), rows_per_group):
        stop = min(len(position), start + rows_per_group)
        first = start - position[start]
        windows = group_windows(token[first:stop], position[first:stop], start - first)
        batches = pack_batches(windows, batch_size)
        rows = np.concatenate([batch.rows for batch in batches])
        assert sorted(rows.tolist()) == list(range(stop - start))
        for batch in batches:
            tokens = np.concatenate(batch.windows)
            kept = tokens if batch.kept is None else tokens[batch.kept]
            assert (kept == start + batch.rows).all()
            longest = max(map(len, batch.windows))
            assert longest * len(batch.windows) <= batch_size or len(batch.windows) == 1
            for window in batch.windows:
                assert position[window[0]] == 0


@settings(max_examples=80, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8), batch_size=st.sampled_from([1, 24, 64, 320]))
def test_no_cut_into_batches_costs_less(lengths: list[int], batch_size: int) -> None:
    windows = [Window(np.zeros(length, np.int32), 0, 0) for length in lengths]
    lengths = sorted(lengths, reverse=True)

    def cost(groups: list[list[int]]) -> float:
        padded = [group[0] * len(group) for group in groups]
        fits = all(tokens <= batch_size or len(group) == 1 for tokens, group in zip(padded, groups, strict=True))
        return sum(padded) + len(groups) * (batch_size // OVERHEAD_SHARE) if fits else math.inf

    def cuts(rest: list[int]) -> Iterator[list[list[int]]]:
        if not rest:
            yield []
        for size in range(1, len(rest) + 1):
            for others in cuts(rest[size:]):
                yield [rest[:size], *others]

    packed = [[len(window) for window in batch.windows] for batch in pack_batches(windows, batch_size)]
    assert [length for batch in packed for length in batch] == lengths
    assert cost(packed) == min(map(cost, cuts(lengths)))


def test_pack_is_deterministic_and_keeps_ties_in_order() -> None:
    windows = [Window(np.full(4, i, np.int32), 4 * i, 0) for i in range(6)]
    assert [[int(w[0]) for w in batch.windows] for batch in pack_batches(windows, 8)] == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_window_longer_than_the_budget_runs_alone(batch_size: int) -> None:
    windows = [Window(np.zeros(5, np.int32), 5 * i, 0) for i in range(3)]
    assert [len(batch.windows) for batch in pack_batches(windows, batch_size)] == [1, 1, 1]
