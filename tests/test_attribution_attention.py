"""Attention explained: heads of an edge add up to it, pairs of nodes to a score before the softmax."""

import numpy as np
import pytest
import torch
from helpers_models import one_thread, tiny_model
from test_attribution_graph import ALL, KINDS, prompt_of, transcoders

from scope.attribution.attention import edge_heads, qk_pairs
from scope.attribution.freezing import freeze
from scope.attribution.graph import build_graph
from scope.errors import InvalidInputError, OutOfRangeError

__all__ = ["one_thread"]


@pytest.fixture(scope="module", params=[*KINDS, "skip"])
def case(request):
    skip = request.param == "skip"
    model = tiny_model("gemma3" if skip else request.param)
    made = transcoders(model, "skip_transcoder" if skip else "transcoder")
    if skip:
        for sae in made:
            sae.W_skip.data += 0.1 * torch.randn(sae.W_skip.shape, generator=torch.Generator().manual_seed(3))
    prompt = prompt_of(model, 12)
    return model, made, prompt, build_graph(model, prompt, made, ALL)


def test_heads_add_up_to_the_edge(case):
    model, made, _, graph = case
    rng = np.random.default_rng(0)
    for edge in rng.choice(len(graph.weight), 12, replace=False):
        source, target, weight = int(graph.source[edge]), int(graph.target[edge]), float(graph.weight[edge])
        table = edge_heads(graph, model, made, source, target)
        assert table["weight"].sum() == pytest.approx(weight, rel=2e-3, abs=2e-4)
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


def test_pairs_add_up_to_the_score_before_the_softmax(case):
    model, made, prompt, _ = case
    frozen, _ = freeze(model, prompt)
    for layer, head, query, key in ((0, 0, 5, 2), (2, 3, 11, 8), (1, 1, 7, 7)):
        attention = frozen.layers[layer].attention
        scores = attention.query[head, query] @ attention.key[head // attention.group, : query + 1].T
        scores = scores * attention.scaling
        found = qk_pairs(model, prompt, made, layer, head, query, key, top=None)
        assert found.score == pytest.approx(float(scores[key]), rel=2e-3, abs=2e-4)
        assert found.table["weight"].sum() == pytest.approx(found.score, rel=1e-3, abs=1e-4)
        seen = scores
        if attention.mask is not None:
            seen = scores[attention.mask[query, : query + 1] > -1]
        assert found.relative == pytest.approx(float(scores[key] - seen.mean()), rel=2e-3, abs=2e-4)
        assert found.pattern == pytest.approx(float(attention.pattern(slice(0, 12))[head, query, key]), abs=1e-5)
        names = set(found.table["query_node"])
        assert {"embedding", "bias"} <= names
        assert any("feature" in name for name in names) == (layer > 0)


def test_bad_input(case):
    model, made, prompt, graph = case
    with pytest.raises(OutOfRangeError, match="key is 6"):
        qk_pairs(model, prompt, made, 0, 0, 5, 6)
    with pytest.raises(OutOfRangeError, match="head is"):
        qk_pairs(model, prompt, made, 0, 99, 5, 2)
    with pytest.raises(OutOfRangeError, match="no node"):
        edge_heads(graph, model, made, 0, 10**6)
    with pytest.raises(InvalidInputError, match="No edge goes"):
        edge_heads(graph, model, made, 0, 1)
