"""Parameters: how many, how many a token uses, and where they lie; lookup tables on the host."""

import json

import numpy as np
import pytest
import torch
from helpers_models import TEXT, WRONG_TYPE, tiny_folder, tiny_model
from helpers_models import one_thread as one_thread
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from activations.store import ActivationStore
from scope.bench.embeddings import bench_embeddings
from scope.bench.settings import EmbeddingsBench
from scope.cli import app
from scope.errors import InvalidInputError
from scope.models import LanguageModel
from scope.models.architectures import find_layout
from scope.models.placement import host_tables, place

TOKENS = torch.arange(4, 24)
META = torch.device("meta")
"""A second device that every machine has: it keeps shapes and no values, so what was moved there cannot be confused
with what stayed."""


def load(kind, **options):
    return LanguageModel.load(str(tiny_folder(kind)), device="cpu", dtype="float32", **options)


@pytest.mark.parametrize("kind", ["gemma3n", "gemma4", "gemma4_experts", "llama", "gpt2", "gemma3_multimodal"])
def test_the_counts_are_those_of_the_shapes(kind):
    model = tiny_model(kind)
    count, sizes = model.parameter_count(), {n: p.numel() for n, p in model.hf.named_parameters()}
    assert count.total == sum(sizes.values())
    rows = {path: model.hf.get_submodule(path).weight.shape for path in count.lookup_tables}
    assert {path: np.prod(shape) for path, shape in rows.items()} == count.lookup_tables
    embed = model.layout.module(model.layout.family.embed)
    assert count.tied_unembedding == (model.W_U is model.hf.get_submodule(embed).weight) == (kind != "llama")
    per_layer = sum(size for path, size in count.lookup_tables.items() if path.endswith("per_layer"))
    assert (per_layer > 0) == (kind in ("gemma3n", "gemma4"))
    towers = sum(size for name, size in sizes.items() if "vision" in name or "multi_modal" in name)
    assert count.towers == towers
    assert count.effective == count.total - per_layer - towers
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    assert count.experts == experts
    assert (count.n_experts, count.experts_per_token) == ((4, 2) if experts else (0, 0))
    tables = {path: size for path, size in count.lookup_tables.items() if path != embed or not count.tied_unembedding}
    one_row_each = sum(rows[path][1] for path in tables)
    rest = count.total - towers - experts - sum(tables.values())
    assert count.active_per_token == rest + experts // 2 + one_row_each
    assert f"{count.active_per_token:,} active per token" in count._repr_html_()
    (place_,) = count.devices.values()
    assert (place_.parameters, place_.bytes) == (count.total, 4 * count.total)
    assert place_.lookup_tables == sum(count.lookup_tables.values())


@pytest.mark.parametrize("kind", ["gemma3n", "gemma4", "llama"])
def test_tables_stay_on_the_host_and_the_rest_moves(kind):
    hf = AutoModelForCausalLM.from_pretrained(tiny_folder(kind), dtype=torch.float32)
    layout = find_layout(hf)
    paths = host_tables(hf, layout)
    assert [path.rsplit(".", 1)[1] for path in paths] == [
        "embed_tokens" if kind == "llama" else "embed_tokens_per_layer"
    ]
    values = {path: hf.get_submodule(path).weight.clone() for path in paths}
    place(hf, META, "host")
    for name, tensor in {**dict(hf.named_parameters()), **dict(hf.named_buffers())}.items():
        on_host = any(name.startswith(f"{path}.") for path in paths)
        assert tensor.device.type == ("cpu" if on_host else "meta"), name
    for path, value in values.items():
        torch.testing.assert_close(hf.get_submodule(path).weight, value)
        rows = hf.get_submodule(path)(TOKENS)  # looked up on the host, handed to the device
        assert (rows.device, rows.shape) == (META, (len(TOKENS), value.shape[1]))


