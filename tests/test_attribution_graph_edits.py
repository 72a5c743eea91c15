"""Graphs under a standing intervention: sums against the model as edited, edges against autograd, what is refused."""

import contextlib
import dataclasses
import functools
import json

import numpy as np
import pytest
import torch
from helpers_models import one_thread, tiny_folder, tiny_model
from helpers_saes import make
from test_attribution_dense import cross_layer
from test_attribution_graph import ALL, prompt_of, transcoders
from test_cli import scope

from scope.attribution.attention import edge_heads, node_heads
from scope.attribution.circuit_curves import graph_faithfulness
from scope.attribution.dictionaries import mlp_dictionaries
from scope.attribution.freezing import freeze
from scope.attribution.graph import build_graph
from scope.attribution.graph_edits import graph_edits
from scope.attribution.graph_json import graph_facts, load_graph, save_graph
from scope.attribution.graph_runs import GraphRuns
from scope.attribution.path_patching import path_patching
from scope.attribution.pruning import prune, scores
from scope.attribution.reading import read_prompt
from scope.attribution.verification import verify
from scope.attribution.writes import layer_writes
from scope.errors import InvalidInputError, MismatchError, OutOfRangeError
from scope.interventions import InterventionSpec, add_direction, combine
from scope.models.edits import EditContext, apply_edits
from scope.saes.base import SAEMetadata
from scope.saes.formats import save

__all__ = ["one_thread"]

KINDS = ["gemma3", "llama"]
WIDTH = 32
DIRECTION = torch.randn(WIDTH, generator=torch.Generator().manual_seed(1)).tolist()
PATCHED = "The cat sat on the mat and looked"
EDITS = {
    "add": [{"kind": "add", "component": "residual", "layer": 1, "direction": DIRECTION, "value": 0.7}],
    "add at a position": [
        {"kind": "add", "hook": "blocks.2.hook_resid_pre", "direction": DIRECTION, "value": 2.0, "positions": [3]}
    ],
    "ablate heads": [{"kind": "ablate", "layer": 1, "heads": [0, 2], "positions": [2, 5, 8]}],
    "set heads": [{"kind": "set", "layer": 2, "heads": [1], "value": 0.2}],
    "scale attention": [{"kind": "scale", "component": "attention", "layer": 1, "value": 0.3}],
    "scale an MLP": [{"kind": "scale", "component": "mlp", "layer": 1, "value": -1.5}],
    "ablate an MLP": [{"kind": "ablate", "component": "mlp", "layer": 0, "keep_bos": False}],
    "project out": [{"kind": "project_out", "hook": "blocks.1.hook_resid_mid", "direction": DIRECTION}],
    "scale a direction in front": [
        {"kind": "scale", "hook": "blocks.1.hook_resid_pre", "direction": DIRECTION, "value": 2.5},
    ],
    "a direction": [
        {"kind": "set", "component": "residual", "layer": 0, "direction": DIRECTION, "value": 1.3},
        {"kind": "scale", "component": "residual", "layer": 1, "direction": DIRECTION, "value": 3.0},
    ],
    "embeddings": [
        {"kind": "scale", "component": "embedding", "value": 0.5, "positions": [2, 3]},
        {"kind": "add", "component": "embedding", "direction": DIRECTION, "value": 0.4, "positions": [4]},
    ],
    "patch": [
        {"kind": "patch", "component": "residual", "layer": 0, "prompt": PATCHED, "positions": [2, 4]},
        {"kind": "patch", "layer": 2, "heads": [3], "prompt": PATCHED, "positions": [5]},
    ],
    "features of an SAE": [
        {"kind": "set", "sae": "stream", "features": [3, 5], "value": [2.0, 1.0], "positions": [1, 4, 6]},
        {"kind": "project_out", "sae": "stream", "features": [7, 8]},
        {"kind": "scale", "sae": "stream", "features": list(range(9, 30)), "value": 2.5},
        {"kind": "ablate", "sae": "heads", "features": list(range(20))},
    ],
    "attention held": [
        {"kind": "add", "component": "residual", "layer": 0, "direction": DIRECTION, "value": 3.0},
    ],
}


def saes_of(model):
    heads = model.layout.n_heads * model.layout.d_head
    stream, z = SAEMetadata(hook_name="blocks.1.hook_resid_post"), SAEMetadata(hook_name="blocks.1.attn.hook_z")
    return {
        "stream": make("topk", d_in=model.d_model, d_sae=60, k=8, metadata=stream),
        "heads": make("jumprelu", d_in=heads, metadata=z, reshape_activations="hook_z"),
    }


