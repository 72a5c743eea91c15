"""Appending text: the new rows follow the old ones, which never vanish, whatever happens in between."""

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from helpers_activations import FakeModel, FakePending, expected_rows, tree, write_text

from activations import ledger as ledger_module
from activations import passes
from activations.capture import CaptureReport, capture
from activations.errors import InterruptedRunError, InvalidInputError, MismatchError
from activations.source import float32_to_bf16
from activations.store import ActivationStore
from activations.text import TextSource

RESID, Z, OTHER = "blocks.1.hook_resid_post", "blocks.1.attn.hook_z", "blocks.0.hook_resid_post"
R = 32


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def texts(tmp_path: Path) -> list[TextSource]:
    return [TextSource(write_text(tmp_path / f"text{i}.jsonl", n_documents=8, seed=i, longest=50)) for i in range(3)]


def run(
    text: TextSource | None, out: Path, hooks: Any = (RESID, Z), model: Any = None, **settings: Any
) -> CaptureReport:
    settings = {"context_size": 16, "rows_per_group": R, "batch_size": 64, **settings}
    return capture(FakeModel() if model is None else model, text, hooks, out, **settings)


def check(store: ActivationStore) -> None:
    """Everything in a store is what the model gives for its tokens."""
    for hook in store.hooks:
        n_rows = store.rows_of(hook)
        expected = float32_to_bf16(expected_rows(FakeModel(), store, hook))[:n_rows]
        np.testing.assert_array_equal(store.read(hook, 0, n_rows), expected)
        shown = zarr.open(store.path, mode="r")[f"hooks/{hook}"]
        np.testing.assert_array_equal(shown[: store.n_rows], expected[: shown.shape[0]])
    assert store.sequences()["n_rows"].sum() == store.n_rows
    assert store.verify() == []


@pytest.mark.parametrize("old_rows", [1, 31, 32, 33, 80, None])
@pytest.mark.parametrize("new_rows", [1, 16, 70, None])
def test_new_rows_follow_the_old_ones(
    texts: list[TextSource], tmp_path: Path, old_rows: int | None, new_rows: int | None
) -> None:
    out = tmp_path / "s.zarr"
    before = run(texts[0], out, max_tokens=old_rows).store
    rows, documents, activations = before.rows(0, before.n_rows), before.documents(), before.read(Z, 0, before.n_rows)
    report = run(texts[1], out, append=True, max_tokens=new_rows)
    store = report.store
    alone = run(texts[1], tmp_path / "alone.zarr", max_tokens=new_rows).store
    assert report.new_rows == 2 * 0 + alone.n_rows
    assert store.n_rows == report.rows == before.n_rows + alone.n_rows
    assert store.complete
    assert store.fingerprint == before.fingerprint
    check(store)
    n = before.n_rows
    np.testing.assert_array_equal(store.read(Z, 0, n), activations)
    np.testing.assert_array_equal(store.read(Z, n, store.n_rows), alone.read(Z, 0, alone.n_rows))
    joined, other = store.rows(0, store.n_rows), alone.rows(0, alone.n_rows)
    for column, values in rows._asdict().items():
        shift = int(rows.sequence[-1]) + 1 if column == "sequence" else 0
        expected = np.concatenate([values, getattr(other, column) + shift])
        np.testing.assert_array_equal(getattr(joined, column), expected)
    assert store.documents()["title"].tolist() == [*documents["title"], *alone.documents()["title"]]
    assert store.documents()["document"].tolist() == list(range(len(store.documents())))
    assert not list(out.rglob("*.before-append"))
    assert store.info()["appended"] == [
        {"from_row": n, "max_tokens": new_rows, "text": store.manifest["appended"][0]["text"]}
    ]


def test_append_again_and_add_a_hook(texts: list[TextSource], tmp_path: Path) -> None:
    out = tmp_path / "s.zarr"
    run(texts[0], out, hooks=[RESID])
    run(texts[1], out, hooks=[], append=True, context_size=None, rows_per_group=None)
    run(None, out, hooks=[OTHER])
    report = run(texts[2], out, hooks=[], append=True)
    assert report.store.hooks == (OTHER, RESID)
    check(report.store)
    done = tree(out)
    again = run(texts[2], out, hooks=[], append=True)
    assert (again.new_rows, again.rows) == (0, report.rows)
    assert tree(out) == done
    run(texts[0], out, hooks=[RESID])  # what it was begun with is there too
    assert tree(out) == done


def test_old_rows_are_not_run_again(texts: list[TextSource], tmp_path: Path) -> None:
    out, model = tmp_path / "s.zarr", FakeModel()
    run(texts[0], out, rows_per_group=4096)
    report = run(texts[1], out, rows_per_group=4096, append=True, model=model)
    assert sum(tokens for _, tokens in model.calls) < 1.5 * report.new_rows


