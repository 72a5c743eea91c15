"""Capture: what comes back is what the model gave, and what bad input gets."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from helpers_activations import ALIASES, FakeModel, FakePending, expected_rows, tree, write_text
from hypothesis import given
from hypothesis import strategies as st

from activations import arrays
from activations.capture import CaptureReport, capture
from activations.errors import (
    InterruptedRunError,
    InvalidInputError,
    MismatchError,
    NonFiniteError,
    OccupiedError,
    UnknownNameError,
)
from activations.source import ActivationSource, HookedModel, RowFlag, bf16_to_float32, float32_to_bf16
from activations.spec import rows_per_group_for
from activations.store import ActivationStore
from activations.text import Document, TextSource, is_held_out

TILDE = ord("~") + 3
RESID, Z, OTHER = "blocks.1.hook_resid_post", "blocks.1.attn.hook_z", "blocks.0.hook_resid_post"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def text(tmp_path: Path) -> TextSource:
    return TextSource(write_text(tmp_path / "text.jsonl"))


def run(
    text: TextSource | None, out: Path, hooks: Any = (RESID, Z), model: Any = None, **settings: Any
) -> CaptureReport:
    settings = {"context_size": 16, "rows_per_group": 64, "batch_size": 128, **settings}
    return capture(FakeModel() if model is None else model, text, hooks, out, **settings)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_what_comes_back_is_what_the_model_gave(text: TextSource, tmp_path: Path, dtype: Any) -> None:
    report = run(text, tmp_path / "s.zarr", dtype=dtype)
    store, model = report.store, FakeModel()
    assert store.complete
    assert not report.resumed
    assert report.rows == report.new_rows == store.n_rows > 5 * 64
    for hook in (RESID, Z):
        expected = expected_rows(model, store, hook)
        stored = float32_to_bf16(expected) if dtype == "bfloat16" else expected.astype(dtype)
        np.testing.assert_array_equal(store.read(hook, 0, store.n_rows), stored)
        as_float = bf16_to_float32(stored) if dtype == "bfloat16" else stored.astype(np.float32)
        np.testing.assert_array_equal(store.read_float32(hook, 5, 200), as_float[5:200])
        norms = np.linalg.norm(expected.reshape(len(expected), -1), axis=1)
        np.testing.assert_allclose(store.norms(hook, 0, store.n_rows), norms, rtol=1e-6)
        np.testing.assert_array_equal(zarr.open(store.path, mode="r")[f"hooks/{hook}"][:], stored)
    assert store.verify() == []
    assert isinstance(store, ActivationSource)
    assert isinstance(model, HookedModel)


def test_tables_and_flags(text: TextSource, tmp_path: Path) -> None:
    report = run(text, tmp_path / "s.zarr")
    store = report.store
    rows, sequences, documents = store.rows(0, store.n_rows), store.sequences(), store.documents()
    originals = {d.title: d for d in text.documents() if d.text.strip()}
    assert documents["title"].tolist() == list(originals)
    assert documents["language"].tolist() == [d.language for d in originals.values()]
    assert [json.loads(extra)["score"] for extra in documents["extra"]] == [t.split()[1] for t in originals]
    assert (documents["source"] == "text").all()
    assert documents["n_tokens"].tolist() == [len(d.text) for d in originals.values()]
    assert documents["held_out"].tolist() == [is_held_out(Document("", title=title)) for title in originals]
    assert report.documents == len(documents)
    assert report.empty_documents == 24 - len(documents)
    assert report.windowed_documents == (documents["n_tokens"] > 15).sum()
    assert sequences["n_rows"].sum() == store.n_rows
    for sequence in sequences.itertuples():
        part = slice(sequence.start_row, sequence.start_row + sequence.n_rows)
        assert (rows.sequence[part] == sequence.sequence).all()
        assert rows.position[part].tolist() == list(range(sequence.n_rows))
        document = list(originals.values())[sequence.document]
        expected = document.text.encode()[sequence.document_offset :][: sequence.n_rows - 1]
        assert (rows.token_id[part][1:] - 3).astype(np.uint8).tobytes() == expected
        flags = rows.flags[part]
        assert (((flags & RowFlag.HELD_OUT) > 0) == is_held_out(document)).all()
        assert ((flags & RowFlag.BOS) > 0).tolist() == [True] + [False] * (sequence.n_rows - 1)
    assert store.document_at(store.n_rows - 1)["title"] == documents["title"].iloc[-1]


@pytest.mark.parametrize(
    ("rows_per_group", "batch_size"),
    [(1, 50), (4, 1), (4, 50), (4, 1000), (16, 1), (16, 50), (16, 1000), (256, 1), (256, 1000)],
)
def test_row_groups_and_batches_leave_no_trace(
    text: TextSource, tmp_path: Path, rows_per_group: int, batch_size: int
) -> None:
    """Windows that cross row groups, even several, give what one row group gives."""
    settings = {"max_tokens": 150, "context_size": 24, "rows_per_group": rows_per_group, "batch_size": batch_size}
    store = run(text, tmp_path / "a.zarr", **settings).store
    whole = run(text, tmp_path / "b.zarr", **{**settings, "rows_per_group": 4096}).store
    assert store.n_rows == whole.n_rows == 150
    for hook in (RESID, Z):
        np.testing.assert_array_equal(store.read(hook, 0, 150), whole.read(hook, 0, 150))
    for column, values in store.rows(0, 150)._asdict().items():
        np.testing.assert_array_equal(values, getattr(whole.rows(0, 150), column))
    assert store.sequences().equals(whole.sequences())
    assert store.documents().equals(whole.documents())


def test_batches_respect_the_budget_and_waste_little(text: TextSource, tmp_path: Path) -> None:
    model = FakeModel()
    report = run(text, tmp_path / "s.zarr", model=model, rows_per_group=4096, batch_size=200)
    tokens = sum(tokens for _, tokens in model.calls)
    assert max(tokens for _, tokens in model.calls) <= 200
    assert tokens < 1.1 * report.rows


@pytest.mark.parametrize("max_tokens", [1, 16, 17, 63, 64, 65, 128])
def test_max_tokens_is_exact(text: TextSource, tmp_path: Path, max_tokens: int) -> None:
    report = run(text, tmp_path / "s.zarr", max_tokens=max_tokens)
    assert report.rows == report.store.n_rows == max_tokens
    assert report.store.complete
    assert report.store.sequences()["n_rows"].sum() == max_tokens
    assert zarr.open(report.store.path, mode="r")[f"hooks/{RESID}"].shape == (max_tokens, 12)


def test_more_max_tokens_than_text(text: TextSource, tmp_path: Path) -> None:
    a, b = run(text, tmp_path / "a.zarr"), run(text, tmp_path / "b.zarr", max_tokens=10**9)
    assert a.rows == b.rows
    assert b.store.complete


def test_the_same_capture_has_the_same_id(text: TextSource, tmp_path: Path) -> None:
    stores = [run(text, tmp_path / name).store for name in ("a.zarr", "b.zarr")]
    assert stores[0].id == stores[1].id == stores[0].fingerprint[:12]
    assert tree(stores[0].path) == tree(stores[1].path)
    assert run(text, tmp_path / "c.zarr", hooks=[RESID]).store.id != stores[0].id
    assert run(text, tmp_path / "d.zarr", max_tokens=99).store.id != stores[0].id


def test_a_complete_store_is_left_alone(text: TextSource, tmp_path: Path) -> None:
    store = run(text, tmp_path / "s.zarr").store
    before, model = tree(store.path), FakeModel()
    report = run(text, tmp_path / "s.zarr", model=model, rows_per_group=None)
    assert (report.resumed, report.new_rows, report.rows, model.calls) == (True, 0, store.n_rows, [])
    assert tree(store.path) == before
    assert store.is_complete_for([RESID])
    assert not store.is_complete_for([RESID, OTHER])


def test_aliases_are_known_to_the_store(text: TextSource, tmp_path: Path) -> None:
    (alias, hook), *_ = ALIASES.items()
    store = run(text, tmp_path / "s.zarr", hooks=[alias, hook]).store
    assert store.hooks == (hook,)
    assert store.resolve_hook(alias) == hook
    assert store.is_complete_for([alias])
    np.testing.assert_array_equal(store.read(alias, 3, 9), store.read(hook, 3, 9))
    with pytest.raises(UnknownNameError, match=rf"Did you mean {hook}"):
        store.read(hook[:-1], 0, 1)


def test_hooks_can_be_added_and_line_up(text: TextSource, tmp_path: Path) -> None:
    store = run(text, tmp_path / "s.zarr", hooks=[RESID]).store
    report = run(None, tmp_path / "s.zarr", hooks=[Z, RESID])
    assert report.store.hooks == (Z, RESID)
    assert report.store.fingerprint == store.fingerprint
    together = run(text, tmp_path / "t.zarr", hooks=[RESID, Z]).store
    for hook in (RESID, Z):
        np.testing.assert_array_equal(report.store.read(hook, 0, store.n_rows), together.read(hook, 0, store.n_rows))
    assert report.store.verify() == []


def test_a_star_stands_for_every_layer(text: TextSource, tmp_path: Path) -> None:
    store = run(text, tmp_path / "a.zarr", [Z, "blocks.*.hook_resid_post", OTHER]).store
    assert store.hooks == (OTHER, Z, RESID)
    one_by_one = run(text, tmp_path / "b.zarr", [RESID, OTHER, Z]).store
    assert tree(store.path) == tree(one_by_one.path)
    aliased = run(text, tmp_path / "c.zarr", "blocks.*.hook_out").store
    assert (aliased.hooks, aliased.resolve_hook("blocks.1.hook_out")) == ((RESID,), RESID)
    before = tree(aliased.path)
    more = run(None, aliased.path, ["blocks.*.hook_resid_post"])
    assert (more.store.hooks, more.new_rows) == ((OTHER, RESID), more.rows)
    assert {name: tree(aliased.path)[name] for name in before if name.split("/")[-1].startswith("c.")} == {
        name: content for name, content in before.items() if name.split("/")[-1].startswith("c.")
    }
    with pytest.raises(InvalidInputError, match=r"No hook fits 'blocks\.\*\.hook_resid'"):
        run(text, tmp_path / "d.zarr", ["blocks.*.hook_resid"])
    assert not (tmp_path / "d.zarr").exists()


@given(
    row_bytes=st.lists(st.integers(1, 2**20), min_size=1, max_size=200),
    context_size=st.integers(2, 2**15),
)
def test_row_groups_are_as_large_as_memory_allows(row_bytes: list[int], context_size: int) -> None:
    """However many hooks there are, and what is not bounded so is four windows."""

    def is_small(rows: int) -> bool:
        together = rows * sum(row_bytes) <= 2**29 or rows <= 4 * context_size
        return rows <= 65_536 and rows * max(row_bytes) <= 2**27 and together

    rows = rows_per_group_for(row_bytes, context_size)
    assert rows & (rows - 1) == 0
    assert is_small(rows)
    assert not is_small(2 * rows)


def test_many_hooks_have_smaller_row_groups(text: TextSource, tmp_path: Path) -> None:
    """As large as those of four; a store keeps its own when hooks are added."""
    model = FakeModel(hooks={f"blocks.{layer}.wide": (1024,) for layer in range(32)})
    settings: dict[str, Any] = {"context_size": 16, "max_tokens": 20, "rows_per_group": None}
    sizes = {
        n: run(text, tmp_path / f"{n}.zarr", list(model.hooks)[:n], model, **settings).store.spec.rows_per_group
        for n in (1, 4, 8, 32)
    }
    assert sizes == {1: 65_536, 4: 65_536, 8: 32_768, 32: 8192}
    more = run(None, tmp_path / "4.zarr", ["blocks.*.wide"], model, **settings).store
    assert (len(more.hooks), more.spec.rows_per_group) == (32, 65_536)


def test_a_store_without_bos(text: TextSource, tmp_path: Path) -> None:
    store = run(text, tmp_path / "s.zarr", model=FakeModel(bos_token_id=None)).store
    assert not (store.rows(0, store.n_rows).flags & RowFlag.BOS).any()
    assert store.documents()["n_tokens"].sum() == store.n_rows


def test_progress_ends_with_all_rows(text: TextSource, tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    report = run(text, tmp_path / "s.zarr", progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (report.rows, report.rows)


# ---- what bad input gets: an error that names it, and nothing written


def refused(out: Path, error: type[Exception], match: str, call: Callable[[], Any]) -> None:
    before = tree(out) if out.exists() else None
    with pytest.raises(error, match=match) as caught:
        call()
    assert isinstance(caught.value, InvalidInputError)
    assert (tree(out) if out.exists() else None) == before


def test_bad_settings_write_nothing(text: TextSource, tmp_path: Path) -> None:
    out = tmp_path / "s.zarr"
    settings: list[tuple[dict[str, Any], str]] = [
        ({"context_size": 513}, "context_size is 513; fake takes at most 512"),
        ({"context_size": 1}, "context_size is 1; a window needs at least 2"),
        ({"dtype": "float64"}, "dtype is 'float64'; expected one of bfloat16"),
        ({"rows_per_group": 48}, "rows_per_group is 48; expected a power of two"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"hooks": []}, "No hook was given"),
        ({"hooks": ["blocks.1.hook_resid_pots"]}, f"Did you mean {RESID}"),
    ]
    for changes, match in settings:
        refused(out, InvalidInputError, match, lambda changes=changes: run(text, out, **changes))
    refused(out, UnknownNameError, "no file", lambda: run(TextSource(tmp_path / "none.jsonl"), out))
    refused(out, UnknownNameError, "text column 'body'", lambda: run(TextSource(text.paths, "body"), out))
    refused(out, InvalidInputError, "does not have all of its text", lambda: run(None, out))
    odd = FakeModel(hooks={"a/b": (3,)})
    refused(out, InvalidInputError, "cannot be a folder's name", lambda: run(text, out, hooks=["a/b"], model=odd))


def test_empty_text_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": " \\n"}\n')
    out = tmp_path / "s.zarr"
    refused(out, InvalidInputError, r"no text in a\.jsonl", lambda: run(TextSource(tmp_path / "a.jsonl"), out))
    assert not out.exists()


def test_text_without_tokens_writes_nothing(text: TextSource, tmp_path: Path) -> None:
    class Deaf(FakeModel):
        def encode_documents(self, texts: Any) -> list[np.ndarray]:
            return [np.empty(0, np.int32) for _ in texts]

    refused(
        tmp_path / "s.zarr",
        InvalidInputError,
        "no document has a token",
        lambda: run(text, tmp_path / "s.zarr", model=Deaf()),
    )


def test_the_model_is_made_last(text: TextSource, tmp_path: Path) -> None:
    made = []

    def factory() -> FakeModel:
        made.append(1)
        return FakeModel()

    with pytest.raises(UnknownNameError):
        run(TextSource(tmp_path / "none.jsonl"), tmp_path / "s.zarr", model=factory)
    assert made == []
    assert run(text, tmp_path / "s.zarr", model=factory).store.complete
    assert made == [1]


def test_an_occupied_folder_is_refused(text: TextSource, tmp_path: Path) -> None:
    out = tmp_path / "s.zarr"
    out.mkdir()
    (out / "notes.md").write_text("mine")
    refused(out, OccupiedError, r"holds something else \(notes\.md", lambda: run(text, out))
    (out / "manifest.json").write_text('{"format": "sae", "version": 1}')
    refused(out, OccupiedError, "format 'sae'", lambda: run(text, out))
    (tmp_path / "file").write_text("")
    with pytest.raises(OccupiedError, match="is a file"):
        run(text, tmp_path / "file")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model": FakeModel("other")}, "model is 'other', the store has 'fake'; weight_hash is"),
        ({"model": FakeModel(bos_token_id=None)}, "bos_token_id is None, the store has 2"),
        ({"context_size": 8}, "context_size is 8, the store has 16"),
        ({"dtype": "float32"}, "dtype is 'float32', the store has 'bfloat16'"),
        ({"rows_per_group": 128}, "rows_per_group is 128, the store has 64"),
        ({"max_tokens": 100}, "another max_tokens: it is 100, the store has None"),
    ],
)
def test_another_spec_is_refused_by_name(text: TextSource, tmp_path: Path, changes: Any, match: str) -> None:
    out = tmp_path / "s.zarr"
    run(text, out)
    refused(out, MismatchError, match, lambda: run(text, out, **changes))


def test_another_text_is_refused_by_name(text: TextSource, tmp_path: Path) -> None:
    out = tmp_path / "s.zarr"
    run(text, out)
    shuffled = TextSource(text.paths, shuffle_seed=3)
    refused(out, MismatchError, "another text: .*shuffle_seed is 3, the store has None", lambda: run(shuffled, out))
    write_text(tmp_path / "other.jsonl", seed=1)
    refused(out, MismatchError, r"files is \['other\.jsonl'\]", lambda: run(TextSource(tmp_path / "other.jsonl"), out))
    with open(tmp_path / "text.jsonl", "a") as file:
        file.write('{"text": "more"}\n')
    refused(out, MismatchError, "another text: fingerprint is", lambda: run(TextSource(text.paths), out))


# ---- what stops a run


class Poisoned(FakeModel):
    """Gives a bad value on a `~` late in a window."""

    bad = np.nan

    def rows_at(self, hook: str, window: np.ndarray) -> np.ndarray:
        rows = super().rows_at(hook, window)
        if hook == Z:
            rows[(window == TILDE) & (np.arange(len(window)) > 13), 1, 2] = self.bad
        return rows


@pytest.mark.parametrize(
    ("dtype", "bad", "match"),
    [
        ("bfloat16", np.nan, "a NaN or Inf"),
        ("float32", np.inf, "a NaN or Inf"),
        ("float16", 70_000.0, r"too large for float16 .*Store bfloat16"),
    ],
)
def test_non_finite_values_stop_the_run(text: TextSource, tmp_path: Path, dtype: Any, bad: float, match: str) -> None:
    model, out = Poisoned(), tmp_path / "s.zarr"
    model.bad = bad
    with pytest.raises(NonFiniteError, match=match) as caught:
        run(text, out, model=model, dtype=dtype)
    store = ActivationStore.open(out)
    clean = run(text, tmp_path / "clean.zarr", dtype=dtype).store
    rows = clean.rows(0, clean.n_rows)
    first = int(np.flatnonzero((rows.token_id == TILDE) & (rows.position > 13))[0])
    message = str(caught.value)
    group = first // 64
    assert Z in message
    row = int(message.split("at row ")[1].split(", in")[0].replace(",", ""))
    assert row // 64 == group
    assert f"in the document {clean.document_at(row)['title']!r}" in message
    assert store.n_rows == group * 64
    np.testing.assert_array_equal(store.read(Z, 0, store.n_rows), clean.read(Z, 0, store.n_rows))
    assert store.verify() == []


class Interrupting(FakeModel):
    """Raises in its nth forward pass."""

    n = 4
    error: BaseException = KeyboardInterrupt()

    def forward_rows(self, *arguments: Any) -> FakePending:
        pending = super().forward_rows(*arguments)
        if len(self.calls) == self.n:
            raise self.error
        return pending


def test_ctrl_c_says_how_to_resume(text: TextSource, tmp_path: Path) -> None:
    out = tmp_path / "s.zarr"
    with pytest.raises(InterruptedRunError, match=r"rows are committed in .*run the same command again to resume"):
        run(text, out, model=Interrupting())
    assert not (out / "lock").exists()
    assert threading.active_count() == 1 or not any(
        t.name.startswith(("writer", "planner")) for t in threading.enumerate()
    )
    store = ActivationStore.open(out)
    assert not store.complete
    report = run(text, out)
    assert report.resumed
    assert tree(out) == tree(run(text, tmp_path / "t.zarr").store.path)


def test_errors_of_the_model_pass_through_with_a_note(text: TextSource, tmp_path: Path) -> None:
    model = Interrupting()
    model.error = RuntimeError("CUDA out of memory")
    with pytest.raises(RuntimeError, match="CUDA out of memory") as caught:
        run(text, tmp_path / "s.zarr", model=model)
    assert any("run the same command again" in note for note in caught.value.__notes__)


def test_wrong_shapes_from_the_model_are_refused(text: TextSource, tmp_path: Path) -> None:
    class Wrong(FakeModel):
        def forward_rows(self, *arguments: Any) -> FakePending:
            values = dict(super().forward_rows(*arguments).values)
            values[RESID] = values[RESID][:, :1]  # a width of 1 would broadcast
            return FakePending(values)

    with pytest.raises(MismatchError, match=r"expected \(\d+, 12\)"):
        run(text, tmp_path / "s.zarr", model=Wrong())


def test_an_unfinished_capture_is_finished_first(text: TextSource, tmp_path: Path) -> None:
    out = tmp_path / "s.zarr"
    with pytest.raises(InterruptedRunError):
        run(text, out, model=Interrupting())
    refused(out, MismatchError, "unfinished capture of the hooks", lambda: run(text, out, hooks=[Z]))
    report = run(text, out, hooks=[OTHER, Z, RESID])
    assert report.store.complete
    assert report.store.hooks == (OTHER, Z, RESID)
    assert report.store.verify() == []


def test_a_full_disk_is_a_clear_error_and_loses_nothing(
    text: TextSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, writes = tmp_path / "s.zarr", [0]
    original = arrays.write_object

    def filling(path: Path, *arguments: Any) -> Any:
        writes[0] += "hooks/" in str(path)
        if writes[0] > 5:
            raise OSError(28, "No space left on device")
        return original(path, *arguments)

    monkeypatch.setattr("activations.writer.write_object", filling)
    with pytest.raises(InterruptedRunError, match=r"No space left on device.*rows are committed.*run the same"):
        run(text, out)
    monkeypatch.undo()
    store = ActivationStore.open(out)
    assert 0 < store.n_rows <= 128
    assert store.verify() == []
    run(text, out)
    assert tree(out) == tree(run(text, tmp_path / "t.zarr").store.path)


def test_readers_see_committed_rows_only(text: TextSource, tmp_path: Path) -> None:
    out = tmp_path / "s.zarr"
    seen = []

    class Watched(FakeModel):
        def forward_rows(self, *arguments: Any) -> FakePending:
            store = ActivationStore.open(out)
            seen.append(store.n_rows)
            assert store.n_rows % 64 == 0
            assert not store.complete
            if store.n_rows:
                np.testing.assert_array_equal(
                    store.read(RESID, 0, store.n_rows), float32_to_bf16(expected_rows(self, store, RESID))
                )
                with pytest.raises(InvalidInputError, match="committed rows"):
                    store.read(RESID, 0, store.n_rows + 1)
                assert store.sequences()["n_rows"].sum() == store.n_rows
                assert zarr.open(out, mode="r")[f"hooks/{RESID}"].shape[0] <= ActivationStore.open(out).n_rows
            return super().forward_rows(*arguments)

    store = run(text, out, model=Watched()).store
    assert max(seen) > 0
    assert store.n_rows > max(seen)


def test_importing_and_reading_need_no_torch(text: TextSource, tmp_path: Path) -> None:
    store = run(text, tmp_path / "s.zarr").store
    code = (
        "import sys, activations, activations.store\n"
        "assert not {'torch', 'pandas', 'zarr', 'pyarrow'} & set(sys.modules), 'heavy at import'\n"
        f"store = activations.ActivationStore.open({str(store.path)!r})\n"
        f"store.read({RESID!r}, 0, 9); store.documents(); store.verify(); store.info()\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
