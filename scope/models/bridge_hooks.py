"""The hooks that only a TransformerBridge has, listed without booting one.

The table was read off `bridge.hook_dict` of booted models and a test holds it equal to that, so that
`model.hook_names()` answers at once and without transformer_lens. Hooks that a bridge lists but never calls are
left out.
"""

from collections.abc import Iterator
from typing import NamedTuple

from scope.models.architectures import Layout

__all__ = ["GATED_HOOKS", "BridgeHook", "bridge_hooks"]

GATED_HOOKS: dict[str, str] = {
    "attn.hook_result": "set_use_attn_result",
    "hook_attn_in": "set_use_attn_in",
    "hook_q_input": "set_use_split_qkv_input",
    "hook_k_input": "set_use_split_qkv_input",
    "hook_v_input": "set_use_split_qkv_input",
    "hook_mlp_in": "set_use_hook_mlp_in",
}
"""Hooks that a bridge calls only after a setter (ending of the name -> method)."""


class BridgeHook(NamedTuple):
    """A hook of the bridge and the shape of its tensor."""

    name: str
    shape: tuple[str | int, ...]
    aliases: tuple[str, ...] = ()
    read_only: bool = False


def bridge_hooks(layout: Layout) -> Iterator[BridgeHook]:
    """Hooks of the bridge in model order. Some are also known to the fast path, under this or another name."""
    family = layout.family
    yield BridgeHook("embed.hook_in", ("batch", "seq"))
    if family.pos_embed:
        yield BridgeHook("pos_embed.hook_in", ("batch", "seq"))
    for index in range(layout.n_layers):
        hooks = _delegated_layer(layout, index) if family.delegated else _layer(layout, layout.sizes[index].dense)
        for name, shape, aliases, read_only in hooks:
            also = tuple(f"blocks.{index}.{alias}" for alias in aliases)
            yield BridgeHook(f"blocks.{index}.{name}", shape, also, read_only)
    if family.delegated:
        yield BridgeHook("ln_final.hook_in", ("batch", "seq", layout.d_model))
    else:
        yield from _norm("ln_final", layout.d_model)


def _norm(name: str, width: int) -> Iterator[BridgeHook]:
    yield BridgeHook(f"{name}.hook_in", ("batch", "seq", width))
    yield BridgeHook(f"{name}.hook_normalized", ("batch", "seq", width))
    yield BridgeHook(f"{name}.hook_scale", ("batch", "seq", 1))


def _layer(layout: Layout, dense: bool) -> Iterator[BridgeHook]:
    family, d_model = layout.family, layout.d_model
    heads, key_heads, d_head = layout.n_heads, layout.n_key_value_heads, layout.d_head
    row = ("batch", "seq", d_model)
    yield from _norm("ln1", d_model)
    yield BridgeHook("hook_attn_in", ("batch", "seq", heads, d_model), ("attn.hook_attn_in",))
    for letter, n_heads in (("q", heads), ("k", key_heads), ("v", key_heads)):
        split = ("batch", "seq", n_heads, d_model)
        yield BridgeHook(f"hook_{letter}_input", split, (f"attn.hook_{letter}_input",))
        yield BridgeHook(f"attn.{letter}.hook_in", row)
    if layout.query_key_norms:
        for letter, n_heads in (("q", heads), ("k", key_heads)):
            per_head: tuple[str | int, ...] = ("batch", n_heads, "seq", d_head)
            yield BridgeHook(f"attn.hook_{letter}_normed", per_head)
            for end in ("hook_in", "hook_out", "hook_normalized"):
                yield BridgeHook(f"attn.{letter}_norm.{end}", per_head)
            yield BridgeHook(f"attn.{letter}_norm.hook_scale", ("batch", n_heads, "seq", 1))
    if family.rotary:
        rotated = layout.rotated or d_head
        yield BridgeHook("attn.hook_cos", ("batch", "seq", rotated))
        yield BridgeHook("attn.hook_sin", ("batch", "seq", rotated))
    if family.rotary and len(family.qkv) > 1:
        yield BridgeHook("attn.hook_rot_q", ("batch", "seq", heads, d_head))
        yield BridgeHook("attn.hook_rot_k", ("batch", "seq", key_heads, d_head))
    yield BridgeHook("attn.hook_attn_scores", ("batch", heads, "seq", "seq"))
    yield BridgeHook("attn.hook_pattern", ("batch", heads, "seq", "seq"))
    if len(family.qkv) == 1:
        yield BridgeHook("attn.hook_hidden_states", row)
    yield BridgeHook("attn.hook_result", ("batch", "seq", heads, d_model))
    if family.ln1_post:
        yield from _norm("ln1_post", d_model)
    yield from _norm("ln2", d_model)
    if dense:
        yield BridgeHook("mlp.in.hook_in", row)
    if dense and family.mlp_gate:
        yield BridgeHook("mlp.gate.hook_in", row)
    if family.ln2_post:
        yield from _norm("ln2_post", d_model)


def _delegated_layer(layout: Layout, index: int) -> Iterator[BridgeHook]:
    """Where transformers computes attention and norms: their inside cannot be seen, scores are patterns."""
    sizes = layout.sizes[index]
    row = ("batch", "seq", layout.d_model)
    yield BridgeHook("ln1.hook_in", row)
    for letter in sizes.projections:
        yield BridgeHook(f"attn.{letter}.hook_in", row)
    # A layer whose values are its keys norms them both.
    for letter in "qkv" if "k" in sizes.projections else "q":
        n_heads = layout.n_heads if letter == "q" else sizes.n_key_value_heads
        per_head = ("batch", "seq", n_heads, sizes.d_head)
        yield BridgeHook(f"attn.{letter}_norm.hook_in", per_head)
        yield BridgeHook(f"attn.{letter}_norm.hook_out", per_head)
    pattern = ("batch", layout.n_heads, "seq", "seq")
    yield BridgeHook("attn.hook_pattern", pattern, ("attn.hook_attn_scores",), read_only=True)
    yield BridgeHook("ln1_post.hook_in", row)
    if layout.n_streams > 1:
        yield BridgeHook("attn.hook_in", row)
        yield BridgeHook("laurel.hook_in", row)
        yield BridgeHook("laurel.hook_out", row)
    yield BridgeHook("mlp.in.hook_in", row)
    yield BridgeHook("mlp.gate.hook_in", row)
    yield BridgeHook("ln2_post.hook_in", row)
    if layout.d_per_layer:
        yield BridgeHook("per_layer_input_gate.hook_in", row)
        yield BridgeHook("post_per_layer_input_norm.hook_in", row)
