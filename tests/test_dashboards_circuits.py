"""The circuit page's data: graphs of a workspace, pruned and named, supernodes, verdicts, files, jobs on a model."""

import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import typer
from helpers_circuits import made_graph
from helpers_models import one_thread, tiny_folder, tiny_model
from plotly.utils import PlotlyJSONEncoder
from test_attribution_dense import cross_layer
from test_attribution_graph import transcoders

from dashboards.circuit_jobs import HeadPlace, MakeRequest, circuit_jobs
from dashboards.circuits import MAX_NODES, Circuits, Thresholds, thresholds_of
from dashboards.components.circuit_attention import pairs
from dashboards.components.circuit_view import graph_view, make_form, missing_part
from dashboards.components.circuit_writes import writes
from dashboards.context import Context
from dashboards.dictionaries import dictionaries
from dashboards.worker import Job, JobState
from scope.attribution.graph_json import Supernode, load_graph, node_ids, save_graph
from scope.attribution.pruning import only_nodes, prune
from scope.attribution.query_key import QkPairs
from scope.attribution.supernodes import Supernodes
from scope.attribution.verdicts import load_verification, save_verification, verdicts
from scope.attribution.verification import Agreement, Verification
from scope.cli import app
from scope.errors import IntegrityError, InvalidInputError, OutOfRangeError, UnknownNameError
from scope.features.labels import FeatureLabels
from scope.figures import verification_scatter
from scope.interventions import Intervention, InterventionSpec
from scope.saes.formats import save
from scope.workspace import Workspace

__all__ = ["one_thread"]

NO_AGREEMENT = Agreement(1.0, 1.0, 1.0, 0)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    workspace = Workspace(tmp_path / "workspace")
    save_graph(made_graph(60), workspace.path_for("circuit-graph", "made"), 0.9)
    return workspace


@pytest.fixture
def known(workspace: Workspace) -> Circuits:
    return Circuits(Context(workspace))


def measured(pairs: list[tuple[int, int, float, float, float]]) -> Verification:
    """source, target, predicted, measured, random; each at both factors, with opposite signs."""
    rows = [
        (source, target, factor, sign * predicted, sign * found, sign * random, sign * found)
        for source, target, predicted, found, random in pairs
        for factor, sign in ((0.0, -1), (2.0, 1))
    ]
    names = ["source", "target", "factor", "predicted", "measured", "measured_random", "measured_frozen"]
    return Verification(NO_AGREEMENT, NO_AGREEMENT, NO_AGREEMENT, pd.DataFrame(rows, columns=names))


def test_graphs_are_artefacts_of_a_workspace(workspace: Workspace, tmp_path: Path) -> None:
    (entry,) = workspace.graphs()
    assert (entry.kind, entry.name, len(entry.id)) == ("circuit-graph", "made", 12)
    assert entry.manifest["features"] == 60
    assert workspace.find(entry.id).path == entry.path
    assert len(workspace.graph("made").nodes) == entry.manifest["nodes"]
    elsewhere = tmp_path / "elsewhere.json"
    save_graph(made_graph(20, seed=1), elsewhere)
    assert workspace.add(elsewhere) == workspace.add(elsewhere)
    assert {one.name for one in workspace.graphs()} == {"made", "elsewhere"}
    assert [one.name for one in workspace.entries("sae")] == []
    with pytest.raises(InvalidInputError, match="no circuit graph"):
        workspace.add(Path(__file__))
    # Written anew, it is another graph.
    save_graph(made_graph(21, seed=1), elsewhere)
    assert workspace.find("elsewhere").id != entry.id
    (workspace.path / "graphs" / "broken.json").write_text("{}")
    problems = {one.name: one.problem for one in workspace.graphs()}
    assert problems["made"] is None
    assert "no circuit graph" in problems["broken"]


