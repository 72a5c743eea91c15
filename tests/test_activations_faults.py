"""Rot of every kind in every kind of file: `scope verify` names it, and reading raises or gives what was written."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_activations import FakeModel, write_text
from typer.testing import CliRunner

from activations import arrays, ledger
from activations.capture import capture
from activations.errors import ActivationsError, IntegrityError
from activations.layout import PLAN
from activations.shuffle import ShuffledBatches
from activations.store import ActivationStore
from activations.text import TextSource
from activations.writer import hooks_capture_id
from scope.cli import app

RESID, Z = "blocks.1.hook_resid_post", "blocks.1.attn.hook_z"
ROWS = 32
CAPTURE = hooks_capture_id([RESID, Z])
KINDS = {
    "shard": f"hooks/{RESID}/c.2.0",
    "shard of two dimensions": f"hooks/{Z}/c.5.0.0",
    "norms": f"tokens/norm/{Z}/c.2",
    "token ids": "tokens/token_id/c.2",
    "flags": "tokens/flags/c.2",
    "sequences": "sequences/00000002.parquet",
    "documents": "documents/00000002.parquet",
    "record": f"ledger/{CAPTURE}/00000009.json",
    "record of the plan": f"ledger/{PLAN}/00000009.json",
    "segment": f"ledger/{CAPTURE}/segment-000001.jsonl",
    "segment of the plan": f"ledger/{PLAN}/segment-000000.jsonl",
    "declaration": f"ledger/{CAPTURE}/capture.json",
    "declaration of the plan": f"ledger/{PLAN}/capture.json",
    "manifest": "manifest.json",
    "array metadata": f"hooks/{RESID}/zarr.json",
    "group metadata": "tokens/zarr.json",
}
"""One file of each kind; there are 11 row groups, and records fold by four."""
UNREAD = {"array metadata", "group metadata"}
"""What only other tools go by; our own reads stay right without."""
ALIKE = {"group metadata", "declaration"}
"""The same in any two stores of these hooks."""
FLIPS = 12
"""Places of a file that are flipped, one after the other."""


@pytest.fixture(scope="module", autouse=True)
def _small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        patch.setattr(arrays, "CHUNK_BYTES", 16 * 24)
        patch.setattr(ledger, "RECORDS_PER_SEGMENT", 4)
        yield


def make(folder: Path, seed: int = 0, **settings: Any) -> Path:
    folder.mkdir(parents=True)
    text = TextSource(write_text(folder / "text.jsonl", seed=seed))
    settings = {"context_size": 16, "rows_per_group": ROWS, "batch_size": 64, "max_tokens": 340, **settings}
    return capture(FakeModel(), text, [RESID, Z], folder / "s.zarr", **settings).store.path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("faults") / "whole")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another store whose files have the same names."""
    return make(tmp_path_factory.mktemp("faults") / "foreign", seed=1, dtype="float16")


@pytest.fixture(scope="module")
def truth(whole: Path) -> dict[str, np.ndarray]:
    return {name: read(0, 340) for name, read in reads(ActivationStore.open(whole)).items()}


@pytest.fixture
def store_path(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "s.zarr")
    return tmp_path / "s.zarr"


def reads(store: ActivationStore) -> dict[str, Callable[[int, int], np.ndarray]]:
    """Every way to read some rows; the tables are read whole."""
    return {
        "activations": lambda start, stop: store.read(RESID, start, stop),
        "scattered rows": lambda start, stop: store.read_rows(Z, np.arange(start, stop)),
        "norms": lambda start, stop: store.norms(Z, start, stop),
        "token ids": lambda start, stop: store.rows(start, stop).token_id,
        "flags": lambda start, stop: store.flags(start, stop),
        "sequences": lambda start, stop: store.sequences().to_numpy(),
        "documents": lambda start, stop: store.documents().to_numpy(),
    }


def damaged_reads(path: Path, truth: dict[str, np.ndarray]) -> list[str]:
    """What cannot be read any more; whatever is given is what was written."""
    try:
        store = ActivationStore.open(path)
    except ActivationsError as error:
        return [str(error)]
    problems = []
    for name, read in reads(store).items():
        step = 340 if name in ("sequences", "documents") else 20
        for start in range(0, 340, step):
            try:
                found = read(start, start + step)
            except IntegrityError as error:
                problems.append(str(error))
            else:
                expected = truth[name] if step == 340 else truth[name][start : start + step]
                np.testing.assert_array_equal(found, expected, err_msg=name)
    return problems


def verify(path: Path) -> str:
    """What `scope verify` says, which has to be that something is wrong."""
    result = CliRunner().invoke(app, ["verify", str(path)], catch_exceptions=False)
    assert result.exit_code != 0
    return result.output


def check(path: Path, kind: str, truth: dict[str, np.ndarray], names: list[str] | None = None) -> None:
    said = verify(path)
    assert any(name in said for name in names or [KINDS[kind]]), said
    if Path(KINDS[kind]).name.startswith("c."):
        array, group = KINDS[kind].removeprefix("hooks/").rpartition("/")[0], int(KINDS[kind].split("c.")[1][0])
        rows = said.split(f"({array}, rows ")[1].split(")")[0].split(" to ")
        assert group * ROWS <= int(rows[0]) < int(rows[1]) <= (group + 1) * ROWS
    assert bool(damaged_reads(path, truth)) == (kind not in UNREAD)


