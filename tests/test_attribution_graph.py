"""`scope.attribution.graph` and `.frozen`: edges against autograd, sums against the model, and what doubling does."""

import numpy as np
import pytest
import torch
from helpers_models import one_thread, real_model, tiny_model
from helpers_saes import make

from scope.attribution.freezing import freeze
from scope.attribution.graph import build_graph
from scope.attribution.graph_settings import GraphSettings
from scope.errors import InvalidInputError
from scope.saes.base import SAEMetadata

__all__ = ["one_thread"]

KINDS = ["gemma3", "llama", "gpt2", "gemma2", "pythia", "qwen3"]
ALL = GraphSettings(max_features=10_000, edges_per_target=10_000, batch_size=7)


def transcoders(model, arch="transcoder", layers=None):
    made = []
    for layer in layers if layers is not None else range(model.n_layers):
        metadata = SAEMetadata(hook_name=f"blocks.{layer}.ln2.hook_out", hook_name_out=f"blocks.{layer}.hook_mlp_out")
        d = model.d_model
        sae = make(arch, d_in=d, d_out=d, activation="topk", d_sae=60, k=6, seed=layer, metadata=metadata)
        made.append(sae)
    return made


def prompt_of(model, n=9):
    start = [] if model.bos_token_id is None else [model.bos_token_id]
    ids = torch.randint(290, 330, (n - len(start),), generator=torch.Generator().manual_seed(4))
    return torch.tensor([*start, *ids.tolist()])


@pytest.fixture(scope="module", params=KINDS)
def case(request):
    model = tiny_model(request.param)
    made = transcoders(model)
    prompt = prompt_of(model)
    return model, made, prompt, build_graph(model, prompt, made, ALL)


def test_the_pattern_is_the_models_own():
    for kind in [*KINDS, "gemma3n"]:
        model = tiny_model(kind)
        prompt = prompt_of(model, 14)  # longer than the window of sliding layers
        frozen, seen = freeze(model, prompt, ["blocks.1.hook_resid_post"])
        own = model.run(prompt, hooks=["blocks.1.hook_resid_post"]).activations["blocks.1.hook_resid_post"]
        torch.testing.assert_close(seen["blocks.1.hook_resid_post"], own, rtol=1e-4, atol=1e-4)
        eager = tiny_model(kind, "eager").hf(prompt[None], output_attentions=True).attentions
        for layer, expected in zip(frozen.layers, eager, strict=True):
            torch.testing.assert_close(
                layer.attention.pattern(slice(0, len(prompt))), expected[0], rtol=1e-4, atol=1e-5
            )


def test_what_comes_in_adds_up_to_what_a_node_is(case):
    """Σ edges + biases = the pre-activation (without b_enc), or the centred logit."""
    _, _, _, graph = case
    sums = np.zeros(len(graph.nodes))
    np.add.at(sums, graph.target, graph.weight)
    expanded = graph.nodes[graph.nodes["kind"].isin(["feature", "logit"])]
    assert (expanded["kind"] == "feature").sum() == graph.n_active > 50
    found = sums[expanded["node"]] + expanded["bias"]
    np.testing.assert_allclose(found, expanded["value"], rtol=2e-3, atol=2e-4)
    totals = np.zeros(len(graph.nodes))
    np.add.at(totals, graph.target, np.abs(graph.weight))
    np.testing.assert_allclose(totals[expanded["node"]], expanded["total_in"], rtol=1e-4)


