"""Neuronpedia's explanations become labels, and features leave in its import format.

`EXPLANATION`, `NEURON`, `ACTIVATION` and the batch's names are the columns of Neuronpedia's tables and of
SAEDashboard's batches as their sources have them: hijohnnylin/neuronpedia (commit ebb8426),
utils/neuronpedia-utils/neuronpedia_utils/export-data.py and db_models/{feature,activation,explanation}.py;
jbloomAus/SAEDashboard (commit db4839a), sae_dashboard/neuronpedia/neuronpedia_dashboard.py, `to_dict`.
"""

import gzip
import json

import numpy as np
import pytest
from helpers_features import FakeModel, small_sae, tiny_index
from typer.testing import CliRunner

from scope.cli import app
from scope.errors import InvalidInputError, MismatchError, OccupiedError, UnknownNameError
from scope.features.all_logits import AllLogits
from scope.features.decoder import unit_decoder
from scope.features.labels import FeatureLabels
from scope.features.neuronpedia import SAEAddress, import_explanations
from scope.features.neuronpedia_export import (
    NeuronpediaNames,
    export_neuronpedia,
    feature_json,
    saedashboard_batch,
)
from scope.saes.formats import save as save_sae


def names(text):
    return set(text.split())


EXPLANATION = names(
    "id modelId layer index authorId description embedding typeName explanationModelName umap_x umap_y "
    "umap_cluster umap_log_feature_sparsity triggeredById notes createdAt"
)
NEURON = names(
    "modelId layer index maxActApprox creatorId frac_nonzero freq_hist_data_bar_heights freq_hist_data_bar_values "
    "logits_hist_data_bar_heights logits_hist_data_bar_values neuron_alignment_indices neuron_alignment_l1 "
    "neuron_alignment_values correlated_neurons_indices correlated_neurons_l1 correlated_neurons_pearson "
    "decoder_weights_dist neg_str neg_values pos_str pos_values sourceSetName topkCosSimIndices topkCosSimValues "
    "vector vectorLabel hookName vectorDefaultSteerStrength hasVector"
)
CORRELATED = names("correlated_features_indices correlated_features_pearson correlated_features_l1")
ACTIVATION = names(
    "id modelId layer index creatorId dataSource dataIndex tokens maxValue minValue values maxValueTokenIndex "
    "dfaValues dfaMaxValue dfaTargetIndex binContains binMin binMax lossValues logitContributions "
    "qualifyingTokenIndex"
)
DASHBOARD_FEATURE = names(
    "feature_index neuron_alignment_indices neuron_alignment_values neuron_alignment_l1 "
    "correlated_neurons_indices correlated_neurons_l1 correlated_neurons_pearson correlated_features_indices "
    "correlated_features_l1 correlated_features_pearson neg_str neg_values pos_str pos_values frac_nonzero "
    "freq_hist_data_bar_values freq_hist_data_bar_heights logits_hist_data_bar_heights "
    "logits_hist_data_bar_values n_prompts_total n_tokens_in_prompt dataset decoder_weights_dist activations "
    "vector"
)
DASHBOARD_ACTIVATION = names("bin_min bin_max bin_contains tokens values qualifying_token_index")
HARD = ["<script>alert(1)</script>", "=cmd()", "قط يجلس", "x" * 200]
ADDRESS = SAEAddress("google/gemma-2-2b", "blocks.20.hook_resid_post")


def row(index, description="about cats", **changed):
    """A line of an export as Neuronpedia writes it."""
    return {
        "id": f"cl{index}", "modelId": "gemma-2-2b", "layer": "20-gemmascope-res-16k", "index": str(index),
        "authorId": "x", "description": description, "embedding": None, "typeName": "oai_token-act-pair",
        "explanationModelName": "gpt-4o-mini", "umap_x": 0, "umap_y": 0, "umap_cluster": 0,
        "umap_log_feature_sparsity": 0, **changed,
    }  # fmt: skip


