"""The command line on a tiny model: the whole line, --json, exit codes, and nothing written on wrong use."""

import json
import subprocess
import sys
from pathlib import Path

import helpers_models
import pytest
from helpers_saes import make
from typer.testing import CliRunner

from scope.cli import app
from scope.features.index import FeatureIndex
from scope.saes.base import SAEMetadata
from scope.saes.formats import save

HOOK = "blocks.1.hook_resid_post"


def scope(*arguments: object, code: int = 0):
    """Run a command in this process; returns its result, and the JSON of its last line where it asked for it."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == code, result.output
    if "--json" in arguments and result.stdout.strip():
        return json.loads(result.stdout.splitlines()[-1], parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    return result


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A jsonl file of forty documents in two languages, one of them with markup."""
    path = tmp_path_factory.mktemp("data") / "text.jsonl"
    sentences = ["the quick brown fox jumps over the lazy dog. ", "<script>alert(1)</script> and more text. "]
    with open(path, "w") as file:
        for number in range(40):
            row = {
                "text": sentences[number % 2] * (3 + number % 5),
                "title": f"page-{number}",
                "language": ["en", "de"][number % 2],
                "source": "made",
            }
            file.write(json.dumps(row) + "\n")
    return path


@pytest.fixture(scope="module")
def line(tmp_path_factory, data) -> dict[str, Path]:
    """A store, an SAE and an index, made by the commands."""
    folder = tmp_path_factory.mktemp("line")
    made = {"store": folder / "acts.zarr", "sae": folder / "sae", "index": folder / "features.index"}
    model = helpers_models.tiny_folder("gemma3")
    captured = scope(
        *("capture", "--model", model, "--data", data, "--hook", HOOK, "--hook", "blocks.0.hook_mlp_out"),
        *("--out", made["store"], "--context-size", 32, "--rows-per-group", 512, "--json"),
    )
    assert captured["rows"] == captured["new_rows"] > 1000
    assert captured["windowed_documents"] > 0
    trained = scope(
        *("train", made["store"], "--hook", HOOK, "--arch", "topk", "--d-sae", 64, "--k", 4, "--tokens", 4096),
        *("--batch-size", 256, "--out", made["sae"], "--evaluate-tokens", 200, "--json"),
    )
    assert 0 < trained["fvu"] < 1.5
    assert trained["l0"] <= 4
    assert {"delta_ce", "ce_recovered", "fvu_all"} <= set(trained)
    indexed = scope("index", made["store"], made["sae"], "--out", made["index"], "--json")
    assert indexed["n_firings"] > 0
    return made


def test_the_line_from_text_to_index(line):
    for what, kind in (("store", "activation-store"), ("sae", "sae"), ("index", "feature-index")):
        facts = scope("info", line[what], "--json")
        assert facts["kind"] == kind
    for what in ("store", "index"):
        assert scope("verify", line[what], "--json")["faults"] == []
    assert "fvu" in scope("info", line["sae"], "--json")["quality"]


def test_a_published_sae_is_indexed_as_our_own_is(line, tmp_path):
    from safetensors.torch import load_file, save_file

    own = load_file(line["sae"] / "sae_weights.safetensors")
    folder = tmp_path / "theirs"
    folder.mkdir()
    names = {"encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
    theirs = {"encoder.weight": own["W_enc"].T.contiguous(), **{name: own[ours] for name, ours in names.items()}}
    save_file(theirs, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"k": 4, "num_latents": 64, "d_in": own["b_dec"].shape[0]}))
    out = tmp_path / "theirs.index"
    error = scope("index", line["store"], folder, "--out", out, "--json", code=2)["error"]
    assert "--hook" in error["message"]
    assert not out.exists()
    with pytest.warns(UserWarning, match="does not record which model"):
        indexed = scope("index", line["store"], folder, "--out", out, "--hook", HOOK, "--json")
    assert indexed["n_firings"] == scope("info", line["index"], "--json")["n_firings"]


def test_an_index_measures_the_features_of_its_own_sae_alone(line, tmp_path):
    features = FeatureIndex.open(line["index"]).table
    feature = int(features["n_firings"].idxmax())
    common = ("steer", "--model", helpers_models.tiny_folder("gemma3"), "--prompt", "the fox", "--max-new-tokens", 2)
    pushed = ("--feature", feature, "--strength", 2, "--index", line["index"], "--json")
    found = scope(*common, *pushed, "--sae", line["sae"])
    assert found["norm"] == pytest.approx(2 * float(features["max_value"][feature]), rel=1e-4)
    save(make("topk", d_in=32, d_sae=64, metadata=SAEMetadata(hook_name=HOOK)), tmp_path / "other")
    told = scope(*common, *pushed, "--sae", tmp_path / "other", code=2)["error"]
    assert told["type"] == "MismatchError"