def test_a_payload_is_the_pruned_graph(known: Circuits) -> None:
    wanted = Thresholds(0.7, 0.9)
    whole = known.graph("made")
    expected = prune(whole, *wanted)
    found = known.payload("made", wanted)
    assert found["nodes"]["id"] == node_ids(expected)
    assert found["n_edges"] == len(expected.weight) < len(whole.weight)
    ids = found["nodes"]["id"]
    drawn = {
        (ids[s], ids[t]): w
        for s, t, w in zip(*(found["edges"][name] for name in ("source", "target", "weight")), strict=True)
    }
    own = {
        (ids[s], ids[t]): w for s, t, w in zip(expected.source, expected.target, expected.weight.tolist(), strict=True)
    }
    assert drawn == pytest.approx(own, rel=1e-4)
    assert set(found["nodes"]["holds"]) == set(found["edges"]["holds"]) == {None}
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert known.number("made", ids[5]) == node_ids(whole).index(ids[5])


def test_a_payload_opens_each_index_once(known: Circuits, monkeypatch: pytest.MonkeyPatch) -> None:
    index = SimpleNamespace(d_sae=512, table=pd.DataFrame({"top_tokens": [[str(n)] for n in range(512)]}))
    opened: list[str] = []
    monkeypatch.setattr(Circuits, "_indexes", lambda *_: {layer: SimpleNamespace(id=str(layer)) for layer in range(12)})
    monkeypatch.setattr(Context, "index", lambda _, id: opened.append(id) or index)
    nodes = known.payload("made", Thresholds(1.0, 1.0))["nodes"]
    assert len(opened) == len(set(opened)) <= 12
    features = [n for n, kind in enumerate(nodes["kind"]) if kind == "feature"]
    assert [nodes["name"][n] for n in features] == [str(nodes["feature"][n]) for n in features]


