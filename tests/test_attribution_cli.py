"""Graphs as files, and `scope attribute`, `scope graph`, `scope graph verify` on a tiny model."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers_models import one_thread, tiny_folder, tiny_model
from helpers_saes import make
from test_attribution_graph import ALL, prompt_of, transcoders
from test_cli import scope

from scope.attribution.baselines import zero
from scope.attribution.graph import build_graph
from scope.attribution.graph_json import load_graph, save_graph
from scope.attribution.methods import attribute
from scope.attribution.pruning import prune
from scope.attribution.targets import router_logit
from scope.errors import InvalidInputError
from scope.saes.base import SAEMetadata
from scope.saes.formats import save

__all__ = ["one_thread"]

PROMPT = "The cat sat on the mat and looked at the"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SAE, and a transcoder for each layer, of the tiny Gemma."""
    path = tmp_path_factory.mktemp("dictionaries")
    model = tiny_model("gemma3")
    for layer, transcoder in enumerate(transcoders(model)):
        save(transcoder, path / "transcoders" / f"layer_{layer}")
    metadata = SAEMetadata(hook_name="blocks.1.hook_resid_post")
    save(make("topk", d_in=model.d_model, metadata=metadata), path / "sae")
    return path


def test_a_graph_is_read_as_it_was_written(tmp_path):
    model = tiny_model("gemma3")
    graph = prune(build_graph(model, prompt_of(model), transcoders(model), ALL), 0.7, 0.9)
    save_graph(graph, tmp_path / "graph.json", 0.7)
    read = load_graph(tmp_path / "graph.json")
    for name in ("source", "target", "weight"):
        np.testing.assert_array_equal(getattr(read, name), getattr(graph, name))
    columns = [name for name in graph.nodes.columns if name != "probability"]
    pd.testing.assert_frame_equal(read.nodes[columns], graph.nodes[columns], check_dtype=False)
    assert (read.tokens, read.token_ids, read.n_layers) == (graph.tokens, graph.token_ids, graph.n_layers)
    np.testing.assert_allclose(read.logit_weights, graph.logit_weights)


def test_the_file_is_what_circuit_tracers_page_reads(tmp_path):
    """Field names and id forms of its frontend/graph_models.py."""
    model = tiny_model("gemma3")
    graph = prune(build_graph(model, prompt_of(model), transcoders(model), ALL), 0.7, 0.9)
    save_graph(graph, tmp_path / "graph.json")
    content = json.loads((tmp_path / "graph.json").read_text())
    assert set(content) == {"metadata", "qParams", "nodes", "links"}
    assert {"slug", "scan", "transcoder_list", "prompt_tokens", "prompt", "schema_version"} <= set(content["metadata"])
    assert set(content["qParams"]) == {"pinnedIds", "supernodes", "linkType", "clickedId", "sg_pos"}
    ids = [node["node_id"] for node in content["nodes"]]
    assert len(set(ids)) == len(ids)
    assert len({node["jsNodeId"] for node in content["nodes"]}) >= len([i for i in ids if "_-1_" in i])
    assert {link[end] for link in content["links"] for end in ("source", "target")} <= set(ids)
    for node in content["nodes"]:
        layer, number, position = node["node_id"].split("_")
        assert int(position) == node["ctx_idx"]
        if node["feature_type"] == "cross layer transcoder":
            x, y = int(layer), int(number)
            assert node["feature"] == (x + y) * (x + y + 1) // 2 + y
    assert sum(node["is_target_logit"] for node in content["nodes"]) == 1


