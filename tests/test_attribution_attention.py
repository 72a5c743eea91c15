"""Attention explained: heads of an edge add up to it, pairs of nodes to a score before the softmax."""

import numpy as np
import pytest
import torch
from helpers_models import one_thread, tiny_folder, tiny_model
from test_attribution_graph import ALL, KINDS, prompt_of, transcoders

from scope.attribution.attention import edge_heads, node_heads
from scope.attribution.components import logit_components
from scope.attribution.freezing import freeze
from scope.attribution.graph import build_graph
from scope.attribution.query_key import qk_pairs
from scope.errors import InvalidInputError, OutOfRangeError
from scope.models import LanguageModel

__all__ = ["one_thread"]

PER_LAYER = ["gemma3n", "gemma4", "gemma4_experts"]
"""Norms on queries, keys and values, layers that share keys and values or have no values of their own, layers that
scale the stream or mix several, per-layer tables; and experts."""


@pytest.fixture(scope="module", params=[*KINDS, "gemma3 skip", "pythia skip", *PER_LAYER])
def case(request):
    kind, _, skip = request.param.partition(" ")
    model = tiny_model(kind)
    made = transcoders(model, "skip_transcoder" if skip else "transcoder")
    if skip:
        for sae in made:
            sae.W_skip.data += 0.1 * torch.randn(sae.W_skip.shape, generator=torch.Generator().manual_seed(3))
    prompt = prompt_of(model, 12)
    return model, made, prompt, build_graph(model, prompt, made, ALL)


