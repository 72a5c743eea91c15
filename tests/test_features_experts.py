"""What goes to which expert: counts on a store against the model's own routing, and features that an edit flips."""

import json

import numpy as np
import pytest
import torch
from helpers_models import TEXT, tiny_model
from helpers_models import one_thread as one_thread
from helpers_saes import make

from activations.capture import capture
from activations.store import ActivationStore
from activations.text import TextSource
from scope.errors import InvalidInputError, MismatchError, UnknownNameError
from scope.features.experts import (
    dense_against_experts,
    expert_load,
    expert_specialisation,
    feature_experts,
    feature_flips,
    read_routing,
)
from scope.figures.experts import expert_heatmap
from scope.interventions import combine, forbid_expert
from scope.saes.base import SAEMetadata

LAYER = 1
MOE = f"blocks.{LAYER}.moe."
HOOK = f"blocks.{LAYER}.hook_resid_post"


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    model = tiny_model("mixtral")
    folder = tmp_path_factory.mktemp("experts")
    english, french = TEXT.split("Le café")[0], "Le café était fermé à midi. La rivière est profonde. " * 4
    documents = [
        {"text": text, "title": f"{language} {number}", "language": language, "source": f"book {number % 2}"}
        for number in range(6)
        for language, text in (("en", english), ("fr", french))
    ]
    (folder / "text.jsonl").write_text("\n".join(json.dumps(document) for document in documents))
    hooks = [f"{MOE}hook_experts", f"{MOE}hook_weights", f"{MOE}hook_logits", HOOK]
    capture(model, TextSource(folder / "text.jsonl"), hooks, folder / "acts.zarr", context_size=32, dtype="float32")
    return model, ActivationStore.open(folder / "acts.zarr")


def routed(model, store):
    """Per window (tokens, chosen, weights, language) from the model itself, BOS left out."""
    sequences, documents = store.sequences(), store.documents().set_index("document")
    found = []
    for row in sequences.itertuples():
        tokens = torch.from_numpy(store.window_tokens([row.sequence])[0].astype("int64"))
        seen = model.run(tokens, hooks=[f"{MOE}hook_experts", f"{MOE}hook_weights"], logits=False).activations
        chosen, weights = seen[f"{MOE}hook_experts"][1:].numpy(), seen[f"{MOE}hook_weights"][1:].numpy()
        found.append((tokens[1:].numpy(), chosen, weights, documents["language"][row.document]))
    return found


def test_load_is_what_the_router_chose(case):
    model, store = case
    own = routed(model, store)
    chosen = np.concatenate([one for _, one, _, _ in own])
    weights = np.concatenate([one for _, _, one, _ in own])
    load = expert_load(store, LAYER)
    assert list(load["expert"]) == [0, 1, 2, 3]
    for row in load.itertuples():
        assert row.tokens == (chosen == row.expert).any(1).sum()
        assert row.share == pytest.approx(row.tokens / len(chosen))
        if row.tokens:
            assert row.weight == pytest.approx(weights[chosen == row.expert].mean(), rel=1e-4)
    assert load["share"].sum() == pytest.approx(2.0)
    by_language = expert_load(store, LAYER, "language").set_index(["group", "expert"])
    for language in ("en", "fr"):
        there = np.concatenate([one for _, one, _, lang in own if lang == language])
        for expert in range(4):
            assert by_language.loc[(language, expert), "tokens"] == (there == expert).any(1).sum()
    figure = expert_heatmap(by_language.reset_index(), "lift", theme="dark")
    assert np.shape(figure.data[0].z) == (2, 4)
    by_token = expert_load(store, LAYER, "token")
    tokens = np.concatenate([one for one, _, _, _ in own])
    assert by_token["tokens"].sum() == 2 * len(tokens)
    assert set(by_token["group"]) == set(tokens.tolist())
    assert set(expert_load(store, LAYER, "source")["group"]) == {"book 0", "book 1"}


def test_specialisation_is_the_divergence_of_its_tokens_groups(case):
    model, store = case
    own = routed(model, store)
    table = expert_specialisation(store, LAYER, "language").set_index("expert")
    is_french = np.concatenate([np.full(len(tokens), language == "fr") for tokens, _, _, language in own])
    chosen = np.concatenate([one for _, one, _, _ in own])
    for expert in table.index[table["share"] > 0]:
        p, q = is_french[(chosen == expert).any(1)].mean(), is_french.mean()
        bits = sum(a * np.log2(a / b) for a, b in ((p, q), (1 - p, 1 - q)) if a > 0)
        assert table.loc[expert, "information"] == pytest.approx(bits, abs=1e-9)
    by_token = expert_specialisation(store, LAYER, "token")
    assert (by_token["information"] > 0).any()
    # The router sees tokens, so they tell more of it than shuffled ones do.
    busy = by_token[by_token["share"] > 0.1]
    assert (busy["information"] > busy["information_by_chance"]).all()