def test_info_of_a_model_lists_its_sizes():
    facts = scope("info", helpers_models.tiny_folder("llama"), "--json")
    assert facts["kind"] == "model"
    assert facts["n_layers"] > 1


def test_verify_finds_a_flipped_bit(line, tmp_path):
    import shutil

    copy = tmp_path / "copy.zarr"
    shutil.copytree(line["store"], copy)
    shard = max((copy / "hooks" / HOOK).glob("c*"), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    (fault,) = scope("verify", copy, "--json", code=1)["faults"]
    assert fault["hook"] == HOOK


def test_a_second_capture_resumes_and_computes_nothing(line, data):
    again = scope(
        *("capture", "--model", helpers_models.tiny_folder("gemma3"), "--data", data, "--hook", HOOK),
        *("--out", line["store"], "--context-size", 32, "--rows-per-group", 512, "--json"),
    )
    assert again["resumed"]
    assert again["new_rows"] == 0


def test_flags_may_come_from_a_file(line, tmp_path):
    config = tmp_path / "train.toml"
    config.write_text('hook = "blocks.0.hook_mlp_out"\nd-sae = 32\nk = 2\ntokens = 1024\nbatch_size = 256\n')
    trained = scope(
        *("train", line["store"], "--config", config, "--out", tmp_path / "sae", "--evaluate-tokens", 0, "--json")
    )
    assert trained["d_sae"] == 32
    assert trained["hook"] == "blocks.0.hook_mlp_out"
    config.write_text("depth = 3\n")
    scope("train", line["store"], "--config", config, "--out", tmp_path / "other", code=2)


def test_a_workspace_takes_in_what_lies_elsewhere(line, tmp_path):
    added = scope("workspace", "add", line["index"], "--workspace", tmp_path, "--json")
    (entry,) = scope("workspace", "list", "--workspace", tmp_path, "--json")["entries"]
    assert entry["id"] == added["id"]


def capture_arguments(data, out, changed):
    model = helpers_models.tiny_folder("gemma3")
    options = {"model": model, "data": data, "hook": HOOK, "out": out, "context_size": 32, **changed}
    return ["capture", *(part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value))]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"model": "gemma-3-270"}, "gemma-3-270m"),
        ({"hook": "blocks.1.hook_resid_pots"}, HOOK),
        ({"data": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"text_column": "txt"}, "text"),
        ({"dtype": "int3"}, "bfloat16"),
        ({"context_size": 100_000}, "at most"),
        ({"rows_per_group": 1000}, "power of two"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"workers": 2}, "for the engine ray"),
        ({"engine": "torchrun"}, "RANK is not set"),
    ],
)
def test_wrong_use_of_capture_exits_with_2_and_writes_nothing(data, tmp_path, changed, words):
    result = scope(*capture_arguments(data, tmp_path / "s.zarr", changed), code=2)
    assert words in result.stderr
    assert not (tmp_path / "s.zarr").exists()


def test_an_occupied_folder_is_refused(data, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert str(tmp_path) in scope(*capture_arguments(data, tmp_path, {}), code=2).stderr
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"hook": "blocks.1.hook_mlp_out"}, "blocks.0.hook_mlp_out"),
        ({"arch": "topp"}, "topk"),
        ({"k": 65}, "at most d_sae"),
        ({"tokens": 10}, "batch"),
    ],
)
def test_wrong_use_of_train_exits_with_2_and_writes_nothing(line, tmp_path, changed, words):
    options = {"hook": HOOK, "d-sae": 64, "k": 4, "out": tmp_path / "sae", **changed}
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    assert words in scope("train", line["store"], *arguments, code=2).stderr
    assert not (tmp_path / "sae").exists()


def test_an_sae_of_another_model_is_refused(line, data, tmp_path):
    other = tmp_path / "llama.zarr"
    scope(*capture_arguments(data, other, {"model": helpers_models.tiny_folder("llama"), "max_tokens": 300}))
    result = scope("index", other, line["sae"], "--out", tmp_path / "i.index", code=2)
    assert not (tmp_path / "i.index").exists()
    assert "model" in result.stderr


