"""Mixtures of experts (Mixtral, Qwen3-MoE, Gemma 4 26B-A4B): which experts a token goes to, and what they make of it.

A layer's router gives each token a logit for every one of `n_experts` experts; the token goes to the k largest. With x
what the experts read and E_j the experts,

    p = softmax(logits)                     blocks.l.moe.hook_logits      (batch, seq, n_experts)
    chosen = the k largest of p             blocks.l.moe.hook_experts     (batch, seq, k)  expert numbers
    w = p[chosen], normed as the model does blocks.l.moe.hook_weights     (batch, seq, k)
    E_j(x) for each chosen j                blocks.l.moe.hook_expert_out  (batch, seq, k, d_model)
    y = sum_j w_j E_j(x)                    blocks.l.moe.hook_out         (batch, seq, d_model)

    x                                       blocks.l.moe.hook_in          (batch, seq, d_model)
    y normed, as it is added to the MLP's   blocks.l.moe.hook_normed      (batch, seq, d_model)  Gemma 4
    the dense MLP's output, normed          blocks.l.moe.hook_dense_normed (batch, seq, d_model)  Gemma 4

Slots are in the router's order, the likeliest expert first. Mixtral always norms the chosen weights to sum to 1,
Qwen3-MoE where its configuration says so, and Gemma 4 always, times a scale of each expert. In Mixtral and Qwen3-MoE
the experts are the MLP (`hook_mlp_out` is y); in Gemma 4 they stand beside a dense MLP, whose own hooks are as ever,
read another norm of the residual stream, and `hook_mlp_out` is the norm of the sum of both.

All of these can be read, edited and captured; an edit of the logits chooses anew. Expert numbers are stored as floats,
exactly up to 256 experts in bfloat16. What single experts write is not computed by transformers' fused experts: it is
computed again where it is asked for, k vectors a token, and an edit of it is summed up in the experts' place.
"""

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from scope.errors import InvalidInputError

__all__ = ["expert_outputs", "require_experts", "rerouted", "summed"]


def expert_outputs(
    experts: Any, x: Float[Tensor, "n d_model"], chosen: Int[Tensor, "n k"]
) -> Float[Tensor, "n k d_model"]:
    """E_j(x) of each token's chosen experts: W_down (act(W_gate x) * W_up x)."""
    out = x.new_zeros(*chosen.shape, x.shape[-1])
    for expert in chosen.unique().tolist():
        row, slot = (chosen == expert).nonzero(as_tuple=True)
        gate, up = nn.functional.linear(x[row], experts.gate_up_proj[expert]).chunk(2, dim=-1)
        made = nn.functional.linear(experts.act_fn(gate) * up, experts.down_proj[expert])
        out = out.index_put((row, slot), made.to(out.dtype))
    return out


def summed(outputs: Float[Tensor, "n k d_model"], weights: Float[Tensor, "n k"]) -> Float[Tensor, "n d_model"]:
    """sum_j w_j E_j(x)."""
    return (outputs * weights[..., None].to(outputs.dtype)).sum(1)


def rerouted(router: Any, logits: Float[Tensor, "n n_experts"]) -> tuple[Tensor, Tensor, Tensor]:
    """What a router of Mixtral's or Qwen3-MoE's kind makes of logits: logits, weights and chosen experts.

    Gemma 4's router has a module of its own for its logits, behind which it goes on by itself.
    """
    weights, chosen = logits.float().softmax(-1).topk(router.top_k, dim=-1)
    if getattr(router, "norm_topk_prob", True):
        weights = weights / weights.sum(-1, keepdim=True)
    return logits, weights.to(logits.dtype) if hasattr(router, "norm_topk_prob") else weights, chosen


def require_experts(model: Any, layer: int | None = None) -> None:
    """Refuse a model without experts, or a layer without them.

    Raises:
        InvalidInputError: there are none.
    """
    with_experts = [index for index, sizes in enumerate(model.layout.sizes) if sizes.n_experts]
    if not with_experts:
        raise InvalidInputError(
            f"{model.name} ({model.config.model_type}) has no experts; Mixtral, Qwen3-MoE and Gemma 4 26B-A4B do."
        )
    if layer is not None and layer not in with_experts:
        raise InvalidInputError(f"Layer {layer} has no experts; layers {with_experts} do.")
