"""The command line on models with experts and with per-layer embeddings: what it says is what the library counts."""

import json
from pathlib import Path

import pytest
from helpers_models import EXPERT_KINDS, TEXT, tiny_folder, tiny_model
from helpers_models import one_thread as one_thread
from helpers_saes import make
from test_cli import scope

from activations.store import ActivationStore
from scope.attribution import logit_difference, per_layer_writes, table_effects
from scope.features.experts import dense_against_experts, expert_specialisation, feature_experts
from scope.features.routing import edit_effects, expert_layers, load_by_layer, prompt_routing
from scope.interventions import combine, forbid_expert, swap_experts
from scope.models import LanguageModel
from scope.saes.base import SAEMetadata
from scope.saes.formats import save

PROMPT = "The cat sat on the mat."
HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """Two layers of Mixtral's routing, and a hook for an SAE."""
    folder = tmp_path_factory.mktemp("experts")
    rows = [
        {"text": TEXT * 2, "title": f"page {number}", "language": ["en", "fr"][number % 2], "source": "made"}
        for number in range(4)
    ]
    (folder / "text.jsonl").write_text("\n".join(map(json.dumps, rows)))
    hooks = [HOOK, *(f"blocks.{layer}.moe.{name}" for layer in (0, 1) for name in ("hook_experts", "hook_weights"))]
    options = [part for hook in hooks for part in ("--hook", hook)]
    scope(
        *("capture", "--model", tiny_folder("mixtral"), "--data", folder / "text.jsonl", *options),
        *("--out", folder / "s.zarr", "--context-size", 32, "--dtype", "float32", "--json"),
    )
    return folder / "s.zarr"


def as_the_command_loads(kind: str) -> LanguageModel:
    """In the processor's own dtype."""
    return LanguageModel.load(str(tiny_folder(kind)))


def test_load_and_specialisation(store: Path) -> None:
    opened = ActivationStore.open(store)
    assert expert_layers(opened) == [0, 1]
    load = scope("experts", "load", store, "--json")["load"]
    assert load == load_by_layer(opened).to_dict("records")
    assert sum(row["share"] for row in load if row["layer"] == 1) == pytest.approx(2.0)
    found = scope("experts", "load", store, "--layer", 1, "--by", "language", "--json")
    assert found["experts"] == expert_specialisation(opened, 1, "language").to_dict("records")
    assert {row["group"] for row in found["load"]} == {"en", "fr"}
    tokens = scope(
        *("experts", "load", store, "--layer", 1, "--by", "token", "--model", tiny_folder("mixtral"), "--json")
    )["experts"]
    reads = tiny_model("mixtral").vocabulary_strings([row["top_group"] for row in tokens])
    assert [row["token"] for row in tokens] == reads
    assert "times its due" in scope("experts", "load", store, "--layer", 1).stdout
    assert "moe.hook_experts" in scope("experts", "load", store, "--layer", 2, code=2).stderr
    assert "language" in scope("experts", "load", store, "--layer", 1, "--by", "tongue", code=2).stderr
    assert "--layer" in scope("experts", "load", store, "--by", "language", code=2).stderr
    assert "--by token" in scope("experts", "load", store, "--layer", 1, "--model", "gpt2", code=2).stderr
    other = ("--by", "token", "--model", tiny_folder("gpt2"))
    assert "another tokenizer" in scope("experts", "load", store, "--layer", 1, *other, code=2).stderr


def test_features_and_experts_meet(store: Path, tmp_path: Path) -> None:
    sae = make("topk", d_in=32, d_sae=60, k=6, seed=1, metadata=SAEMetadata(hook_name=HOOK))
    save(sae, tmp_path / "sae")
    own = feature_experts(ActivationStore.open(store), sae, 1)
    base = ("experts", "features", store, "--sae", tmp_path / "sae", "--layer", 1)
    pairs = scope(*base, "--json")["pairs"]
    assert len(pairs) == len(own)
    assert [row["lift"] for row in pairs] == sorted((row["lift"] for row in pairs), reverse=True)
    feature = int(own["feature"].iloc[0])
    of_feature = scope(*base, "--feature", feature, "--json")["pairs"]
    assert {row["expert"] for row in of_feature} == {0, 1, 2, 3}
    assert sum(row["together"] for row in of_feature) == 2 * of_feature[0]["firings"]
    of_expert = scope(*base, "--expert", 3, "--json")["pairs"]
    assert {row["feature"] for row in of_expert} == set(own["feature"])
    assert "0 to 3" in scope(*base, "--expert", 4, code=2).stderr
    assert "--min-firings" in scope(*base, "--feature", 10_000, code=2).stderr
    assert "--min-firings" in scope(*base, "--expert", 0, "--min-firings", 10**9, code=2).stderr


