"""Edits of experts: of what the router chooses, and of what an expert writes. See `scope.models.experts` for the hooks.

Of the choice. All three edit the router's logits; the router then chooses anew and norms the weights as the model does.

- *forbid*: the expert's logit becomes -inf, and the next likeliest takes its place.
- *force*: where the expert was not chosen, it trades logits with the least likely one that was: it takes that one's
  place and probability, and the model gives it the weight that goes with them.
- *swap*: two experts trade logits: tokens that went to the one go to the other.

Of the output, E_j(x) of a token that went to expert j: *ablate* (0), *set*, *scale*. The choice and its weights w stay
as they are, so that ablating takes w_j E_j(x) out of the layer's sum and nothing else.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from scope.errors import InvalidInputError, OutOfRangeError
from scope.interventions.edit import Edit, Integers, Positions, as_integers, as_positions
from scope.models.edits import EditContext
from scope.models.experts import require_experts

__all__ = [
    "ablate_experts",
    "changed_experts",
    "checked_experts",
    "forbid_expert",
    "force_expert",
    "scale_experts",
    "set_experts",
    "swap_experts",
]


def forbid_expert(
    model: Any, layer: int, expert: Integers, positions: Positions = None, *, keep_bos: bool = False
) -> Edit:
    """No token goes to the expert, or to any of several.

    Args:
        model: a `scope.models.LanguageModel` with experts.
        layer: the layer.
        expert: the expert's number, or several.
        positions: where it counts; None for everywhere.
        keep_bos: leave the BOS token that starts a window as it is.

    Raises:
        InvalidInputError: the model or the layer has no experts, or fewer are left than a token goes to.
        OutOfRangeError: the layer has no such expert.
    """
    forbidden = checked_experts(model, layer, expert)
    sizes = model.layout.sizes[layer]
    require_enough(layer, sizes.n_experts, sizes.experts_per_token, len(forbidden))

    def forbid(logits: Float[Tensor, "batch seq n_experts"], context: EditContext) -> Tensor:
        new = logits.clone()
        new[..., forbidden] = float("-inf")
        return new

    return Edit(f"blocks.{layer}.moe.hook_logits", forbid, as_positions(positions), keep_bos, by_token=True)


def force_expert(
    model: Any, layer: int, expert: Integers, positions: Positions = None, *, keep_bos: bool = False
) -> Edit:
    """Every token goes to the expert, or to all of several, at most as many as a token goes to; arguments and errors as
    for `forbid_expert`."""
    forced = checked_experts(model, layer, expert)
    k = model.layout.sizes[layer].experts_per_token
    if len(forced) > k:
        raise InvalidInputError(f"{len(forced)} experts are forced; a token of layer {layer} goes to {k}.")

    def force(logits: Float[Tensor, "batch seq n_experts"], context: EditContext) -> Tensor:
        slots = torch.arange(k, device=logits.device)
        wanted = torch.tensor(forced, device=logits.device)
        new = logits
        for one in forced:
            chosen = new.topk(k, dim=-1).indices
            last = slots.where(~torch.isin(chosen, wanted), -1).amax(-1, keepdim=True)
            traded = _traded(new, one, chosen.gather(-1, last.clamp_min(0)))
            new = new.where((chosen == one).any(-1, keepdim=True), traded)
        return new

    return Edit(f"blocks.{layer}.moe.hook_logits", force, as_positions(positions), keep_bos, by_token=True)


def swap_experts(
    model: Any, layer: int, one: int, other: int, positions: Positions = None, *, keep_bos: bool = False
) -> Edit:
    """Tokens of one expert go to the other, and the other way round; arguments and errors as for `forbid_expert`."""
    checked_experts(model, layer, one)
    checked_experts(model, layer, other)
    if one == other:
        raise InvalidInputError(f"Expert {one} cannot be swapped with itself; give two.")

    def swap(logits: Float[Tensor, "batch seq n_experts"], context: EditContext) -> Tensor:
        return _traded(logits, one, torch.full_like(logits[..., :1], other, dtype=torch.int64))

    return Edit(f"blocks.{layer}.moe.hook_logits", swap, as_positions(positions), keep_bos, by_token=True)


def _traded(
    logits: Float[Tensor, "batch seq n_experts"], one: int, others: Int[Tensor, "batch seq 1"]
) -> Float[Tensor, "batch seq n_experts"]:
    """Logits in which an expert has each token's other expert's, and that one has its."""
    new = logits.scatter(-1, others, logits[..., one : one + 1])
    new[..., one : one + 1] = logits.gather(-1, others)
    return new


def ablate_experts(
    model: Any, layer: int, experts: Integers, positions: Positions = None, *, keep_bos: bool = False
) -> tuple[Edit, ...]:
    """E_j(x) -> 0 for each expert j that is given; arguments and errors as for `forbid_expert`."""
    return changed_experts(model, layer, experts, torch.zeros_like, positions, keep_bos=keep_bos)


def set_experts(
    model: Any,
    layer: int,
    experts: Integers,
    new: float | Float[Tensor, " d_model"],
    positions: Positions = None,
    *,
    keep_bos: bool = False,
) -> tuple[Edit, ...]:
    """E_j(x) -> `new`, a number or a vector, for each expert j that is given; other arguments and errors as for
    `forbid_expert`."""
    row = torch.as_tensor(new)
    if row.ndim and tuple(row.shape) != (model.d_model,):
        raise InvalidInputError(f"new has shape {tuple(row.shape)}; expected a number, or ({model.d_model},).")

    def change(made: Tensor) -> Tensor:
        return row.to(made.device, made.dtype).expand_as(made)

    return changed_experts(model, layer, experts, change, positions, keep_bos=keep_bos)


def scale_experts(
    model: Any, layer: int, experts: Integers, factor: float, positions: Positions = None, *, keep_bos: bool = False
) -> tuple[Edit, ...]:
    """E_j(x) -> `factor` E_j(x) for each expert j that is given; other arguments and errors as for `forbid_expert`."""
    return changed_experts(model, layer, experts, lambda made: factor * made, positions, keep_bos=keep_bos)


def changed_experts(
    model: Any,
    layer: int,
    experts: Integers,
    change: Callable[[Tensor], Tensor],
    positions: Positions = None,
    *,
    keep_bos: bool = False,
) -> tuple[Edit, ...]:
    """Edits that change what experts write: one that reads which experts each token goes to, after all edits of the
    choice, and one that changes those experts' outputs. They belong together, and are for one pass after another.

    Args:
        model: a `scope.models.LanguageModel` with experts.
        layer: the layer.
        experts: numbers of the experts.
        change: from outputs, (batch, seq, k, d_model), to what takes their place where they are of these experts.
        positions: where it counts; None for everywhere.
        keep_bos: leave the BOS token that starts a window as it is.

    Raises:
        InvalidInputError: the model or the layer has no experts.
        OutOfRangeError: the layer has no such expert.
    """
    wanted = checked_experts(model, layer, experts)
    block = f"blocks.{layer}.moe."
    seen: list[Tensor] = []

    def read(chosen: Tensor, context: EditContext) -> Tensor:
        seen[:] = [torch.isin(chosen, torch.tensor(wanted, device=chosen.device, dtype=chosen.dtype))]
        return chosen

    def write(made: Float[Tensor, "batch seq k d_model"], context: EditContext) -> Tensor:
        return torch.where(seen.pop()[..., None], change(made), made)

    return (
        Edit(f"{block}hook_experts", read, by_token=True, reads_last=True),
        Edit(f"{block}hook_expert_out", write, as_positions(positions), keep_bos, by_token=True),
    )


def checked_experts(model: Any, layer: int, experts: Integers) -> list[int]:
    """Numbers of experts that a layer has, each once.

    Raises:
        InvalidInputError: the model or the layer has no experts; or none were given, or one twice.
        OutOfRangeError: the layer has no such expert.
    """
    require_experts(model, layer)
    chosen = as_integers(experts, "Numbers of experts")
    if not chosen or len(set(chosen)) < len(chosen):
        raise InvalidInputError(f"Numbers of experts must be at least one and all different; got {chosen}.")
    n_experts = model.layout.sizes[layer].n_experts
    for expert in chosen:
        if not 0 <= expert < n_experts:
            raise OutOfRangeError(f"Layer {layer} has no expert {expert}: it has 0 to {n_experts - 1}.")
    return chosen


def require_enough(layer: int, n_experts: int, k: int, n_forbidden: int) -> None:
    """Refuse to forbid so many experts of a layer that fewer than the k that a token goes to are left."""
    if n_experts - n_forbidden >= k:
        return
    if k == n_experts:
        raise InvalidInputError(f"Each token goes to all {n_experts} experts of layer {layer}; none is to spare.")
    raise InvalidInputError(
        f"{n_forbidden} of the {n_experts} experts of layer {layer} are forbidden; a token goes to {k}, so that at "
        f"most {n_experts - k} can be."
    )
