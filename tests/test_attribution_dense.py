"""Circuit graphs against a dense reference: Jacobians by autograd through the Hugging Face model itself, with queries,
keys and norm denominators detached and every MLP's output replaced by features, error and bias; and cross-layer
transcoders, whose features write several layers."""

import contextlib
import functools

import numpy as np
import pytest
import torch
from helpers_models import one_thread, tiny_model
from helpers_saes import shaken
from test_attribution_graph import ALL, frozen_run, prompt_of, transcoders

from scope.attribution.attention import edge_heads, node_heads
from scope.attribution.dictionaries import mlp_dictionaries
from scope.attribution.graph import build_graph
from scope.attribution.pruning import prune
from scope.attribution.query_key import qk_pairs
from scope.attribution.verification import verify
from scope.errors import InvalidInputError
from scope.saes import registry
from scope.saes.base import SAEMetadata

__all__ = ["one_thread"]


def cross_layer(model, activation="topk", layers=None, k=20):
    layers = range(model.n_layers) if layers is None else layers
    metadata = SAEMetadata(
        hook_names=tuple(f"blocks.{i}.ln2.hook_out" for i in layers),
        hook_names_out=tuple(f"blocks.{i}.hook_mlp_out" for i in layers),
    )
    n, d = len(metadata.hook_names), model.d_model
    cfg = registry.config_of("clt").for_training(
        d_in=n * d, d_out=n * d, n_layers=n, d_sae=n * 40, k=k, activation=activation, metadata=metadata
    )
    return shaken(registry.get("clt")(cfg, generator=torch.Generator().manual_seed(0)))


def linear_norm(module, args, output):
    """The same output, its denominator without a gradient; for RMSNorm and LayerNorm, whatever their gain."""
    x = args[0]
    centred = x - x.mean(-1, keepdim=True) if isinstance(module, torch.nn.LayerNorm) else x
    bias = module.bias if getattr(module, "bias", None) is not None else 0.0
    return centred * ((output - bias) / centred).detach() + bias


def detached(module, args, output, cut=None):
    """Queries and keys without a gradient: all of the output, or its first `cut` entries."""
    return output.detach() if cut is None else torch.cat([output[..., :cut].detach(), output[..., cut:]], -1)


def without_query_and_key(model):
    """Handles of hooks that detach what patterns are made of."""
    for layer in range(model.n_layers):
        qkv = [model.hf.get_submodule(model.layout.layer(layer, path)) for path in model.layout.family.qkv]
        if len(qkv) > 1:
            yield from (module.register_forward_hook(detached) for module in qkv[:2])
        else:
            yield qkv[0].register_forward_hook(functools.partial(detached, cut=2 * model.d_model))


def dense_reference(model, prompt, dictionary, graph):
    """Column by column what each node adds to each expanded one: `(n_nodes, n_nodes)`, and the nodes' values."""
    nodes, d = graph.nodes, mlp_dictionaries(model, dictionary)
    hf, layout, family = model.hf, model.layout, model.layout.family
    layers = range(model.n_layers)
    reads = {i: f"blocks.{i}.ln2.hook_out" for i in layers}
    writes = {i: f"blocks.{i}.hook_mlp_out" for i in layers}
    seen = model.run(prompt, hooks=[*reads.values(), *writes.values()]).activations
    scale = torch.ones(len(nodes), requires_grad=True)
    written = {i: d.b_dec(i).expand(len(prompt), -1) for i in layers}
    for row in nodes[nodes["kind"] == "feature"].itertuples():
        for i in d.written_from(row.layer):
            place = torch.zeros(len(prompt), model.d_model)
            place[row.position] = row.activation * d.decoder(row.layer, torch.tensor([row.feature]), i)[0]
            written[i] = written[i] + scale[row.node] * place
    numbers = {(r.kind, r.layer, r.position): r.node for r in nodes[nodes["kind"] != "feature"].itertuples()}
    for i in layers:
        errors = seen[writes[i]] - written[i].detach()
        share = torch.stack([scale[numbers["error", i, p]] for p in range(len(prompt))])
        written[i] = written[i] + share[:, None] * errors
    inputs = {}
    with contextlib.ExitStack() as stack:
        names = [family.ln1, family.ln2, *([family.ln1_post] if family.ln1_post else [])]
        modules = [hf.get_submodule(layout.layer(i, name)) for i in layers for name in names]
        handles = [m.register_forward_hook(linear_norm) for m in modules]
        handles.append(hf.get_submodule(layout.module(family.final_norm)).register_forward_hook(linear_norm))
        handles += without_query_and_key(model)
        embedded = torch.stack([scale[numbers["embedding", -1, p]] for p in range(len(prompt))])
        blocks = [hf.get_submodule(layout.layer(i, family.ln2).rpartition(".")[0]) for i in layers]
        handles.append(
            blocks[0].register_forward_pre_hook(
                lambda m, args, kwargs: ((args[0] * embedded[None, :, None], *args[1:]), kwargs), with_kwargs=True
            )
        )
        for i in layers:
            ln2 = hf.get_submodule(layout.layer(i, family.ln2))
            handles.append(ln2.register_forward_hook(lambda m, a, out, i=i: inputs.__setitem__(i, out[0])))
            last = model.hook_table[writes[i]]
            handles.append(
                hf.get_submodule(last.site.module).register_forward_hook(lambda m, a, out, i=i: written[i][None])
            )
        for handle in handles:
            stack.callback(handle.remove)
        logits = hf(input_ids=prompt[None], use_cache=False).logits[0, -1]
    rows, values = np.zeros((len(nodes), len(nodes))), np.zeros(len(nodes))
    for row in nodes[nodes["kind"].isin(["feature", "logit"])].itertuples():
        if row.kind == "logit":
            value = logits[row.feature] - logits.mean()
        else:
            value = inputs[row.layer][row.position] @ d.encoder(row.layer, torch.tensor([row.feature]))[0]
        rows[row.node] = torch.autograd.grad(value, scale, retain_graph=True)[0].numpy()
        values[row.node] = float(value.detach())
    return rows, values