def frozen_run(model, prompt, added):
    """The residual streams of a model with attention patterns and denominators of `prompt`, MLPs constant, and
    something added to what the MLPs write: {layer: (seq, d_model)}. Written forwards, without pull_back."""
    frozen, _ = freeze(model, prompt)
    rows = slice(0, len(prompt))
    x = frozen.embedding
    reads = []
    for index, layer in enumerate(frozen.layers):
        normed = layer.ln1(x, rows)
        if layer.ln1.bias is not None:
            normed = normed + layer.ln1.bias
        attention = layer.attention
        values = torch.einsum("hed,kd->hke", attention.W_V, normed)
        if attention.value_bias is not None:
            values = values + attention.value_bias[:, None]
        heads = attention.pattern(rows) @ values.repeat_interleave(attention.group, 0)
        out = torch.einsum("hqe,hde->qd", heads, attention.W_O)
        if attention.output_bias is not None:
            out = out + attention.output_bias
        if layer.ln1_post is not None:
            out = layer.ln1_post(out, rows)
        before, x = x, x + out
        read = layer.ln2(before if model.layout.parallel else x, rows)
        reads.append(read if layer.ln2.bias is None else read + layer.ln2.bias)
        x = x + layer.mlp_out + added.get(index, 0.0)
    final = frozen.final_norm(x, rows)
    return reads, final if frozen.final_norm.bias is None else final + frozen.final_norm.bias


def test_doubling_a_source_changes_each_target_by_its_edge(case):
    model, made, prompt, graph = case
    base, final = frozen_run(model, prompt, {})
    own = model.run(prompt, hooks=[f"blocks.{i}.ln2.hook_out" for i in range(model.n_layers)]).activations
    for read, there in zip(base, own.values(), strict=True):
        torch.testing.assert_close(read, there, rtol=1e-3, atol=1e-3)
    nodes = graph.nodes
    edges = {(s, t): w for s, t, w in zip(graph.source, graph.target, graph.weight, strict=True)}
    sources = nodes[(nodes["kind"] == "feature") & (nodes["layer"] < model.n_layers - 1)]
    for source in sources.sample(6, random_state=0).itertuples():
        decoder = made[source.layer].W_dec.detach()[source.feature]
        added = torch.zeros(len(prompt), model.d_model)
        added[source.position] = source.activation * decoder
        reads, moved = frozen_run(model, prompt, {source.layer: added})
        for target in nodes[nodes["kind"].isin(["feature", "logit"])].sample(40, random_state=1).itertuples():
            if target.kind == "logit":
                row = model.W_U[target.feature] - model.W_U.mean(0)
                change = float((moved[-1] - final[-1]) @ row)
            else:
                shift = reads[target.layer][target.position] - base[target.layer][target.position]
                change = float(shift @ made[target.layer].W_enc.detach()[:, target.feature])
            assert edges.get((source.node, target.node), 0.0) == pytest.approx(change, rel=1e-3, abs=2e-4)


def test_a_skip_transcoders_linear_part_is_on_the_way_not_an_error():
    model = tiny_model("llama")
    made = transcoders(model, "skip_transcoder")
    prompt = prompt_of(model)
    graph = build_graph(model, prompt, made, ALL)
    sums = np.zeros(len(graph.nodes))
    np.add.at(sums, graph.target, graph.weight)
    expanded = graph.nodes[graph.nodes["kind"].isin(["feature", "logit"])]
    np.testing.assert_allclose(sums[expanded["node"]] + expanded["bias"], expanded["value"], rtol=2e-3, atol=3e-4)


def test_a_small_graph_holds_the_most_influential_features_and_the_same_edges(case):
    model, made, prompt, graph = case
    small = build_graph(model, prompt, made, GraphSettings(max_features=12, edges_per_target=30, batch_size=4))
    assert (small.nodes["kind"] == "feature").sum() == 12
    key = ["kind", "layer", "position", "feature"]
    whole = {tuple(row[key]): row["node"] for _, row in graph.nodes.iterrows()}
    number = [whole[tuple(row[key])] for _, row in small.nodes.iterrows()]
    edges = {(s, t): w for s, t, w in zip(graph.source, graph.target, graph.weight, strict=True)}
    for s, t, w in zip(small.source, small.target, small.weight, strict=True):
        assert edges[number[s], number[t]] == pytest.approx(w, rel=1e-3, abs=1e-5)
    strongest = graph.nodes[graph.nodes["kind"] == "feature"].nlargest(3, "influence")
    assert {tuple(row[key]) for _, row in strongest.iterrows()} <= {
        tuple(row[key]) for _, row in small.nodes.iterrows()
    }


