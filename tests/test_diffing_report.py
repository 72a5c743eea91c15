"""`scope diff` and `scope quantisation` on tiny models: what was changed by hand is what the report says changed."""

import json
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_models import one_thread, tiny_folder, tiny_model  # noqa: F401  # a fixture
from safetensors.torch import load_file, save_file
from test_cli import scope

from activations.text import TextSource
from scope.diffing import ComparisonConfig, DiffReport, ModelPair, diff_models, layer_changes, report
from scope.diffing.summary import conclusions_table, summary_of
from scope.errors import OccupiedError
from scope.models import LanguageModel
from scope.models.live import LiveActivations
from scope.saes import formats
from scope.saes.base import SAEMetadata
from scope.saes.topk import TopKConfig, TopKSAE
from scope.workspace import Workspace

pytestmark = pytest.mark.usefixtures("one_thread")
HOOK = "blocks.2.hook_resid_post"
CHANGED_LAYER = 2
SIZES = ("--tokens", 3000, "--context-size", 32, "--layer-tokens", 600, "--document-tokens", 60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of two sources, an SAE, and two copies of the tiny model: as it is, and with another MLP in layer 2."""
    folder = tmp_path_factory.mktemp("diff")
    with open(folder / "text.jsonl", "w") as file:
        for number in range(80):
            words = ["the cat sat on the mat. ", "the river is deep, nobody knows why. "][number % 2]
            row = {
                "text": words * (2 + number % 3),
                "title": f"page-{number}",
                "source": ["cats", "rivers"][number % 2],
            }
            file.write(json.dumps(row) + "\n")
    shutil.copytree(tiny_folder("gemma3"), folder / "same")
    shutil.copytree(tiny_folder("gemma3"), folder / "tuned")
    weights = load_file(folder / "tuned" / "model.safetensors")
    name = next(name for name in weights if f"layers.{CHANGED_LAYER}.mlp.down_proj" in name)
    noise = torch.randn(weights[name].shape, generator=torch.Generator().manual_seed(3))
    weights[name] += noise * weights[name].std()
    save_file(weights, folder / "tuned" / "model.safetensors", metadata={"format": "pt"})
    cfg = TopKConfig(d_in=32, d_sae=64, k=6, metadata=SAEMetadata(hook_name=HOOK))
    formats.save(TopKSAE(cfg, generator=torch.Generator().manual_seed(0)), folder / "sae")
    return folder


def test_a_changed_layer_is_found(folder: Path) -> None:
    workspace = folder / "workspace"
    out = workspace / "diffs" / "tuned"
    command = (
        *("diff", tiny_folder("gemma3"), folder / "tuned", "--data", folder / "text.jsonl", "--sae", folder / "sae"),
        *("--out", out, *SIZES, "--d-sae", 48, "--k", 4, "--train-tokens", 4096, "--batch-size", 256, "--json"),
    )
    found = scope(*command)
    changes = {row["layer"]: row["change"] for row in found["layers"] if row["source"] == "all"}
    assert [changes[layer] for layer in range(CHANGED_LAYER)] == [0.0] * CHANGED_LAYER
    assert all(changes[layer] > 0.01 for layer in range(CHANGED_LAYER, 4))
    assert {row["source"] for row in found["predictions"]} == {"all", "cats", "rivers"}
    assert all(row["kl"] > 0 for row in found["predictions"])
    (sae,) = found["saes"]
    assert sae["changed"] > 0
    assert sae["relative_change"] > 0
    feature, examples = next(iter(sae["examples"].items()))
    strongest = (examples["tuned"] or examples["base"])[0]
    assert strongest["source"] in ("cats", "rivers")
    table = DiffReport.open(out).sae_table(0)
    assert bool(table.set_index("feature").loc[int(feature), "changed"])
    assert found["crosscoder"]["d_sae"] == 48
    assert sum(found["crosscoder"]["places"].values()) == 48
    assert not (out / "captures").exists()
    assert [entry.name for entry in Workspace(workspace).diffs()] == ["tuned"]
    assert Workspace(workspace).find(found["id"]).kind == "model-diff"
    assert "Crosscoder" in DiffReport.open(out).summary()
    assert scope(*command)["id"] == found["id"]
    (folder / "occupied").mkdir()
    (folder / "occupied" / "file").write_text("mine")
    refused = scope(*("diff", folder / "same", folder / "tuned", "--out", folder / "occupied", "--json"), code=2)
    assert refused["error"]["type"] == "OccupiedError"
    assert "model-diff" in scope("verify", out, "--json", code=2)["error"]["message"]
    (out / "report.json").write_text("{")
    assert scope("info", out, "--json", code=1)["error"]["type"] == "IntegrityError"


def test_a_control_says_what_any_tuning_changes(folder: Path, tmp_path: Path) -> None:
    common = ("--data", folder / "text.jsonl", "--sae", folder / "sae", *SIZES, "--d-sae", 0, "--dtype", "float32")
    common = (*common, "--json")
    base, tuned = tiny_folder("gemma3"), folder / "tuned"
    first = scope("diff", base, tuned, "--out", tmp_path / "first", *common)
    assert first["saes"][0]["changed"] > 0
    assert first["saes"][0]["beyond"] is None
    again = scope("diff", base, tuned, "--out", tmp_path / "again", "--control", tmp_path / "first", *common)
    assert again["saes"][0]["changed"] == first["saes"][0]["changed"] == again["saes"][0]["changed_in_control"]
    assert again["saes"][0]["beyond"] == 0
    assert again["control"]["id"] == first["id"]
    assert "0 changed beyond the control" in DiffReport.open(tmp_path / "again").summary()
    scope("diff", base, folder / "same", "--out", tmp_path / "same", *common)
    found = scope("diff", base, tuned, "--out", tmp_path / "found", "--control", tmp_path / "same", *common)
    assert found["saes"][0]["beyond"] == first["saes"][0]["changed"]
    assert set(found["saes"][0]["examples"]) == set(first["saes"][0]["examples"])
    other = (*common[:4], "--tokens", 2000, *common[6:])
    refused = scope(*("diff", base, tuned, "--out", tmp_path / "other", "--control", tmp_path / "same", *other), code=2)
    assert refused["error"]["type"] == "MismatchError"
    assert "text settings" in refused["error"]["message"]
    assert not (tmp_path / "other").exists()
    against_same = ("diff", base, tuned, "--out", tmp_path / "other", "--control", tmp_path / "same")
    refused = scope(*against_same, *common, "--dtype", "bfloat16", code=2)
    assert "another dtype" in refused["error"]["message"]
    (tmp_path / "same" / "sae-0-firings.npz").unlink()
    assert scope(*against_same, *common, code=1)["error"]["type"] == "IntegrityError"
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("kind", ["llama", "gemma3n", "gemma4"])
def test_predictions_are_those_of_the_models(kind: str, folder: Path) -> None:
    """Also where the residual stream is a stack, which the final norm reads the streams of together."""
    model, text = tiny_model(kind), TextSource([folder / "text.jsonl"])
    config = ComparisonConfig(context_size=32, layer_tokens=300)
    found = layer_changes(ModelPair.of(model, model), text, config).predictions.iloc[0]
    source = LiveActivations(model, text, ["hook_embed"], context_size=32, max_tokens=300)
    rows = [(plan.columns["sequence"], plan.columns["token_id"]) for plan in source.plans()]
    sequence, token_id = (np.concatenate(column) for column in zip(*rows, strict=True))
    windows = [token_id[sequence == one] for one in np.unique(sequence)]
    losses = np.concatenate(model.cross_entropy([window for window in windows if len(window) > 1]))
    assert found["n_tokens"] == len(losses)
    assert found["ce_base"] == pytest.approx(losses.mean(), rel=1e-4)


def test_a_run_that_was_killed_before_it_told_of_itself_is_taken_up(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, out = ModelPair(tiny_model("gemma3"), tiny_model("gemma3")), tmp_path / "out"
    text, sae = TextSource([folder / "text.jsonl"]), formats.load(folder / "sae")
    config = ComparisonConfig(tokens=300, context_size=32, layer_tokens=0)
    with monkeypatch.context() as patched:
        patched.setattr(report, "write_manifest", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            diff_models(pair, text, out, config, saes={"sae": sae})
    assert diff_models(pair, text, out, config, saes={"sae": sae}).figures["saes"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OccupiedError, match="is a file"):
        diff_models(pair, text, tmp_path / "file", config, saes={"sae": sae})


def test_a_summary_says_where_no_feature_fires_in_both_models(folder: Path, tmp_path: Path) -> None:
    pair = ModelPair(tiny_model("gemma3"), tiny_model("gemma3"))
    config = ComparisonConfig(tokens=300, context_size=32, layer_tokens=0)
    saes = {"sae": formats.load(folder / "sae")}
    found = diff_models(pair, TextSource([folder / "text.jsonl"]), tmp_path / "out", config, saes=saes)
    (sae,) = found.figures["saes"]
    told = summary_of({**found.figures, "saes": [{**sae, "mean_agreement": 0.0, "mean_decoder_cosine": None}]})
    assert "none fires in both" in told


def test_nothing_is_found_where_nothing_changed(folder: Path, tmp_path: Path) -> None:
    found = scope(
        *("quantisation", tiny_folder("gemma3"), folder / "same", "--data", folder / "text.jsonl"),
        *("--sae", folder / "sae", "--out", tmp_path / "out", *SIZES, "--json"),
    )
    assert all(row["change"] == 0 for row in found["layers"])
    assert all(row["ce_change"] == 0 and row["top1"] == 1 for row in found["predictions"])
    assert all(abs(row["kl"]) < 1e-6 for row in found["predictions"])
    (sae,) = found["saes"]
    assert (sae["changed"], sae["fvu_change"], sae["mean_agreement"]) == (0, 0.0, 1.0)
    assert sae["examples"] == {}
    assert found["crosscoder"] is None
    assert len(found["conclusions"]) == 8
    assert all(one["holds"] for one in found["conclusions"])


def test_a_coarse_quantisation_breaks_conclusions(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder("gemma3"), tmp_path / "coarse")
    weights = load_file(tmp_path / "coarse" / "model.safetensors")
    for name, weight in weights.items():
        if weight.ndim == 2 and "layers" in name:
            step = weight.abs().amax(dim=-1, keepdim=True) / 1.5
            weights[name] = (weight / step).round() * step
    save_file(weights, tmp_path / "coarse" / "model.safetensors", metadata={"format": "pt"})
    found = scope(
        *("quantisation", tiny_folder("gemma3"), tmp_path / "coarse", "--data", folder / "text.jsonl"),
        *("--sae", folder / "sae", "--out", tmp_path / "out", *SIZES, "--json"),
    )
    first = [row["change"] for row in found["layers"] if row["source"] == "all"]
    assert min(first) > 0.05
    held = {one["statement"]: one["holds"] for one in found["conclusions"]}
    assert not held["The likeliest next token is the same"]
    assert not held["sae: features fire on the same rows"]


def test_several_files_are_compared_as_each_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one run of the reference for all of them."""
    base, files = tiny_folder("gemma3"), [folder / "same", folder / "tuned"]
    common = ("--data", folder / "text.jsonl", "--sae", folder / "sae", *SIZES, "--json")
    alone = {file.name: scope("quantisation", base, file, "--out", tmp_path / file.name, *common) for file in files}
    models: list[str] = []
    loaded: list[weakref.ref[LanguageModel]] = []
    runs = LiveActivations.batches
    load = LanguageModel.load

    def watched(*args: object, **more: object) -> LanguageModel:
        assert sum(model() is not None for model in loaded) <= 1  # the reference
        model = load(*args, **more)  # type: ignore[arg-type]
        loaded.append(weakref.ref(model))
        return model

    def counted(self: LiveActivations, *args: object, **more: object) -> object:
        models.append(self.model.name)
        return runs(self, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(LiveActivations, "batches", counted)
    monkeypatch.setattr(LanguageModel, "load", watched)
    out = tmp_path / "all"
    found = scope("quantisation", base, *files, "--out", out, *common)["reports"]
    assert sum(name not in ("same", "tuned") for name in models) == 1
    assert len(loaded) == 3
    for name, figures in found.items():
        left_out = ("report", "id")
        assert {key: part for key, part in figures.items() if key not in left_out} == {
            key: part for key, part in alone[name].items() if key not in left_out
        }
    assert sorted(path.name for path in out.iterdir()) == ["same", "tuned"]
    table = conclusions_table(found)
    assert table.count("!") > 1
    assert "same" in table.splitlines()[0]
    missing = scope("quantisation", base, files[0], tmp_path / "no.gguf", "--out", tmp_path / "none", *common, code=2)
    assert missing["error"]["type"] == "UnknownNameError"
    assert not (tmp_path / "none").exists()
    twice = scope("quantisation", base, files[0], files[0], "--out", tmp_path / "none", *common, code=2)
    assert "both called same" in twice["error"]["message"]


def test_models_that_do_not_belong_together_are_refused(folder: Path, tmp_path: Path) -> None:
    refused = scope(
        *("diff", tiny_folder("gemma3"), tiny_folder("gpt2"), "--data", folder / "text.jsonl"),
        *("--out", tmp_path / "out", "--json"),
        code=2,
    )
    assert refused["error"]["type"] == "MismatchError"
    assert "tokenizers" in refused["error"]["message"]
    assert not (tmp_path / "out").exists()
    unknown = scope(
        *("diff", folder / "same", folder / "tuned", "--data", folder / "text.jsonl", "--hook", "blocks.9.hook_out"),
        *("--out", tmp_path / "out", "--json"),
        code=2,
    )
    assert unknown["error"]["type"] == "UnknownNameError"
    assert not (tmp_path / "out").exists()