def test_a_large_graph_opens_with_as_many_nodes_as_can_be_read(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    save_graph(made_graph(900), workspace.path_for("circuit-graph", "large"))
    known = Circuits(Context(workspace))
    default = known.default("large")
    assert default.nodes < 1
    assert 100 < len(known.shown("large", default).ids) <= MAX_NODES


def test_thresholds_that_cannot_be_are_refused() -> None:
    assert thresholds_of({"nodes": "0.5"}) == Thresholds(0.5, 1.0)
    for text in ("0", "-1", "1.5", "nan", "<b>"):
        with pytest.raises(InvalidInputError, match="share of influence of edges"):
            thresholds_of({"edges": text})


def test_supernodes_are_kept_in_the_workspace_and_travel_with_an_export(known: Circuits, workspace: Workspace) -> None:
    before = workspace.find("made").path.read_bytes()
    shown = known.shown("made", Thresholds(1.0, 1.0))
    ids = [id for id, kind in zip(shown.ids, shown.graph.nodes["kind"], strict=True) if kind == "feature"]
    known.group("made", [["about <hot>", *ids[:3]], ["rest", ids[4]]])
    assert workspace.find("made").path.read_bytes() == before
    assert known.supernodes("made") == [Supernode("about <hot>", tuple(ids[:3])), Supernode("rest", (ids[4],))]
    content = known.export("made", Thresholds(1.0, 1.0), hidden=[ids[1]], pinned=[ids[0], "nothing"])
    assert content["qParams"]["supernodes"] == [["about <hot>", ids[0], ids[2]], ["rest", ids[4]]]
    assert content["qParams"]["pinnedIds"] == [ids[0]]
    path = workspace.path_for("circuit-graph", "again")
    path.write_text(json.dumps(content))
    again = load_graph(path)
    left = only_nodes(shown.graph, np.array([id != ids[1] for id in shown.ids]))
    np.testing.assert_array_equal(again.weight, left.weight)
    # A file's own supernodes show until something is said in the workspace.
    assert [group.name for group in known.supernodes("again")] == ["about <hot>", "rest"]
    known.group("again", [])
    assert known.supernodes("again") == []


def test_supernodes_that_cannot_be_are_refused(known: Circuits, tmp_path: Path) -> None:
    ids = node_ids(known.graph("made"))
    with pytest.raises(UnknownNameError, match="node"):
        known.group("made", [["name", "99_99_99"]])
    kept = Supernodes("f" * 64, tmp_path / "w.db")
    for groups in ([Supernode(" ", (ids[0],))], [Supernode("a", ())], [Supernode("x" * 121, (ids[0],))]):
        with pytest.raises(InvalidInputError):
            kept.write(groups)
    with pytest.raises(InvalidInputError, match="another"):
        kept.write([Supernode("a", (ids[0],)), Supernode("b", (ids[0],))])
    assert kept.read() is None


def test_all_logits_hidden_is_no_file(known: Circuits) -> None:
    graph = known.graph("made")
    logits = [id for id, kind in zip(node_ids(graph), graph.nodes["kind"], strict=True) if kind == "logit"]
    with pytest.raises(InvalidInputError, match="logits are hidden"):
        known.export("made", Thresholds(1.0, 1.0), logits, [])


def test_what_holds_has_the_sign_and_about_the_size(tmp_path: Path) -> None:
    found = measured(
        [
            (1, 5, 2.0, 2.5, 0.1),
            (1, 6, -1.0, -0.8, 0.3),
            (2, 5, 1.0, 0.2, 1.1),
            (2, 6, 1.0, -1.0, 0.0),
            (3, 6, 0.0, 4, 4),
        ]
    )
    judged = verdicts(found)
    assert judged.nodes.set_index("source")["holds"].to_dict() == {1: True, 2: False}
    by_pair = judged.pairs.set_index(["source", "target"])
    assert by_pair["holds"].to_dict() == {(1, 5): True, (1, 6): True, (2, 5): False, (2, 6): False}
    assert by_pair["slope"].to_dict() == pytest.approx({(1, 5): 1.25, (1, 6): 0.8, (2, 5): 0.2, (2, 6): -1.0})
    assert by_pair["holds_random"].to_dict() == {(1, 5): False, (1, 6): False, (2, 5): True, (2, 6): False}
    save_verification(found, tmp_path / "verified" / "x.parquet")
    again = load_verification(tmp_path / "verified" / "x.parquet")
    assert again is not None
    pd.testing.assert_frame_equal(verdicts(again).pairs, judged.pairs, rtol=1e-5, check_dtype=False)
    assert again.model.n == 8
    assert load_verification(tmp_path / "nothing") is None
    (tmp_path / "bad").write_text("no parquet")
    with pytest.raises(IntegrityError, match="verify again"):
        load_verification(tmp_path / "bad")


def test_an_effect_of_the_wrong_sign_in_one_run_does_not_hold() -> None:
    """Set to 0 it does nothing, or the opposite; doubled, more than enough to make up for that."""
    pairs = measured([(1, 5, 2.0, 2.0, 0.0), (1, 6, 2.0, 2.0, 0.0)]).pairs
    pairs.loc[(pairs["target"] == 6) & (pairs["factor"] == 0), "measured"] = 0.1
    judged = verdicts(Verification(NO_AGREEMENT, NO_AGREEMENT, NO_AGREEMENT, pairs)).pairs.set_index("target")
    assert 0.4 < judged["slope"][6] < 0.6
    pairs.loc[(pairs["target"] == 6) & (pairs["factor"] == 2), "measured"] = 3.0
    judged = verdicts(Verification(NO_AGREEMENT, NO_AGREEMENT, NO_AGREEMENT, pairs)).pairs.set_index("target")
    assert 0.5 < judged["slope"][6] < 2
    assert judged["holds"].to_dict() == {5: True, 6: False}


def test_a_scatter_shows_both_and_says_where_they_agree() -> None:
    figure = verification_scatter(measured([(1, 5, 2.0, 2.5, 0.1), (1, 6, -1.0, 0.8, 0.3)]).pairs)
    points = [trace for trace in figure.data if trace.mode == "markers"]
    assert len(points) == 2
    assert list(points[0].x) == [-2.0, 2.0, 1.0, -1.0]
    assert list(points[0].marker.symbol) == ["circle", "circle", "x-thin-open", "x-thin-open"]
    assert verification_scatter(measured([]).pairs).data


def test_verdicts_reach_the_nodes_and_edges_that_are_shown(known: Circuits, workspace: Workspace) -> None:
    graph = known.graph("made")
    shown = known.shown("made", Thresholds(1.0, 1.0))
    kinds = shown.graph.nodes["kind"].to_numpy()
    edge = next(n for n in range(len(shown.graph.weight)) if kinds[shown.graph.source[n]] == "feature")
    source, target = (int(shown.numbers[end[edge]]) for end in (shown.graph.source, shown.graph.target))
    save_verification(measured([(source, target, 1.0, -1.0, 0.0)]), workspace.verification_path("made"))
    found = known.payload("made", Thresholds(1.0, 1.0))
    ids = found["nodes"]["id"]
    at = {id: n for n, id in enumerate(ids)}
    names = node_ids(graph)
    assert found["nodes"]["holds"][at[names[source]]] is False
    ends = list(zip(found["edges"]["source"], found["edges"]["target"], strict=True))
    assert found["edges"]["holds"][ends.index((at[names[source]], at[names[target]]))] is False
    assert sum(one is not None for one in found["edges"]["holds"]) == 1


@pytest.fixture(scope="module")
def dictionary_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a transcoder for each layer of the tiny Gemma."""
    workspace = Workspace(tmp_path_factory.mktemp("circuits") / "workspace")
    model = tiny_model("gemma3")
    for layer, transcoder in enumerate(transcoders(model)):
        metadata = replace(transcoder.cfg.metadata, model_name=str(tiny_folder("gemma3")))
        transcoder.cfg = replace(transcoder.cfg, metadata=metadata)
        save(transcoder, workspace.path_for("sae", f"mlp-{layer}"))
    return workspace.path


def add_cross_layer(workspace: Workspace) -> None:
    """Put a cross-layer transcoder of the tiny Gemma into a workspace."""
    clt = cross_layer(tiny_model("gemma3"), "jumprelu")
    clt.cfg = replace(clt.cfg, metadata=replace(clt.cfg.metadata, model_name=str(tiny_folder("gemma3"))))
    save(clt, workspace.path_for("sae", "across"))


def ended(context: Context, job: Job) -> Job:
    context.worker.wait(job, 600)
    assert job.state is JobState.DONE, job.error
    return job


def test_a_graph_is_made_verified_and_its_edges_split(dictionary_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(dictionary_folder, tmp_path / "w")
    context = Context(Workspace(tmp_path / "w"))
    jobs, known = circuit_jobs(context), Circuits(context)
    chosen = dictionaries(context)
    assert [one.layers for one in chosen] == [(layer,) for layer in range(len(chosen))]
    asked = MakeRequest("The cat sat on the mat", tuple(one.entry.id for one in chosen), ("the",), 64)
    id = ended(context, jobs.submit_make(asked)).result
    graph = known.graph(id)
    assert context.workspace.find(id).name == "the-cat-sat-on-the-mat"
    assert list(graph.nodes.loc[graph.nodes["kind"] == "logit", "label"]) in (["the"], [" the"])
    assert sorted(known.used(graph)) == list(range(len(chosen)))
    # Names: what is said of a feature in the workspace.
    row = graph.nodes[graph.nodes["kind"] == "feature"].iloc[0]
    own = known.used(graph)[row["layer"]].entry.manifest["fingerprint"]
    FeatureLabels(own, context.workspace.database).set(int(row["feature"]), "mine")
    payload = known.payload(id, Thresholds(1.0, 1.0))
    named = {n for n, name in enumerate(payload["nodes"]["name"]) if name == "mine"}
    assert {payload["nodes"]["feature"][n] for n in named} == {row["feature"]}
    # Verified: what was measured lies beside it.
    assert known.verdicts(id) is None
    ended(context, jobs.submit_verify(id))
    judged = known.verdicts(id)
    assert judged is not None
    assert len(judged.nodes)
    assert context.workspace.verification_path(id).parent.parent == context.workspace.path / "graphs"
    assert [entry.id for entry in context.workspace.graphs()] == [id]
    # Heads of an edge add up to it.
    ids = node_ids(graph)
    edge = int(np.argmax(np.abs(graph.weight)))
    ends = ids[graph.source[edge]], ids[graph.target[edge]]
    table = ended(context, jobs.submit_heads(id, *ends)).result
    assert table["weight"].sum() == pytest.approx(float(graph.weight[edge]), rel=1e-3)
    into = ended(context, jobs.submit_heads(id, "", ends[1])).result
    # The worker's model may run in bfloat16, as the machine has it.
    assert into["weight"].sum() == pytest.approx(float(graph.nodes["value"].iloc[graph.target[edge]]), rel=2e-2)
    assert known.examples(id, ends[1])["examples"] == []
    # The edge, tested by itself: its verdict is the one that is shown from then on.
    ended(context, jobs.submit_test(id, ends[0]))
    tested, of_edges = known.edge_tests(id), known.edge_verdicts(id)
    assert tested is not None
    assert of_edges is not None
    own = of_edges.pairs[of_edges.pairs["target"] == graph.target[edge]]
    assert len(own) == 1
    assert len(tested.pairs) == 2 * (graph.source == graph.source[edge]).sum()
    payload = known.payload(id, Thresholds(1.0, 1.0))
    drawn = list(zip(payload["edges"]["source"], payload["edges"]["target"], strict=True))
    place = {name: n for n, name in enumerate(payload["nodes"]["id"])}
    shown = payload["edges"]["holds"][drawn.index((place[ends[0]], place[ends[1]]))]
    assert shown is bool(own["holds"].iloc[0])
    # Why the strongest head looked where it did.
    head = into[into["layer"] >= 0].iloc[0]
    query = int(graph.nodes["position"].iloc[graph.target[edge]])
    asked_head = HeadPlace(int(head["layer"]), int(head["head"]), query, int(head["key"]))
    assert HeadPlace.parse(str(asked_head)) == asked_head
    why = ended(context, jobs.submit_pairs(id, asked_head)).result
    assert len(why.attention) == query + 1
    assert sum(why.attention) == pytest.approx(1, abs=1e-4)
    assert why.kinds["relative"].sum() == pytest.approx(why.relative, rel=1e-3, abs=1e-4)


def test_a_graph_is_made_under_named_interventions_and_tested_under_them(
    dictionary_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(dictionary_folder, tmp_path / "w")
    context = Context(Workspace(tmp_path / "w"))
    jobs, known = circuit_jobs(context), Circuits(context)
    chosen = tuple(one.entry.id for one in dictionaries(context))
    edits = (
        Intervention(kind="scale", component="attention", layer=1, value=0.5),
        Intervention(kind="set", component="mlp", layer=0, value=8.0, positions=(6,)),
        Intervention(kind="set", sae=chosen[2], features=(5,), value=2.0),
    )
    context.workspace.save_intervention(InterventionSpec(name="halved", interventions=edits))
    asked = MakeRequest("The cat sat on the mat", chosen, (), 64, "halved")
    id = ended(context, jobs.submit_make(asked)).result
    graph = known.graph(id)
    assert graph.spec is not None
    assert [one.kind for one in graph.spec.interventions] == ["scale", "set", "set"]
    assert Path(graph.spec.interventions[2].sae).name == "mlp-2"
    assert "intervention" in set(graph.nodes["kind"])
    words = str(graph_view(known.entry(id), graph, Thresholds(1.0, 1.0), None))
    assert "halved: Scale the attention of layer 1 by 0.5. Set the mlp of layer 0 to 8.0, at position 6." in words
    exported = known.export(id, Thresholds(1.0, 1.0), (), ())
    assert exported["metadata"]["scope"]["interventions"] == graph.spec.to_dict()
    ended(context, jobs.submit_verify(id))
    assert known.verdicts(id) is not None
    ids = node_ids(graph)
    edge = int(np.argmax(np.abs(graph.weight) * (graph.nodes["kind"].to_numpy()[graph.source] == "feature")))
    ends = ids[graph.source[edge]], ids[graph.target[edge]]
    table = ended(context, jobs.submit_heads(id, *ends)).result
    assert table["weight"].sum() == pytest.approx(float(graph.weight[edge]), rel=1e-3)
    ended(context, jobs.submit_test(id, ends[0]))
    with pytest.raises(InvalidInputError, match="without them"):
        jobs.submit_pairs(id, HeadPlace(1, 0, 2, 1))
    with pytest.raises(UnknownNameError, match="halfed"):
        jobs.submit_make(asked._replace(interventions="halfed"))


def test_a_graph_of_a_cross_layer_transcoder_is_made_and_explained(tmp_path: Path) -> None:
    context = Context(Workspace(tmp_path / "w"))
    add_cross_layer(context.workspace)
    jobs, known = circuit_jobs(context), Circuits(context)
    (clt,) = dictionaries(context)
    assert (clt.layers, clt.across, clt.width) == ((0, 1, 2, 3), True, 40)
    assert clt.written_from(2) == (2, 3)
    id = ended(context, jobs.submit_make(MakeRequest("The cat sat on the mat", (clt.entry.id,), (), 64))).result
    graph = known.graph(id)
    assert set(known.used(graph)) == {0, 1, 2, 3}
    # A label is kept under the feature's number in the whole dictionary.
    row = graph.nodes[(graph.nodes["kind"] == "feature") & (graph.nodes["layer"] == 1)].iloc[0]
    labels = FeatureLabels(clt.entry.manifest["fingerprint"], context.workspace.database)
    labels.set(clt.number(1, int(row["feature"])), "mine")
    payload = known.payload(id, Thresholds(1.0, 1.0))
    assert payload["writes"] == {0: (0, 1, 2, 3), 1: (1, 2, 3), 2: (2, 3), 3: (3,)}
    assert payload["indexes"] == {}
    nodes = payload["nodes"]
    named = {(nodes["layer"][n], nodes["feature"][n]) for n, name in enumerate(nodes["name"]) if name}
    assert named == {(1, row["feature"])}
    ids = node_ids(graph)
    edge = int(np.argmax(np.abs(graph.weight) * (graph.nodes["kind"].to_numpy() == "feature")[graph.source]))
    ends = ids[graph.source[edge]], ids[graph.target[edge]]
    table = ended(context, jobs.submit_heads(id, *ends)).result
    assert table["weight"].sum() == pytest.approx(float(graph.weight[edge]), rel=2e-2)
    node = ids[int(row["node"])]
    own = ended(context, jobs.submit_writes(id, node)).result
    assert own["layer"].tolist() == [1, 2, 3]
    text = json.dumps(writes(own, "L1 feature", " cold").to_plotly_json(), cls=PlotlyJSONEncoder)
    assert {"L1", "L2", "L3"} <= set(re.findall(r'"(L\d)"', text))
    assert "What it writes" in text
    with pytest.raises(UnknownNameError):
        jobs.submit_writes(id, "1_999_9")
    ended(context, jobs.submit_test(id, ends[0]))
    ended(context, jobs.submit_verify(id))
    assert known.edge_verdicts(id) is not None
    why = ended(context, jobs.submit_pairs(id, HeadPlace(2, 1, 4, 2))).result
    assert why.kinds["relative"].sum() == pytest.approx(why.relative, rel=1e-3, abs=1e-3)


def test_where_there_are_no_transcoders_the_commands_that_make_them_can_be_copied() -> None:
    text = json.dumps(make_form([], "/tmp/my work").to_plotly_json(), cls=PlotlyJSONEncoder)
    copied = [json.loads(f'"{one}"') for one in re.findall(r'"data-copy": "((?:[^"\\]|\\.)*)"', text)]
    train, small, make = (shlex.split(one) for one in copied)
    for words in (train, small):
        assert words[:2] == ["scope", "train"]
        assert words[words.index("--hook") + 1] == "blocks.*.ln2.hook_out"
        assert words[words.index("--hook-out") + 1] == "blocks.*.hook_mlp_out"
        assert words[words.index("--out") + 1] == "/tmp/my work/saes" == make[make.index("--transcoders") + 1]
        assert Path(words[words.index("--data") + 1]).name.endswith(".parquet")
    assert make[:2] == ["scope", "graph"]
    commands: Any = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for words, command in (
        (train, commands["train"]),
        (small, commands["train"]),
        (make, commands["graph"].commands["make"]),
    ):
        known = {name for option in command.params for name in option.opts}
        assert {word for word in words if word.startswith("--")} <= known


def test_what_lies_elsewhere_or_has_no_index_is_said_with_the_command_that_helps(
    dictionary_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(dictionary_folder, tmp_path / "w")
    workspace = Workspace(tmp_path / "w")
    known = Circuits(Context(workspace))
    elsewhere = tmp_path / "of another place"
    shutil.move(workspace.find("mlp-0").path, elsewhere)
    here = [str(workspace.find(f"mlp-{layer}").path) for layer in (1, 2)]
    graph = replace(made_graph(60, n_layers=3), transcoders=(str(elsewhere), *here))
    save_graph(graph, workspace.path_for("circuit-graph", "made"))
    assert known.missing(known.graph("made")) == [str(elsewhere)]
    with pytest.raises(UnknownNameError, match=r"of another place'\. The graph's transcoders have to be"):
        circuit_jobs(Context(workspace)).submit_verify("made")

    nodes = graph.nodes[graph.nodes["kind"] == "feature"]
    first, second = (
        known.examples("made", node_ids(graph)[int(nodes.loc[nodes["layer"] == layer, "node"].iloc[0])])
        for layer in (0, 1)
    )
    assert "transcoder of layer 0 is not in this workspace" in first["why"]
    assert not first["command"]
    assert "features of layer 1 have no index" in second["why"]
    words = shlex.split(second["command"])
    assert words[:3] == ["scope", "index", here[0]]
    assert words[words.index("--out") + 1] == str(workspace.path / "indexes" / "mlp-1.index")
    commands: Any = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    options = {name for option in commands["index"].params for name in option.opts}
    assert {word for word in words if word.startswith("--")} <= options

    part = missing_part(known.missing(known.graph("made")), 3, "/tmp/my work")
    assert part is not None
    text = json.dumps(part.to_plotly_json(), cls=PlotlyJSONEncoder)
    assert "1 of its 3 transcoders is not in this workspace" in text
    assert f"for one in '{elsewhere}'; do" in text
    workspace.add(elsewhere)
    assert known.missing(known.graph("made")) == []
    assert missing_part([], 3, "") is None


def test_features_of_a_pair_lead_to_their_pages_where_there_is_an_index() -> None:
    row = {"query_kind": "feature", "query_layer": 1, "query_feature": 17, "key_kind": "feature", "key_layer": 0}
    table = pd.DataFrame([{**row, "key_feature": 5, "weight": 0.5, "relative": -0.25}])
    kinds = pd.DataFrame([{"query_kind": "feature", "key_kind": "feature", "relative": -0.25}])
    found = QkPairs(table, kinds, 0.5, -0.25, 2, (0.2, 0.3, 0.5))
    drawn = pairs(found, HeadPlace(2, 1, 2, 0), ["a", "b", "c"], {"query": ["heat"], "key": [""]}, {1: "abc"})
    text = json.dumps(drawn.to_plotly_json(), cls=PlotlyJSONEncoder, ensure_ascii=False)
    assert "/feature/17?index=abc" in text
    assert "heat" in text
    assert "L0 feature 5" in text
    assert "/feature/5" not in text
    assert "below the other keys" in text


def test_a_cross_layer_transcoder_stands_alone(dictionary_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(dictionary_folder, tmp_path / "w")
    context = Context(Workspace(tmp_path / "w"))
    add_cross_layer(context.workspace)
    chosen = dictionaries(context)
    assert [one.across for one in chosen] == [False] * 4 + [True]
    with pytest.raises(InvalidInputError, match="stands alone"):
        circuit_jobs(context).submit_make(MakeRequest("x", tuple(one.entry.id for one in chosen)))


def test_bad_requests_are_answered_before_any_model(dictionary_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(dictionary_folder, tmp_path / "w")
    context = Context(Workspace(tmp_path / "w"))
    save_graph(made_graph(20), context.workspace.path_for("circuit-graph", "made"))
    jobs = circuit_jobs(context)
    ids = tuple(one.entry.id for one in dictionaries(context))
    with pytest.raises(InvalidInputError, match="Type the text"):
        jobs.submit_make(MakeRequest(" ", ids))
    with pytest.raises(InvalidInputError, match="at least one transcoder"):
        jobs.submit_make(MakeRequest("x", ()))
    with pytest.raises(UnknownNameError, match="transcoder"):
        jobs.submit_make(MakeRequest("x", ("../../etc",)))
    with pytest.raises(UnknownNameError, match="scope workspace add"):
        jobs.submit_verify("made")
    with pytest.raises(UnknownNameError, match="node"):
        jobs.submit_heads("made", "nothing", "either")
    with pytest.raises(UnknownNameError, match="circuit-graph"):
        jobs.submit_verify("../../etc/passwd")
    for place, told in (((99, 0, 1, 0), "layer is 99"), ((1, 0, 99, 0), "query is 99"), ((1, 0, 2, 3), "key is 3")):
        with pytest.raises(OutOfRangeError, match=told):
            jobs.submit_pairs("made", HeadPlace(*place))
    for text in ("", "1.2.3", "1.2.3.x", "1.2.3.-4", "1.2.3.<b>"):
        with pytest.raises(InvalidInputError, match=r"LAYER\.HEAD"):
            HeadPlace.parse(text)