def test_features_and_experts_are_counted_together(case):
    _, store = case
    sae = make("topk", d_in=32, d_sae=60, k=6, seed=1, metadata=SAEMetadata(hook_name=HOOK))
    table = feature_experts(store, sae, LAYER, min_firings=5)
    routing = read_routing(store, LAYER)
    x = torch.from_numpy(store.read(HOOK, 0, store.n_rows)[routing.rows])
    fires = sae.encode(x).detach().numpy() > 0
    goes = (routing.chosen[:, :, None] == np.arange(4)).any(1)
    together = fires.T.astype(int) @ goes.astype(int)
    kept = np.flatnonzero(fires.sum(0) >= 5)
    assert set(table["feature"]) == set(kept.tolist())
    for row in table.sample(40, random_state=0).itertuples():
        assert row.firings == fires[:, row.feature].sum()
        assert row.together == together[row.feature, row.expert]
        assert row.lift == pytest.approx(row.share / goes[:, row.expert].mean())


def test_what_a_forbidden_expert_flips(case):
    model, _ = case
    sae = make("topk", d_in=32, d_sae=60, k=6, seed=1, metadata=SAEMetadata(hook_name="blocks.2.hook_resid_post"))
    edits = combine(forbid_expert(model, LAYER, 0))
    prompt = "The cat sat on the mat and looked at the moon."
    table = feature_flips(model, sae, prompt, edits)
    key = "blocks.2.hook_resid_post"
    before, after = (model.run(prompt, saes=sae, edits=one).features[key] for one in ({}, edits))
    flipped = ((before > 0) != (after > 0))[1:].nonzero() + torch.tensor([1, 0])
    assert len(table) == len(flipped) > 0
    assert set(map(tuple, table[["position", "feature"]].to_numpy().tolist())) == set(map(tuple, flipped.tolist()))
    assert ((table["before"] == 0) != (table["after"] == 0)).all()
    assert feature_flips(model, sae, prompt, {}).empty


def test_what_is_not_there_is_refused(case):
    _, store = case
    with pytest.raises(UnknownNameError):
        expert_load(store, 0)
    with pytest.raises(UnknownNameError, match="language"):
        expert_load(store, LAYER, "tongue")
    coarse = type("Coarse", (), {"__getattr__": lambda self, name: getattr(store, name), "dtype": "bfloat16"})()
    with pytest.raises(InvalidInputError, match="float32"):
        read_routing(coarse, LAYER, n_experts=300)
    half = {"rows_of": lambda self, hook: store.rows_of(hook) // (2 if hook == HOOK else 1)}
    partly = type("Partly", (), {"__getattr__": lambda self, name: getattr(store, name), **half})()
    sae = make("topk", d_in=32, metadata=SAEMetadata(hook_name=HOOK))
    with pytest.raises(MismatchError, match="Finish its capture"):
        feature_experts(partly, sae, LAYER)


def test_dense_and_experts_side_by_side_are_what_the_layer_adds():
    model = tiny_model("gemma4_experts")
    prompt = "The cat sat on the mat."
    table = dense_against_experts(model, prompt)
    assert set(table["layer"]) == set(range(model.n_layers))
    ln2_post = model.hf.model.layers[2].post_feedforward_layernorm
    names = [
        f"blocks.2.{name}" for name in ("moe.hook_dense_normed", "moe.hook_normed", "hook_mlp_out", "moe.hook_out")
    ]
    dense, experts, added, raw = model.run(prompt, hooks=names).activations.values()
    torch.testing.assert_close(ln2_post(dense + experts), added)
    torch.testing.assert_close(model.hf.model.layers[2].post_feedforward_layernorm_2(raw), experts)
    own = table[table["layer"] == 2]
    np.testing.assert_allclose(own["dense"], dense.norm(dim=-1), rtol=1e-5)
    np.testing.assert_allclose(own["experts"], experts.norm(dim=-1), rtol=1e-5)
    other = ((experts * (dense + experts)).sum(-1) / (dense + experts).square().sum(-1)).numpy()
    np.testing.assert_allclose(own["dense_share"] + other, 1, rtol=1e-4)
    with pytest.raises(InvalidInputError, match="beside a dense MLP"):
        dense_against_experts(tiny_model("mixtral"), prompt)