def test_a_graph_of_circuit_tracers_is_read(tmp_path):
    """As it writes them, without anything of ours."""
    content = {
        "metadata": {"slug": "x", "scan": "gemma-2-2b", "transcoder_list": [], "prompt_tokens": ["<bos>", "Hi"],
                     "prompt": "Hi", "node_threshold": 0.8, "schema_version": 1},
        "qParams": {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""},
        "nodes": [
            {"node_id": "E_17_1", "feature": 1, "layer": "E", "ctx_idx": 1, "feature_type": "embedding",
             "jsNodeId": "E_17-1"},
            {"node_id": "3_-1_1", "feature": -1, "layer": "3", "ctx_idx": 1,
             "feature_type": "mlp reconstruction error", "jsNodeId": "3_-1-1", "influence": 0.5},
            {"node_id": "2_40_1", "feature": 943, "layer": "2", "ctx_idx": 1, "feature_type": "cross layer transcoder",
             "jsNodeId": "2_40-0", "influence": 0.4, "activation": 2.5, "clerp": "greeting"},
            {"node_id": "5_99_1", "feature": 99, "layer": "5", "ctx_idx": 1, "feature_type": "logit",
             "token_prob": 0.25, "jsNodeId": "L_99-1", "is_target_logit": True},
        ],
        "links": [
            {"source": "E_17_1", "target": "2_40_1", "weight": 1.5},
            {"source": "2_40_1", "target": "5_99_1", "weight": -2},
        ],
    }  # fmt: skip
    (tmp_path / "graph.json").write_text(json.dumps(content))
    graph = load_graph(tmp_path / "graph.json")
    assert graph.nodes["kind"].tolist() == ["embedding", "error", "feature", "logit"]
    assert graph.nodes["layer"].tolist() == [-1, 3, 2, 4]
    assert graph.nodes["feature"].tolist() == [-1, -1, 40, 99]
    assert graph.weight.tolist() == [1.5, -2.0]
    assert graph.nodes["label"][2] == "greeting"
    older = json.loads(json.dumps(content).replace("3_-1_1", "0_3_1"))  # ids of error nodes as they once were
    del older["nodes"][1:3], older["links"][:]
    older["nodes"].append({**content["nodes"][1], "node_id": "0_3_1"})
    (tmp_path / "older.json").write_text(json.dumps(older))
    read = load_graph(tmp_path / "older.json")
    assert (read.n_layers, read.nodes["layer"].tolist()) == (4, [-1, 4, 3])
    del older["nodes"][2]  # nothing of the last layers is left
    (tmp_path / "older.json").write_text(json.dumps(older))
    assert load_graph(tmp_path / "older.json").n_layers == 4
    untold = json.dumps({**content, "metadata": {"prompt": "Hi"}})
    behind = json.dumps({**content, "metadata": {**content["metadata"], "prompt_tokens": ["<bos>"]}})
    wrong = (("{", "no circuit graph"), ('{"nodes": []}', "metadata"), (untold, "prompt_tokens"), (behind, "1 tokens"))
    for text, told in wrong:
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(InvalidInputError, match=told):
            load_graph(tmp_path / "bad.json")
    with pytest.raises(InvalidInputError, match="no graph at"):
        load_graph(tmp_path / "none.json")


def test_from_the_command_line(folder, tmp_path):
    common = ("--model", tiny_folder("gemma3"), "--prompt", PROMPT, "--json")
    token = tiny_model("gemma3").vocabulary_strings([305])[0]
    found = scope("attribute", "--sae", folder / "sae", "--target", token, "--top", 5, "--steps", 300, *common)
    assert len(found["effects"]) == 5
    assert found["completeness"]["blocks.1.hook_resid_post"] == pytest.approx(1, abs=0.3)
    out = tmp_path / "graph.json"
    made = scope("graph", "--transcoders", folder / "transcoders", "--out", out, "--max-features", 50, *common)
    assert made["nodes"]["feature"] > 0
    checked = scope("graph", "verify", out, "--json")
    assert {"slope", "correlation", "sign_agreement", "random", "attention_frozen"} <= checked.keys()
    assert set(checked["random"]) == {"slope", "correlation", "sign_agreement", "n"}
    alone = scope("graph", "verify", out, "--edges", "--json")
    assert 0 < alone["n"] < checked["n"]
    assert alone["attention_frozen"]["correlation"] > alone["random"]["correlation"]


