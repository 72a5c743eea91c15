"""`graph_faithfulness`: what a circuit alone leaves of a target, against runs edited by hand."""

import numpy as np
import pytest
import torch
from helpers_models import one_thread, tiny_model
from test_attribution_dense import cross_layer
from test_attribution_graph import ALL, prompt_of, transcoders

from scope.attribution.baselines import counterfactual, mean
from scope.attribution.circuit_curves import graph_faithfulness
from scope.attribution.graph import build_graph
from scope.attribution.pruning import prune
from scope.attribution.targets import FINAL, logit, projection
from scope.errors import InvalidInputError, MismatchError

__all__ = ["one_thread"]


@pytest.fixture(scope="module", params=["gemma3", "gpt2"])
def case(request):
    model = tiny_model(request.param)
    made = transcoders(model)
    return model, made, prune(build_graph(model, prompt_of(model), made, ALL), 0.7, 0.95)


def of(found, nodes, errors, size=None):
    table = found.table[(found.table["nodes"] == nodes) & (found.table["errors"] == errors)]
    return table if size is None else table[table["size"] == size].iloc[0]


def test_all_features_with_their_errors_are_the_model_and_none_is_nothing(case):
    model, made, graph = case
    found = graph_faithfulness(graph, model, made, sizes=(0, 3, 10), n_random=4)
    assert of(found, "all", "kept")["value"].iloc[0] == pytest.approx(found.value, rel=1e-4, abs=1e-4)
    assert of(found, "all", "kept")["faithfulness"].iloc[0] == pytest.approx(1.0, abs=1e-3)
    for errors in ("kept", "ablated"):
        assert of(found, "graph", errors)["size"].tolist() == [0, 3, 10, found.n_features]
        assert of(found, "graph", errors, 0)["faithfulness"] == 0.0
        drawn = of(found, "random", errors)
        assert drawn["size"].tolist() == [3, 10, found.n_features]
        assert (drawn["low"] <= drawn["faithfulness"]).all()
        assert (drawn["faithfulness"] <= drawn["high"]).all()
    assert found.to_dict()["curve"][0].keys() == set(found.table.columns)


def test_a_circuit_is_a_run_whose_mlps_are_written_by_hand(case):
    """The two strongest features kept, held at what they were, errors at 0."""
    model, made, graph = case
    prompt = torch.tensor(graph.token_ids)
    hooks = [f"blocks.{i}.ln2.hook_out" for i in range(model.n_layers)]
    hooks += [f"blocks.{i}.hook_mlp_out" for i in range(model.n_layers)]
    seen = model.run(prompt, hooks=hooks).activations
    chosen = graph.nodes[graph.nodes["kind"] == "feature"].nlargest(2, "influence")
    token = int(graph.nodes[graph.nodes["kind"] == "logit"]["feature"].iloc[0])
    has_bos = bool(model.bos_mask(prompt[None])[0, 0])
    edits = {}
    for layer, sae in enumerate(made):
        new = sae.b_dec.detach().expand(len(prompt), -1).clone()
        if has_bos:
            new[0] = seen[f"blocks.{layer}.hook_mlp_out"][0]
        for row in chosen[chosen["layer"] == layer].itertuples():
            new[row.position] += row.activation * sae.W_dec.detach()[row.feature]
        edits[f"blocks.{layer}.hook_mlp_out"] = lambda value, context, new=new: new[None].expand_as(value)
    logits = model.run(prompt, edits=edits).logits[-1]
    found = graph_faithfulness(graph, model, made, logit(token), sizes=(2,), recompute=False, n_random=0)
    assert of(found, "graph", "ablated", 2)["value"] == pytest.approx(float(logits[token] - logits.mean()), abs=1e-3)


def test_what_is_computed_anew_knows_what_is_missing_before_it(case):
    model, made, graph = case
    live = graph_faithfulness(graph, model, made, sizes=(5,), n_random=0)
    held = graph_faithfulness(graph, model, made, sizes=(5,), n_random=0, recompute=False)
    assert live.recomputed
    assert not held.recomputed
    assert of(live, "graph", "ablated", 5)["value"] != pytest.approx(of(held, "graph", "ablated", 5)["value"], abs=1e-4)
    # With everything there is, anew and held are one.
    for found in (live, held):
        assert of(found, "all", "kept")["faithfulness"].iloc[0] == pytest.approx(1.0, abs=1e-3)


