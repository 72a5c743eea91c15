"""How strongly features write each layer, against what adding exactly that does to the model's logits."""

import numpy as np
import pytest
import torch
from helpers_models import one_thread, tiny_folder, tiny_model
from test_attribution_dense import cross_layer
from test_attribution_graph import ALL, frozen_run, prompt_of, transcoders
from test_cli import scope

from scope.attribution import build_graph, layer_writes, prune
from scope.errors import InvalidInputError, OutOfRangeError
from scope.saes.formats import save

__all__ = ["one_thread"]


@pytest.mark.parametrize("kind", ["gemma3", "llama"])
def test_each_layers_effect_is_what_writing_it_alone_adds_to_the_logit(kind: str) -> None:
    model = tiny_model(kind)
    clt, prompt = cross_layer(model, "jumprelu"), prompt_of(model)
    graph = prune(build_graph(model, prompt, [clt], ALL), 0.7, 1.0)
    nodes = graph.nodes
    logits = nodes[nodes["kind"] == "logit"]
    end = logits.sort_values("probability").iloc[-1]
    found = layer_writes(graph, model, [clt])
    features = nodes[nodes["kind"] == "feature"]
    assert found["node"].drop_duplicates().tolist() == features["node"].tolist()
    rows = clt.W_dec.detach().unflatten(0, (model.n_layers, -1)).unflatten(-1, (model.n_layers, -1))
    _, final = frozen_run(model, prompt, {})
    pull = model.W_U[int(end["feature"])] - model.W_U.mean(0)
    for source in features.sample(6, random_state=0).itertuples():
        own = found[found["node"] == source.node]
        assert own["layer"].tolist() == list(range(source.layer, model.n_layers))
        for row in own.itertuples():
            written = rows[source.layer, source.feature, row.layer]
            assert row.norm == pytest.approx(float(written.norm()), rel=1e-5)
            assert row.written == pytest.approx(float(source.activation * written.norm()), rel=1e-4)
            added = torch.zeros(len(prompt), model.d_model)
            added[source.position] = source.activation * written
            _, moved = frozen_run(model, prompt, {row.layer: added})
            change = float((moved[-1] - final[-1]) @ pull)
            assert row.effect == pytest.approx(change, rel=1e-3, abs=5e-4)


@pytest.mark.parametrize("across", [True, False], ids=["clt", "transcoders"])
def test_the_layers_effects_sum_to_the_edge(across: bool) -> None:
    model = tiny_model("gemma3")
    made = [cross_layer(model, "jumprelu")] if across else transcoders(model)
    graph = build_graph(model, prompt_of(model), made, ALL)
    for end in graph.nodes[graph.nodes["kind"] == "logit"]["node"][:2]:
        table = layer_writes(graph, model, made, logit=end)
        sums = table.groupby("node")["effect"].sum()
        into = graph.target == end
        edges = dict(zip(graph.source[into], graph.weight[into], strict=True))
        np.testing.assert_allclose(sums, [edges.get(node, 0.0) for node in sums.index], rtol=1e-3, atol=2e-4)
        if not across:
            assert (table["layer"].to_numpy() == graph.nodes["layer"].to_numpy()[table["node"]]).all()


def test_what_is_no_feature_or_logit_is_refused() -> None:
    model = tiny_model("gemma3")
    graph = build_graph(model, prompt_of(model), transcoders(model), ALL)
    logit = int(graph.nodes[graph.nodes["kind"] == "logit"]["node"].iloc[0])
    with pytest.raises(InvalidInputError, match="expected a feature"):
        layer_writes(graph, model, transcoders(model), [logit])
    with pytest.raises(InvalidInputError, match="expected a logit"):
        layer_writes(graph, model, transcoders(model), logit=0)
    with pytest.raises(OutOfRangeError, match="no node"):
        layer_writes(graph, model, transcoders(model), [10**6])
    with pytest.raises(InvalidInputError, match="features of layer"):
        layer_writes(graph, model, transcoders(model, layers=[0]))


def test_from_the_command_line(tmp_path) -> None:
    model = tiny_model("gemma3")
    save(cross_layer(model, "jumprelu"), tmp_path / "across")
    out = tmp_path / "graph.json"
    scope(
        *("graph", "--model", tiny_folder("gemma3"), "--transcoders", tmp_path / "across", "--out", out),
        *("--prompt", "The cat sat on the mat", "--max-features", 40),
    )
    found = scope("graph", "writes", out, "--top", 5, "--json")
    assert len(found["features"]) == 5
    shares = [one["influence"] for one in found["features"]]
    assert shares == sorted(shares, reverse=True)
    for one in found["features"]:
        assert [row["layer"] for row in one["writes"]] == list(range(one["layer"], model.n_layers))
        assert sum(row["effect"] for row in one["writes"]) == pytest.approx(one["effect"], rel=1e-5, abs=1e-6)
    told = scope("graph", "writes", out, "--top", 5, "--target", found["target"]).stdout
    first = found["features"][0]
    assert f"L{first['layer']} feature {first['feature']} at {first['position']}" in told
    assert "next token" in scope("graph", "writes", out, "--target", "xyzzy", code=2).stderr