@pytest.mark.parametrize("kind", ["gemma3", "llama", "gpt2"])
@pytest.mark.parametrize("across", [False, True], ids=["transcoders", "clt"])
def test_edges_are_the_jacobian_of_the_replacement_model(kind, across):
    model = tiny_model(kind, "eager")
    prompt = prompt_of(model, 7)
    dictionary = [cross_layer(model)] if across else transcoders(model)
    graph = build_graph(model, prompt, dictionary, ALL)
    assert (graph.nodes["kind"] == "feature").sum() == graph.n_active > 60
    expected, values = dense_reference(model, prompt, dictionary, graph)
    found = np.zeros_like(expected)
    found[graph.target, graph.source] = graph.weight
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-4 * np.abs(expected).max())
    there = graph.nodes["kind"].isin(["feature", "logit"])
    np.testing.assert_allclose(graph.nodes["value"][there], values[there], rtol=5e-3, atol=2e-3)


@pytest.mark.parametrize("kind", ["gemma3", "llama"])
def test_doubling_a_cross_layer_feature_changes_each_target_by_its_edge(kind):
    """Written forwards: what the feature writes is added in all layers that it writes, MLPs held constant."""
    model = tiny_model(kind)
    clt, prompt = cross_layer(model, "jumprelu"), prompt_of(model)
    graph = build_graph(model, prompt, [clt], ALL)
    d, nodes = mlp_dictionaries(model, [clt]), graph.nodes
    base, final = frozen_run(model, prompt, {})
    edges = {(s, t): w for s, t, w in zip(graph.source, graph.target, graph.weight, strict=True)}
    sources = nodes[(nodes["kind"] == "feature") & (nodes["layer"] < model.n_layers - 1)]
    for source in sources.sample(5, random_state=0).itertuples():
        added = {}
        for layer in d.written_from(source.layer):
            added[layer] = torch.zeros(len(prompt), model.d_model)
            row = d.decoder(source.layer, torch.tensor([source.feature]), layer)[0]
            added[layer][source.position] = source.activation * row
        reads, moved = frozen_run(model, prompt, added)
        for target in nodes[nodes["kind"].isin(["feature", "logit"])].sample(40, random_state=1).itertuples():
            if target.kind == "logit":
                change = float((moved[-1] - final[-1]) @ (model.W_U[target.feature] - model.W_U.mean(0)))
            else:
                shift = reads[target.layer][target.position] - base[target.layer][target.position]
                change = float(shift @ d.encoder(target.layer, torch.tensor([target.feature]))[0])
            assert edges.get((source.node, target.node), 0.0) == pytest.approx(change, rel=1e-3, abs=5e-4)


def test_a_cross_layer_graph_is_verified_and_its_attention_explained():
    model = tiny_model("gemma3")
    clt, prompt = cross_layer(model, "jumprelu"), prompt_of(model)
    graph = prune(build_graph(model, prompt, [clt], ALL), 0.6, 0.95)
    found = verify(graph, model, [clt])
    assert found.attention_frozen.correlation > 0.3
    assert found.model.n == found.random.n > 100
    features = set(graph.nodes[graph.nodes["kind"] == "feature"]["node"])
    tried = [(s, t, w) for s, t, w in zip(graph.source, graph.target, graph.weight, strict=True) if s in features][:20]
    for source, target, weight in tried:
        heads = edge_heads(graph, model, [clt], int(source), int(target))
        assert heads["weight"].sum() == pytest.approx(weight, rel=1e-3, abs=1e-4)
        end = graph.nodes.iloc[int(target)]
        into = node_heads(graph, model, [clt], int(target))
        assert into["weight"].sum() == pytest.approx(end["value"], rel=1e-3, abs=1e-3)
    pairs = qk_pairs(model, prompt, [clt], 2, 1, 6, 3, top=None)
    assert pairs.table["weight"].sum() == pytest.approx(pairs.score, rel=1e-4)
    expected = qk_pairs(model, prompt, transcoders(model), 2, 1, 6, 3).score
    assert pairs.score == pytest.approx(expected, rel=1e-3)


def test_what_a_graph_cannot_take_is_said():
    model = tiny_model("gemma3")
    clt = cross_layer(model)
    with pytest.raises(InvalidInputError, match="stands alone"):
        build_graph(model, prompt_of(model), [clt, transcoders(model)[0]])
    other = cross_layer(model)
    names = tuple(f"blocks.{i}.hook_mlp_in" for i in range(model.n_layers))
    object.__setattr__(other.cfg.metadata, "hook_names", names)
    with pytest.raises(InvalidInputError, match=r"ln2\.hook_out"):
        build_graph(model, prompt_of(model), [other])
    with pytest.raises(InvalidInputError, match="all layers at once"):
        mlp_dictionaries(model, [clt]).encode_layer(0, torch.zeros(3, model.d_model))
