"""Per-layer embeddings: hooks are what transformers computes, on both paths, read, edited, captured, trained on."""

from pathlib import Path

import pytest
import torch
from helpers_models import (
    PER_LAYER_KINDS,
    TEXT,
    fast_points,
    relative_difference,
    require_both_paths_edit_the_same,
    require_both_paths_read_the_same,
    tiny_folder,
    tiny_model,
)
from helpers_models import one_thread as one_thread
from torch import Tensor

from activations.capture import capture
from activations.store import ActivationStore
from activations.text import TextSource
from scope.attribution import logit_lens
from scope.errors import InvalidInputError
from scope.models import LanguageModel
from scope.models.per_layer import layer_scale, write_hooks, write_parts
from scope.training import TrainConfig, train

TOKENS = torch.arange(4, 24)
ALL_KINDS = (*PER_LAYER_KINDS, "gemma4_experts")
LAYER = 1


@pytest.mark.parametrize("kind", [*ALL_KINDS, "gemma4_multimodal"])
def test_the_fast_path_equals_the_analysis_path_at_every_hook(kind: str) -> None:
    require_both_paths_read_the_same(tiny_model(kind, "eager"), TOKENS)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_every_edit_does_the_same_on_both_paths(kind: str) -> None:
    model = tiny_model(kind, "eager")
    elsewhere = [f"blocks.{layer}." for layer in range(model.n_layers) if layer != LAYER]
    points = [point for point in fast_points(model) if not point.name.startswith(tuple(elsewhere))]
    require_both_paths_edit_the_same(model, TOKENS, points, lambda point, value: 0.5 * value + 0.1)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_what_is_listed_is_there_with_its_shape(kind: str) -> None:
    model = tiny_model(kind, "eager")
    for point in model.hook_names():
        if not point.name.startswith("blocks.") or point.name.startswith(("blocks.0.", "blocks.3.")):
            value = model.run(TOKENS, hooks=[point.name], logits=False).activations[point.name]
            assert value.shape == tuple(len(TOKENS) if size == "seq" else size for size in point.shape[1:]), point


