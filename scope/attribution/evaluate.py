"""Evaluating targets in batches: the ground that gradients, integrated gradients and patching stand on.

A batch is some runs, the shorter ones padded on the right, where causal attention never looks. Each run has its own
target (`evaluate`), or several targets are read off every run (`evaluate_each`). A run may have its activation at some
hooks replaced or shifted. One pass gives every run's number; a second,
backward, gives its gradient at any hook:

    T_b(x), and dT_b/dx_h for each run b and hook h

The gradients of several runs come from one backward pass, as no run depends on another.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from scope.attribution.targets import Target
from scope.errors import InvalidInputError
from scope.models.hooks import HookPoint
from scope.models.taps import tapped

__all__ = ["Change", "Changes", "Evaluation", "check_targets", "evaluate", "evaluate_each"]

Change = Callable[[Float[Tensor, "batch seq *row"]], Float[Tensor, "batch seq *row"]]
"""From the activation at a hook to what takes its place."""
Changes = Mapping[str, Change]
"""By hook."""


class Evaluation(NamedTuple):
    """What a batch of runs gave."""

    values: Float[Tensor, " batch"]
    """Each run's target, float32."""
    activations: dict[str, Float[Tensor, "batch seq width"]]
    """Per hook that was asked for, what the model went on with, float32."""
    gradients: dict[str, Float[Tensor, "batch seq width"]]
    """Per hook, of each run's target, float32; empty where no gradients were asked for."""


def check_targets(model: Any, tokens: Int[Tensor, " seq"], targets: Sequence[Target]) -> None:
    """Refuse targets that the prompt or the model does not have, before anything runs."""
    if not targets:
        raise InvalidInputError("No target was given.")
    for target in targets:
        model.hook_shape(target.hook) if target.hook != "hook_unembed" else None
        target.check(model, tokens)


def evaluate(
    model: Any,
    tokens: Int[Tensor, "batch seq"],
    targets: Sequence[Target],
    *,
    hooks: Sequence[str] = (),
    changes: Changes | None = None,
    lengths: Sequence[int] | None = None,
    grad: bool = False,
) -> Evaluation:
    """Run a batch and read each run's target.

    Args:
        model: a `scope.models.LanguageModel`.
        tokens: a run's tokens in each row, BOS included, padded on the right.
        targets: one for each run.
        hooks: where activations, and gradients, are wanted; those after a target's hook have gradient 0.
        changes: what to do to the activation at a hook, before it is recorded.
        lengths: tokens of each run; None where nothing is padded.
        grad: whether to compute gradients.
    """
    kept = _kept(model, tokens, targets, hooks, changes or {}, grad)
    with torch.set_grad_enabled(grad):
        ends = list(lengths) if lengths is not None else [tokens.shape[1]] * len(tokens)
        values = torch.stack(
            [
                _value(model, kept, target, tokens, run, end)
                for run, (target, end) in enumerate(zip(targets, ends, strict=True))
            ]
        )
    wanted = {model.hook_table[name].name for name in hooks}
    gradients: dict[str, Tensor] = {}
    if grad:
        there = {name: kept[name] for name in wanted if name in kept}
        found = torch.autograd.grad(values.sum(), list(there.values()), allow_unused=True)
        for (name, value), gradient in zip(there.items(), found, strict=True):
            gradients[name] = (torch.zeros_like(value) if gradient is None else gradient).flatten(2).float()
    return Evaluation(
        values.detach().float(),
        {name: kept[name].detach().flatten(2).float() for name in wanted if name in kept},
        gradients,
    )


@torch.no_grad()
def evaluate_each(
    model: Any, tokens: Int[Tensor, "batch seq"], targets: Sequence[Target], changes: Changes
) -> Float[Tensor, "targets batch"]:
    """Run a batch, and read every target off every run, float32; see `evaluate`."""
    kept = _kept(model, tokens, targets, (), changes, False)
    return torch.stack(
        [
            torch.stack([_value(model, kept, target, tokens, run, tokens.shape[1]) for run in range(len(tokens))])
            for target in targets
        ]
    ).float()


def _kept(
    model: Any,
    tokens: Tensor,
    targets: Sequence[Target],
    hooks: Sequence[str],
    changes: Changes,
    grad: bool,
) -> dict[str, Tensor]:
    """Run as far as is read; the activations at `hooks` and where the targets read, by canonical name."""
    table = model.hook_table
    changed = {table[name].name: change for name, change in changes.items()}
    wanted = {table[name].name for name in hooks}
    read = {table[target.hook].name for target in targets}
    kept: dict[str, Tensor] = {}

    def handler(name: str) -> Callable[[Tensor], Tensor | None]:
        def at(value: Tensor) -> Tensor | None:
            new = changed[name](value) if name in changed else value
            if name in wanted or name in read:
                # A copy of its own: where nothing before needs a gradient, the graph begins here.
                new = new.clone()
                if grad and not new.requires_grad:
                    new.requires_grad_()
                kept[name] = new
            return None if new is value else new

        return at

    names = sorted({*wanted, *read, *changed}, key=table.rank)
    last_read = max(map(table.rank, read))
    handlers: dict[HookPoint, Any] = {table[name]: handler(name) for name in names if table.rank(name) <= last_read}
    with torch.set_grad_enabled(grad), model.lock, tapped(model.hf, handlers, stop=True):
        model.hidden_states(tokens)
    return kept


def _value(model: Any, kept: Mapping[str, Tensor], target: Target, tokens: Tensor, run: int, end: int) -> Tensor:
    there = kept[model.hook_table[target.hook].name][run, :end].flatten(1)
    return target.value(model, there, tokens[run, :end])