def test_a_logit_as_a_sum_of_components_from_the_command_line(folder):
    token, other = tiny_model("gemma3").vocabulary_strings([305, 311])
    common = ("attribute", "--method", "components", "--model", tiny_folder("gemma3"), "--prompt", PROMPT, "--json")
    plain = scope(*common, "--target", token, "--against", other, "--top", 1000)
    assert sum(row["effect"] for row in plain["effects"]) == pytest.approx(plain["value"], rel=1e-4)
    assert sum(row["effect"] for row in plain["by_component"]) == pytest.approx(plain["value"], rel=1e-4)
    assert {row["component"] for row in plain["effects"]} == {"embedding", "attention", "mlp", "rounding"}
    assert all(row["strength"] is None for row in plain["effects"])
    split = scope(*common, "--target", token, "--against", other, "--top", 1000, "--sae", folder / "transcoders")
    assert {"feature", "error"} <= {row["component"] for row in split["effects"]}
    assert split["value"] == pytest.approx(plain["value"], rel=1e-4)


def test_a_routers_choice_from_the_command_line(tmp_path):
    model = tiny_model("qwen3_moe")
    sae = make("topk", d_in=model.d_model, metadata=SAEMetadata(hook_name="blocks.0.hook_resid_post"))
    save(sae, tmp_path / "sae")
    common = ("--model", tiny_folder("qwen3_moe"), "--prompt", PROMPT, "--json")
    found = scope("attribute", "--sae", tmp_path / "sae", "--router", "2:1", "--steps", 2, *common)
    expected = attribute(model, PROMPT, router_logit(model, 2, 1), sae, "integrated_gradients", zero(), steps=2)
    assert found["target"] == expected.target == "router logit of expert 1 in layer 2"
    assert found["value"] == pytest.approx(expected.value, rel=1e-4)
    strongest = expected.table.iloc[0]
    assert found["effects"][0]["effect"] == pytest.approx(strongest["effect"], rel=1e-3)


def test_what_is_wrong_is_said(folder, tmp_path):
    common = ("--model", tiny_folder("gemma3"), "--prompt", PROMPT, "--json")
    for arguments, told in (
        (("attribute", "--sae", folder / "sae", "--target", "xylophone quartz"), "a target is one token"),
        (("attribute", "--sae", folder / "sae", "--target", "a", "--method", "guess"), "integrated_gradients"),
        (("attribute", "--sae", folder / "sae", "--target", "a", "--position", 400), "out of range"),
        (("attribute", "--target", "a"), "--method components"),
        (("attribute", "--sae", folder / "sae"), "--target TOKEN, or --router"),
        (("attribute", "--sae", folder / "sae", "--router", "3"), "expected LAYER:EXPERT"),
        (("attribute", "--sae", folder / "sae", "--router", "1:0", "--against", "a"), "no --against"),
        (("attribute", "--sae", folder / "sae", "--router", "1:0"), "has no experts"),
        (("attribute", "--target", "a", "--method", "components", "--counterfactual", "x"), "--counterfactual"),
        (("graph", "--transcoders", folder / "sae", "--out", tmp_path / "g.json"), "ln2.hook_out"),
        (("graph", "--transcoders", tmp_path, "--out", tmp_path / "g.json"), "holds no transcoders"),
        (("graph", "--transcoders", folder, "--out", tmp_path / "g.json", "--node-share", 2), "node_share"),
        (("graph", "--transcoders", tmp_path, "--out", tmp_path), "cannot be written to"),
        (("graph", "--transcoders", tmp_path, "--out", folder / "sae" / "cfg.json" / "g.json"), "cannot be written to"),
    ):
        assert told in scope(*arguments, *common, code=2)["error"]["message"]
    assert not (tmp_path / "g.json").exists()


@pytest.mark.real
def test_the_benchmark_reports_each_length():
    found = scope("bench", "attribute", "--lengths", "6,9", "--max-features", 5, "--d-sae", 64, "--k", 4, "--json")
    assert [graph["tokens"] for graph in found["graphs"]] == [6, 9]
    for graph in found["graphs"]:
        assert graph["features"] == 5
        assert graph["active_features"] == 18 * 4 * (graph["tokens"] - 1)
        assert 0 < graph["build_seconds"] <= graph["seconds"]
        assert graph["peak_gigabytes"] > 0.1
        assert graph["peak_beside_model_gigabytes"] is None  # of a process that holds a model it cannot be told