def spec_of(name):
    return InterventionSpec.from_dict({"name": name, "interventions": EDITS[name], "freeze_attention": "held" in name})


def sums_of(graph):
    sums = np.zeros(len(graph.nodes))
    np.add.at(sums, graph.target, graph.weight)
    return sums


@functools.cache
def built(kind, name):
    """A tiny model, its transcoders, the SAEs of interventions, and the graph under some."""
    model = tiny_model(kind)
    made, saes, spec = transcoders(model), saes_of(model), spec_of(name)
    return model, made, saes, build_graph(model, prompt_of(model), made, ALL, spec=spec, saes=saes)


@pytest.fixture
def case(request):
    return built(*request.param)


def cases(kinds=KINDS, names=tuple(EDITS)):
    """Of models with per-layer embeddings interventions on the main one are refused."""
    some = [(kind, name) for kind in kinds for name in names if (kind, name) != ("gemma3n", "embeddings")]
    return pytest.mark.parametrize("case", some, indirect=True, ids=" ".join)


def check_sums(model, saes, graph):
    expanded = graph.nodes[graph.nodes["kind"].isin(["feature", "logit"])]
    assert (expanded["kind"] == "feature").sum() == graph.n_active > 50
    found = sums_of(graph)[expanded["node"]] + expanded["bias"]
    np.testing.assert_allclose(found, expanded["value"], rtol=3e-3, atol=3e-4)
    logits = graph.nodes[graph.nodes["kind"] == "logit"]
    edited = model.run(torch.tensor(graph.token_ids), edits=graph.spec.resolve(model, saes)).logits
    whole = edited[-1]
    cap = model.layout.final_logit_softcapping
    uncapped = whole if cap is None else cap * torch.atanh(whole / cap)
    centred = (uncapped[logits["feature"].tolist()] - uncapped.mean()).detach().numpy()
    np.testing.assert_allclose(logits["value"], centred, rtol=1e-3, atol=1e-4)
    plain = model.run(torch.tensor(graph.token_ids)).logits
    assert not torch.allclose(edited, plain, atol=1e-3)


@cases()
def test_what_comes_in_adds_up_to_what_a_node_is_in_the_model_as_edited(case):
    model, _, saes, graph = case
    check_sums(model, saes, graph)


@cases(["gemma3n"])
def test_it_does_where_the_residual_stream_is_one_of_several(case):
    model, _, saes, graph = case
    check_sums(model, saes, graph)


class Forward:
    """The frozen model written forwards, with the interventions' own functions: what is read, and leaves to derive by:
    `written` by layer for what MLPs write, `put` by intervention for what is added behind its edit, from `added`."""

    def __init__(self, model, made, graph, saes, written=None, added=None):
        tokens = torch.tensor(graph.token_ids)
        edits = graph_edits(graph.spec, model, mlp_dictionaries(model, made), tokens, saes)
        frozen, _ = freeze(model, tokens, edits=edits)
        self.model, self.edits, self.tokens, self.put = model, edits, tokens, {}
        self.bos, self.added = model.bos_mask(tokens[None]), added or {}
        rows = slice(0, len(tokens))
        with torch.enable_grad():
            self.embedding = frozen.embedding.clone().requires_grad_()
            self.written = {
                i: (layer.mlp_out + (written or {}).get(i, 0.0)).requires_grad_()
                for i, layer in enumerate(frozen.layers)
            }
            x, self.reads = self.embedding, []
            # `frozen.embedding` is behind the edits of embeddings, but for what they put there.
            for change in edits.changes:
                if change.edits[-1].hook == "hook_embed":
                    (there,) = [edit for edit in frozen.edits["hook_embed"] if edit.number == change.number]
                    x = x + self.leaf(change.number, there.constant)
            for index, layer in enumerate(frozen.layers):
                block = f"blocks.{index}."
                x = self.at(f"{block}hook_resid_pre", x)
                attention = layer.attention
                values = torch.einsum("hed,kd->hke", attention.W_V, layer.ln1(x, rows))
                heads = attention.pattern(rows) @ values.repeat_interleave(attention.group, 0)
                heads = self.at(f"{block}attn.hook_z", heads.transpose(0, 1))
                out = torch.einsum("qhe,hde->qd", heads, attention.W_O)
                out = out if layer.ln1_post is None else layer.ln1_post(out, rows)
                x = self.at(f"{block}hook_resid_mid", x + self.at(f"{block}hook_attn_out", out))
                self.reads.append(layer.ln2(x, rows))
                x = x + self.at(f"{block}hook_mlp_out", self.written[index])
                x = self.at(f"{block}hook_resid_post", x)
            self.final = frozen.final_norm(x, rows)

    def leaf(self, number, like):
        added = self.added.get(number, torch.zeros(like.shape[0], like[0].numel()))
        self.put[number] = added.clone().requires_grad_()
        return like + self.put[number].view(like.shape)

    def at(self, hook, x):
        for change in self.edits.changes:
            if change.edits[-1].hook == hook:
                edited = apply_edits(change.edits, x[None], EditContext(hook, self.tokens[None], self.bos))[0]
                x = self.leaf(change.number, edited)
        return x