def test_heads_add_up_to_the_edge(case):
    model, made, _, graph = case
    rng = np.random.default_rng(0)
    kinds = graph.nodes["kind"].to_numpy()[graph.source]
    of_each_kind = [edge for kind in sorted(set(kinds)) for edge in (kinds == kind).nonzero()[0][:: len(kinds) // 40]]
    for edge in [*of_each_kind, *rng.choice(len(graph.weight), 12, replace=False)]:
        source, target, weight = int(graph.source[edge]), int(graph.target[edge]), float(graph.weight[edge])
        table = edge_heads(graph, model, made, source, target)
        assert table["weight"].sum() == pytest.approx(weight, rel=1e-3, abs=2e-5)
        start, end = graph.nodes.iloc[source], graph.nodes.iloc[target]
        if start["position"] != end["position"]:
            assert table.set_index(["layer", "head"])["weight"][-1, -1] == 0.0


def test_one_layer_apart_a_head_carries_its_pattern_times_its_ov():
    model = tiny_model("llama")
    made = transcoders(model)
    prompt = prompt_of(model, 12)
    graph = build_graph(model, prompt, made, ALL)
    frozen, _ = freeze(model, prompt)
    nodes = graph.nodes
    features = nodes[nodes["kind"] == "feature"]
    source = features[(features["layer"] == 0) & (features["position"] == 3)].iloc[0]
    target = features[(features["layer"] == 1) & (features["position"] == 7)].iloc[0]
    found = edge_heads(graph, model, made, int(source["node"]), int(target["node"])).set_index(["layer", "head"])
    layer = model.hf.model.layers[1]
    written = source["activation"] * made[0].W_dec.detach()[source["feature"]]
    normed = written * layer.input_layernorm.weight / frozen.layers[1].ln1.denominator[3]
    column = made[1].W_enc.detach()[:, target["feature"]]
    gradient = column * layer.post_attention_layernorm.weight / frozen.layers[1].ln2.denominator[7]
    values = layer.self_attn.v_proj.weight @ normed
    pattern = tiny_model("llama", "eager").hf(prompt[None], output_attentions=True).attentions[1][0]
    for head in range(4):
        part = values[(head // 2) * 8 : (head // 2) * 8 + 8]
        out = layer.self_attn.o_proj.weight[:, head * 8 : head * 8 + 8] @ part
        expected = float(pattern[head, 7, 3] * (out @ gradient))
        assert found["weight"][1, head] == pytest.approx(expected, rel=1e-3, abs=1e-6)


def own_bias(model, made, end):
    """What the bias of the norm in front of a node adds to it."""
    layout, family = model.layout, model.layout.family
    path = layout.module(family.final_norm) if end.kind == "logit" else layout.layer(end.layer, family.ln2)
    bias = getattr(model.hf.get_submodule(path), "bias", None)
    if bias is None:
        return 0.0
    reads = model.W_U[end.feature] - model.W_U.mean(0) if end.kind == "logit" else made[end.layer].W_enc[:, end.feature]
    return float(bias @ reads)


def test_heads_into_a_node_add_up_to_what_it_is(case):
    model, made, _, graph = case
    ends = graph.nodes[graph.nodes["kind"].isin(["feature", "logit"])]
    for end in [*ends.sample(6, random_state=1).itertuples(), next(ends[ends["kind"] == "logit"].itertuples())]:
        table = node_heads(graph, model, made, end.node)
        expected = end.value - own_bias(model, made, end)
        assert table["weight"].sum() == pytest.approx(expected, rel=2e-3, abs=3e-4)
        assert table["key"].max() <= end.position
    # In front of the first layer there are embeddings alone: its heads carry what their edges say.
    end = ends[(ends["layer"] == 1) & (ends["position"] == 7)].iloc[0]
    own = node_heads(graph, model, made, int(end["node"])).set_index(["layer", "head"])["weight"]
    edges = [
        edge_heads(graph, model, made, int(s), int(end["node"])) for s in graph.source[graph.target == end["node"]]
    ]
    summed = sum(table.set_index(["layer", "head"])["weight"].reindex(own.index, fill_value=0.0) for table in edges)
    np.testing.assert_allclose(summed.loc[0], own.loc[0], rtol=5e-3, atol=3e-4)


def scores_of(model, prompt, layer, head, query):
    """Pre-softmax scores of a query with the keys that it sees, and which these are."""
    frozen, _ = freeze(model, prompt)
    attention = frozen.layers[layer].attention
    scores = attention.query[head, query] @ attention.key[head // attention.group, : query + 1].T
    seen = torch.ones(query + 1, dtype=torch.bool)
    if attention.mask is not None:
        seen = attention.mask[query, : query + 1] > -1
    return scores * attention.scaling, seen, attention.pattern(slice(0, len(prompt)))[head, query]


def test_pairs_add_up_to_the_score_before_the_softmax(case):
    model, made, prompt, _ = case
    last = model.n_layers - 1
    for layer, head, query, key in ((0, 0, 5, 2), (2, 3, 11, 8), (1, 1, 7, 7), (1, 0, 0, 0), (last, 2, 9, 4)):
        scores, seen, pattern = scores_of(model, prompt, layer, head, query)
        found = qk_pairs(model, prompt, made, layer, head, query, key, top=None)
        assert found.score == pytest.approx(float(scores[key]), rel=2e-3, abs=2e-4)
        assert found.table["weight"].sum() == pytest.approx(found.score, rel=1e-3, abs=1e-4)
        seen[key] = False
        others = float(scores[seen].mean()) if seen.any() else 0.0
        assert found.n_others == int(seen.sum())
        assert found.relative == pytest.approx(float(scores[key]) - others, rel=2e-3, abs=3e-4)
        for table in (found.table, found.kinds):
            assert table["relative"].sum() == pytest.approx(found.relative, rel=1e-3, abs=1e-4)
        np.testing.assert_allclose(found.attention, pattern[: query + 1], atol=1e-5)
        kinds = set(found.table["query_kind"])
        assert {"embedding", "bias"} <= kinds
        assert ("feature" in kinds) == (layer > 0 and (query > 0 or model.bos_token_id is None))
        assert ("skip" in kinds) == (bool(layer) and hasattr(made[0], "W_skip"))


def test_a_pair_is_set_against_the_same_pair_at_the_other_keys(case):
    """Each pair's relative weight from the pairs of every other key, asked for one by one."""
    model, made, prompt, _ = case
    layer, head, query, key = 1, 2, 9, 6
    names = ["query_kind", "query_layer", "query_feature", "key_kind", "key_layer", "key_feature"]

    def pairs(at):
        table = qk_pairs(model, prompt, made, layer, head, query, at, top=None).table
        return table[table["key_kind"] != "elsewhere"].set_index(names)["weight"]

    found = qk_pairs(model, prompt, made, layer, head, query, key, top=None).table.set_index(names)
    _, seen, _ = scores_of(model, prompt, layer, head, query)
    others = [at for at in seen.nonzero()[:, 0].tolist() if at != key]
    means = sum(pairs(at).reindex(found.index, fill_value=0.0) for at in others) / len(others)
    here = found.index.get_level_values("key_kind") != "elsewhere"
    np.testing.assert_allclose(found["relative"][here], (found["weight"] - means)[here], rtol=1e-3, atol=1e-4)
    # What fires elsewhere only is of no weight here, and counts against it.
    assert (found["weight"][~here] == 0).all()
    assert (found["relative"][~here] != 0).any()


def test_bad_input(case):
    model, made, prompt, graph = case
    with pytest.raises(OutOfRangeError, match="key is 6"):
        qk_pairs(model, prompt, made, 0, 0, 5, 6)
    with pytest.raises(OutOfRangeError, match="head is"):
        qk_pairs(model, prompt, made, 0, 99, 5, 2)
    with pytest.raises(OutOfRangeError, match="no node"):
        edge_heads(graph, model, made, 0, 10**6)
    with pytest.raises(InvalidInputError, match="from a node of kind embedding to one of kind embedding"):
        edge_heads(graph, model, made, 0, 1)
    with pytest.raises(InvalidInputError, match="Nothing comes into"):
        node_heads(graph, model, made, 0)


def test_what_a_model_in_half_precision_recorded_is_taken_as_float32():
    model = LanguageModel.load(str(tiny_folder("llama")), device="cpu", dtype="bfloat16")
    made, prompt = transcoders(model), prompt_of(model, 12)
    graph = build_graph(model, prompt, made, ALL)
    exact = qk_pairs(tiny_model("llama"), prompt, made, 2, 1, 9, 3).score
    assert qk_pairs(model, prompt, made, 2, 1, 9, 3).score == pytest.approx(exact, rel=0.1, abs=0.05)
    edge = int(np.abs(graph.weight).argmax())
    heads = edge_heads(graph, model, made, int(graph.source[edge]), int(graph.target[edge]))
    assert heads["weight"].sum() == pytest.approx(float(graph.weight[edge]), rel=1e-3)
    node = int(graph.nodes["node"].iloc[-1])
    value = float(graph.nodes["value"].iloc[-1])
    assert node_heads(graph, model, made, node)["weight"].sum() == pytest.approx(value, rel=0.05, abs=0.05)
    found = logit_components(model, prompt, 300)
    assert found.table["effect"].sum() == pytest.approx(found.value, abs=1e-3)