@pytest.mark.parametrize("kind", ["gemma3n", "gemma4", "llama"])
def test_outputs_hooks_and_edits_are_equal_with_tables_on_the_host(kind):
    plain, hosted = load(kind), load(kind, embeddings="host")
    hook = "hook_embed" if kind == "llama" else "blocks.1.ple.hook_table"

    def double(value, context):
        assert value.device == hosted.device
        return 2 * value

    for edits in ({}, {hook: double}):
        ours = hosted.run(TOKENS, hooks=[hook, "blocks.2.hook_resid_post"], edits=edits)
        theirs = plain.run(TOKENS, hooks=[hook, "blocks.2.hook_resid_post"], edits=edits)
        assert torch.equal(ours.logits, theirs.logits)
        for name, value in theirs.activations.items():
            assert torch.equal(ours.activations[name], value)


def test_what_cannot_lie_on_the_host_is_refused():
    with pytest.raises(InvalidInputError, match="unembedding too"):
        load("gemma3", embeddings="host")
    with pytest.raises(WRONG_TYPE, match="host"):
        load("gemma4", embeddings="hots")


def test_a_bridge_over_two_places_is_refused():
    model = load("gemma4")
    model.hf.lm_head = torch.nn.Linear(32, model.d_vocab, bias=False, device=META)
    with pytest.raises(InvalidInputError, match='embeddings="device"'):
        _ = model.bridge


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["gemma3n", "gemma4"])
def test_the_host_saves_the_tables_bytes_on_a_gpu(kind):
    kept = {}
    for embeddings in ("device", "host"):
        model = LanguageModel.load(str(tiny_folder(kind)), device="cuda", dtype="float32", embeddings=embeddings)
        kept[embeddings] = model.run(TOKENS).logits
        tables = model.layout.module("embed_tokens_per_layer")
        on = model.hf.get_submodule(tables).weight.device.type
        assert on == ("cpu" if embeddings == "host" else "cuda")
        assert {p.device.type for n, p in model.hf.named_parameters() if not n.startswith(tables)} == {"cuda"}
    assert torch.equal(kept["device"], kept["host"])


def test_info_tells_what_a_token_uses_and_where_it_lies():
    answer = CliRunner().invoke(app, ["info", str(tiny_folder("gemma4")), "--embeddings", "host", "--json"])
    assert answer.exit_code == 0, answer.output
    use = json.loads(answer.stdout.splitlines()[-1])["parameter_use"]
    expected = tiny_model("gemma4").parameter_count()
    assert use["active_per_token"] == expected.active_per_token
    assert use["lookup_tables"] == expected.lookup_tables
    assert use["devices"]["cpu"]["parameters"] == expected.total


def test_the_benchmark_compares_both_places():
    figures = bench_embeddings(
        EmbeddingsBench(device="cpu", n_layers=2, d_model=256, d_vocab=512, batch=1, tokens=16, rounds=1),
        lambda _: None,
    )
    assert figures["equal_outputs"]
    assert figures["model"]["table_bytes"] == 512 * 2 * 256 * (4 if figures["model"]["dtype"] == "float32" else 2)
    assert figures["saved_bytes"] is None  # a CPU is its own host
    assert figures["slowdown"] > 0


def test_a_capture_with_tables_on_the_host_is_the_same(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    hook, stores = "blocks.2.ple.hook_product", []
    for embeddings in ("device", "host"):
        out = str(tmp_path / f"{embeddings}.zarr")
        asked = ["capture", "--model", str(tiny_folder("gemma4")), "--data", str(tmp_path / "text.txt"), "--hook", hook]
        asked += ["--out", out, "--context-size", "32", "--device", "cpu", "--embeddings", embeddings]
        answer = CliRunner().invoke(app, asked)
        assert answer.exit_code == 0, answer.output
        stores.append(ActivationStore.open(out))
    one, other = stores
    assert one.fingerprint == other.fingerprint
    np.testing.assert_array_equal(one.read(hook, 0, one.n_rows), other.read(hook, 0, other.n_rows))
