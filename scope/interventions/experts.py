"""Edits of what a router chose: forbid an expert, force one, swap two. See `scope.models.experts` for the hooks.

- *forbid*: the expert's logit becomes -inf and the router chooses anew: the next likeliest takes its place, with the
  weights that the router then gives.
- *force*: where the expert was not chosen, it takes the place of the least likely one that was, and its weight.
- *swap*: tokens that went to one of two experts go to the other, with the weight that the one had.

Weights of forced and swapped experts are those of the experts whose place they take (in Gemma 4 with those experts'
scale), so that nothing but what the experts compute differs.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from scope.errors import InvalidInputError, OutOfRangeError
from scope.interventions.edit import Edit, Positions, as_positions
from scope.models.edits import EditContext
from scope.models.experts import require_experts

__all__ = ["forbid_expert", "force_expert", "swap_experts"]


def forbid_expert(model: Any, layer: int, expert: int, positions: Positions = None, *, keep_bos: bool = False) -> Edit:
    """No token goes to the expert.

    Args:
        model: a `scope.models.LanguageModel` with experts.
        layer: the layer.
        expert: the expert's number.
        positions: where it counts; None for everywhere.
        keep_bos: leave the BOS token that starts a window as it is.

    Raises:
        InvalidInputError: the model or the layer has no experts, or a token goes to all of them.
        OutOfRangeError: the layer has no such expert.
    """
    _check(model, layer, expert)
    sizes = model.layout.sizes[layer]
    if sizes.experts_per_token >= sizes.n_experts:
        raise InvalidInputError(f"Each token goes to all {sizes.n_experts} experts of layer {layer}; none is to spare.")

    def forbid(logits: Float[Tensor, "batch seq n_experts"], context: EditContext) -> Tensor:
        new = logits.clone()
        new[..., expert] = float("-inf")
        return new

    return Edit(f"blocks.{layer}.moe.hook_logits", forbid, as_positions(positions), keep_bos, by_token=True)


def force_expert(model: Any, layer: int, expert: int, positions: Positions = None, *, keep_bos: bool = False) -> Edit:
    """Every token goes to the expert; arguments and errors as for `forbid_expert`."""
    _check(model, layer, expert)

    def force(chosen: Int[Tensor, "batch seq k"], context: EditContext) -> Tensor:
        there = (chosen == expert).any(-1)
        new = chosen.clone()
        new[..., -1] = torch.where(there, chosen[..., -1], expert)
        return new

    return Edit(f"blocks.{layer}.moe.hook_experts", force, as_positions(positions), keep_bos, by_token=True)


def swap_experts(
    model: Any, layer: int, one: int, other: int, positions: Positions = None, *, keep_bos: bool = False
) -> Edit:
    """Tokens of one expert go to the other, and the other way round; arguments and errors as for `forbid_expert`."""
    _check(model, layer, one)
    _check(model, layer, other)
    if one == other:
        raise InvalidInputError(f"Expert {one} cannot be swapped with itself; give two.")

    def swap(chosen: Int[Tensor, "batch seq k"], context: EditContext) -> Tensor:
        return torch.where(chosen == one, other, torch.where(chosen == other, one, chosen))

    return Edit(f"blocks.{layer}.moe.hook_experts", swap, as_positions(positions), keep_bos, by_token=True)


def _check(model: Any, layer: int, expert: int) -> None:
    require_experts(model, layer)
    n_experts = model.layout.sizes[layer].n_experts
    if not 0 <= expert < n_experts:
        raise OutOfRangeError(f"Layer {layer} has no expert {expert}: it has 0 to {n_experts - 1}.")