@pytest.mark.parametrize("kind", PER_LAYER_KINDS)
def test_the_hooks_are_the_terms_of_the_formulas(kind: str) -> None:
    """From the weights alone, written out anew."""
    model = tiny_model(kind, "eager")
    backbone = model.hf.model
    layer = backbone.layers[LAYER]
    seen = model.run(TOKENS, hooks=[point.name for point in fast_points(model)]).activations
    block = f"blocks.{LAYER}."
    ple = {name: seen[f"{block}ple.hook_{name}"] for name in ("table", "projection", "input", "gate", "product", "out")}
    d_ple, d_model = model.layout.d_per_layer, model.d_model

    def norm(x: Tensor, gain: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain

    rows = backbone.embed_tokens_per_layer.weight[TOKENS].unflatten(-1, (model.n_layers, d_ple))
    torch.testing.assert_close(ple["table"], rows[:, LAYER] * d_ple**0.5)
    projected = (seen["hook_embed"] @ backbone.per_layer_model_projection.weight.T) * d_model**-0.5
    projected = norm(projected.unflatten(-1, (model.n_layers, d_ple)), backbone.per_layer_projection_norm.weight)
    torch.testing.assert_close(ple["projection"], projected[:, LAYER])
    torch.testing.assert_close(ple["input"], (ple["table"] + ple["projection"]) / 2**0.5)
    gate = torch.nn.functional.gelu(seen[f"{block}ple.hook_pre"], approximate="tanh")
    torch.testing.assert_close(ple["gate"], gate)
    torch.testing.assert_close(ple["product"], gate * ple["input"])
    torch.testing.assert_close(ple["out"], ple["product"] @ layer.per_layer_projection.weight.T)
    written = seen[f"{block}hook_ple_out"]
    torch.testing.assert_close(written, norm(ple["out"], layer.post_per_layer_input_norm.weight))
    if kind == "gemma4":
        stream = seen[f"{block}hook_resid_mid"] + seen[f"{block}hook_mlp_out"]
        torch.testing.assert_close(seen[f"{block}ple.hook_pre"], stream @ layer.per_layer_input_gate.weight.T)
        torch.testing.assert_close(seen[f"{block}hook_resid_post"], (stream + written) * layer.layer_scalar)
    else:
        nothing = {f"{block}hook_ple_out": lambda value, context: value * 0}
        name = f"{block}hook_streams_post"
        without = model.run(TOKENS, hooks=[name], edits=nothing).activations[name]
        torch.testing.assert_close(seen[name][:, 0], without[:, 0])
        torch.testing.assert_close(seen[name][:, 1], without[:, 1] + written)


@pytest.mark.parametrize("kind", PER_LAYER_KINDS)
def test_what_was_written_is_the_sum_of_look_up_and_projection(kind: str) -> None:
    model = tiny_model(kind)
    name = f"blocks.{LAYER}.hook_ple_out"
    seen = model.run(TOKENS, hooks=[*write_hooks(LAYER), name]).activations
    parts = write_parts(model, LAYER, seen)
    torch.testing.assert_close(parts.table + parts.projection, seen[name])
    assert parts.table.norm() > 0
    assert layer_scale(model, LAYER) == pytest.approx(0.9 if kind == "gemma4" else 1.0)


@pytest.mark.parametrize("kind", PER_LAYER_KINDS)
def test_a_zeroed_table_is_what_zeroing_its_hook_is(kind: str) -> None:
    model = LanguageModel.load(str(tiny_folder(kind)), device="cpu", dtype="float32")
    zero = {f"blocks.{LAYER}.ple.hook_table": lambda value, context: torch.zeros_like(value)}
    edited = model.run(TOKENS, edits=zero).logits
    width = model.layout.d_per_layer
    model.hf.model.embed_tokens_per_layer.weight[:, LAYER * width : (LAYER + 1) * width] = 0
    zeroed = model.run(TOKENS).logits
    assert edited is not None
    assert zeroed is not None
    torch.testing.assert_close(edited, zeroed)
    assert relative_difference(zeroed, tiny_model(kind).run(TOKENS).logits) > 1e-4  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", PER_LAYER_KINDS)
def test_a_store_of_per_layer_hooks_holds_what_the_model_computes_and_trains_an_sae(kind: str, tmp_path: Path) -> None:
    model = tiny_model(kind)
    (tmp_path / "text.txt").write_text(TEXT * 6)
    product, table, stack = "blocks.2.ple.hook_product", "blocks.1.ple.hook_table", "blocks.0.hook_resid_post"
    capture(
        model, TextSource(tmp_path / "text.txt"), [product, table, stack], tmp_path / "acts.zarr",
        max_tokens=600, context_size=32, dtype="float32",
    )  # fmt: skip
    store = ActivationStore.open(tmp_path / "acts.zarr")
    tokens = store.window_tokens([0])[0]
    seen = model.run(torch.from_numpy(tokens.astype("int64")), hooks=[product, table, stack], logits=False).activations
    for hook in (product, table, stack):
        torch.testing.assert_close(torch.from_numpy(store.read(hook, 0, len(tokens))), seen[hook], rtol=1e-4, atol=1e-5)
    report = train(store, product, TrainConfig(d_sae=32, k=4, tokens=4096, batch_size=128, seed=0))
    assert report.sae.d_in == model.layout.d_per_layer
    assert report.sae.hook_name == product
    rows = torch.from_numpy(store.read(product, 0, store.n_rows))
    residue = rows - report.sae(rows)
    assert residue.square().sum() < 0.5 * (rows - rows.mean(0)).square().sum()
    spliced = model.run(TOKENS, saes=report.sae, splice="without_error")
    assert spliced.features[product].shape == (len(TOKENS), 32)
    assert relative_difference(spliced.logits, model.run(TOKENS).logits) > 0  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", PER_LAYER_KINDS)
def test_a_transcoder_learns_what_a_layer_makes_of_its_table(kind: str, tmp_path: Path) -> None:
    """From the look-up to what is written into the residual stream, hooks of different widths."""
    model = tiny_model(kind)
    (tmp_path / "text.txt").write_text(TEXT * 6)
    reads, writes = "blocks.2.ple.hook_input", "blocks.2.hook_ple_out"
    capture(
        model, TextSource(tmp_path / "text.txt"), [reads, writes], tmp_path / "acts.zarr",
        max_tokens=600, context_size=32, dtype="float32",
    )  # fmt: skip
    store = ActivationStore.open(tmp_path / "acts.zarr")
    config = TrainConfig(arch="transcoder", d_sae=32, k=4, tokens=8192, batch_size=128, seed=0)
    sae = train(store, reads, config, hook_out=writes).sae
    assert (sae.d_in, sae.d_out) == (model.layout.d_per_layer, model.d_model)
    written = torch.from_numpy(store.read(writes, 0, store.n_rows))
    residue = written - sae(torch.from_numpy(store.read(reads, 0, store.n_rows)))
    assert residue.square().sum() < 0.9 * (written - written.mean(0)).square().sum()


def test_attention_that_only_the_bridge_shows_cannot_be_edited() -> None:
    model = tiny_model("gemma4", "eager")
    name = "blocks.0.attn.hook_pattern"
    assert model.run(TOKENS, hooks=[name], logits=False).activations[name].sum(-1).allclose(torch.ones(4, len(TOKENS)))
    with pytest.raises(InvalidInputError, match="read but not edited"):
        model.run(TOKENS, edits={name: lambda value, context: value * 0})


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_the_lens_after_the_last_layer_is_the_model(kind: str) -> None:
    """For AltUp's streams too, which the model itself merges behind its last layer."""
    model = tiny_model(kind)
    lens = logit_lens(model, TOKENS, k=3)
    logits = model.run(TOKENS).logits
    assert logits is not None
    best = logits.log_softmax(-1).exp().topk(3, dim=-1)
    assert lens.top_ids.shape == (model.n_layers, len(TOKENS), 3)
    assert (torch.from_numpy(lens.top_ids[-1]) == best.indices).all()
    torch.testing.assert_close(torch.from_numpy(lens.top_probabilities[-1]), best.values, rtol=1e-4, atol=1e-6)
