"""Per-layer embeddings (Gemma 3n, Gemma 4 E2B and E4B): what each layer's own table makes of a token.

Beside the main embedding e (hook `hook_embed`) a token has one row of a second table, which holds a piece for every
layer. At layer l, with h the residual stream that the layer has made by then:

    table_l      = sqrt(d_ple) E_l[token]                         blocks.l.ple.hook_table       (batch, seq, d_ple)
    projection_l = RMSNorm(W_l e / sqrt(d_model))                 blocks.l.ple.hook_projection  (batch, seq, d_ple)
    input_l      = (table_l + projection_l) / sqrt(2)             blocks.l.ple.hook_input       (batch, seq, d_ple)
    pre_l        = W_gate h                                       blocks.l.ple.hook_pre         (batch, seq, d_ple)
    gate_l       = gelu(pre_l)                                    blocks.l.ple.hook_gate        (batch, seq, d_ple)
    product_l    = gate_l * input_l                               blocks.l.ple.hook_product     (batch, seq, d_ple)
    out_l        = W_out product_l                                blocks.l.ple.hook_out         (batch, seq, d_model)
    written_l    = RMSNorm(out_l)                                 blocks.l.hook_ple_out         (batch, seq, d_model)

Both norms multiply by their gain. Gemma 4 adds `written_l` to the residual stream and then multiplies the stream by a
scalar of the layer. Gemma 3n, whose residual stream is a stack (AltUp), adds it to every stream but the first; its gate
reads the active stream, scaled. All of these are hooks of the fast path, of kind "per_layer".

`write_parts` splits `written_l` exactly into what the look-up wrote and what the projection of the main embedding
wrote, with the gate and the norm's denominator as they were: the rest of the way is linear.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from scope.errors import InvalidInputError

if TYPE_CHECKING:
    from scope.models.language_model import LanguageModel

__all__ = ["PerLayerWrites", "layer_scale", "require_per_layer", "write_hooks", "write_parts"]


class PerLayerWrites(NamedTuple):
    """What one layer's per-layer embedding wrote into the residual stream, float32."""

    table: Float[Tensor, "seq d_model"]
    """Through the look-up of the layer's table."""
    projection: Float[Tensor, "seq d_model"]
    """Through the projection of the main embedding."""


def require_per_layer(model: "LanguageModel") -> None:
    """Refuse a model without per-layer embeddings.

    Raises:
        InvalidInputError: the model has none.
    """
    if not model.layout.d_per_layer:
        raise InvalidInputError(
            f"{model.name} ({model.config.model_type}) has no per-layer embeddings; Gemma 3n and Gemma 4 E2B, E4B do."
        )


def write_hooks(layer: int) -> list[str]:
    """The hooks that `write_parts` needs the activations of."""
    return [f"blocks.{layer}.ple.{name}" for name in ("hook_table", "hook_projection", "hook_gate", "hook_out")]


@torch.no_grad()
def write_parts(model: "LanguageModel", layer: int, activations: dict[str, Tensor]) -> PerLayerWrites:
    """`hook_ple_out` of a layer as the sum of its two parts.

    Args:
        model: a model with per-layer embeddings.
        layer: which layer.
        activations: of the hooks `write_hooks(layer)`, (seq, width) each, as `model.run` gives them.
    """
    table, projection, gate, out = (activations[name].float() for name in write_hooks(layer))
    layout = model.layout
    W_out = model.hf.get_submodule(layout.layer(layer, "per_layer_projection")).weight.float()
    norm = model.hf.get_submodule(layout.layer(layer, "post_per_layer_input_norm"))
    denominator = (out.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    gain = norm.weight.float() / denominator

    def written(part: Tensor) -> Tensor:
        return (gate * part * 0.5**0.5) @ W_out.T * gain

    return PerLayerWrites(written(table), written(projection))


def layer_scale(model: "LanguageModel", layer: int) -> float:
    """What a layer multiplies its residual stream by at its very end (Gemma 4); 1 where it does not."""
    scale = getattr(model.hf.get_submodule(model.layout.layer(layer)), "layer_scalar", None)
    return 1.0 if scale is None else float(scale)
