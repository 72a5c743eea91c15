"""Pruning, scores and verification of circuit graphs, against dense linear algebra and runs edited by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers_models import one_thread, tiny_model
from helpers_saes import make
from test_attribution_graph import ALL, prompt_of, transcoders

from scope.attribution.attention import node_heads
from scope.attribution.circuit_curves import graph_faithfulness
from scope.attribution.dictionaries import mlp_dictionaries
from scope.attribution.freezing import freeze
from scope.attribution.frozen import attention_as_frozen
from scope.attribution.graph import build_graph
from scope.attribution.graph_runs import FeatureNode, GraphRuns
from scope.attribution.path_patching import path_patching
from scope.attribution.pruning import prune, scores
from scope.attribution.verification import Agreement, total_effects, verify
from scope.attribution.writes import layer_writes
from scope.errors import InvalidInputError, MismatchError

__all__ = ["one_thread"]


@pytest.fixture(scope="module", params=["gemma3", "llama"])
def case(request):
    model = tiny_model(request.param)
    made = transcoders(model)
    graph = build_graph(model, prompt_of(model), made, ALL)
    return model, made, graph


def dense(graph, absolute=False):
    matrix = np.zeros((len(graph.nodes), len(graph.nodes)))
    matrix[graph.target, graph.source] = np.abs(graph.weight) if absolute else graph.weight
    return matrix


def test_influence_and_scores_are_those_of_the_whole_matrix(case):
    _, _, graph = case
    share = dense(graph, absolute=True)
    totals = share.sum(1, keepdims=True)
    share = np.divide(share, totals, out=np.zeros_like(share), where=totals > 0)
    whole = graph.logit_weights @ (np.linalg.inv(np.eye(len(share)) - share) - np.eye(len(share)))
    np.testing.assert_allclose(graph.nodes["influence"], whole, rtol=1e-3, atol=1e-6)
    kinds = graph.nodes["kind"].to_numpy()
    embedding, error = whole[kinds == "embedding"].sum(), whole[kinds == "error"].sum()
    found = scores(graph)
    assert found.replacement == pytest.approx(embedding / (embedding + error), rel=1e-4)
    weight = (whole + graph.logit_weights) * (totals[:, 0] > 0)
    explained = share[:, kinds != "error"].sum(1)
    assert found.completeness == pytest.approx((explained * weight).sum() / weight.sum(), rel=1e-4)
    # All that leads to the logits starts at an embedding or an error.
    assert embedding + error == pytest.approx(1.0, rel=1e-3)


def test_a_pruned_graph_is_a_connected_part_with_the_most_influence(case):
    _, _, graph = case
    small = prune(graph, 0.6, 0.9)
    assert len(small.nodes) < len(graph.nodes)
    assert 0 < len(small.weight) < len(graph.weight)
    key = ["kind", "layer", "position", "feature"]
    whole = {tuple(row[key]): row for _, row in graph.nodes.iterrows()}
    number = [whole[tuple(row[key])]["node"] for _, row in small.nodes.iterrows()]
    matrix = dense(graph)
    for s, t, w in zip(small.source, small.target, small.weight, strict=True):
        assert matrix[number[t], number[s]] == w
    for kind in ("embedding", "logit"):
        assert (small.nodes["kind"] == kind).sum() == (graph.nodes["kind"] == kind).sum()
    inner = small.nodes[small.nodes["kind"] == "feature"]["node"]
    assert set(inner) <= set(small.source.tolist())
    assert set(inner) <= set(small.target.tolist())
    dropped = graph.nodes[(graph.nodes["kind"] == "feature") & ~graph.nodes["node"].isin(number)]
    assert dropped["influence"].median() < small.nodes.loc[inner, "influence"].median()
    assert prune(graph, 0.9, 0.98).nodes.shape[0] >= small.nodes.shape[0]
    everything = prune(graph, 1.0, 1.0)
    assert set(everything.nodes["kind"]) == {"embedding", "error", "feature", "logit"}
    with pytest.raises(InvalidInputError, match="node_share"):
        prune(graph, 0.0)


def test_total_effects_are_the_sum_over_paths(case):
    _, _, graph = case
    small = prune(graph, 0.5, 0.9)
    activation = small.nodes["activation"].to_numpy()
    feature = (small.nodes["kind"] == "feature").to_numpy()
    direct = dense(small) * feature[None, :] / np.where(feature, activation, 1.0)[None, :]
    paths, total = np.eye(len(direct)), np.zeros_like(direct)
    for _ in range(small.n_layers + 1):
        paths = direct @ paths
        total += paths
    np.testing.assert_allclose(total_effects(small), total, rtol=1e-6, atol=1e-9)


def test_attention_as_frozen_on_its_own_prompt_changes_nothing(case):
    model, _, graph = case
    tokens = torch.tensor(graph.token_ids)
    frozen, _ = freeze(model, tokens)
    plain = model.run(tokens).logits
    with attention_as_frozen(frozen):
        held = model.run(tokens).logits
    torch.testing.assert_close(held, plain, rtol=1e-4, atol=1e-4)
    with attention_as_frozen(frozen):
        moved = model.run(tokens.flip(0)).logits
    assert not torch.allclose(moved, model.run(tokens.flip(0)).logits, atol=1e-3)


def test_what_is_measured_is_what_an_edit_does(case):
    model, made, graph = case
    small = prune(graph, 0.6, 0.9)
    found = verify(small, model, made, batch_size=5)
    tokens = torch.tensor(graph.token_ids)
    clean = model.run(tokens, hooks=[f"blocks.{i}.ln2.hook_out" for i in range(model.n_layers)])
    nodes = small.nodes
    for pair in found.pairs.sample(12, random_state=0).itertuples():
        source, target = nodes.loc[pair.source], nodes.loc[pair.target]

        def write(value, context, source=source, pair=pair):
            row = made[source["layer"]].W_dec.detach()[source["feature"]]
            value[0, source["position"]] += (pair.factor - 1) * source["activation"] * row

        run = model.run(tokens, hooks=list(clean.activations), edits={f"blocks.{source['layer']}.hook_mlp_out": write})
        if target["kind"] == "logit":
            change = (run.logits - clean.logits)[-1]
            change = change[target["feature"]] - change.mean()
        else:
            hook = f"blocks.{target['layer']}.ln2.hook_out"
            shift = (run.activations[hook] - clean.activations[hook])[target["position"]]
            change = shift @ made[target["layer"]].W_enc[:, target["feature"]]
        assert pair.measured == pytest.approx(float(change), rel=1e-3, abs=1e-4)
    assert found.to_dict()["random"]["n"] == found.model.n > 20
    assert set(found.by_source()["source"]) <= set(nodes[nodes["kind"] == "feature"]["node"])


def test_predictions_come_true_where_the_model_is_nearly_linear(case):
    """Held attention and effects on the next layer: only the norms react, and a little."""
    model, made, graph = case
    found = verify(prune(graph, 0.7, 0.95), model, made)
    assert found.attention_frozen.correlation > found.random.correlation + 0.3
    assert found.model.correlation > found.random.correlation + 0.2
    assert found.model.sign_agreement > 0.6


def test_a_graph_that_holds_every_feature_leaves_none_for_the_control(case):
    model, made, graph = case
    runs = GraphRuns(graph, model, mlp_dictionaries(model, made), torch.tensor(graph.token_ids))
    node = FeatureNode(0, 1, 0, 3, 1.0)
    runs.held_features[node.layer].update(range(runs.dictionaries.width(node.layer)))
    with pytest.raises(InvalidInputError, match="holds every feature of layer"):
        runs.other(node, np.random.default_rng(0))


def test_a_graph_of_another_model_or_of_other_transcoders_is_refused_before_anything_runs(monkeypatch):
    model = tiny_model("gemma3")
    made = transcoders(model)
    graph = prune(build_graph(model, prompt_of(model), made, ALL), 0.7, 0.9)
    features = graph.nodes[graph.nodes["kind"] == "feature"]
    last, node = int(features["layer"].max()), int(features["node"].iloc[0])
    d = model.d_model
    narrow = [
        make("transcoder", d_in=d, d_out=d, activation="topk", d_sae=4, k=2, metadata=sae.cfg.metadata) for sae in made
    ]
    other = tiny_model("llama")  # of the same width, and of fewer layers
    untold = replace(graph, token_ids=(*graph.token_ids[:-1], -1))
    beyond = replace(graph, token_ids=(*graph.token_ids[:-1], model.d_vocab))
    for given, on, some, told in (
        (graph, model, made[:last], f"features of layer {last}"),
        (graph, model, narrow, "has 0 to 3"),
        (graph, other, transcoders(other), "of 4 layers"),
        (untold, model, made, "does not say which token"),
        (beyond, model, made, f"token {model.d_vocab:,}"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(type(model), "hidden_states", lambda *args: pytest.fail("the model ran"))
            for run in (
                verify,
                graph_faithfulness,
                layer_writes,
                lambda *fit: path_patching(*fit, [node]),
                lambda *fit: node_heads(*fit, node),
            ):
                with pytest.raises(MismatchError, match=told):
                    run(given, on, some)


def test_agreement():
    predicted = np.array([1.0, -2.0, 3.0, 0.0])
    found = Agreement.of(predicted, np.array([2.0, -4.0, 6.0, 9.0]))
    assert found == pytest.approx((2.0, 1.0, 1.0, 3))
    assert np.isnan(Agreement.of(np.zeros(3), np.ones(3)).slope)