@pytest.mark.parametrize("kind", EXPERT_KINDS)
def test_a_prompts_routing_is_the_models(kind: str) -> None:
    model = tiny_model(kind)
    table = prompt_routing(model, PROMPT)
    layers = [layer for layer, sizes in enumerate(model.layout.sizes) if sizes.n_experts]
    names = [f"blocks.{layer}.moe.{name}" for layer in layers for name in ("hook_experts", "hook_weights")]
    seen = model.run(PROMPT, hooks=names).activations
    assert sorted(table["layer"].unique()) == layers
    for layer in layers:
        own = table[table["layer"] == layer]
        wide = own.pivot(index="position", columns="slot", values="expert").to_numpy()
        assert (wide == seen[f"blocks.{layer}.moe.hook_experts"].numpy()).all()
        weights = own.pivot(index="position", columns="slot", values="weight").to_numpy()
        assert weights == pytest.approx(seen[f"blocks.{layer}.moe.hook_weights"].numpy())
        assert (own.groupby("position")["probability"].sum() <= 1 + 1e-5).all()
    found = scope("experts", "prompt", tiny_folder(kind), "--prompt", PROMPT, "--json")
    loaded = as_the_command_loads(kind)
    own = prompt_routing(loaded, PROMPT)
    assert [row["expert"] for row in found["routing"]] == own["expert"].tolist()
    beside = kind == "gemma4_experts"
    assert (found["dense"] is not None) == beside
    if beside:
        expected = dense_against_experts(loaded, PROMPT)["dense_share"].tolist()
        assert [row["dense_share"] for row in found["dense"]] == pytest.approx(expected)
        assert "dense" in scope("experts", "prompt", tiny_folder(kind), "--prompt", PROMPT, "--layer", 1).stdout


def test_what_is_not_there_is_refused() -> None:
    assert "no experts" in scope("experts", "prompt", tiny_folder("llama"), "--prompt", PROMPT, code=2).stderr
    assert (
        "Layer 1" in scope("experts", "prompt", tiny_folder("qwen3_moe"), "--prompt", "a", "--layer", 1, code=2).stderr
    )
    assert "no per-layer" in scope("per-layer", tiny_folder("llama"), "--prompt", PROMPT, code=2).stderr
    assert "0 to" in scope("per-layer", tiny_folder("gemma4"), "--prompt", PROMPT, "--token", 99, code=2).stderr


def test_an_edits_effect_on_what_comes_next_is_the_models_own() -> None:
    model = tiny_model("mixtral")
    sae = make("topk", d_in=32, d_sae=60, k=6, seed=1, metadata=SAEMetadata(hook_name="blocks.2.hook_resid_post"))
    edits = combine(swap_experts(model, 1, 0, 2, positions=[3]))
    found = edit_effects(model, PROMPT, edits, sae, position=4, n=7)
    before, after = (model.run(PROMPT, edits=one).logits[4].double().softmax(-1) for one in ({}, edits))
    change = after - before
    assert found.position == 4
    assert found.next_tokens["token_id"].tolist() == change.abs().topk(7).indices.tolist()
    assert found.next_tokens["change"].tolist() == pytest.approx(
        change[found.next_tokens["token_id"].tolist()].tolist(), abs=1e-6
    )
    assert found.kl == pytest.approx(float((after * (after / before).log()).sum()), rel=1e-3, abs=1e-7)
    assert (found.flips["position"] >= 3).all()
    nothing = edit_effects(model, PROMPT, combine(forbid_expert(model, 1, 0, positions=[5])), position=4)
    assert nothing.kl == pytest.approx(0, abs=1e-9)
    assert nothing.flips is None


@pytest.mark.parametrize("kind", ["gemma3n", "gemma4"])
def test_per_layer_writes_and_the_features_they_push(kind: str, tmp_path: Path) -> None:
    model = as_the_command_loads(kind)
    hook = "blocks.2.hook_ple_out"
    sae = make("topk", d_in=32, d_sae=60, k=6, seed=1, metadata=SAEMetadata(hook_name=hook))
    save(sae, tmp_path / "sae")
    report = per_layer_writes(model, PROMPT, [sae], 3)
    command = ("per-layer", tiny_folder(kind), "--prompt", PROMPT, "--sae", tmp_path / "sae", "--top", 3)
    found = scope(*command, "--json")
    assert found["tokens"] == list(report.tokens)
    assert [row["share"] for row in found["writes"]] == pytest.approx(report.writes["share"].tolist())
    assert [row["feature"] for row in found["features"]] == report.features["feature"].tolist()
    whole = [
        (number, text)
        for number, text in enumerate(model.vocabulary_strings(range(300, 340)), 300)
        if model.tokenize(text, prepend_bos=False).tolist() == [number]
    ]
    (number, token), (other_number, other) = whole[0], whole[-1]
    asked = (*command, "--target", token, "--against", other, "--method", "activation_patching")
    effects = scope(*asked, "--json")["effects"]
    known = table_effects(model, PROMPT, logit_difference(number, other_number), "activation_patching")
    assert [row["effect"] for row in effects["rows"]] == pytest.approx(known.table["effect"].tolist(), abs=1e-5)
    assert (effects["value"], effects["without_tables"]) == pytest.approx((known.value, known.without), abs=1e-5)
    assert "all tokens together" in scope(*asked).stdout
    assert found["effects"] is None
    assert "--target" in scope(*command, "--against", other, code=2).stderr
    one = scope(*command, "--token", 2, "--json")
    assert {row["position"] for row in one["writes"]} == {2}
    assert f"At {report.tokens[2]!r}" in scope(*command, "--token", 2).stdout
