"""Reading a store: any rows, verified; rot of every kind is found and named."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers_activations import FakeModel, write_text

from activations import arrays
from activations.capture import capture
from activations.errors import IntegrityError, InvalidInputError, UnknownNameError
from activations.source import RowFlag
from activations.store import ActivationStore
from activations.text import TextSource

RESID, Z = "blocks.1.hook_resid_post", "blocks.1.attn.hook_z"


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    text = TextSource(write_text(folder / "text.jsonl"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "CHUNK_BYTES", 16 * 24)
        capture(FakeModel(), text, [RESID, Z], folder / "s.zarr", context_size=16, rows_per_group=64, batch_size=128)
    return folder / "s.zarr"


@pytest.fixture
def store(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ActivationStore:
    """A copy that a test may damage; inner chunks of 16 rows."""
    monkeypatch.setattr(arrays, "CHUNK_BYTES", 16 * 24)
    shutil.copytree(original, tmp_path / "s.zarr")
    return ActivationStore.open(tmp_path / "s.zarr")


def test_any_rows_can_be_read(store: ActivationStore) -> None:
    everything = {hook: store.read(hook, 0, store.n_rows) for hook in store.hooks}
    tokens = store.rows(0, store.n_rows)
    rng = np.random.default_rng(0)
    for _ in range(30):
        start, stop = np.sort(rng.integers(0, store.n_rows + 1, 2)).tolist()
        for hook, values in everything.items():
            np.testing.assert_array_equal(store.read(hook, start, stop), values[start:stop])
            assert store.norms(hook, start, stop).shape == (stop - start,)
        np.testing.assert_array_equal(store.rows(start, stop).token_id, tokens.token_id[start:stop])
        scattered = rng.integers(0, store.n_rows, 20)
        for hook, values in everything.items():
            np.testing.assert_array_equal(store.read_rows(hook, scattered), values[scattered])
    assert store.read_rows(RESID, np.array([], int)).shape == (0, 12)


@pytest.mark.parametrize(("batch_size", "start"), [(1000, 0), (50, 0), (64, 7), (7, 300)])
def test_batches_are_all_rows_in_order(
    store: ActivationStore, batch_size: int, start: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("activations.store.READ_AHEAD_BYTES", 4000)
    batches = list(store.batches([Z, RESID], batch_size, start))
    assert all(len(batch.rows) == batch_size for batch in batches[:-1])
    rows = np.concatenate([batch.rows for batch in batches])
    assert rows.tolist() == list(range(start, store.n_rows))
    for hook in (Z, RESID):
        values = np.concatenate([batch.activations[hook] for batch in batches])
        np.testing.assert_array_equal(values, store.read(hook, start, store.n_rows))
        norms = np.concatenate([batch.norms[hook] for batch in batches])
        np.testing.assert_array_equal(norms, store.norms(hook, start, store.n_rows))
    flags = np.concatenate([batch.flags for batch in batches])
    np.testing.assert_array_equal(flags, store.rows(start, store.n_rows).flags)


def test_rows_that_do_not_exist_are_refused(store: ActivationStore) -> None:
    n = store.n_rows
    for start, stop in ((0, n + 1), (-1, 3), (5, 4)):
        with pytest.raises(InvalidInputError, match=f"has {n:,} committed rows"):
            store.read(RESID, start, stop)
        with pytest.raises(InvalidInputError, match="committed rows"):
            store.rows(start, stop)
    for rows in ([n], [-1], [0, n]):
        with pytest.raises(InvalidInputError, match="committed rows"):
            store.read_rows(RESID, np.array(rows))
    with pytest.raises(UnknownNameError, match="Did you mean"):
        store.read("blocks.1.hook_resid_pos", 0, 1)


def test_opening_something_else(tmp_path: Path, store: ActivationStore) -> None:
    with pytest.raises(UnknownNameError, match=r"Did you mean .*s\.zarr"):
        ActivationStore.open(tmp_path / "s.zar")
    manifest = json.loads((store.path / "manifest.json").read_text())
    for changes, error, match in (
        ({"version": 99}, InvalidInputError, "version 99"),
        ({"format": "sae"}, InvalidInputError, "format 'sae'"),
    ):
        (store.path / "manifest.json").write_text(json.dumps({**manifest, **changes}))
        with pytest.raises(error, match=match):
            ActivationStore.open(store.path)


def test_opening_and_reading_write_nothing(store: ActivationStore) -> None:
    stamps = {path: path.stat().st_mtime_ns for path in store.path.rglob("*")}
    again = ActivationStore.open(store.path)
    again.read(RESID, 0, 100)
    again.verify()
    again.info()
    assert {path: path.stat().st_mtime_ns for path in store.path.rglob("*")} == stamps


# ---- rot

Damage = Callable[[Path], None]


def flip(at: int) -> Damage:
    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[at] ^= 4
        path.write_bytes(content)

    return damage


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def swap(path: Path) -> None:
    other = path.with_name(path.name.replace("c.2", "c.3").replace("00000002", "00000003"))
    a, b = path.read_bytes(), other.read_bytes()
    path.write_bytes(b)
    other.write_bytes(a)


DAMAGES = {"changed": flip(30), "truncated": truncate, "missing": Path.unlink, "swapped": swap}


@pytest.mark.parametrize("problem", DAMAGES)
@pytest.mark.parametrize(
    ("array", "name"),
    [
        (f"hooks/{RESID}", "c.2.0"),
        (f"hooks/{Z}", "c.2.0.0"),
        (f"tokens/norm/{Z}", "c.2"),
        ("tokens/flags", "c.2"),
        ("documents", "00000002.parquet"),
    ],
)
def test_rot_is_named_by_verify_and_refused_by_reads(
    store: ActivationStore, array: str, name: str, problem: str
) -> None:
    path = store.path / array / name
    lengths = (
        {path.stat().st_size, path.with_name(name.replace("2", "3", 1)).stat().st_size} if problem == "swapped" else {0}
    )
    DAMAGES[problem](path)
    faults = store.verify()
    affected = 2 if problem == "swapped" else 1
    assert len(faults) == affected
    fault = faults[0]
    assert fault.hook == array.removeprefix("hooks/")
    assert fault.object == f"{array}/{name}"
    if problem != "swapped" or len(lengths) == 1:
        assert fault.problem.startswith(problem)
    assert 128 <= fault.row_start < fault.row_stop <= 192
    if array.startswith("hooks/") and problem == "changed":
        assert (fault.row_start, fault.row_stop) == (128, 144), "the inner chunk that was hit"

    reads: dict[str, Callable[[ActivationStore], object]] = {
        f"hooks/{RESID}": lambda s: s.read(RESID, 130, 131),
        f"hooks/{Z}": lambda s: s.read_rows(Z, np.array([3, 140, 200])),
        f"tokens/norm/{Z}": lambda s: s.norms(Z, 0, s.n_rows),
        "tokens/flags": lambda s: s.rows(190, 191),
        "documents": lambda s: s.documents(),
    }
    with pytest.raises(IntegrityError) as caught:
        reads[array](ActivationStore.open(store.path))
    assert f"{array}/{name}" in str(caught.value)
    assert "rows" in str(caught.value)
    # What is sound is still read.
    sound = RESID if array != f"hooks/{RESID}" else Z
    store.read(sound, 0, store.n_rows)


def test_shards_of_two_hooks_swapped(original: Path, tmp_path: Path) -> None:
    text = TextSource(write_text(tmp_path / "text.jsonl"))
    hooks = [RESID, "blocks.0.hook_resid_post"]
    store = capture(FakeModel(), text, hooks, tmp_path / "s.zarr", context_size=16, rows_per_group=64).store
    a, b = (store.path / "hooks" / hook / "c.1.0" for hook in hooks)
    content = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(content)
    assert [fault.hook for fault in store.verify()] == sorted(hooks)
    assert all("swapped: holds the bytes of hooks/" in fault.problem for fault in store.verify())
    for hook in hooks:
        with pytest.raises(IntegrityError):
            store.read(hook, 64, 65)


def test_damaged_metadata(store: ActivationStore) -> None:
    (store.path / "hooks" / Z / "zarr.json").unlink()
    path = store.path / "tokens" / "zarr.json"
    path.write_bytes(path.read_bytes() + b" ")
    layout = store.layout.norm
    (store.path / "tokens" / "norm" / Z / "zarr.json").write_bytes(layout.metadata(store.n_rows + 1))
    manifest = json.loads((store.path / "manifest.json").read_text())
    manifest["max_tokens"] = 3
    (store.path / "manifest.json").write_text(json.dumps(manifest))
    faults = {fault.object for fault in ActivationStore.open(store.path).verify()}
    assert faults == {
        "manifest.json",
        f"hooks/{Z}/zarr.json",
        "tokens/zarr.json",
        f"tokens/norm/{Z}/zarr.json",
    }


def test_verify_reports_progress(store: ActivationStore) -> None:
    seen: list[tuple[int, int | None]] = []
    store.verify(lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] > 0


# ---- what a store shows of itself


def test_info_is_json_and_right(store: ActivationStore) -> None:
    info = json.loads(json.dumps(store.info()))
    assert (info["rows"], info["complete"], info["id"]) == (store.n_rows, True, store.id)
    assert info["hooks"][Z]["shape"] == [3, 5]
    n_bos = int(((store.rows(0, store.n_rows).flags & RowFlag.BOS) > 0).sum())
    norms = info["hooks"][RESID]["norms"]
    assert norms["rows"] == store.n_rows - n_bos
    assert (norms["above_10x"], norms["above_100x"]) == (0, 0)
    assert sum(group["tokens"] for group in info["by_language"].values()) == store.n_rows - n_bos
    assert set(info["by_language"]) == {"en", "de"}
    on_disk = sum(p.stat().st_size for p in store.path.rglob("*") if "c." in p.name or p.suffix == ".parquet")
    assert info["bytes"] == on_disk


def test_outlier_norms_are_counted(tmp_path: Path) -> None:
    class Sinking(FakeModel):
        def rows_at(self, hook: str, window: np.ndarray) -> np.ndarray:
            rows = np.ones((len(window), 12), np.float32)
            rows[np.arange(len(window)) % 5 == 1] *= 50
            rows[0] *= 1000  # BOS
            return rows

    text = TextSource(write_text(tmp_path / "text.jsonl"))
    store = capture(Sinking(), text, [RESID], tmp_path / "s.zarr", context_size=16).store
    norms = store.info()["hooks"][RESID]["norms"]
    position = store.rows(0, store.n_rows).position
    assert norms["median"] == pytest.approx(12**0.5)
    assert (norms["above_10x"], norms["above_100x"]) == (int((position % 5 == 1).sum()), 0)


def test_the_table_in_a_notebook_escapes_names(tmp_path: Path) -> None:
    text = TextSource(write_text(tmp_path / "<b>.jsonl"))
    model = FakeModel("<script>alert(1)</script>", hooks={"<i>hook": (12,)})
    store = capture(model, text, ["<i>hook"], tmp_path / "<u>.zarr", context_size=16).store
    html = store._repr_html_()
    for raw in ("<script", "<b>.", "<i>", "<u>."):
        assert raw not in html
    assert "&lt;script&gt;" in html
    assert f"{store.n_rows:,} rows" in repr(store)
