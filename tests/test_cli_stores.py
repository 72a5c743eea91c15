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
    assert (grown["rows"], grown["new_rows"]) == (170, 70)
    assert scope("capture", "--out", store, "--append", "--data", more, "--max-tokens", 70)["new_rows"] == 0
    dropped = scope("store", "drop", store, "--hook", HOOK)
    assert (dropped["dropped"], dropped["hooks"]) == ([HOOK], [OTHER])
    assert dropped["bytes_freed"] > 170 * 64
    every = scope("capture", "--into", store, "--hook", "blocks.*.hook_resid_post")
    assert [hook for hook in every["hooks"] if hook != OTHER] == [f"blocks.{n}.hook_resid_post" for n in range(3)]
    scope("export", store, "--format", "npy", "--hook", "blocks.*.hook_resid_post", "--out", tmp_path / "some")
    assert len(list((tmp_path / "some" / "data").glob("blocks.*.hook_resid_post"))) == 3
    assert scope("store", "drop", store, "--hook", "blocks.*.hook_resid_post")["hooks"] == [OTHER]
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


# ---- rows chosen at capture


def capture_chosen(tmp_path: Path, *options: object, data: Path | None = None, code: int = 0) -> Any:
    return scope(
        *("capture", "--model", helpers_models.tiny_folder("llama"), "--hook", HOOK, "--context-size", 16),
        *("--data", data or text(tmp_path / "a.jsonl", "quick"), "--out", tmp_path / "chosen.zarr"),
        *("--rows-per-group", 64, *options),
        code=code,
    )


def test_tokens_are_chosen_by_flags(tmp_path: Path) -> None:
    model = helpers_models.tiny_model("llama")
    capture_chosen(tmp_path, "--token-pattern", "o", "--skip-special", "--every", 1)
    store = ActivationStore.open(tmp_path / "chosen.zarr")
    rows = store.rows(0, store.n_rows)
    assert store.n_rows > 20
    assert all("o" in token for token in model.token_texts(rows.token_id.tolist()))
    for row in (0, store.n_rows - 1):
        (window,) = store.window_tokens([rows.sequence[row]])
        assert window[rows.position[row]] == rows.token_id[row]
        assert window[0] == model.bos_token_id
    # More hooks and more text take the selection from the store.
    scope("capture", "--into", store.path, "--hook", OTHER)
    grown = scope("capture", "--into", store.path, "--append", "--data", text(tmp_path / "b.jsonl", "cold"))
    assert grown["rows"] > store.n_rows
    store.refresh()
    assert all("o" in token for token in model.token_texts(store.rows(0, store.n_rows).token_id.tolist()))
    assert scope("verify", store.path)["faults"] == []
    assert scope("info", store.path)["selection"]["pattern"] == "o"


def test_the_assistants_turns_of_chats(tmp_path: Path) -> None:
    chats = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat on the mat"}]
    chats.write_text("".join(json.dumps({"messages": turns, "title": f"c{n}"}) + "\n" for n in range(4)))
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}")
    options = ("--messages-column", "messages", "--roles", "assistant")
    assert "no chat template" in capture_chosen(tmp_path, *options, data=chats, code=2)
    report = capture_chosen(tmp_path, *options, "--chat-template", template, data=chats)
    store = ActivationStore.open(report["store"])
    model = helpers_models.tiny_model("llama")
    said = "".join(model.token_texts(store.rows(0, store.n_rows).token_id.tolist()))
    assert said.replace(" ", "") == "satonthemat" * 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--every", 0), "every is 0"),
        (("--every-in", "windo"), "Did you mean window"),
        (("--token-pattern", "("), "no regular expression"),
        (("--token-pattern", "qqq"), "No token of a.jsonl is chosen"),
        (("--roles", "assistant"), "the text is no chats"),
        (("--roles", "asistant"), "Did you mean assistant"),
        (("--messages-column", "messages"), "no text column 'messages'"),
        (("--chat-template", "nowhere.jinja"), "nowhere.jinja cannot be read"),
    ],
)
def test_wrong_choices_write_nothing(tmp_path: Path, options: tuple[object, ...], words: str) -> None:
    assert words in capture_chosen(tmp_path, *options, code=2)
    assert not (tmp_path / "chosen.zarr").exists()


def test_an_index_over_chosen_rows_shows_where_they_stand(tmp_path: Path) -> None:
    """Contexts are made of the rows there are; places in window and document are the true ones."""
    from scope.features.index import FeatureIndex

    capture_chosen(tmp_path, "--every", 3)
    store, sae, index = (tmp_path / name for name in ("chosen.zarr", "sae", "features.index"))
    scope(
        *("train", store, "--hook", HOOK, "--d-sae", 16, "--k", 4, "--tokens", 128, "--batch-size", 32),
        *("--out", sae, "--evaluate-tokens", 50),
    )
    assert scope("index", store, sae, "--out", index)["n_firings"] > 0
    assert scope("verify", index)["faults"] == []
    opened, rows = FeatureIndex.open(index), ActivationStore.open(store)
    model = helpers_models.tiny_model("llama")
    sequences = rows.sequences()
    shown = [example for feature in range(16) for example in opened.top_examples(feature, n=4)]
    assert len(shown) > 10
    for example in shown:
        sequence = int(rows.rows(example.row, example.row + 1).sequence[0])
        (window,) = rows.window_tokens([sequence])
        offset = int(sequences["document_offset"][sequence])
        assert example.document_position == offset + example.position - 1
        assert example.document_position % 3 == offset % 3
        assert example.token == model.vocabulary_strings([int(window[example.position])])[0]
        first = example.row - example.centre
        assert first >= int(sequences["start_row"][sequence])
        assert first + len(example.tokens) <= int(sequences["start_row"][sequence] + sequences["n_rows"][sequence])