def test_a_baseline_is_where_it_starts(case):
    model, made, graph = case
    prompt = torch.tensor(graph.token_ids)
    other = prompt.clone()
    other[3:5] = torch.tensor([301, 322])
    token = int(graph.nodes[graph.nodes["kind"] == "logit"]["feature"].iloc[0])
    found = graph_faithfulness(graph, model, made, logit(token), counterfactual(other), sizes=(), n_random=0)
    logits = model.run(prompt, edits=_mlps_of(model, prompt, other)).logits[-1]
    assert of(found, "graph", "ablated", 0)["value"] == pytest.approx(float(logits[token] - logits.mean()), abs=2e-3)
    averaged = graph_faithfulness(graph, model, made, baseline=mean(model, made, [prompt, other]), n_random=0)
    assert averaged.baseline == "mean"
    with pytest.raises(MismatchError, match="tokens"):
        graph_faithfulness(graph, model, made, baseline=counterfactual(other[:-1]))


def _mlps_of(model, prompt, other):
    hooks = [f"blocks.{i}.hook_mlp_out" for i in range(model.n_layers)]
    seen = model.run(other, hooks=hooks).activations
    return {hook: lambda value, context, new=seen[hook]: new[None].expand_as(value) for hook in hooks}


def test_skip_and_cross_layer_transcoders_are_whole_too():
    model, prompt = tiny_model("gemma3"), prompt_of(tiny_model("gemma3"))
    for made in (
        transcoders(model, "skip_transcoder"),
        [cross_layer(model, "jumprelu")],
        [cross_layer(model, "batchtopk")],
        transcoders(model, layers=[1]),
    ):
        graph = build_graph(model, prompt, made, ALL)
        found = graph_faithfulness(graph, model, made, sizes=(4,), n_random=2)
        assert of(found, "all", "kept")["faithfulness"].iloc[0] == pytest.approx(1.0, abs=1e-3)
    joint = [cross_layer(model)]
    graph = build_graph(model, prompt, joint, ALL)
    with pytest.raises(InvalidInputError, match="--held"):
        graph_faithfulness(graph, model, joint)
    found = graph_faithfulness(graph, model, joint, recompute=False, n_random=0)
    assert of(found, "all", "kept")["faithfulness"].iloc[0] == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("layers", [None, [1, 2]])
def test_a_mean_baseline_of_a_cross_layer_transcoder_is_what_its_nodes_are_on_average(layers):
    """With every feature and error at its mean, each MLP writes its own mean."""
    model = tiny_model("gemma3")
    prompt = prompt_of(model)
    other = prompt.flip(0).roll(1)
    made = [cross_layer(model, "jumprelu", layers=layers)]
    hooks = [f"blocks.{i}.hook_mlp_out" for i in range(model.n_layers)]
    runs = [model.run(tokens, hooks=hooks).activations for tokens in (prompt, other)]
    means = {hook: torch.cat([run[hook][1:] for run in runs]).mean(0) for hook in hooks}

    def edit(hook):
        def write(value, context):
            value[0, 1:] = means[hook]

        return write

    token = 305
    logits = model.run(prompt, edits={hook: edit(hook) for hook in hooks}).logits[-1]
    graph = build_graph(model, prompt, made, ALL)
    base = mean(model, made, [prompt, other])
    found = graph_faithfulness(graph, model, made, logit(token), base, sizes=(0,), n_random=0)
    assert found.baseline == "mean"
    assert of(found, "graph", "ablated", 0)["value"] == pytest.approx(float(logits[token] - logits.mean()), abs=1e-3)
    others = [cross_layer(model, "jumprelu", layers=[0, 3])]
    with pytest.raises(MismatchError, match="Give the transcoders that it was made with"):
        graph_faithfulness(graph, model, others, baseline=base)
    with pytest.raises(MismatchError, match="not of this transcoder"):
        graph_faithfulness(build_graph(model, prompt, others, ALL), model, others, baseline=base)
    with pytest.raises(InvalidInputError, match="besides BOS"):
        mean(model, made, [])


def test_what_makes_no_sense_is_said(case):
    model, made, graph = case
    with pytest.raises(InvalidInputError, match="0 or more"):
        graph_faithfulness(graph, model, made, sizes=(-1,))
    with pytest.raises(InvalidInputError, match="later hook"):
        graph_faithfulness(graph, model, made, projection("blocks.1.hook_mlp_out", torch.ones(model.d_model)))
    found = graph_faithfulness(graph, model, made, projection(FINAL, torch.ones(model.d_model)), n_random=0)
    assert np.isfinite(found.value)