def batch(folder, rows, name="batch-0.jsonl.gz"):
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(one) + "\n" for one in rows).encode()
    (folder / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    return folder / name


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    built, _, _ = tiny_index(tmp_path_factory.mktemp("np"))
    for feature, text in enumerate(HARD):
        built.labels.set(feature, text=text, notes=text)
    return built


def test_an_export_becomes_labels_from_files_and_folders(tmp_path):
    folder = tmp_path / "gemma-2-2b" / "20-gemmascope-res-16k"
    batch(folder / "explanations", [row(feature, text) for feature, text in enumerate(HARD)])
    batch(
        folder / "explanations", [row(7), row(7, "newer words", id="b", explanationModelName="o4")], "batch-1.jsonl.gz"
    )
    batch(folder / "features", [{"modelId": "not an explanation"}])
    labels = FeatureLabels("ab" * 32, d_sae=16384)
    report = import_explanations(labels, [folder], ADDRESS)
    assert (report.labels, report.features) == (6, 5)
    assert report.sources == {
        "neuronpedia: gpt-4o-mini, oai_token-act-pair": 5,
        "neuronpedia: o4, oai_token-act-pair": 1,
    }
    assert [labels.get(feature).text for feature in range(4)] == HARD
    assert {stored.text for stored in labels.all(7)} == {"about cats", "newer words"}
    before = labels.table()
    import_explanations(labels, [folder / "explanations"], ADDRESS)
    assert labels.table().equals(before)


def test_plain_lines_and_the_older_array_are_read_too(tmp_path):
    labels = FeatureLabels("ab" * 32)
    import_explanations(labels, [batch(tmp_path, [row(1, "lines")], "a.jsonl")], ADDRESS)
    fields = ("modelId", "layer", "index", "description", "explanationModelName", "typeName")
    older = {name: value for name, value in row(2, "array").items() if name in fields}
    (tmp_path / "b.json").write_text(json.dumps([older]))
    import_explanations(labels, [tmp_path / "b.json"], ADDRESS)
    assert labels.table()["label"].tolist() == ["lines", "array"]


@pytest.mark.parametrize(
    ("address", "words"),
    [
        (SAEAddress("gemma-2-9b", "blocks.20.hook_resid_post"), "'gemma-2-2b', and the SAE is of 'gemma-2-9b'"),
        (SAEAddress("gemma-2-2b-it", ""), "of the model"),
        (SAEAddress("gemma-2-2b", "blocks.19.hook_resid_post"), "of layer 20"),
        (SAEAddress("gemma-2-2b", "blocks.20.hook_mlp_out"), "reads blocks.20.hook_mlp_out"),
        (SAEAddress("", "", "gemma-2-2b/20-gemmascope-res-65k"), "is Neuronpedia's gemma-2-2b/20-gemmascope-res-65k"),
    ],
)  # fmt: skip
def test_labels_of_another_model_or_hook_are_refused_unless_told(tmp_path, address, words):
    labels = FeatureLabels("ab" * 32)
    file = batch(tmp_path, [row(1)])
    with pytest.raises(MismatchError, match=words):
        import_explanations(labels, [file], address)
    assert labels.table().empty
    assert import_explanations(labels, [file], address, allow_mismatch=True).labels == 1


@pytest.mark.parametrize(
    "address",
    [
        ADDRESS,
        SAEAddress("Gemma_2 2B, Q4_K_M dequantised", "blocks.20.hook_resid_post"),
        SAEAddress("", ""),
        SAEAddress("other name", "blocks.1.hook_z", "gemma-2-2b/20-gemmascope-res-16k"),
    ],
)
def test_labels_of_the_same_sae_by_any_of_its_names_are_taken(tmp_path, address):
    assert import_explanations(FeatureLabels("ab" * 32), [batch(tmp_path, [row(1)])], address).labels == 1


def test_what_is_no_export_is_refused_with_file_and_line(tmp_path):
    labels = FeatureLabels("ab" * 32, d_sae=40)
    cases = {
        "batch-0.jsonl, line 2 has no description": [row(1), {"modelId": "m", "layer": "l", "index": "1"}],
        "line 1: the index 'x' is no feature id": [row("x")],
        r"line 1 is about feature 40; this SAE has 40 features": [row(40)],
        "several sources: gemma-2-2b/20-gemmascope-res-16k, gemma-2-2b/21-x": [row(1), row(1, layer="21-x")],
    }
    for words, rows in cases.items():
        with pytest.raises(InvalidInputError, match=words):
            import_explanations(labels, [batch(tmp_path, rows, "batch-0.jsonl")], ADDRESS)
    (tmp_path / "bad.jsonl").write_text("{no json\n")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b"x" * 10_000)[:20])
    with pytest.raises(InvalidInputError, match=r"bad.jsonl, line 1 is not JSON"):
        import_explanations(labels, [tmp_path / "bad.jsonl"], ADDRESS)
    with pytest.raises(InvalidInputError, match="cannot be read"):
        import_explanations(labels, [tmp_path / "cut.jsonl.gz"], ADDRESS)
    with pytest.raises(UnknownNameError, match=r"no file .*Did you mean"):
        import_explanations(labels, [tmp_path / "bat.jsonl"], ADDRESS)
    assert labels.table().empty


