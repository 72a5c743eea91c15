"""Hook names: one table, listed without a bridge, found by every name, shown safely."""

import dataclasses

import pytest
import torch
from helpers_models import KINDS, WRONG_TYPE, tiny_model
from helpers_models import one_thread as one_thread

from scope.errors import InvalidInputError, UnknownNameError
from scope.models import HookTable
from scope.models.architectures import MODEL_TYPES, find_layout


@pytest.mark.parametrize("kind", KINDS)
def test_rows_have_the_shapes_that_the_table_says(kind: str) -> None:
    model = tiny_model(kind)
    tokens = torch.arange(4, 11)
    points = [point for point in model.hook_names() if point.path == "fast"]
    activations = model.run(tokens, hooks=[point.name for point in points]).activations
    for point in points:
        assert activations[point.name].shape == (7, *model.hook_shape(point.name)), point


@pytest.mark.parametrize(
    ("name", "known_as"),
    [
        ("blocks.2.hook_out", "blocks.2.hook_resid_post"),
        ("blocks.2.hook_in", "blocks.2.hook_resid_pre"),
        ("blocks.0.attn.o.hook_in", "blocks.0.attn.hook_z"),
        ("blocks.0.mlp.out.hook_in", "blocks.0.mlp.hook_post"),
        ("embed.hook_out", "hook_embed"),
        ("unembed.hook_in", "ln_final.hook_out"),
        ("blocks.1.hook_resid_mid", "blocks.1.hook_resid_mid"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_both_vocabularies_resolve_to_one_name(kind: str, name: str, known_as: str) -> None:
    assert tiny_model(kind).resolve_hook(name) == known_as


def test_gemmas_attention_and_mlp_outputs_are_told_apart_from_what_reaches_the_residual() -> None:
    gemma, llama = tiny_model("gemma3"), tiny_model("llama")
    assert gemma.resolve_hook("blocks.0.mlp.hook_out") == "blocks.0.mlp.hook_out"
    assert gemma.resolve_hook("blocks.0.ln2_post.hook_out") == "blocks.0.hook_mlp_out"
    assert llama.resolve_hook("blocks.0.mlp.hook_out") == "blocks.0.hook_mlp_out"
    tokens = torch.arange(4, 11)
    names = [f"blocks.1.{name}" for name in ("hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_mlp_out")]
    for model in (gemma, llama):
        pre, attention, mid, mlp = model.run(tokens, hooks=names).activations.values()
        post = model.run(tokens, hooks=["blocks.1.hook_resid_post"]).activations["blocks.1.hook_resid_post"]
        torch.testing.assert_close(pre + attention, mid)
        torch.testing.assert_close(mid + mlp, post)


@pytest.mark.parametrize("name", ["blocks.1.hook_residpost", "blocks.9.hook_resid_post", "hook_embeds"])
def test_a_wrong_name_is_refused_with_near_misses(name: str) -> None:
    model = tiny_model("gemma3")
    with pytest.raises(UnknownNameError, match="Did you mean"):
        model.resolve_hook(name)
    for wrong in ({"hooks": [name]}, {"edits": {name: lambda value, context: None}}):
        with pytest.raises(UnknownNameError, match="hook_names"):
            model.run("The cat", **wrong)


@pytest.mark.parametrize("name", [None, 3, ""])
def test_what_is_no_name_at_all_is_refused(name: object) -> None:
    with pytest.raises(WRONG_TYPE):
        tiny_model("gemma3").resolve_hook(name)  # type: ignore[arg-type]


def test_what_only_the_bridge_sees_cannot_be_captured() -> None:
    model = tiny_model("gemma3")
    assert model.hook_names()["blocks.0.attn.hook_pattern"].path == "bridge"
    with pytest.raises(InvalidInputError, match=r"use model\.run"):
        model.hook_shape("blocks.0.attn.hook_pattern")


def test_hooks_are_in_model_order_and_can_be_selected_by_kind() -> None:
    table = tiny_model("gemma3").hook_names()
    order = [
        "hook_embed",
        "blocks.0.hook_resid_pre",
        "blocks.0.attn.hook_z",
        "blocks.0.hook_resid_mid",
        "blocks.0.mlp.hook_post",
        "blocks.0.hook_resid_post",
        "blocks.3.hook_mlp_out",
        "ln_final.hook_out",
    ]
    assert sorted(order, key=table.rank) == order
    residual = tiny_model("gemma3").hook_names("residual")
    assert len(residual) == 3 * 4
    assert all("resid" in name for name in residual.names)
    with pytest.raises(WRONG_TYPE, match=r"embedding.*residual"):
        table.select("head")  # type: ignore[arg-type]


def test_the_table_shows_itself_with_layers_folded_and_everything_escaped() -> None:
    table = tiny_model("llama").hook_names()
    assert "blocks.{0…2}.hook_resid_post" in repr(table)
    assert "(batch, seq, 4, 8)" in repr(table)
    evil = HookTable([dataclasses.replace(next(iter(table)), name="<script>alert(1)</script>")])
    assert "<script>" not in evil._repr_html_()
    assert "&lt;script&gt;" in evil._repr_html_()


def test_nothing_stands_between_attention_and_mlp_where_they_are_beside_each_other() -> None:
    """Of q, k and v, which one matrix holds head by head, each is a hook of its own; and the layer adds what its
    attention and its MLP make of one and the same stream."""
    model = tiny_model("pythia")
    assert "blocks.1.hook_resid_mid" not in model.hook_names()
    assert "blocks.1.hook_resid_mid" in tiny_model("pythia_serial").hook_names()
    names = ["hook_resid_pre", "hook_mlp_in", "hook_attn_out", "hook_mlp_out", "hook_resid_post", "ln1.hook_out"]
    seen = model.run(torch.arange(4, 24), hooks=[f"blocks.1.{name}" for name in (*names, "attn.hook_k")]).activations
    before, read, attention, mlp, after, normed, keys = seen.values()
    assert torch.equal(before, read)
    torch.testing.assert_close(before + attention + mlp, after)
    projection = model.hf.gpt_neox.layers[1].attention.query_key_value
    for head in range(4):
        rows = slice(24 * head + 8, 24 * head + 16)
        torch.testing.assert_close(keys[:, head], normed @ projection.weight[rows].T + projection.bias[rows])


def test_an_unsupported_architecture_is_refused_with_the_list() -> None:
    import transformers

    config = transformers.BloomConfig(vocab_size=32, hidden_size=16, n_layer=1, n_head=2)
    with pytest.raises(InvalidInputError, match="bloom") as error:
        find_layout(transformers.BloomForCausalLM(config))
    assert all(model_type in str(error.value) for model_type in MODEL_TYPES)
