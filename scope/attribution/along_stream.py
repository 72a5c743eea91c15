"""Gradients along the residual stream alone, at one position and without attention: what is written there counts so.

What a head, an MLP or a table writes at a position reaches what is read at the same position behind it in two ways: by
later heads, and along the residual stream. `along_the_stream` is the second: through skip connections, the scalars that
layers end with, interventions in force, and with AltUp (Gemma 3n) through what mixes its streams and the low-rank
branch beside attention (`scope.attribution.frozen_streams`).
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from scope.attribution.frozen import FrozenModel

__all__ = ["StreamGradients", "along_the_stream"]


class StreamGradients(NamedTuple):
    """Gradients at one position, each `(n, d_model)`, by layer, of the layers in front of what reads."""

    attn_out: dict[int, Tensor]
    """At what attention writes."""
    mlp_out: dict[int, Tensor]
    """At what the MLP writes."""
    ple_out: dict[int, Tensor]
    """At what the per-layer embedding writes."""
    in_front: dict[int, Tensor]
    """At the residual stream in front of the layer, and of the final norm: of AltUp's stack at each stream."""
    embedding: Float[Tensor, "n d_model"]
    put: Float[Tensor, " n"]
    """What comes from what interventions put into the stream on the way."""


def along_the_stream(
    frozen: FrozenModel,
    gradients: Float[Tensor, "n d_model"],
    at: int,
    until: int,
    reads: Literal["mlp", "attention"] = "mlp",
    skips: bool = True,
) -> StreamGradients:
    """Pull directions back along the residual stream.

    Args:
        frozen: the prompt.
        gradients: at the stream in front of the norm that is read, as `FrozenModel.at_mlp_input` and `.at_logits` give
            them.
        at: the position.
        until: the layer that reads; n_layers for the final norm.
        reads: what of that layer reads.
        skips: whether linear parts of transcoders are on the way.
    """
    here, n_layers = slice(at, at + 1), len(frozen.layers)
    where = torch.full((len(gradients),), at, device=gradients.device)
    beside, stacked = frozen.model.layout.parallel, frozen.model.layout.n_streams > 1
    found = StreamGradients({}, {}, {}, {}, gradients, torch.zeros(len(gradients), device=gradients.device))

    def in_front(hook: str, gradient: Tensor) -> Tensor:
        for edit in reversed(frozen.edits.get(hook, ())):
            found.put.add_(gradient[:, 0] @ edit.constant[at])
            gradient = edit.backward(gradient, here)
        return gradient

    now = frozen.ends.zeros(gradients, 1)
    if until == n_layers:
        now = frozen.ends.at_last(gradients, where)[:, None]
        found.in_front[until] = now[:, 0]
    for index in range(min(until, n_layers - 1), -1, -1):
        block, layer = f"blocks.{index}.", frozen.layers[index]
        stream, into_mlp = layer.stream, None
        if index < until:
            now = now.clone() if stacked else now  # a stack is changed in place
            if f"{block}hook_resid_post" in frozen.edits:
                now = stream.with_active(now, in_front(f"{block}hook_resid_post", stream.active(now)))
            now = now if layer.scale == 1.0 else now * layer.scale
            if layer.per_layer is not None:
                found.ple_out[index] = stream.at_table(now)[:, 0]
        past, end = stream.at_end(now, here)
        if index < until:
            written = in_front(f"{block}hook_mlp_out", end)
            found.mlp_out[index] = written[:, 0]
            if skips and index in frozen.skips:
                into_mlp = layer.ln2.backward(written @ frozen.skips[index], here)
        elif reads == "mlp":
            into_mlp = gradients[:, None]
        if index < until or reads == "mlp":
            # Where both stand beside each other an MLP reads what attention reads, and not what it writes.
            end = end if beside or into_mlp is None else end + into_mlp
            end = stream.at_attention(in_front(f"{block}hook_resid_mid", end))
            written = in_front(f"{block}hook_attn_out", end)
            found.attn_out[index] = written[:, 0]
            normed = stream.beside_attention(end, here)
            end = end + into_mlp if beside and into_mlp is not None else end
            if normed is not None:
                end = end + layer.ln1.backward(normed, here)
        else:
            end = gradients[:, None]
        now = stream.in_front(past, end, here)
        if f"{block}hook_resid_pre" in frozen.edits:
            now = stream.with_active(now, in_front(f"{block}hook_resid_pre", stream.active(now)))
        found.in_front[index] = now[:, 0]
    embedding = frozen.ends.at_embedding(now, here)
    in_front("hook_embed", embedding)
    return found._replace(embedding=embedding[:, 0])