def test_one_source_of_several_is_named_and_long_or_empty_ones_are_counted(tmp_path):
    labels = FeatureLabels("ab" * 32)
    rows = [row(1), row(2, " "), row(3, "x" * 3000), row(9, layer="21-other")]
    report = import_explanations(labels, [batch(tmp_path, rows)], ADDRESS, source="20-gemmascope-res-16k")
    assert (report.labels, report.skipped_empty, report.skipped_long) == (1, 1, 1)
    assert labels.table()["feature"].tolist() == [1]


def test_one_feature_has_the_fields_of_neuronpedias_tables(index):
    content = json.loads(json.dumps(feature_json(index, 3)))
    assert set(content) == NEURON | CORRELATED | {"activations", "explanations"}
    assert content["activations"]
    for activation in content["activations"]:
        assert set(activation) == ACTIVATION
        assert len(activation["tokens"]) == len(activation["values"])
        assert activation["values"][activation["maxValueTokenIndex"]] == activation["maxValue"]
    (explanation,) = content["explanations"]
    assert set(explanation) <= EXPLANATION
    assert explanation["description"] == HARD[3]
    assert (content["modelId"], content["layer"], content["index"]) == ("fake-model", "1-scope-res-40", "3")
    assert content["hookName"] == index.hook_name
    assert content["frac_nonzero"] == pytest.approx(index.table["density"][3])
    assert sum(content["freq_hist_data_bar_heights"]) == index.table["n_firings"][3]
    assert len(content["freq_hist_data_bar_values"]) == len(content["freq_hist_data_bar_heights"])
    assert content["pos_values"] == pytest.approx(index.top_logits(3, 10)["effect"].tolist(), abs=1e-5)


def test_examples_lie_in_the_bands_that_they_name(index):
    content = feature_json(index, 3)
    strengths = np.sort(index.firings(3)["value"].to_numpy())[::-1]
    bands = {(a["binMin"], a["binMax"], a["binContains"]) for a in content["activations"] if a["binMin"] >= 0}
    assert sum(share for _, _, share in bands) == pytest.approx(1)
    for activation in content["activations"]:
        own = activation["values"][activation["qualifyingTokenIndex"]]
        if activation["binMin"] == -1:
            assert activation["binMax"] == pytest.approx(float(strengths[0]), rel=1e-5)
        else:
            assert activation["binMin"] - 1e-5 <= own <= activation["binMax"] + 1e-5


