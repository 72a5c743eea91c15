"""`freeze`: one run of a prompt, after which its attention patterns and norm denominators are known.

1. An attention function of our own records rotated queries, keys and masks (`scope.attribution.frozen_attention`).
2. Handlers record the denominators of norms, what every layer's MLP wrote, what per-layer embeddings made, and where
   the residual stream is a stack how it was mixed (`scope.attribution.frozen_streams`).
3. A layer's values may be an earlier layer's, or its keys, and may have a norm: its `FrozenLayer` holds whose they are.
4. Under interventions all of it is of the model as edited; where these hold attention as it is without them, queries,
   keys and masks are the plain run's.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from scope.attribution.frozen import FrozenLayer, FrozenModel
from scope.attribution.frozen_attention import FrozenAttention, recording
from scope.attribution.frozen_norm import FrozenNorm, norm_denominator
from scope.attribution.frozen_streams import StreamEnds, altup_recorded
from scope.attribution.graph_edits import Change, GraphEdits, edited_handlers
from scope.attribution.linear_edits import LinearEdit, linear_edit
from scope.errors import InvalidInputError
from scope.interventions.edit import Edit
from scope.models.edits import EditContext
from scope.models.losses import final_norm_gain
from scope.models.per_layer import layer_scale, write_hooks, write_parts
from scope.models.taps import tapped

__all__ = ["PATTERN_BYTES", "freeze"]

PATTERN_BYTES = 2**28
"""Attention patterns of all layers together that are kept; more are made anew each time."""


def freeze(
    model: Any, tokens: Int[Tensor, " seq"], extra_hooks: Sequence[str] = (), edits: GraphEdits | None = None
) -> tuple[FrozenModel, dict[str, Float[Tensor, "seq width"]]]:
    """Run a prompt once and hold its attention patterns and norm denominators.

    Args:
        model: a `scope.models.LanguageModel`.
        tokens: the prompt's tokens.
        extra_hooks: further hooks whose activations are wanted, such as what transcoders read.
        edits: interventions that are in force.

    Returns:
        The frozen model, and the activations of `extra_hooks`, float32.

    Raises:
        InvalidInputError: an architecture whose attention is not transformers' attention interface.
    """
    layout = model.layout
    recorded: dict[int, dict[str, Any]] = {}
    seen: dict[str, Tensor] = {}
    denominators: dict[str, Tensor] = {}
    family = layout.family
    after_attention = "attn.hook_out" if family.ln1_post else None
    # Of a stack of streams the first norm reads what is predicted of one, which is no hook.
    norms = [] if layout.n_streams > 1 else ["hook_resid_pre"]
    norms += [*([after_attention] if after_attention else []), "hook_mlp_in"]
    wanted = ["hook_embed", *(["hook_pos_embed"] if family.pos_embed else [])]
    wanted += [f"blocks.{i}.hook_mlp_out" for i in range(layout.n_layers)]
    last = layout.final_residual
    stack = f"blocks.{layout.n_layers - 1}.hook_streams_post" if layout.n_streams > 1 else last
    names = [f"blocks.{i}.{name}" for i in range(layout.n_layers) for name in norms]
    table = model.hook_table
    owners = _value_layers(model)
    value_hooks = _value_hooks(model, owners)
    per_layer = [name for i in range(layout.n_layers if layout.d_per_layer else 0) for name in write_hooks(i)]

    def handler(name: str) -> Any:
        def at(value: Tensor) -> None:
            row = value[0].flatten(1)
            if name in names or name == last:
                denominators[name] = norm_denominator(row, family.centred_norm, _eps(model))
            if name in keep:
                seen[name] = row.float().clone()

        return at

    keep = {*wanted, last, stack, *value_hooks.values(), *per_layer, *(table[name].name for name in extra_hooks)}
    # What an MLP writes is kept as it comes: the nodes write it. All else is what the model goes on with.
    written = {name for name in wanted if name.endswith("hook_mlp_out")}
    before = {name: handler(name) for name in written}
    after = {name: handler(name) for name in {*names, *keep} - written}
    linear: dict[str, tuple[LinearEdit, ...]] = {}

    def told(change: Change, edit: Edit, before: Tensor, after: Tensor, context: EditContext) -> None:
        found = linear_edit(change.number, change.plan, edit, before, after, context)
        linear[context.name] = (*linear.get(context.name, ()), found)

    handlers = edited_handlers(model, edits, tokens[None], before, after, told=told)
    with torch.no_grad(), model.lock, ExitStack() as held:
        if edits is not None and edits.spec.freeze_attention:
            with recording(model, recorded):
                model.hidden_states(tokens[None])
            held.enter_context(edits.attention(model, tokens))
        else:
            held.enter_context(recording(model, recorded))
        with tapped(model.hf, handlers, stop=False), altup_recorded(model) as altup:
            model.hidden_states(tokens[None])
    if len(recorded) != layout.n_layers:
        raise InvalidInputError(
            f"The attention of {type(model.hf).__name__} cannot be frozen: it does not go through transformers' "
            "attention interface."
        )
    size = 4 * layout.n_layers * layout.n_heads * len(tokens) ** 2
    if altup is not None:
        denominators |= {f"blocks.{i}.hook_resid_pre": altup.norm_denominator(i) for i in range(layout.n_layers)}
    layers = tuple(
        _layer(model, index, owners[index], value_hooks, recorded[index], denominators, seen, size <= PATTERN_BYTES)
        for index in range(layout.n_layers)
    )
    if altup is not None:
        layers = tuple(replace(layer, stream=altup.stream(index)) for index, layer in enumerate(layers))
    embedding = seen["hook_embed"] - _put_there(linear.get("hook_embed", ()))
    embedding = embedding + (seen["hook_pos_embed"] if family.pos_embed else 0.0)
    norm = model.hf.get_submodule(layout.module(family.final_norm))
    final = FrozenNorm(
        final_norm_gain(model).detach().float(),
        denominators[last],
        family.centred_norm,
        None if getattr(norm, "bias", None) is None else norm.bias.detach().float(),
    )
    ends = StreamEnds()
    if altup is not None:
        ends = altup.ends(seen["hook_embed"], seen[stack].unflatten(-1, (layout.n_streams, layout.d_model)))
    frozen = FrozenModel(model, tokens, embedding, layers, final, seen[last], {}, linear, ends)
    return frozen, {name: seen[table[name].name] for name in extra_hooks}


def _put_there(edits: Sequence[LinearEdit]) -> Tensor | float:
    """What interventions at one hook put there, as it stands behind the last of them."""
    total: Tensor | float = 0.0
    for edit in edits:
        total = edit.constant + (edit.forward(total, slice(0, len(total))) if isinstance(total, Tensor) else 0.0)
    return total


def _eps(model: Any) -> float:
    norm = model.hf.get_submodule(model.layout.module(model.layout.family.final_norm))
    return float(norm.eps if hasattr(norm, "eps") else norm.variance_epsilon)


def _value_layers(model: Any) -> list[int]:
    """Per layer the one whose values it attends to: its own, or the last of its kind of attention that has any."""
    layout = model.layout
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ["attention"] * layout.n_layers
    owners: list[int] = []
    last: dict[str, int] = {}
    for index, kind in enumerate(kinds):
        if "k" in layout.sizes[index].projections:
            last[kind] = index
        owners.append(last[kind])
    return owners


def _value_hooks(model: Any, owners: Sequence[int]) -> dict[int, str]:
    """Per layer with a norm on its values the hook of what goes into that: values, or keys where these are values."""
    found = {}
    for layer in sorted(set(owners)):
        attention = model.hf.get_submodule(model.layout.layer(layer, model.layout.family.attention))
        if hasattr(attention, "v_norm"):
            letter = "v" if "v" in model.layout.sizes[layer].projections else "k"
            found[layer] = f"blocks.{layer}.attn.hook_{letter}"
    return found


def _layer(
    model: Any,
    index: int,
    owner: int,
    value_hooks: Mapping[int, str],
    recorded: dict[str, Any],
    denominators: Mapping[str, Tensor],
    seen: Any,
    keep: bool,
) -> FrozenLayer:
    layout, family = model.layout, model.layout.family
    block = f"blocks.{index}."

    def norm(relative: str, hook: str) -> FrozenNorm:
        module = model.hf.get_submodule(layout.layer(index, relative))
        gain = module.weight.detach().float() + (1.0 if family.gain_offset else 0.0)
        bias = getattr(module, "bias", None)
        return FrozenNorm(gain, denominators[block + hook], family.centred_norm, None if bias is None else bias.float())

    sizes = layout.sizes[owner]
    W_V, value_bias = _projection(model, owner, "v")
    W_O, output_bias = _projection(model, index, "o")
    value_denominator = None
    if owner in value_hooks:
        norm_of_values = model.hf.get_submodule(layout.layer(owner, family.attention)).v_norm
        values = seen[value_hooks[owner]].unflatten(-1, (sizes.n_key_value_heads, sizes.d_head))
        value_denominator = norm_denominator(values, False, norm_of_values.eps).T
        if value_bias is not None:
            raise InvalidInputError("A bias on values that are normed afterwards is not supported by graphs.")
    attention = FrozenAttention(
        recorded["query"],
        recorded["key"],
        recorded["mask"],
        recorded["scaling"],
        recorded["softcap"],
        W_V.unflatten(0, (sizes.n_key_value_heads, sizes.d_head)),
        None if value_bias is None else value_bias.unflatten(0, (sizes.n_key_value_heads, sizes.d_head)),
        W_O.unflatten(1, (layout.n_heads, sizes.d_head)).permute(1, 0, 2).contiguous(),
        output_bias,
        keep,
        value_denominator,
    )
    post = norm(family.ln1_post, "attn.hook_out") if family.ln1_post else None
    mlp_out = seen[f"{block}hook_mlp_out"]
    return FrozenLayer(
        norm(family.ln1, "hook_resid_pre"),
        attention,
        post,
        norm(family.ln2, "hook_mlp_in"),
        mlp_out,
        owner,
        write_parts(model, index, seen) if layout.d_per_layer else None,
        layer_scale(model, index),
    )


def _projection(model: Any, index: int, which: str) -> tuple[Tensor, Tensor | None]:
    """Weight (out, in) and bias of v or o, float32: Linear's, or GPT-2's Conv1D's, which is transposed."""
    layout, family = model.layout, model.layout.family
    fused = which == "v" and len(family.qkv) == 1
    value = 0 if fused else 2 if "v" in layout.sizes[index].projections else 1
    path = family.o if which == "o" else family.qkv[value]
    module = model.hf.get_submodule(layout.layer(index, path))
    weight = module.weight.detach().float()
    weight = weight if isinstance(module, torch.nn.Linear) else weight.T
    bias = None if module.bias is None else module.bias.detach().float()
    if fused and family.interleaved:
        split = (layout.n_heads, 3, layout.d_head)
        weight = weight.unflatten(0, split)[:, 2].flatten(0, 1)
        bias = None if bias is None else bias.unflatten(0, split)[:, 2].flatten()
    elif fused:
        start = (layout.n_heads + layout.n_key_value_heads) * layout.d_head
        weight, bias = weight[start:], None if bias is None else bias[start:]
    return weight, bias
