"""The command line on stores that grow, lose hooks and are exported."""

import json
from pathlib import Path
from typing import Any

import helpers_models
import pytest
from helpers_activations import tree
from typer.testing import CliRunner

from activations.store import ActivationStore
from scope.cli import app

HOOK, OTHER = "blocks.1.hook_resid_post", "blocks.0.hook_mlp_out"


def scope(*arguments: object, code: int = 0) -> Any:
    """Run a command in this process; returns the JSON of its last line, or what it said on standard error."""
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return json.loads(result.stdout.splitlines()[-1]) if code == 0 else result.stderr


def text(path: Path, word: str) -> Path:
    rows = [{"text": f"the {word} fox jumps over the lazy dog. " * (1 + n), "title": f"{word} {n}"} for n in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "s.zarr"
    scope(
        *("capture", "--model", helpers_models.tiny_folder("llama"), "--data", text(tmp_path / "a.jsonl", "quick")),
        *("--hook", HOOK, "--out", path, "--context-size", 16, "--rows-per-group", 64, "--max-tokens", 100),
    )
    return path


def test_a_store_grows_shrinks_and_is_exported(store: Path, tmp_path: Path) -> None:
    fingerprint = ActivationStore.open(store).fingerprint
    added = scope("capture", "--into", store, "--hook", OTHER)
    assert (added["hooks"], added["rows"], added["new_rows"]) == ([OTHER, HOOK], 100, 100)
    more = text(tmp_path / "b.jsonl", "slow")
    grown = scope("capture", "--into", store, "--append", "--data", more, "--max-tokens", 70)
    assert (grown["rows"], grown["new_rows"]) == (170, 140)
    assert scope("capture", "--out", store, "--append", "--data", more, "--max-tokens", 70)["new_rows"] == 0
    dropped = scope("store", "drop", store, "--hook", HOOK)
    assert (dropped["dropped"], dropped["hooks"]) == ([HOOK], [OTHER])
    assert dropped["bytes_freed"] > 170 * 64
    assert scope("verify", store)["faults"] == []
    facts = scope("info", store)
    assert facts["complete"]
    assert facts["fingerprint"] == fingerprint
    assert facts["appended"][0]["text"]["files"] == ["b.jsonl"]
    exported = scope("export", store, "--format", "npy", "--out", tmp_path / "out")
    assert exported["rows"] == 170
    assert json.loads((tmp_path / "out" / "export.json").read_text())["store"]["fingerprint"] == fingerprint


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--hook", OTHER], "either --out"),
        (["--out", "S", "--into", "S", "--hook", OTHER], "either --out"),
        (["--into", "S", "--append", "--hook", OTHER], "give it with --data"),
        (["--into", "S", "--data", "D", "--hook", OTHER], "give --append"),
        (["--into", "S"], "at least one --hook"),
        (["--into", "S", "--hook", "blocks.0.hook_mlp_oot"], OTHER),
        (["--into", "S", "--hook", OTHER, "--context-size", "8"], "context_size is 8, the store has 16"),
        (["--into", "S", "--append", "--data", "D", "--hook", OTHER], f"holds {HOOK} as well"),
        (["--out", "N", "--hook", OTHER, "--data", "D"], "Give --model"),
        (["--out", "N", "--hook", OTHER, "--model", "M"], "Give --data"),
        (["--into", "N", "--hook", OTHER], "no activation-store"),
    ],
)
def test_wrong_use_of_capture_writes_nothing(store: Path, tmp_path: Path, arguments: list[str], words: str) -> None:
    before = tree(store)
    stands_for = {"S": store, "D": text(tmp_path / "b.jsonl", "slow"), "N": tmp_path / "n.zarr"}
    assert words in scope("capture", *(stands_for.get(part, part) for part in arguments), code=2)
    assert tree(store) == before
    assert not (tmp_path / "n.zarr").exists()


def test_another_model_is_refused(store: Path) -> None:
    before = tree(store)
    other = helpers_models.tiny_folder("gemma3")
    assert "weight_hash is" in scope("capture", "--into", store, "--model", other, "--hook", OTHER, code=2)
    assert tree(store) == before


def test_wrong_use_of_drop_and_export_writes_nothing(store: Path, tmp_path: Path) -> None:
    before = tree(store)
    assert "one must stay" in scope("store", "drop", store, "--hook", HOOK, code=2)
    assert HOOK in scope("store", "drop", store, "--hook", HOOK[:-1], code=2)
    out = ("--out", tmp_path / "out")
    assert "Did you mean npy" in scope("export", store, "--format", "npz", *out, code=2)
    assert HOOK in scope("export", store, "--format", "npy", "--hook", HOOK[:-1], *out, code=2)
    assert "no bfloat16" in scope("export", store, "--format", "hf-dataset", "--dtype", "bfloat16", *out, code=2)
    assert tree(store) == before
    assert not (tmp_path / "out").exists()