def test_the_histogram_of_logit_effects_counts_every_token_once(tmp_path):
    built, _, sae = tiny_index(tmp_path)
    model = FakeModel()
    logits = AllLogits(sae, model)
    wanted = model.logit_effects(unit_decoder(sae)).float().numpy()
    assert np.allclose(np.stack(list(logits.of([3, 0, 3]))), wanted[[3, 0, 3]], atol=1e-6)
    content = feature_json(built, 3, effects=wanted[3])
    heights, values = (np.array(content[f"logits_hist_data_bar_{name}"]) for name in ("heights", "values"))
    assert (len(heights), heights.sum()) == (50, model.d_vocab)
    step = (wanted[3].max() - wanted[3].min()) / 50
    np.testing.assert_allclose(values, wanted[3].min() + step * (np.arange(50) + 0.5), atol=1e-5)
    # The bars that Neuronpedia colours as promoting are those of tokens that are promoted, but for a bin around zero.
    assert abs(heights[values >= 0].sum() - (wanted[3] >= 0).sum()) <= heights[np.abs(values) <= step].sum()
    (row,) = saedashboard_batch(built, [3], logits=logits)["features"]
    assert row["logits_hist_data_bar_heights"] == content["logits_hist_data_bar_heights"]
    report = export_neuronpedia(built, tmp_path / "out", [5, 3], logits=logits)
    lines = gzip.decompress((report.folder / "features" / "batch-0.jsonl.gz").read_bytes()).decode().splitlines()
    assert [sum(json.loads(line)["logits_hist_data_bar_heights"]) for line in lines] == [model.d_vocab] * 2
    assert json.loads(lines[1])["logits_hist_data_bar_values"] == content["logits_hist_data_bar_values"]


def test_a_feature_that_never_fires_is_exported_too(index):
    content = feature_json(index, 5)
    assert (content["frac_nonzero"], content["activations"], content["freq_hist_data_bar_heights"]) == (0, [], [])


def test_a_batch_has_the_fields_of_saedashboards(index):
    content = json.loads(json.dumps(saedashboard_batch(index, [0, 3])))
    assert set(content) == {"model_id", "layer", "sae_set", "sae_id_suffix", "features"}
    for feature in content["features"]:
        assert set(feature) == DASHBOARD_FEATURE
        assert all(set(activation) == DASHBOARD_ACTIVATION for activation in feature["activations"])


def test_a_whole_sae_is_a_folder_whose_explanations_come_back_as_labels(index, tmp_path):
    called = NeuronpediaNames(model_id="gemma-2-2b", source_set="mine-res-40", layer=20)
    report = export_neuronpedia(index, tmp_path, names=called)
    assert report.folder == tmp_path / "gemma-2-2b" / "20-mine-res-40"
    assert {path.name for path in report.folder.glob("*.jsonl")} == {
        "release.jsonl", "model.jsonl", "sourceset.jsonl", "source.jsonl",
    }  # fmt: skip
    lines = gzip.decompress((report.folder / "features" / "batch-0.jsonl.gz").read_bytes()).decode().split("\n")
    assert [json.loads(line)["index"] for line in lines if line] == [str(feature) for feature in range(index.d_sae)]
    assert (report.features, report.explanations) == (40, 4)
    labels = FeatureLabels("cd" * 32, d_sae=40)
    import_explanations(labels, [report.folder], ADDRESS)
    assert labels.table()["label"].tolist() == HARD
    with pytest.raises(OccupiedError, match="holds something already"):
        export_neuronpedia(index, tmp_path, names=called)


def test_importing_an_export_twice_adds_nothing(index):
    ids = [one["id"] for one in feature_json(index, 3)["activations"]]
    assert len(set(ids)) == len(ids)
    assert ids == [one["id"] for one in feature_json(index, 3)["activations"]]


def test_names_that_are_no_names_are_refused(index, tmp_path):
    for name in ("../../etc", "<b>", ".", "a/b"):
        with pytest.raises(InvalidInputError, match="is no name for Neuronpedia"):
            export_neuronpedia(index, tmp_path, names=NeuronpediaNames(model_id=name))
    assert not list(tmp_path.iterdir())