@cases()
def test_edges_are_the_derivatives_of_the_frozen_model_with_the_interventions_own_functions(case):
    model, made, saes, graph = case
    forward = Forward(model, made, graph, saes)
    hooks = [f"blocks.{i}.ln2.hook_out" for i in range(model.n_layers)]
    own = model.run(forward.tokens, hooks=hooks, edits=graph.spec.resolve(model, saes)).activations
    for read, hook in zip(forward.reads, hooks, strict=True):
        torch.testing.assert_close(read, own[hook], rtol=1e-3, atol=1e-3)
    nodes = graph.nodes
    edges = {(s, t): w for s, t, w in zip(graph.source, graph.target, graph.weight, strict=True)}
    features = nodes[nodes["kind"] == "feature"]
    sources = nodes[nodes["kind"].isin(["embedding", "intervention"])]
    sources = [*sources.itertuples(), *features.sample(60, random_state=0).itertuples()]
    read = read_prompt(model, forward.tokens, made, forward.edits)
    put = {one.edit.number: one.edit.constant for one in read.constants}
    targets = [*features.sample(12, random_state=1).itertuples(), *nodes[nodes["kind"] == "logit"].itertuples()]
    leaves = [forward.embedding, *forward.written.values(), *forward.put.values()]
    for target in targets[:16]:
        if target.kind == "logit":
            value = forward.final[-1] @ (model.W_U[target.feature] - model.W_U.mean(0)).detach()
        else:
            column = made[target.layer].W_enc.detach()[:, target.feature]
            value = forward.reads[target.layer][target.position] @ column
        found = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)
        embedding, *rest = [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]
        by_layer = dict(zip(forward.written, rest[: len(forward.written)], strict=True))
        by_edit = dict(zip(forward.put, rest[len(forward.written) :], strict=True))
        for source in sources:
            if source.kind == "embedding":
                expected = embedding[source.position] @ forward.embedding[source.position]
            elif source.kind == "intervention":
                expected = by_edit[source.feature][source.position] @ put[source.feature][source.position]
            else:
                row = made[source.layer].W_dec.detach()[source.feature]
                expected = source.activation * (by_layer[source.layer][source.position] @ row)
            got = edges.get((source.node, target.node), 0.0)
            assert got == pytest.approx(float(expected.detach()), rel=2e-3, abs=2e-4)


# Not of an SAE's features: a change of that size fires others.
@cases(names=["add", "ablate heads", "scale an MLP", "a direction", "embeddings", "patch"])
def test_doubling_a_source_changes_each_target_by_its_edge(case):
    model, made, saes, graph = case
    base = Forward(model, made, graph, saes)
    read = read_prompt(model, base.tokens, made, base.edits)
    put = {one.edit.number: one.edit.constant for one in read.constants}
    nodes = graph.nodes
    edges = {(s, t): w for s, t, w in zip(graph.source, graph.target, graph.weight, strict=True)}
    features = nodes[nodes["kind"] == "feature"]
    doubled = [*features.sample(2, random_state=0).itertuples()]
    doubled += [*nodes[nodes["kind"] == "intervention"].tail(2).itertuples()]
    for source in doubled:
        added, written = {}, {}
        if source.kind == "intervention":
            added[source.feature] = torch.zeros_like(put[source.feature])
            added[source.feature][source.position] = put[source.feature][source.position]
        else:
            written[source.layer] = torch.zeros(len(base.tokens), model.d_model)
            row = made[source.layer].W_dec.detach()[source.feature]
            written[source.layer][source.position] = source.activation * row
        moved = Forward(model, made, graph, saes, written, added)
        for target in [*features.sample(30, random_state=1).itertuples(), nodes.iloc[-1]]:
            if target.kind == "logit":
                change = (moved.final - base.final)[-1] @ (model.W_U[target.feature] - model.W_U.mean(0))
            else:
                shift = (moved.reads[target.layer] - base.reads[target.layer])[target.position]
                change = shift @ made[target.layer].W_enc[:, target.feature]
            got = edges.get((source.node, target.node), 0.0)
            assert got == pytest.approx(float(change.detach()), rel=2e-3, abs=3e-4)


