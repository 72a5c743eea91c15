"""Path patching of single edges, against runs edited by hand."""

import numpy as np
import pytest
import torch
from helpers_models import one_thread, tiny_model
from test_attribution_dense import cross_layer
from test_attribution_graph import ALL, prompt_of, transcoders

from scope.attribution.dictionaries import mlp_dictionaries
from scope.attribution.graph import build_graph
from scope.attribution.path_patching import merged, path_patching
from scope.attribution.pruning import prune
from scope.attribution.verdicts import verdicts
from scope.errors import InvalidInputError, OutOfRangeError

__all__ = ["one_thread"]

MODELS = {"gemma3": "transcoder", "gpt2": "transcoder", "llama": "skip_transcoder", "clt": "clt"}


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    arch = MODELS[request.param]
    model = tiny_model("gemma3" if arch == "clt" else request.param)
    made = [cross_layer(model)] if arch == "clt" else transcoders(model, arch)
    if arch == "skip_transcoder":
        for sae in made:
            sae.W_skip.data += 0.1 * torch.randn(sae.W_skip.shape, generator=torch.Generator().manual_seed(3))
    graph = prune(build_graph(model, prompt_of(model), made, ALL), 0.7, 0.95)
    return model, made, graph


def sources_of(graph, n=2):
    """Some nodes of each kind that edges go out of."""
    nodes = graph.nodes[graph.nodes["node"].isin(graph.source)]
    return [
        int(node) for kind in ("feature", "error", "embedding") for node in nodes[nodes["kind"] == kind]["node"][:n]
    ]


@torch.no_grad()
def by_hand(model, made, graph, source, factor):
    """Nodes' values with every MLP's output replaced by what it was, and the source at so many times its value."""
    d, prompt = mlp_dictionaries(model, made), torch.tensor(graph.token_ids)
    layers, row = range(model.n_layers), graph.nodes.loc[source]
    reads = {layer: f"blocks.{layer}.ln2.hook_out" for layer in layers}
    writes = {layer: f"blocks.{layer}.hook_mlp_out" for layer in layers}
    clean = model.run(prompt, hooks=[*reads.values(), *writes.values(), "hook_embed"]).activations
    place, size, at_layer = row["position"], factor - 1, int(row["layer"])
    new = {layer: clean[hook].clone() for layer, hook in writes.items()}
    embedding = clean["hook_embed"].clone()
    if row["kind"] == "feature":
        for layer in d.written_from(at_layer):
            decoder = d.decoder(at_layer, torch.tensor([row["feature"]]), layer)[0]
            new[layer][place] += size * row["activation"] * decoder
    elif row["kind"] == "error":
        layer = at_layer
        features = {at: own.clone() for at, own in d.encode({i: clean[reads[i]] for i in layers}).items()}
        error = clean[writes[layer]] - d.b_dec(layer)
        for at in d.writers_of(layer):
            if model.bos_token_id is not None:
                features[at][0] = 0.0
            error = error - d.decode(at, features[at], layer)
        if d.skip(layer) is not None:
            error = error - clean[reads[layer]] @ d.skip(layer).T
        new[layer][place] += size * error[place]
    else:
        positions = model.hf.transformer.wpe.weight[: len(prompt)] if hasattr(model.hf, "transformer") else 0.0
        embedding[place] += size * (embedding + positions)[place]
    seen = {}

    def edit(layer):
        def write(value, context):
            value[0] = new[layer]
            if d.skip(layer) is not None:
                value[0] += (seen[layer] - clean[reads[layer]]) @ d.skip(layer).T

        return write

    def keep(layer):
        def read(value, context):
            seen[layer] = value[0].clone()

        return read

    edits = {reads[layer]: keep(layer) for layer in layers} | {writes[layer]: edit(layer) for layer in layers}
    logits = model.run(prompt, edits={**edits, "hook_embed": lambda value, context: embedding[None]}).logits[-1]

    def value(node):
        end = graph.nodes.loc[node]
        if end["kind"] == "logit":
            return float(logits[end["feature"]] - logits.mean())
        column = d.encoder(int(end["layer"]), torch.tensor([end["feature"]]))[0]
        return float(column @ seen[end["layer"]][end["position"]])

    return value


def test_what_is_measured_is_what_a_run_edited_by_hand_shows(case):
    model, made, graph = case
    sources = sources_of(graph)
    found = path_patching(graph, model, made, sources, batch_size=3)
    edges = {(s, t): w for s, t, w in zip(graph.source, graph.target, graph.weight, strict=True) if s in sources}
    assert len(found.pairs) == 2 * len(edges)
    for (source, factor), own in found.pairs.groupby(["source", "factor"]):
        before, after = by_hand(model, made, graph, source, 1.0), by_hand(model, made, graph, source, factor)
        for pair in own.itertuples():
            assert pair.predicted == pytest.approx((factor - 1) * edges[source, pair.target], rel=1e-6)
            change = after(pair.target) - before(pair.target)
            assert pair.measured == pytest.approx(change, rel=2e-3, abs=2e-4)


def test_edges_come_true_and_those_of_others_do_not(case):
    model, made, graph = case
    sources = graph.nodes[(graph.nodes["kind"] == "feature") & graph.nodes["node"].isin(graph.source)]["node"].tolist()
    found = path_patching(graph, model, made, sources)
    assert found.attention_frozen.correlation > 0.8
    assert found.model.correlation > found.random.correlation + 0.3
    judged = verdicts(found).pairs
    assert judged["holds"].mean() > 2 * judged["holds_random"].mean()
    assert set(zip(judged["source"], judged["target"], strict=True)) <= set(
        zip(graph.source.tolist(), graph.target.tolist(), strict=True)
    )


def test_what_was_measured_before_is_kept_but_for_what_is_tested_again(case):
    model, made, graph = case
    first, second = sources_of(graph, 1)[:2]
    one = path_patching(graph, model, made, [first])
    both = merged(one, path_patching(graph, model, made, [second]))
    assert set(both.pairs["source"]) == {first, second}
    again = merged(both, path_patching(graph, model, made, [first], seed=7))
    assert len(again.pairs) == len(both.pairs)
    assert merged(None, one) is one
    kept = again.pairs[again.pairs["source"] == first].sort_values(["target", "factor"])
    np.testing.assert_allclose(kept["measured"], one.pairs.sort_values(["target", "factor"])["measured"], rtol=1e-5)


def test_what_has_no_edges_is_said(case):
    model, made, graph = case
    with pytest.raises(OutOfRangeError, match="no node"):
        path_patching(graph, model, made, [10**6])
    logit = int(graph.nodes[graph.nodes["kind"] == "logit"]["node"].iloc[0])
    with pytest.raises(InvalidInputError, match="kind logit"):
        path_patching(graph, model, made, [logit])