def test_hooks_of_several_captures_are_appended_in_one_pass(
    texts: list[TextSource], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hooks, once, twice = [OTHER, RESID, Z], FakeModel(), FakeModel()
    run(texts[0], tmp_path / "once.zarr", hooks)
    expected = run(texts[1], tmp_path / "once.zarr", [], once, append=True)
    run(texts[0], tmp_path / "begun.zarr", [RESID])
    run(None, tmp_path / "begun.zarr", [Z, OTHER])
    for name in ("s.zarr", "stopped.zarr", "apart.zarr"):
        shutil.copytree(tmp_path / "begun.zarr", tmp_path / name)
    report = run(texts[1], tmp_path / "s.zarr", [], twice, append=True)
    assert twice.calls == once.calls
    assert (report.rows, report.new_rows) == (expected.rows, expected.new_rows)
    check(report.store)
    done = tree(report.store.path)
    shards = {name: content for name, content in done.items() if "/c." in name}
    assert shards == {name: content for name, content in tree(expected.store.path).items() if "/c." in name}

    def failing(self: Any, record: Any) -> None:
        if (record.capture, record.row_stop) == (max(map(report.store.capture_of, hooks)), expected.rows):
            raise OSError("the disk is gone")
        commit(self, record)

    with monkeypatch.context() as patch:  # between the two records of the last row group
        commit = ledger_module.Ledger.commit
        patch.setattr(ledger_module.Ledger, "commit", failing)
        with pytest.raises(InterruptedRunError, match="the disk is gone"):
            run(texts[1], tmp_path / "stopped.zarr", [], append=True)
    stopped = ActivationStore.open(tmp_path / "stopped.zarr")
    assert max(map(stopped.rows_of, hooks)) == expected.rows > min(map(stopped.rows_of, hooks))
    run(texts[1], tmp_path / "stopped.zarr", [], append=True)
    assert tree(tmp_path / "stopped.zarr") == done

    monkeypatch.setattr(passes, "MAX_GROUP_BYTES", R * 2 * (12 + 12))
    apart = FakeModel()
    assert run(texts[1], tmp_path / "apart.zarr", [], apart, append=True).new_rows == 2 * expected.new_rows
    assert apart.calls == 2 * once.calls
    assert tree(tmp_path / "apart.zarr") == done


def refused(out: Path, error: type[Exception], match: str, *arguments: Any, **settings: Any) -> None:
    before = tree(out) if out.exists() else None
    with pytest.raises(error, match=match):
        run(*arguments, **settings)
    assert (tree(out) if out.exists() else None) == before


class Stopping(FakeModel):
    """Fails after some passes."""

    left = 1

    def forward_rows(self, *arguments: Any) -> FakePending:
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("out of memory")
        return super().forward_rows(*arguments)


def test_what_cannot_be_appended(texts: list[TextSource], tmp_path: Path) -> None:
    out = tmp_path / "s.zarr"
    refused(out, InvalidInputError, "is no store yet", texts[0], out, append=True)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(texts[0], out, model=Stopping())
    refused(out, MismatchError, r"not complete: text0\.jsonl is still to be captured", texts[1], out, append=True)
    run(texts[0], out)
    refused(out, InvalidInputError, "no text to append", None, out, append=True)
    refused(out, MismatchError, "another text", texts[1], out)
    refused(out, InvalidInputError, r"holds the text text0\.jsonl already", texts[0], out, append=True)
    refused(out, InvalidInputError, f"holds {RESID} as well", texts[1], out, [Z], append=True)
    refused(out, MismatchError, "context_size is 8", texts[1], out, append=True, context_size=8)
    refused(out, MismatchError, "model is 'other'", texts[1], out, append=True, model=FakeModel("other"))
    (tmp_path / "empty.jsonl").write_text('{"text": " "}\n')
    refused(out, InvalidInputError, "There is no text", TextSource(tmp_path / "empty.jsonl"), out, append=True)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(texts[1], out, append=True, model=Stopping())
    assert not ActivationStore.open(out).complete
    for text in (texts[0], None):
        refused(out, InvalidInputError, r"unfinished append of text1\.jsonl", text, out)
    refused(out, MismatchError, r"text1\.jsonl is still to be captured", texts[2], out, append=True)
    refused(out, MismatchError, "with max_tokens None; got 9", texts[1], out, append=True, max_tokens=9)
    run(texts[1], out, append=True)
    refused(out, InvalidInputError, r"holds the text text0\.jsonl already", texts[0], out, append=True)
    check(ActivationStore.open(out))


def test_an_append_that_has_no_rows_yet_may_be_left_for_another(texts: list[TextSource], tmp_path: Path) -> None:
    class Speechless(FakeModel):
        """Cannot read what it is to append, but finds that there is something."""

        def encode_documents(self, given: Any) -> list[np.ndarray]:
            if len(given) > 1:
                raise RuntimeError("unreadable")
            return super().encode_documents(given)

    out = tmp_path / "s.zarr"
    run(texts[0], out)
    with pytest.raises(RuntimeError, match="unreadable"):
        run(texts[1], out, append=True, model=Speechless())
    store = ActivationStore.open(out)
    assert not store.complete
    check(store)
    run(texts[2], out, append=True)
    run(texts[0], tmp_path / "never.zarr")
    assert tree(out) == tree(run(texts[2], tmp_path / "never.zarr", append=True).store.path)


def test_another_append_in_between_is_noticed(texts: list[TextSource], tmp_path: Path) -> None:
    """The store is checked before the lock is taken; the model is made in between."""
    out = tmp_path / "s.zarr"
    run(texts[0], out)

    def slow() -> FakeModel:
        run(texts[1], out, append=True)
        return FakeModel()

    with pytest.raises(MismatchError, match="other rows meanwhile"):
        run(texts[2], out, append=True, model=slow)
    store = ActivationStore.open(out)
    assert [entry["text"]["files"] for entry in store.manifest["appended"]] == [["text1.jsonl"]]
    assert store.complete
    check(store)


def test_readers_see_the_old_rows_all_the_time(texts: list[TextSource], tmp_path: Path) -> None:
    """Readers that were opened before the append, and those opened in the middle of it."""
    out = tmp_path / "s.zarr"
    before = run(texts[0], out, max_tokens=80).store
    readers = [before, ActivationStore.open(out)]
    expected = {hook: before.read(hook, 0, 80) for hook in (RESID, Z)}
    before.refresh()

    def look(reader: ActivationStore) -> None:
        for hook, values in expected.items():
            np.testing.assert_array_equal(reader.read(hook, 0, 80), values)
            assert np.isfinite(reader.norms(hook, 64, 80)).all()
        assert len(reader.rows(0, reader.n_rows).token_id) == reader.n_rows
        assert reader.sequences()["n_rows"].sum() == reader.n_rows
        assert len(reader.documents()) == reader.documents()["document"].nunique()
        assert reader.verify() == []

    class Watched(FakeModel):
        def forward_rows(self, *arguments: Any) -> FakePending:
            readers.append(ActivationStore.open(out))
            for reader in (*readers[:2], *readers[-2:]):
                look(reader)
            assert not readers[-1].complete
            return super().forward_rows(*arguments)

    report = run(texts[1], out, append=True, model=Watched(), max_tokens=70)
    for reader in readers:
        look(reader)
        reader.refresh()
        look(reader)
        assert reader.complete
        assert reader.n_rows == report.rows
    assert before.n_rows == report.rows


def test_damage_is_still_found(texts: list[TextSource], tmp_path: Path) -> None:
    out = tmp_path / "s.zarr"
    run(texts[0], out, max_tokens=80)
    shard = out / "hooks" / RESID / "c.2.0"
    content = bytearray(shard.read_bytes())
    content[5] ^= 1
    shard.write_bytes(content)
    with pytest.raises(RuntimeError, match="is not what was written"):  # the old rows are verified before they move
        run(texts[1], out, append=True)
    content[5] ^= 1
    shard.write_bytes(content)
    run(texts[1], out, append=True)
    check(ActivationStore.open(out))


class Crash(BaseException):
    """The process is gone: no handler of an ordinary error may see this."""


@pytest.mark.parametrize(("kind", "segments"), [("before the rename", 4), ("after the rename", 1024)])
def test_a_crash_at_any_write_loses_nothing(
    kind: str, segments: int, texts: list[TextSource], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_module, "RECORDS_PER_SEGMENT", segments)  # 4: the tail's record is in a segment
    start = run(texts[0], tmp_path / "start.zarr", max_tokens=3 * R + 9).store
    old = {hook: start.read(hook, 0, start.n_rows) for hook in (RESID, Z)}
    run(texts[0], tmp_path / "whole.zarr", max_tokens=3 * R + 9)
    expected = tree(run(texts[1], tmp_path / "whole.zarr", append=True, max_tokens=40).store.path)
    replace, unlink = os.replace, os.unlink
    point, crashed = 1, True
    seen = set()
    while crashed:
        out, count = tmp_path / f"{point}.zarr", [0]
        shutil.copytree(start.path, out)

        def step(action: Any, *arguments: Any, count: list[int] = count, point: int = point) -> Any:
            if str(arguments[0]).endswith("lock"):  # a process that is gone holds none
                return action(*arguments)
            count[0] += 1
            if count[0] >= point and kind == "before the rename":
                raise Crash
            action(*arguments)
            if count[0] >= point and kind == "after the rename":
                raise Crash

        monkeypatch.setattr(os, "replace", lambda *arguments, step=step: step(replace, *arguments))
        monkeypatch.setattr(os, "unlink", lambda *arguments, step=step: step(unlink, *arguments))
        with contextlib.suppress(Crash):
            run(texts[1], out, append=True, max_tokens=40)
        monkeypatch.setattr(os, "replace", replace)
        monkeypatch.setattr(os, "unlink", unlink)
        crashed = count[0] >= point
        store = ActivationStore.open(out)
        assert store.n_rows >= start.n_rows
        for hook, values in old.items():
            np.testing.assert_array_equal(store.read(hook, 0, start.n_rows), values)
        check(store)
        seen.add(store.n_rows)
        run(texts[1], out, append=True, max_tokens=40)
        assert tree(out) == expected
        shutil.rmtree(out)
        point += 2  # the writes while only whole groups are there are seven in a row: threads shift which
    assert point > 40
    assert seen >= {start.n_rows, 4 * R, start.n_rows + 40}
