"""Per-layer embeddings as sources: what a layer's table wrote, along features, and in circuit graphs."""

import numpy as np
import pandas as pd
import pytest
import torch
from helpers_models import PER_LAYER_KINDS, tiny_folder, tiny_model
from helpers_models import one_thread as one_thread
from helpers_saes import make
from jaxtyping import TypeCheckError

from scope.attribution import (
    build_graph,
    counterfactual,
    load_graph,
    logit,
    logit_difference,
    mean,
    per_layer_writes,
    prune,
    save_graph,
    table_effects,
)
from scope.attribution.freezing import freeze
from scope.attribution.graph_settings import GraphSettings
from scope.errors import InvalidInputError, MismatchError, UnknownNameError
from scope.figures.per_layer import per_layer_bars, per_layer_heatmap
from scope.models import LanguageModel
from scope.saes.base import SAEMetadata

ALL = GraphSettings(max_features=10_000, edges_per_target=10_000, batch_size=7)
LAYER = 1
PROMPT = torch.tensor([2, *torch.randint(290, 390, (9,), generator=torch.Generator().manual_seed(4)).tolist()])


def transcoders(model):
    made = []
    for layer in range(model.n_layers):
        metadata = SAEMetadata(hook_name=f"blocks.{layer}.ln2.hook_out", hook_name_out=f"blocks.{layer}.hook_mlp_out")
        d = model.d_model
        made.append(
            make("transcoder", d_in=d, d_out=d, activation="topk", d_sae=60, k=6, seed=layer, metadata=metadata)
        )
    return made


@pytest.fixture(scope="module", params=["gemma3n", "gemma4", "gemma4_experts"])
def case(request):
    model = tiny_model(request.param)
    made = transcoders(model)
    return model, made, build_graph(model, PROMPT, made, ALL)


def test_what_comes_in_adds_up_to_what_a_node_is(case):
    """Σ edges + biases = the pre-activation, or the centred logit: shared and normed values, scalars, streams."""
    _, _, graph = case
    sums = np.zeros(len(graph.nodes))
    np.add.at(sums, graph.target, graph.weight)
    expanded = graph.nodes[graph.nodes["kind"].isin(["feature", "logit"])]
    assert (expanded["kind"] == "feature").sum() == graph.n_active > 50
    np.testing.assert_allclose(sums[expanded["node"]] + expanded["bias"], expanded["value"], rtol=2e-3, atol=2e-4)