def test_bos_is_an_error_node():
    model = tiny_model("gemma3")
    graph = build_graph(model, prompt_of(model), transcoders(model), ALL)
    assert (graph.nodes.loc[graph.nodes["kind"] == "feature", "position"] > 0).all()


def test_a_layer_without_a_transcoder_is_all_error():
    model = tiny_model("gemma3")
    graph = build_graph(model, prompt_of(model), transcoders(model, layers=[0, 2]), ALL)
    assert set(graph.nodes.loc[graph.nodes["kind"] == "feature", "layer"]) == {0, 2}
    sums = np.zeros(len(graph.nodes))
    np.add.at(sums, graph.target, graph.weight)
    expanded = graph.nodes[graph.nodes["kind"].isin(["feature", "logit"])]
    np.testing.assert_allclose(sums[expanded["node"]] + expanded["bias"], expanded["value"], rtol=2e-3, atol=2e-4)


def test_bad_input():
    model = tiny_model("gemma3")
    made = transcoders(model)
    with pytest.raises(InvalidInputError, match="at least one transcoder"):
        build_graph(model, prompt_of(model), [])
    with pytest.raises(InvalidInputError, match="Two transcoders are of layer 0"):
        build_graph(model, prompt_of(model), [made[0], made[0]])
    sae = make("topk", d_in=32, metadata=SAEMetadata(hook_name="blocks.1.hook_resid_post"))
    with pytest.raises(InvalidInputError, match=r"ln2\.hook_out"):
        build_graph(model, prompt_of(model), [sae])
    with pytest.raises(InvalidInputError, match="max_logits"):
        GraphSettings(max_logits=0)


@pytest.mark.real
def test_on_the_real_model_sums_and_doubling_hold():
    model = real_model()
    made = transcoders(model)
    prompt = model.prompt_tokens("The opposite of hot is")
    graph = build_graph(model, prompt, made, GraphSettings(max_features=60, edges_per_target=10_000))
    sums = np.zeros(len(graph.nodes))
    np.add.at(sums, graph.target, graph.weight)
    logits = graph.nodes[graph.nodes["kind"] == "logit"]
    whole = model.run(prompt).logits[-1]
    centred = (whole[logits["feature"].tolist()] - whole.mean()).numpy()
    np.testing.assert_allclose(logits["value"], centred, rtol=1e-3, atol=1e-2)
    everything = build_graph(model, prompt, made, GraphSettings(max_features=10_000, edges_per_target=10_000))
    expanded = everything.nodes[everything.nodes["kind"].isin(["feature", "logit"])]
    sums = np.zeros(len(everything.nodes))
    np.add.at(sums, everything.target, everything.weight)
    gap = np.abs(sums[expanded["node"]] + expanded["bias"] - expanded["value"])
    assert (gap < 1e-4 * expanded["total_in"] + 1e-3).all()
    base, _ = frozen_run(model, prompt, {})
    edges = {(s, t): w for s, t, w in zip(everything.source, everything.target, everything.weight, strict=True)}
    features = everything.nodes[everything.nodes["kind"] == "feature"]
    for source in features[features["layer"] < 12].sample(3, random_state=0).itertuples():
        added = torch.zeros(len(prompt), model.d_model)
        added[source.position] = source.activation * made[source.layer].W_dec.detach()[source.feature]
        reads, _ = frozen_run(model, prompt, {source.layer: added})
        for target in features[features["layer"] > source.layer].sample(20, random_state=1).itertuples():
            shift = reads[target.layer][target.position] - base[target.layer][target.position]
            change = float(shift @ made[target.layer].W_enc.detach()[:, target.feature])
            assert edges.get((source.node, target.node), 0.0) == pytest.approx(change, rel=1e-2, abs=2e-3)