@cases()
def test_what_an_intervention_puts_there_is_a_node_and_what_it_only_lets_through_is_none(case):
    _, _, _, graph = case
    found = graph.nodes[graph.nodes["kind"] == "intervention"]
    putting = {
        number
        for number, one in enumerate(graph.spec.interventions)
        if one.kind in ("add", "set", "patch") or (one.features and one.kind != "project_out")
    }
    assert set(found["feature"]) == putting
    for row in found.itertuples():
        one = graph.spec.interventions[row.feature]
        assert one.positions is None or row.position in one.positions
        assert row.activation > 0
        behind = graph.nodes["layer"].to_numpy()[graph.target[graph.source == row.node]]
        assert (behind > row.layer).all()
        assert row.label.split()[0].lower() == one.kind


@pytest.mark.parametrize("kind", KINDS)
def test_features_of_the_graphs_own_transcoders_are_set_at_their_nodes(kind, tmp_path):
    model = tiny_model(kind)
    made, prompt = transcoders(model), prompt_of(model)
    plain = build_graph(model, prompt, made, ALL)
    inner = plain.nodes[(plain.nodes["kind"] == "feature") & (plain.nodes["layer"] == 1)]
    at, scaled, gone = (int(inner["feature"].iloc[n]) for n in (0, len(inner) // 2, -1))
    place = int(inner["position"].iloc[0])
    assert len({at, scaled, gone}) == 3
    spec = InterventionSpec.from_dict(
        [
            {"kind": "set", "sae": "mlp", "features": [at], "value": 3.0, "positions": [place]},
            {"kind": "scale", "sae": "mlp", "features": [scaled], "value": 2.0},
            {"kind": "ablate", "sae": "mlp", "features": [gone]},
            {"kind": "scale", "component": "mlp", "layer": 1, "value": 0.5},
        ]
    )
    graph = build_graph(model, prompt, made, ALL, spec=spec, saes={"mlp": made[1]})
    features = graph.nodes[(graph.nodes["kind"] == "feature") & (graph.nodes["layer"] == 1)]
    (held,) = features[(features["feature"] == at) & (features["position"] == place)].itertuples()
    assert held.activation == pytest.approx(3.0 / float(made[1].decoder_norms[at]), rel=1e-4)
    assert held.total_in == 0
    assert held.node not in graph.target
    assert held.node in graph.source
    assert gone not in set(features["feature"])
    before = inner.set_index(["feature", "position"])["activation"]
    for row in features[features["feature"] == scaled].itertuples():
        assert row.activation == pytest.approx(2 * before[(scaled, row.position)], rel=1e-4)
    expanded = graph.nodes[graph.nodes["kind"].isin(["feature", "logit"])]
    found = sums_of(graph)[expanded["node"]] + expanded["bias"]
    np.testing.assert_allclose(found, expanded["value"], rtol=3e-3, atol=3e-4)
    logits = graph.nodes[graph.nodes["kind"] == "logit"]
    whole = model.run(prompt, edits=spec.resolve(model, {"mlp": made[1]})).logits[-1].detach()
    centred = (whole[logits["feature"].tolist()] - whole.mean()).numpy()
    np.testing.assert_allclose(logits["value"], centred, rtol=1e-3, atol=1e-4)

    small = prune(graph, 0.9, 0.99)
    save_graph(small, tmp_path / "graph.json")
    read = load_graph(tmp_path / "graph.json")
    assert read.spec == small.spec == graph.spec
    text = (tmp_path / "graph.json").read_text()
    (tmp_path / "bad.json").write_text(text.replace('"kind": "scale"', '"kind": "scald"', 1))
    with pytest.raises(InvalidInputError, match=r"bad\.json cannot be read"):
        load_graph(tmp_path / "bad.json")
    assert scores(small).replacement == pytest.approx(scores(read).replacement)
    by_id = {"mlp": made[1].fingerprint[:12]}
    named = dataclasses.replace(
        spec, interventions=tuple(dataclasses.replace(one, sae=by_id.get(one.sae, "")) for one in spec.interventions)
    )
    again = build_graph(model, prompt, made, ALL, spec=named)  # found among the transcoders by its id
    np.testing.assert_array_equal(again.weight, graph.weight)
    found = verify(small, model, made, saes={"mlp": made[1]}, max_features=4)
    assert held.node not in set(found.pairs["target"][found.pairs["predicted"] != 0])


@cases(
    ["gemma3"], ["add", "scale an MLP", "ablate heads", "embeddings", "patch", "features of an SAE", "attention held"]
)
def test_verifying_runs_the_model_under_the_interventions(case):
    model, made, saes, graph = case
    small = prune(graph, 0.6, 0.9)
    found = verify(small, model, made, saes=saes, max_features=2, batch_size=3)
    nodes = small.nodes
    tokens = torch.tensor(small.token_ids)
    hooks = [f"blocks.{i}.ln2.hook_out" for i in range(model.n_layers)]

    def nodes_with(*added):
        edits = graph.spec.resolve(model, saes)
        # What is written comes in front of interventions on an MLP's output.
        for edit in added:
            there = edits.pop(edit.hook, None)
            edits.update(combine(edit, *getattr(there, "edits", () if there is None else (there,))))
        run = model.run(tokens, hooks=hooks, edits=edits)
        return run.activations, run.logits[-1]

    reads, logits = nodes_with()
    for pair in found.pairs.sample(8, random_state=0).itertuples():
        source, target = nodes.iloc[pair.source], nodes.iloc[pair.target]
        row = (pair.factor - 1) * source["activation"] * made[source["layer"]].W_dec.detach()[source["feature"]]
        written = add_direction(f"blocks.{source['layer']}.hook_mlp_out", row, positions=int(source["position"]))
        moved, moved_logits = nodes_with(written)
        if target["kind"] == "logit":
            change = (moved_logits - logits)[target["feature"]] - (moved_logits - logits).mean()
        else:
            hook = hooks[target["layer"]]
            column = made[target["layer"]].W_enc.detach()[:, target["feature"]]
            change = (moved[hook] - reads[hook])[target["position"]] @ column
        assert pair.measured == pytest.approx(float(change.detach()), rel=2e-3, abs=3e-4)


SPLIT = ["add", "scale a direction in front", "set heads", "scale attention", "project out", "a direction"]
SPLIT += ["embeddings", "patch", "features of an SAE"]


@cases(["llama", "gemma3n"], SPLIT)
def test_heads_add_up_to_edges_and_nodes(case):
    model, made, saes, graph = case
    edges = np.argsort(-np.abs(graph.weight), kind="stable")
    kinds = graph.nodes["kind"].to_numpy()[graph.source]
    for edge in [*edges[kinds[edges] == "feature"][:3], *edges[kinds[edges] == "embedding"][:2]]:
        source, target = int(graph.source[edge]), int(graph.target[edge])
        found = edge_heads(graph, model, made, source, target, saes=saes)
        assert found["weight"].sum() == pytest.approx(float(graph.weight[edge]), rel=2e-3, abs=1e-4)
    expanded = graph.nodes[graph.nodes["kind"].isin(["feature", "logit"])]
    for node in [*expanded.sample(3, random_state=2)["node"], int(expanded["node"].iloc[-1])]:
        found = node_heads(graph, model, made, node, saes=saes)
        assert found["weight"].sum() == pytest.approx(graph.nodes["value"][node], rel=3e-3, abs=3e-4)


def dictionaries_of(model, arch):
    return [cross_layer(model, "jumprelu")] if arch == "clt" else transcoders(model, arch)


@pytest.mark.parametrize(
    ("kind", "arch"),
    [("gpt2", "transcoder"), ("gemma4", "transcoder"), ("llama", "skip_transcoder"), ("gemma3", "clt")],
)
def test_biases_shared_values_tables_and_linear_parts_are_under_interventions_too(kind, arch):
    model = tiny_model(kind)
    made, prompt = dictionaries_of(model, arch), prompt_of(model)
    half = [1.0] * (model.d_model // 2) + [-1.0] * (model.d_model - model.d_model // 2)
    edits = [
        {"kind": "scale", "component": "mlp", "layer": 1, "value": 0.5},
        {"kind": "scale", "layer": 0, "heads": [1], "value": 2.0},
        {"kind": "set", "layer": 1, "heads": [0], "value": 0.3, "positions": [2, 3]},
        {"kind": "add", "hook": "blocks.1.hook_resid_mid", "direction": half, "value": 0.4},
        {"kind": "scale", "component": "attention", "layer": 1, "value": 1.5},
        {"kind": "project_out", "component": "residual", "layer": 1, "direction": half},
        {"kind": "scale", "hook": "blocks.2.hook_resid_pre", "value": 1.2},
    ]
    spec = InterventionSpec.from_dict(edits)
    graph = build_graph(model, prompt, made, ALL, spec=spec)
    expanded = graph.nodes[graph.nodes["kind"].isin(["feature", "logit"])]
    gap = np.abs(sums_of(graph)[expanded["node"]] + expanded["bias"] - expanded["value"])
    assert (gap < 1e-4 * expanded["total_in"] + 1e-3).all()
    logits = graph.nodes[graph.nodes["kind"] == "logit"]
    whole = model.run(prompt, edits=spec.resolve(model)).logits[-1].detach()
    if model.layout.final_logit_softcapping is None:
        centred = (whole[logits["feature"].tolist()] - whole.mean()).numpy()
        np.testing.assert_allclose(logits["value"], centred, rtol=1e-3, atol=1e-4)
    edges = np.argsort(-np.abs(graph.weight), kind="stable")
    for edge in edges[(graph.nodes["kind"].to_numpy()[graph.source] != "intervention")[edges]][:6]:
        found = edge_heads(graph, model, made, int(graph.source[edge]), int(graph.target[edge]))
        assert found["weight"].sum() == pytest.approx(float(graph.weight[edge]), rel=2e-3, abs=1e-4)
    for row in [*expanded.sample(3, random_state=3).itertuples(), *logits.head(1).itertuples()]:
        found = node_heads(graph, model, made, row.node)["weight"].sum()
        if kind != "gpt2":  # where what the norm's bias adds is no head's
            assert found == pytest.approx(row.value, rel=3e-3, abs=1e-3)
    assert verify(prune(graph, 0.5, 0.9), model, made, max_features=2).model.n > 0


@pytest.mark.parametrize("name", ["scale an MLP", "features of an SAE", "attention held"])
def test_faithfulness_path_patching_and_writes_are_of_the_model_as_edited(name):
    model = tiny_model("gemma3")
    made, saes = transcoders(model), saes_of(model)
    graph = prune(build_graph(model, prompt_of(model), made, ALL, spec=spec_of(name), saes=saes), 0.7, 0.9)
    found = graph_faithfulness(graph, model, made, sizes=(2,), saes=saes, n_random=1)
    edited = model.run(torch.tensor(graph.token_ids), edits=graph.spec.resolve(model, saes)).logits[-1]
    ids = graph.nodes[graph.nodes["kind"] == "logit"].nlargest(2, "probability")["feature"].tolist()
    assert found.value == pytest.approx(float((edited[ids[0]] - edited[ids[1]]).detach()), abs=1e-4)
    everything = found.table[(found.table["nodes"] == "all") & (found.table["errors"] == "kept")]
    assert everything["value"].item() == pytest.approx(found.value, abs=1e-3)
    writes = layer_writes(graph, model, made, saes=saes)
    (logit,) = graph.nodes[graph.nodes["kind"] == "logit"].nlargest(1, "probability")["node"]
    edges = {s: w for s, t, w in zip(graph.source, graph.target, graph.weight, strict=True) if t == logit}
    for row in writes.itertuples():
        if row.node in edges:
            assert row.effect == pytest.approx(edges[row.node], rel=1e-3, abs=1e-5)
    (source,) = graph.nodes[graph.nodes["node"].isin(graph.source) & (graph.nodes["kind"] == "feature")].head(1)["node"]
    tested = path_patching(graph, model, made, [source], saes=saes)
    assert len(tested.pairs) == 2 * (graph.source == source).sum()
    # MLPs that write what they wrote leave the model as it is under the interventions.
    tokens = torch.tensor(graph.token_ids)
    edits = graph_edits(graph.spec, model, mlp_dictionaries(model, made), tokens, saes)
    read = read_prompt(model, tokens, made, edits)
    runs = GraphRuns(graph, model, read.dictionaries, tokens, edits)
    with torch.no_grad():
        held, live = (runs.measure([], runs.attention(), mlps) for mlps in (runs.mlps(read), None))
    np.testing.assert_allclose(held, live, rtol=1e-3, atol=1e-4)


@contextlib.contextmanager
def norms_as_frozen(model, frozen):
    """Within it the model's norms divide by what they divided by on the frozen prompt (Gemma 3's modules)."""

    def held(norm):
        return lambda module, given, out: norm(given[0], slice(0, given[0].shape[1]))

    base, pairs = model.hf.model, []
    for layer, own in zip(base.layers, frozen.layers, strict=True):
        pairs += [(layer.input_layernorm, own.ln1), (layer.post_attention_layernorm, own.ln1_post)]
        pairs.append((layer.pre_feedforward_layernorm, own.ln2))
    with contextlib.ExitStack() as stack:
        for module, norm in [*pairs, (base.norm, frozen.final_norm)]:
            stack.callback(module.register_forward_hook(held(norm)).remove)
        yield


@cases(["gemma3"], [name for name in EDITS if name != "features of an SAE"])  # whose features do not stay as they fire
def test_path_patching_with_attention_and_norms_held_measures_the_edges(case, monkeypatch):
    model, made, saes, graph = case
    tokens = torch.tensor(graph.token_ids)
    edits = graph_edits(graph.spec, model, mlp_dictionaries(model, made), tokens, saes)
    frozen, _ = freeze(model, tokens, edits=edits)
    measure = GraphRuns.measure

    def with_norms_held(*given):
        with norms_as_frozen(model, frozen):
            return measure(*given)

    monkeypatch.setattr(GraphRuns, "measure", with_norms_held)
    some = graph.nodes[graph.nodes["kind"].isin(["embedding", "error", "feature"])]
    some = some[some["node"].isin(graph.source)].sample(6, random_state=0)
    found = path_patching(graph, model, made, some["node"].tolist(), saes=saes).pairs
    assert len(found) > 100
    np.testing.assert_allclose(found["measured_frozen"], found["predicted"], rtol=1e-3, atol=1e-4)


def test_multiples_of_a_maximum_are_stored_as_strengths():
    model = tiny_model("gemma3")
    spec = InterventionSpec.from_dict(
        {"kind": "add", "sae": "stream", "features": [3], "value": 2.0, "unit": "maximum"}
    )
    graph = build_graph(
        model,
        prompt_of(model),
        transcoders(model),
        spec=spec,
        saes=saes_of(model),
        maxima=lambda sae, feature: 4.0,
    )
    (one,) = graph.spec.interventions
    assert (one.unit, one.values) == ("strength", (8.0,))


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        ({"kind": "scale", "hook": "blocks.1.attn.hook_q", "value": 2.0}, "no exact place"),
        ({"kind": "scale", "hook": "blocks.1.mlp.hook_post", "value": 2.0}, "no exact place"),
        ({"kind": "ablate", "sae": "stream", "features": [3], "error_term": False}, "error_term"),
        ({"kind": "ablate", "component": "mlp", "layer": 1, "during": "generated"}, "new text alone"),
        ({"kind": "ablate", "sae": "other", "features": [3]}, "not made with"),
        (
            [
                {"kind": "scale", "component": "mlp", "layer": 1, "value": 2.0},
                {"kind": "ablate", "sae": "own", "features": [3]},
            ],
            "Put the features first",
        ),
        ([{"kind": "ablate", "sae": "own", "features": [3]}] * 2, "changed twice"),
        ({"kind": "ablate", "sae": "", "features": [3]}, "give it"),
    ],
)
def test_what_has_no_exact_place_is_refused_before_anything_runs(edit, words, monkeypatch):
    model = tiny_model("gemma3")
    made = transcoders(model)
    other = make(
        "transcoder", d_in=WIDTH, d_out=WIDTH, activation="topk", d_sae=60, k=6, seed=9, metadata=made[1].cfg.metadata
    )
    saes = {**saes_of(model), "other": other, "own": made[1]} if words != "give it" else None
    prompt = prompt_of(model)
    monkeypatch.setattr(model, "hidden_states", lambda *_, **__: pytest.fail("the model ran"))
    with pytest.raises(InvalidInputError, match=words):
        build_graph(model, prompt, made, spec=InterventionSpec.from_dict(edit), saes=saes)


def test_a_position_or_a_model_that_does_not_fit_is_refused_before_anything_runs(monkeypatch):
    model = tiny_model("gemma3")
    made, prompt = transcoders(model), prompt_of(model)
    monkeypatch.setattr(model, "hidden_states", lambda *_, **__: pytest.fail("the model ran"))
    far = InterventionSpec.from_dict({"kind": "ablate", "component": "mlp", "layer": 1, "positions": [9]})
    with pytest.raises(OutOfRangeError, match="has 9 tokens"):
        build_graph(model, prompt, made, spec=far)
    with pytest.raises(MismatchError, match="for the model other"):
        build_graph(model, prompt, made, spec=dataclasses.replace(far, model="other"))


def test_from_the_command_line(tmp_path):
    model = tiny_model("gemma3")
    for layer, transcoder in enumerate(transcoders(model)):
        save(transcoder, tmp_path / "transcoders" / f"layer_{layer}")
    save(saes_of(model)["stream"], tmp_path / "sae")
    edits = [
        {"kind": "add", "sae": str(tmp_path / "sae"), "features": [3], "value": 4.0},
        {"kind": "ablate", "layer": 1, "heads": [0]},
        {"kind": "set", "sae": str(tmp_path / "transcoders" / "layer_2"), "features": [5], "value": 2.0},
    ]
    spec, out = tmp_path / "spec.json", tmp_path / "graph.json"
    spec.write_text(json.dumps({"name": "pushed", "interventions": edits}))
    common = ("graph", "--model", tiny_folder("gemma3"), "--prompt", "The cat sat on the mat and looked at the")
    common = (*common, "--transcoders", tmp_path / "transcoders", "--out", out, "--max-features", 50, "--json")
    made = scope(*common, "--spec", spec)
    assert made["spec"]["name"] == "pushed"
    assert made["nodes"]["intervention"] > 0
    content = json.loads(out.read_text())
    assert content["metadata"]["schema_version"] == 1
    assert content["metadata"]["scope"]["interventions"] == made["spec"]
    known = {(n["layer"], n["clerp"]) for n in content["nodes"] if n["feature_type"] == "intervention"}
    assert known == {("1", "Add 4 of feature 3 of sae.")}
    words = "pushed: Add 4 of feature 3 of sae. Ablate head 0 of layer 1. Set feature 5 of layer_2 to 2."
    assert graph_facts(out)["interventions"] == words
    for command in ("verify", "faithfulness", "writes"):
        found = scope("graph", command, out, *(("--max-features", 2) if command == "verify" else ()), "--json")
        assert command == "writes" or found["spec"] == made["spec"]
    wrong = scope(*common, "--sae", tmp_path / "sae", code=2)
    assert "--spec" in wrong["error"]["message"]


def test_from_the_command_line_with_saes_that_lie_elsewhere_than_when_the_graph_was_made(tmp_path):
    model = tiny_model("gemma3")
    for layer, transcoder in enumerate(transcoders(model)):
        save(transcoder, tmp_path / "transcoders" / f"layer_{layer}")
    for name in ("stream", "heads"):
        save(saes_of(model)[name], tmp_path / name)
    stream, heads, own = (str(tmp_path / name) for name in ("stream", "heads", "transcoders/layer_1"))
    edits = [
        {"kind": "add", "sae": stream, "features": [3], "value": 4.0},
        {"kind": "set", "sae": own, "features": [5], "value": 6.0, "positions": [4, 7]},
    ]
    spec, out = tmp_path / "spec.json", tmp_path / "graph.json"
    command = ("graph", "--model", tiny_folder("gemma3"), "--prompt", "The cat sat on the mat and looked at the")
    command = (*command, "--out", out, "--spec", spec, "--json", "--max-features", 50)

    def verified(*more):
        return scope("graph", "verify", out, "--max-features", 2, *more, "--json")

    spec.write_text(json.dumps(edits))
    scope(*command, "--transcoders", tmp_path / "transcoders")
    before = verified()
    (tmp_path / "stream").rename(tmp_path / "moved")
    assert verified("--sae", tmp_path / "moved") == before  # and not the transcoder's features 5 of it
    (tmp_path / "transcoders").rename(tmp_path / "others")
    there = ("--sae", tmp_path / "moved", "--transcoders", tmp_path / "others")
    assert verified(*there) == before
    (tmp_path / "moved").rename(tmp_path / "stream")
    spec.write_text(json.dumps([edits[0], {"kind": "ablate", "sae": heads, "features": [1]}]))
    scope(*command, "--transcoders", tmp_path / "others")
    wrong = scope("graph", "verify", out, "--sae", tmp_path / "stream", "--json", code=2)
    assert "2 SAEs" in wrong["error"]["message"]