def scope(*arguments):
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    return result.exit_code, json.loads(result.stdout.splitlines()[-1])


def test_labels_by_the_command_line(index, tmp_path):
    workspace = tmp_path / "w"
    scope("workspace", "add", index.path, "--workspace", workspace)
    where = ("--sae", index.id, "--workspace", workspace)
    file = batch(
        tmp_path, [row(3, modelId="fake-model", layer="1-x-res-40"), row(4, modelId="fake-model", layer="1-x-res-40")]
    )
    assert scope("labels", "import", file, *where)[1]["labels"] == 2
    for feature, text in enumerate(HARD):
        code, label = scope("labels", "set", feature, text, *where, "--star", "--add-to", "mine")
        assert (code, label["text"], label["starred"], label["lists"]) == (0, text, True, ["mine"])
    code, listed = scope("labels", "list", *where)
    assert [label["label"] for label in listed["labels"]] == [*HARD, "about cats"]
    for name in ("l.jsonl", "l.json", "l.csv", "l.parquet"):
        assert scope("labels", "export", *where, "--out", tmp_path / name)[0] == 0
    assert "'=cmd()" in (tmp_path / "l.csv").read_text("utf-8-sig")
    for name in ("l.jsonl", "l.json"):
        other = tmp_path / f"other-{name}"
        scope("workspace", "add", index.path, "--workspace", other)
        code, taken = scope("labels", "import", tmp_path / name, "--sae", index.id, "--workspace", other)
        assert (code, taken["features"]) == (0, 5)
        assert scope("labels", "list", "--sae", index.id, "--workspace", other)[1] == listed
    assert scope("labels", "set", 999, "x", *where)[1]["error"]["type"] == "OutOfRangeError"
    assert (
        scope("labels", "import", batch(tmp_path, [row(3)], "b.jsonl"), *where)[1]["error"]["type"] == "MismatchError"
    )


def test_an_sae_is_named_by_its_folder_too(tmp_path, monkeypatch):
    save_sae(small_sae(), tmp_path / "sae")
    monkeypatch.chdir(tmp_path)
    assert scope("labels", "set", 3, "cats", "--sae", "sae")[0] == 0
    assert [label["label"] for label in scope("labels", "list", "--sae", tmp_path / "sae")[1]["labels"]] == ["cats"]
    assert scope("labels", "list", "--sae", "sea")[1]["error"]["type"] == "UnknownNameError"


def test_an_index_is_exported_by_the_command_line(index, tmp_path):
    workspace = tmp_path / "w"
    scope("workspace", "add", index.path, "--workspace", workspace)
    scope("labels", "set", 3, "=cmd()", "--sae", index.id, "--workspace", workspace)
    here = (index.id, "--workspace", workspace)
    some = ("--features", "3,5-7", "--out", tmp_path / "np")
    code, report = scope("export", *here, "--format", "neuronpedia", *some)
    assert (code, report["features"], report["explanations"], report["logit_histograms"]) == (0, 4, 1, False)
    code, report = scope("export", *here, "--format", "csv", "--out", tmp_path / "t.csv")
    assert (code, report["rows"]) == (0, 40)
    code, report = scope("export", *here, "--format", "parquet", "--grid", "firings",
                         "--features", "3", "--limit", "5", "--out", tmp_path / "f.parquet")  # fmt: skip
    assert (code, report["rows"]) == (0, 5)
    for wrong in (("--features", "3-x"), ("--features", "999"), ("--grid", "nothing"), ("--grid", "firings")):
        assert scope("export", index.path, "--format", "csv", "--out", tmp_path / "x.csv", *wrong)[0] == 2
    assert (
        scope("export", index.path, "--format", "docx", "--out", tmp_path / "x")[1]["error"]["type"]
        == "UnknownNameError"
    )