def test_a_whole_store_is_read(whole: Path, truth: dict[str, np.ndarray]) -> None:
    assert damaged_reads(whole, truth) == []
    assert all((whole / name).is_file() for name in KINDS.values())
    assert CliRunner().invoke(app, ["verify", str(whole)]).exit_code == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit(kind: str, store_path: Path, truth: dict[str, np.ndarray]) -> None:
    path = store_path / KINDS[kind]
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    for place in np.linspace(0, len(good) - 1, FLIPS).astype(int):
        rotten = bytearray(good)
        rotten[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(rotten)
        said = verify(store_path)
        # A manifest whose format or version changed is refused by these, before it is known to be damaged.
        assert KINDS[kind] in said or (kind == "manifest" and str(store_path) in said), said
    rotten = bytearray(good)
    rotten[len(good) // 3] ^= 1
    path.write_bytes(rotten)
    check(store_path, kind, truth)


@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_file(kind: str, store_path: Path, truth: dict[str, np.ndarray]) -> None:
    path = store_path / KINDS[kind]
    good = path.read_bytes()
    for size in (len(good) - 2, len(good) // 2, 0):
        path.write_bytes(good[:size])
        check(store_path, kind, truth)


@pytest.mark.parametrize("kind", KINDS)
def test_a_deleted_file(kind: str, store_path: Path, truth: dict[str, np.ndarray]) -> None:
    (store_path / KINDS[kind]).unlink()
    check(store_path, kind, truth)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ALIKE])
def test_a_file_of_another_store(kind: str, store_path: Path, foreign: Path, truth: dict[str, np.ndarray]) -> None:
    """Sound by itself, of the same name and, mostly, of the same size."""
    content = (foreign / KINDS[kind]).read_bytes()
    assert content != (store_path / KINDS[kind]).read_bytes()
    (store_path / KINDS[kind]).write_bytes(content)
    if "record" in kind or "segment" in kind:  # then it is the objects that are not those of the record
        check(store_path, kind, truth, [f"hooks/{RESID}/c.9.0", f"hooks/{RESID}/c.4.0", "tokens/token_id/c"])
        return
    check(store_path, kind, truth, [KINDS[kind], "manifest.json"] if "declaration" in kind else None)


@pytest.mark.parametrize("kind", KINDS)
def test_two_files_swapped(kind: str, store_path: Path, truth: dict[str, np.ndarray]) -> None:
    path = store_path / KINDS[kind]
    others = {
        **dict.fromkeys(("shard", "norms", "token ids", "flags"), path.with_name(path.name.replace("c.2", "c.3"))),
        "shard of two dimensions": path.with_name("c.6.0.0"),
        **dict.fromkeys(("sequences", "documents"), path.with_name("00000003.parquet")),
        **dict.fromkeys(("record", "record of the plan"), path.with_name("00000010.json")),
        "segment": path.with_name("segment-000000.jsonl"),
        "segment of the plan": store_path / KINDS["segment"],
        "declaration": store_path / KINDS["declaration of the plan"],
        "declaration of the plan": store_path / KINDS["declaration"],
        "manifest": store_path / KINDS["declaration"],
        "array metadata": store_path / f"hooks/{Z}/zarr.json",
        "group metadata": store_path / KINDS["array metadata"],
    }
    other = others[kind]
    a, b = path.read_bytes(), other.read_bytes()
    assert a != b
    path.write_bytes(b)
    other.write_bytes(a)
    said = verify(store_path)
    assert KINDS[kind] in said or str(other.relative_to(store_path)) in said
    assert bool(damaged_reads(store_path, truth)) == (kind not in UNREAD)


def test_a_lost_record_is_told_from_rows_that_never_were(store_path: Path, truth: dict[str, np.ndarray]) -> None:
    (store_path / KINDS["record"]).unlink()
    store = ActivationStore.open(store_path)
    with pytest.raises(IntegrityError, match=r"340 rows of .* were committed once, but a record of them is missing"):
        store.read(RESID, 9 * ROWS, 9 * ROWS + 1)
    with pytest.raises(ActivationsError, match="has 288 committed rows"):
        store.read(RESID, 9 * ROWS, 401)
    with pytest.raises(IntegrityError, match="a record of them is missing"):
        next(store.batches([RESID], 64))
    with pytest.raises(IntegrityError, match="a record of them is missing"):
        ShuffledBatches(store, RESID, 64, seed=0)
    (fault,) = store.verify()
    assert (fault.row_start, fault.row_stop) == (9 * ROWS, 340)
    text = TextSource(store_path.parent / "text.jsonl")
    write_text(store_path.parent / "text.jsonl")
    capture(FakeModel(), text, [RESID, Z], store_path, context_size=16, max_tokens=340)
    assert damaged_reads(store_path, truth) == []
    assert ActivationStore.open(store_path).verify() == []


def test_a_manifest_of_another_version_is_refused_as_such(store_path: Path) -> None:
    manifest = json.loads((store_path / "manifest.json").read_text())
    (store_path / "manifest.json").write_text(json.dumps({**manifest, "version": 9}))
    result = CliRunner().invoke(app, ["verify", str(store_path)])
    assert result.exit_code == 2
    assert "version 9" in result.output
