"""The transcoders of all MLPs from one pass, and what they are worth together, against models edited by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_models import one_thread, tiny_folder, tiny_model  # noqa: F401  # a fixture
from test_cli import scope

from activations.text import TextSource
from scope.errors import InvalidInputError
from scope.interventions import splice_edits
from scope.saes.formats import load
from scope.training import TrainConfig
from scope.training.by_layer import one_for_each_layer
from scope.training.evaluate import held_out_windows
from scope.training.transcoder_set import evaluate_transcoders

pytestmark = pytest.mark.usefixtures("one_thread")
READS, WRITES = "blocks.*.ln2.hook_out", "blocks.*.hook_mlp_out"
SIZES = ("--arch", "transcoder", "--activation", "topk", "--d-sae", 48, "--k", 6, "--lr", "3e-3", "--max-norm-ratio", 0)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    words = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "while", "old", "mills", "burn", "down"]
    generator = np.random.default_rng(0)
    with open(path, "w") as file:
        for number in range(60):
            drawn = " ".join(generator.choice(words, 40))
            file.write(json.dumps({"text": drawn, "title": f"page-{number}"}) + "\n")
    return path


def trained_set(text: Path, out: Path) -> dict:
    return scope(
        *("train", "--model", tiny_folder("gemma3"), "--data", text, "--hook", READS, "--hook-out", WRITES, *SIZES),
        *("--tokens", 6400, "--batch-size", 128, "--context-size", 32, "--evaluate-tokens", 200),
        *("--out", out, "--json"),
    )


@pytest.fixture(scope="module")
def trained(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("set") / "all"
    return out, trained_set(text, out)


def test_one_command_trains_a_transcoder_for_each_layer(trained: tuple[Path, dict], text: Path) -> None:
    out, found = trained
    assert [Path(run["sae"]).name for run in found["runs"]] == [f"layer_{i:02d}" for i in range(4)]
    for layer in range(4):
        sae = load(out / f"layer_{layer:02d}")
        assert sae.cfg.ports.inputs[0].hook == f"blocks.{layer}.ln2.hook_out"
        assert sae.cfg.ports.outputs[0].hook == f"blocks.{layer}.hook_mlp_out"
        assert json.loads((out / f"layer_{layer:02d}" / "evaluation.json").read_text())["fvu"] < 0.9
    card = json.loads((out / "card.json").read_text())
    assert [row["layer"] for row in card["layers"]] == [0, 1, 2, 3]
    assert card["replacement"]["kl"] < card["mean_replacement"]["kl"]
    readme = (out / "README.md").read_text()
    assert f"{card['replacement']['kl']:.3f}" in readme
    # The same call finds everything done.
    again = trained_set(text, out)
    assert [run["id"] for run in again["runs"]] == [run["id"] for run in found["runs"]]


def test_each_is_as_if_trained_alone(trained: tuple[Path, dict], text: Path, tmp_path: Path) -> None:
    out, _ = trained
    hooks = ("--hook", READS.replace("*", "2"), "--hook-out", WRITES.replace("*", "2"))
    scope(
        *("train", "--model", tiny_folder("gemma3"), "--data", text, *hooks, *SIZES, "--tokens", 6400),
        *("--batch-size", 128, "--context-size", 32, "--evaluate-tokens", 0, "--out", tmp_path / "one", "--json"),
    )
    torch.testing.assert_close(load(tmp_path / "one").W_dec, load(out / "layer_02").W_dec, rtol=1e-4, atol=1e-5)


def test_the_replacement_model_is_the_model_edited_by_hand(trained: tuple[Path, dict], text: Path) -> None:
    out, _ = trained
    model = tiny_model("gemma3")
    saes = [load(out / f"layer_{layer:02d}") for layer in range(4)]
    source = model.source(TextSource([text]), [READS, WRITES], context_size=32)
    found = evaluate_transcoders(saes, source, model, tokens=150)
    windows, _ = held_out_windows(source, 150, 0)
    kl, agreed, loss, plain_loss, n = 0.0, 0, 0.0, 0.0, 0
    edits = {hook: edit for sae in saes for hook, edit in splice_edits(sae, keep_bos=True).items()}
    for window in windows:
        ids = torch.from_numpy(window.astype(np.int64))
        plain = model.run(ids).logits[:-1].log_softmax(-1)
        changed = model.run(ids, edits=edits).logits[:-1].log_softmax(-1)
        kl += float((plain.exp() * (plain - changed)).sum())
        agreed += int((plain.argmax(-1) == changed.argmax(-1)).sum())
        loss -= float(changed.gather(1, ids[1:, None]).sum())
        plain_loss -= float(plain.gather(1, ids[1:, None]).sum())
        n += len(ids) - 1
    assert found.n_tokens == n
    assert found.spliced.kl == pytest.approx(kl / n, rel=1e-3)
    assert found.spliced.top1_agreement == pytest.approx(agreed / n, abs=2 / n)
    assert found.spliced.delta_ce == pytest.approx((loss - plain_loss) / n, rel=1e-2, abs=1e-4)
    assert found.ce == pytest.approx(plain_loss / n, rel=1e-4)
    assert found.spliced.kl_interval[0] <= found.spliced.kl <= found.spliced.kl_interval[1]


def test_of_a_text_as_many_tokens_are_measured_as_asked_for(
    trained: tuple[Path, dict], text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sae = tiny_model("gemma3"), load(trained[0] / "layer_00")
    source = model.source(TextSource([text]), [READS.replace("*", "0"), WRITES.replace("*", "0")], context_size=32)
    monkeypatch.setattr("scope.training.evaluate.LIVE_ROWS", 16)
    found = evaluate_transcoders([sae], source, model, tokens=150)
    assert found.n_tokens >= 140  # the first token of a window is not predicted
    assert 140 <= found.layers[0].n_rows <= 150  # BOS is left out
    monkeypatch.setattr("scope.training.evaluate.LIVE_BYTES", 40 * source.row_bytes)
    assert found.layers[0].n_rows > evaluate_transcoders([sae], source, model, tokens=150).layers[0].n_rows > 30


def test_scope_evaluate_measures_a_set_and_says_what_is_none(
    trained: tuple[Path, dict], text: Path, tmp_path: Path
) -> None:
    out, found = trained
    common = ("--model", tiny_folder("gemma3"), "--data", text, "--context-size", 32, "--no-save", "--json")
    measured = scope("evaluate", "--transcoders", out, "--tokens", 200, *common)
    assert measured["replacement"]["kl"] == pytest.approx(found["replacement"]["kl"], rel=1e-3)
    assert "holds no transcoders" in scope("evaluate", "--transcoders", tmp_path, *common, code=2)["error"]["message"]
    assert "--transcoders FOLDER" in scope("evaluate", *common, code=2)["error"]["message"]
    with pytest.raises(InvalidInputError, match="one by one"):
        one_for_each_layer(TrainConfig(arch="transcoder", d_sae=8, k=2), ["blocks.0.ln2.hook_out"], [])
    sae = load(out / "layer_00")
    source = tiny_model("gemma3").source(TextSource([text]), sae.hook_name, context_size=32)
    with pytest.raises(InvalidInputError, match="Two transcoders"):
        evaluate_transcoders([sae, sae], source, tiny_model("gemma3"))


def test_the_line_runs_on_to_a_verified_graph(trained: tuple[Path, dict], tmp_path: Path) -> None:
    out, _ = trained
    graph = tmp_path / "graph.json"
    prompt = "the quick brown fox jumps"
    scope("graph", "--model", tiny_folder("gemma3"), "--transcoders", out, "--prompt", prompt, "--out", graph, "--json")
    checked = scope("graph", "verify", graph, "--json")
    assert checked["attention_frozen"]["n"] > 0
    curve = scope("graph", "faithfulness", graph, "--sizes", "1,5", "--draws", 2, "--json")
    assert {row["nodes"] for row in curve["curve"]} == {"graph", "random", "all"}
    told = scope("graph", "faithfulness", graph, "--sizes", "1,x", "--json", code=2)["error"]["message"]
    assert "separated by commas" in told