def test_errors_are_json_where_json_was_asked_for(tmp_path):
    answer = scope("info", tmp_path / "nothing.zarr", "--json", code=2)
    assert answer["error"]["type"] == "UnknownNameError"


def test_serve_refuses_a_workspace_that_is_not_there(tmp_path):
    assert "scope demo" in scope("serve", tmp_path / "none", code=2).stderr


def test_help_reads_as_a_tour_and_loads_nothing_heavy():
    code = (
        "import sys; from scope.cli import app; import typer.testing as t; r = t.CliRunner().invoke(app, ['--help']);"
        "assert r.exit_code == 0; print(r.output); loaded = set(sys.modules);"
        "heavy = loaded & {'torch', 'zarr', 'dash', 'pandas', 'transformers', 'transformer_lens', 'sae_lens'};"
        "assert not heavy, heavy"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for command in ("capture", "train", "index", "serve", "verify", "info", "demo"):
        assert command in output


@pytest.mark.real
def test_the_demo_goes_on_with_what_is_there(demo_workspace):
    from scope.cli.demo import DemoConfig, make_demo

    config = DemoConfig(max_tokens=16_384, d_sae=1024, passes=8, evaluate_tokens=600, shipped=False)
    before = {path: path.stat().st_mtime_ns for path in demo_workspace.rglob("*") if path.is_file()}
    outcome = make_demo(demo_workspace, config)
    after = {path: path.stat().st_mtime_ns for path in demo_workspace.rglob("*") if path.is_file()}
    assert before == after
    assert outcome.data["rows"] == 16_384
    assert 0 < outcome.data["fvu"] < 1
    assert outcome.data["delta_ce"] > 0


def test_a_model_and_a_text_are_trained_on_without_a_store(line, data, tmp_path):
    """Its rows are a store's, so it becomes as good where more is trained on than there is: then all are in the buffer.
    The store of `line` ran its model in other batches."""
    model = helpers_models.tiny_folder("gemma3")
    options = ("--hook", HOOK, "--d-sae", 64, "--k", 4, "--tokens", 16_384, "--batch-size", 256)
    options = (*options, "--evaluate-tokens", 200, "--json")
    live = ("train", "--model", model, "--data", data, "--context-size", 32, *options, "--out", tmp_path / "live")
    trained = scope(*live)
    stored = scope("train", line["store"], *options, "--out", tmp_path / "stored")
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".zarr"] == []
    for name in ("fvu", "l0", "delta_ce", "n_rows"):
        assert trained[name] == pytest.approx(stored[name], rel=0.02, abs=0.02), name
    assert "steps" not in scope(*live)
    for wrong, words in (
        (("train", *options), "Give an activation store"),
        (("train", "--model", model, *options), "--data"),
        (("train", line["store"], "--data", data, *options), "Both a store and --data"),
        (("train", "--model", model, "--data", tmp_path / "no.jsonl", *options), "no.jsonl"),
    ):
        answer = scope(*wrong, "--out", tmp_path / "wrong", code=2)
        assert words in answer["error"]["message"]
    assert not (tmp_path / "wrong").exists()


def test_the_same_training_again_is_done_already(line):
    arguments = ("train", line["store"], "--hook", HOOK, "--d-sae", 64, "--k", 4, "--tokens", 4096, "--batch-size", 256)
    again = scope(*arguments, "--out", line["sae"], "--evaluate-tokens", 0, "--json")
    assert "steps" not in again
    assert again["fvu"] > 0
    scope(*arguments, "--seed", 1, "--out", line["sae"], code=2)


def test_a_store_without_held_out_documents_trains_all_the_same(tmp_path):
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": "the quick brown fox " * 100, "title": "page-0"}))
    store = tmp_path / "s.zarr"
    scope(*capture_arguments(tmp_path / "one.jsonl", store, {}))
    options = ("--hook", HOOK, "--d-sae", 16, "--k", 2, "--tokens", 256, "--batch-size", 64, "--out", tmp_path / "sae")
    trained = scope("train", store, *options, "--json")
    assert "fvu" not in trained
    assert (tmp_path / "sae" / "manifest.json").is_file()


def test_a_command_line_that_cannot_be_read_answers_in_json_too(tmp_path):
    run = [sys.executable, "-c", "from scope.cli import main; main()", "train", str(tmp_path), "--nope", "--json"]
    result = subprocess.run(run, capture_output=True, text=True)
    assert result.returncode == 2
    assert json.loads(result.stdout.splitlines()[-1])["error"]["type"] == "UsageError"