def linear_run(model, prompt, without=None):
    """What every MLP reads and what the unembedding reads, run forwards from the weights with attention patterns, norm
    denominators and gates as they were, MLPs constant, and one layer's table empty."""
    frozen, _ = freeze(model, prompt)
    hooks = [f"blocks.{i}.{name}" for i in range(model.n_layers) for name in ("ple.hook_gate", "ple.hook_out")]
    seen = model.run(prompt, hooks=["hook_embed", *hooks, "blocks.0.ple.hook_table"]).activations
    backbone, d_ple = model.hf.model, model.layout.d_per_layer
    rows, x, values = slice(0, len(prompt)), frozen.embedding, {}

    def denominator(y, norm):
        return (y.square().mean(-1, keepdim=True) + norm.eps).sqrt()

    tables = backbone.embed_tokens_per_layer(prompt).unflatten(-1, (model.n_layers, d_ple))
    projected = (seen["hook_embed"] @ backbone.per_layer_model_projection.weight.T) * model.d_model**-0.5
    projected = backbone.per_layer_projection_norm(projected.unflatten(-1, (model.n_layers, d_ple)))
    reads = []
    for index, layer in enumerate(backbone.layers):
        normed, attention = frozen.layers[index].ln1(x, rows), layer.self_attn
        if not attention.is_kv_shared_layer:
            weight = attention.k_proj.weight if attention.v_proj is None else attention.v_proj.weight
            raw = (normed @ weight.T).unflatten(-1, (-1, attention.head_dim))
            actual = model.run(
                prompt, hooks=[f"blocks.{index}.attn.hook_{'k' if attention.v_proj is None else 'v'}"]
            ).activations.popitem()[1]
            values[attention.layer_type] = raw / denominator(actual, attention.v_norm)
        there = values[attention.layer_type].movedim(1, 0)
        pattern = frozen.layers[index].attention.pattern(rows)
        heads = pattern @ there.repeat_interleave(len(pattern) // len(there), 0)
        x = x + frozen.layers[index].ln1_post(heads.movedim(0, 1).flatten(1) @ attention.o_proj.weight.T, rows)
        reads.append(frozen.layers[index].ln2(x, rows))
        table = tables[:, index] * (0.0 if index == without else 1.0)
        gate, out = (seen[f"blocks.{index}.ple.{name}"] for name in ("hook_gate", "hook_out"))
        product = gate * (table + projected[:, index]) * 0.5**0.5
        norm = layer.post_per_layer_input_norm
        written = (product @ layer.per_layer_projection.weight.T) / denominator(out, norm) * norm.weight
        x = (x + frozen.layers[index].mlp_out + written) * layer.layer_scalar
    return reads, frozen.final_norm(x, rows)


def test_an_empty_table_changes_each_target_by_its_edges_and_no_other():
    model = tiny_model("gemma4")
    made = transcoders(model)
    graph = build_graph(model, PROMPT, made, ALL)
    base, final = linear_run(model, PROMPT)
    own = model.run(PROMPT, hooks=[f"blocks.{i}.ln2.hook_out" for i in range(model.n_layers)]).activations
    for read, there in zip(base, own.values(), strict=True):
        torch.testing.assert_close(read, there, rtol=1e-3, atol=1e-3)
    reads, moved = linear_run(model, PROMPT, without=LAYER)
    tables = graph.nodes[(graph.nodes["kind"] == "table") & (graph.nodes["layer"] == LAYER)]
    assert len(tables) == len(PROMPT)
    edges = graph.edges()
    told = edges[edges["source"].isin(tables["node"])].groupby("target")["weight"].sum()
    for target in graph.nodes[graph.nodes["kind"].isin(["feature", "logit"])].itertuples():
        if target.kind == "logit":
            change = float((moved[-1] - final[-1]) @ (model.W_U[target.feature] - model.W_U.mean(0)))
        else:
            column = made[target.layer].W_enc.detach()[:, target.feature]
            change = float((reads[target.layer][target.position] - base[target.layer][target.position]) @ column)
        assert change == pytest.approx(-told.get(target.node, 0.0), rel=2e-3, abs=2e-4)
        if target.kind == "feature" and target.layer <= LAYER:
            assert target.node not in told.index


@pytest.mark.parametrize("kind", PER_LAYER_KINDS)
def test_a_zeroed_table_empties_its_own_sources_and_leaves_the_others_before_it(kind):
    model = LanguageModel.load(str(tiny_folder(kind)), device="cpu", dtype="float32")
    made = transcoders(model)
    before = build_graph(model, PROMPT, made, ALL)
    width = model.layout.d_per_layer
    model.hf.model.embed_tokens_per_layer.weight[:, LAYER * width : (LAYER + 1) * width] = 0
    after = build_graph(model, PROMPT, made, ALL)

    def tables(graph, layer):
        rows = graph.nodes[(graph.nodes["kind"] == "table") & (graph.nodes["layer"] == layer)]
        return rows["node"].to_numpy(), rows["activation"].to_numpy()

    numbers, norms = tables(after, LAYER)
    assert (norms == 0).all()
    assert not np.isin(after.source, numbers).any()
    assert np.isin(before.source, tables(before, LAYER)[0]).any()
    for layer in range(LAYER):
        np.testing.assert_array_equal(tables(before, layer)[1], tables(after, layer)[1])
    for layer in range(LAYER + 1, model.n_layers):
        assert (tables(after, layer)[1] > 0).all()
    kept = ["kind", "layer", "position", "feature", "activation", "value"]
    early = [
        graph.nodes[(graph.nodes["kind"].isin(["embedding", "feature"])) & (graph.nodes["layer"] <= LAYER)][kept]
        for graph in (before, after)
    ]
    pd.testing.assert_frame_equal(*(frame.reset_index(drop=True) for frame in early))


def test_table_nodes_survive_pruning_and_a_file(tmp_path):
    model = tiny_model("gemma4")
    graph = prune(build_graph(model, PROMPT, transcoders(model), ALL), 0.9)
    assert (graph.nodes["kind"] == "table").any()
    save_graph(graph, tmp_path / "graph.json")
    read = load_graph(tmp_path / "graph.json")
    columns = ["kind", "layer", "position", "feature"]
    pd.testing.assert_frame_equal(read.nodes[columns], graph.nodes[columns], check_dtype=False)
    np.testing.assert_array_equal(read.source, graph.source)


@pytest.mark.parametrize("kind", PER_LAYER_KINDS)
def test_the_report_says_what_taking_the_table_away_does_to_the_features(kind):
    """Along the skip connection a feature's pre-activation loses what the report says when the write loses its table
    part, in the model itself."""
    model = tiny_model(kind)
    stacked = model.layout.n_streams > 1
    hook = f"blocks.2.{'hook_streams_post' if stacked else 'hook_resid_post'}"
    width = model.d_model * model.layout.n_streams
    sae = make("topk", d_in=width, d_sae=80, k=8, seed=3, metadata=SAEMetadata(hook_name=hook))
    report = per_layer_writes(model, PROMPT, [sae], top=None)
    layers = {2} if stacked else {0, 1, 2}
    assert set(report.features["layer"]) == layers
    own = report.features[report.features["layer"] == 2]
    written = per_layer_writes(model, PROMPT).writes
    part = {}
    from scope.models.per_layer import write_hooks, write_parts

    seen = model.run(PROMPT, hooks=write_hooks(2)).activations
    part = write_parts(model, 2, seen).table

    def take_away(value, context):
        return value - part

    plain = model.run(PROMPT, hooks=[hook]).activations[hook].flatten(1)
    without = model.run(PROMPT, hooks=[hook], edits={"blocks.2.hook_ple_out": take_away}).activations[hook].flatten(1)
    lost = (plain - without) @ sae.W_enc.detach()
    expected = [float(lost[row.position, row.feature]) for row in own.itertuples()]
    np.testing.assert_allclose(own["table"], expected, rtol=1e-3, atol=1e-4)
    norms = written[(written["layer"] == 2) & (written["part"] == "table")]["norm"]
    np.testing.assert_allclose(norms, part.norm(dim=-1), rtol=1e-5)
    assert not (own["position"] == 0).any()  # BOS
    wide = report.of_token(3)
    assert list(wide["layer"]) == list(range(model.n_layers))
    assert (wide[["table", "projection", "share_table"]] > 0).all(axis=None)
    assert len(per_layer_heatmap(report.writes).data[0].z) == model.n_layers
    assert len(per_layer_bars(report.writes, 3, theme="dark").data) == 2


def value_of(model, target, edits=None):
    state = model.run(PROMPT, hooks=[target.hook], edits=edits, logits=False).activations[target.hook]
    return float(target.value(model, state, PROMPT))


def row_at_zero(position):
    def put(value, context):
        value[:, position] = 0

    return put


@pytest.mark.parametrize("kind", PER_LAYER_KINDS)
def test_the_effect_of_a_tokens_row_is_what_the_target_loses_without_it(kind):
    model = tiny_model(kind)
    target = logit_difference(305, 310)
    found = table_effects(model, PROMPT, target, "activation_patching", batch_size=4)
    plain = value_of(model, target)
    assert found.value == pytest.approx(plain, abs=1e-5)
    assert set(zip(found.table["layer"], found.table["position"], strict=True)) == {
        (layer, position) for layer in range(model.n_layers) for position in range(1, len(PROMPT))
    }
    for row in found.table.iloc[[0, 1, 5, -1]].itertuples():
        without = value_of(model, target, {f"blocks.{row.layer}.ple.hook_table": row_at_zero(row.position)})
        assert row.effect == pytest.approx(plain - without, abs=1e-4)
    assert found.table["effect"].abs().max() > 1e-3


@pytest.mark.parametrize("kind", PER_LAYER_KINDS)
@pytest.mark.parametrize("other", [None, PROMPT.flip(0)])
def test_the_effects_of_all_rows_add_up_to_what_the_tables_did(kind, other):
    """Integrated gradients, down to a model whose tables are empty but for BOS, or hold another prompt's rows."""
    model = tiny_model(kind)
    target = logit(305)
    found = table_effects(model, PROMPT, target, baseline=None if other is None else counterfactual(other), steps=80)
    if other is None:
        emptied = LanguageModel.load(str(tiny_folder(kind)), device="cpu", dtype="float32")
        table = emptied.hf.model.embed_tokens_per_layer.weight
        table[[token for token in range(len(table)) if token != int(PROMPT[0])]] = 0
        without = value_of(emptied, target)
    else:
        hooks = [f"blocks.{layer}.ple.hook_table" for layer in range(model.n_layers)]
        seen = model.run(other, hooks=hooks, logits=False).activations
        without = value_of(model, target, {hook: lambda v, c: seen[c.name][None].clone() for hook in hooks})
    assert found.without == pytest.approx(without, abs=1e-4)
    assert abs(found.value - found.without) > 1e-3
    assert found.completeness == pytest.approx(1, abs=0.05)
    assert found.by_layer()["effect"].sum() == pytest.approx(found.by_token()["effect"].sum())
    assert "without the tables" in found._repr_html_()


@pytest.mark.parametrize("kind", PER_LAYER_KINDS)
@pytest.mark.parametrize("method", ["integrated_gradients", "activation_patching"])
def test_an_empty_table_has_no_effect_and_those_of_other_layers_have(kind, method):
    model = LanguageModel.load(str(tiny_folder(kind)), device="cpu", dtype="float32")
    width = model.layout.d_per_layer
    model.hf.model.embed_tokens_per_layer.weight[:, LAYER * width : (LAYER + 1) * width] = 0
    found = table_effects(model, PROMPT, logit(305), method)
    assert set(found.table["layer"]) == {layer for layer in range(model.n_layers) if layer != LAYER}
    assert (found.by_layer()["effect"].abs() > 1e-5).all()


def test_what_has_no_tables_or_no_baseline_is_refused():
    model = tiny_model("gemma4")
    with pytest.raises(InvalidInputError, match="no per-layer embeddings"):
        table_effects(tiny_model("gemma3"), PROMPT, logit(305))
    with pytest.raises(InvalidInputError, match="mean baseline"):
        table_effects(model, PROMPT, logit(305), baseline=mean(model, [], [PROMPT]))
    with pytest.raises(MismatchError, match="line up"):
        table_effects(model, PROMPT, logit(305), baseline=counterfactual(PROMPT[:4]))
    with pytest.raises((UnknownNameError, TypeCheckError), match="integrated_gradients"):
        table_effects(model, PROMPT, logit(305), "guess")  # type: ignore[arg-type]


def test_other_models_and_other_hooks_are_refused():
    with pytest.raises(InvalidInputError, match="no per-layer embeddings"):
        per_layer_writes(tiny_model("gemma3"), PROMPT)
    sae = make("topk", d_in=32, d_sae=40, k=4, metadata=SAEMetadata(hook_name="blocks.1.hook_mlp_out"))
    with pytest.raises(InvalidInputError, match="hook_resid_post"):
        per_layer_writes(tiny_model("gemma4"), PROMPT, [sae])
