"""`table_effects`: what a token's row in each layer's own embedding table did for a target.

In models with per-layer embeddings (`scope.models.per_layer`) a token says something at every layer, and none of it has
been computed: it is looked up. With r_l(p) the row of layer l's table for the token at position p (`ple.hook_table`)
and r' its baseline, the effect of a row is what the target loses when the row takes its baseline's value, everything
after it reacting (as in `scope.attribution.methods`):

    effect(l, p) = T(x) - T(x | r_l(p) := r'_l(p))

- "activation_patching": the definition itself, a run for each layer and token.
- "integrated_gradients": (r - r') . mean over α of dT/dr at r' + α (r - r'), all rows of all tables moving together.
  Over all of them the effects add up to T(x) - T(x'), but for the steps' error (Sundararajan et al. 2017, arXiv
  1703.01365, equation 1). T(x') is what the residual stream, which begins with the main embedding, comes to without
  the tables.

The main embedding stays as it is, so that the two ways in which a token gets into the model are told apart. BOS keeps
its rows, unless a counterfactual prompt has another token there. It needs no dictionaries and no frozen model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from scope.attribution.baselines import Baseline, zero
from scope.attribution.evaluate import Changes, check_targets, evaluate
from scope.attribution.targets import Target
from scope.errors import InvalidInputError, UnknownNameError
from scope.models.per_layer import require_per_layer

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["TableEffects", "TableMethod", "table_effects"]

TableMethod = Literal["integrated_gradients", "activation_patching"]


@dataclass(frozen=True, eq=False)
class TableEffects:
    """What the rows of per-layer embedding tables did for one target on one prompt."""

    target: str
    method: str
    baseline: str
    tokens: tuple[str, ...]
    """The prompt's tokens as they read."""
    value: float
    """T(x)."""
    without: float
    """T(x'), all rows at their baseline."""
    table: "pd.DataFrame"
    """layer, position, token, norm (of the row), effect: by absolute effect, the largest first. Rows that are as their
    baseline are left out."""

    @property
    def completeness(self) -> float:
        """Σ effects / (T(x) - T(x')): 1 where nothing is lost, which integrated gradients promise."""
        return float(self.table["effect"].sum()) / (self.value - self.without)

    def by_layer(self) -> "pd.DataFrame":
        """layer, effect: summed over tokens."""
        return self.table.groupby("layer")[["effect"]].sum().reset_index()

    def by_token(self) -> "pd.DataFrame":
        """position, token, effect: summed over layers."""
        return self.table.groupby(["position", "token"])[["effect"]].sum().reset_index()

    def _repr_html_(self) -> str:
        from html import escape

        head = (
            f"<b>{escape(self.target)}</b> = {self.value:.4g}, {self.without:.4g} without the tables · "
            f"{escape(self.method)}, {escape(self.baseline)} baseline"
        )
        return head + self.table.head(20).to_html(escape=True)


def table_effects(
    model: Any,
    prompt: Any,
    target: Target,
    method: TableMethod = "integrated_gradients",
    baseline: Baseline | None = None,
    *,
    steps: int = 20,
    batch_size: int = 16,
    progress: Callable[[int, int | None], None] | None = None,
) -> TableEffects:
    """Attribute a target to each token's row in each layer's embedding table.

    Args:
        model: a `scope.models.LanguageModel` with per-layer embeddings (Gemma 3n, Gemma 4 E2B and E4B).
        prompt: a text, chat messages or token ids.
        target: one of `scope.attribution.targets`.
        method: see the module.
        baseline: what a row is set against: `zero()`, the default, or the rows of a `counterfactual(prompt)`.
        steps: of integrated gradients: the number of midpoints between baseline and prompt.
        batch_size: runs at once.
        progress: called with (runs done, runs in all).

    Raises:
        InvalidInputError: the model has no per-layer embeddings; a mean baseline; something else that makes no sense.
        UnknownNameError: there is no such method.
        OutOfRangeError: a position or token that does not exist.
        MismatchError: the counterfactual has another number of tokens.
    """
    import pandas as pd

    require_per_layer(model)
    if method not in get_args(TableMethod):
        raise UnknownNameError("method", method, get_args(TableMethod))
    if steps < 1 or batch_size < 1:
        raise InvalidInputError(f"steps is {steps} and batch_size {batch_size}; expected 1 or more.")
    against = baseline or zero()
    if against.kind == "mean":
        raise InvalidInputError("A row of a table has no mean baseline; use zero() or counterfactual().")
    tokens = model.prompt_tokens(prompt)
    check_targets(model, tokens, [target])
    rows = _Rows(model, tokens, target, _looked_up(model, tokens), _baseline_rows(model, tokens, against))
    told = progress or (lambda done, total: None)
    if method == "integrated_gradients":
        effects = _integrated(rows, steps, batch_size, told)
    else:
        effects = _patched(rows, batch_size, told)
    texts = tuple(token.text for token in model.token_strings(tokens))
    layer, position = rows.moved.T.tolist()
    table = pd.DataFrame(
        {
            "layer": layer,
            "position": position,
            "token": [texts[place] for place in position],
            "norm": rows.actual.norm(dim=-1)[layer, position].tolist(),
            "effect": effects[layer, position].tolist(),
        }
    ).sort_values("effect", key=abs, ascending=False, kind="stable", ignore_index=True)
    value, without = (float(rows.run(1, changes)[0]) for changes in ({}, rows.between(torch.zeros(1))))
    return TableEffects(target.name, method, against.kind, texts, value, without, table)


def _hooks(model: Any) -> list[str]:
    return [f"blocks.{layer}.ple.hook_table" for layer in range(model.n_layers)]


def _looked_up(model: Any, tokens: Int[Tensor, " seq"]) -> Float[Tensor, "layer seq d_ple"]:
    seen = model.run(tokens, hooks=_hooks(model), logits=False).activations
    return torch.stack([seen[hook] for hook in _hooks(model)]).float()


def _baseline_rows(model: Any, tokens: Int[Tensor, " seq"], baseline: Baseline) -> Float[Tensor, "layer seq d_ple"]:
    if baseline.kind == "counterfactual":
        return _looked_up(model, baseline.tokens(model, tokens))
    actual = _looked_up(model, tokens)
    return actual * model.bos_mask(tokens[None])[0].to(actual.device)[:, None]


@dataclass(frozen=True, eq=False)
class _Rows:
    """The rows of all tables on one prompt, and their baselines."""

    model: Any
    tokens: Int[Tensor, " seq"]
    target: Target
    actual: Float[Tensor, "layer seq d_ple"]
    baseline: Float[Tensor, "layer seq d_ple"]

    @property
    def moved(self) -> Int[Tensor, "n 2"]:
        """(layer, position) of the rows that are not as their baseline."""
        return (self.actual != self.baseline).any(-1).nonzero()

    def between(self, alphas: Float[Tensor, " runs"]) -> Changes:
        """Changes that put each run's rows at r' + α (r - r')."""
        start, way = self.baseline, self.actual - self.baseline

        def move(layer: int, value: Tensor) -> Tensor:
            return (start[layer] + alphas.to(value.device)[:, None, None] * way[layer]).to(value.dtype)

        return {hook: partial(move, layer) for layer, hook in enumerate(_hooks(self.model))}

    def run(self, runs: int, changes: Changes) -> Float[Tensor, " runs"]:
        return evaluate(self.model, self.tokens.expand(runs, -1), [self.target] * runs, changes=changes).values


def _integrated(
    rows: _Rows, steps: int, batch_size: int, progress: Callable[[int, int | None], None]
) -> Float[Tensor, "layer seq"]:
    hooks = _hooks(rows.model)
    alphas = (torch.arange(steps) + 0.5) / steps
    total = torch.zeros_like(rows.actual)
    for start in range(0, steps, batch_size):
        own = alphas[start : start + batch_size]
        found = evaluate(
            rows.model, rows.tokens.expand(len(own), -1), [rows.target] * len(own), hooks=hooks,
            changes=rows.between(own), grad=True,
        )  # fmt: skip
        for layer, hook in enumerate(hooks):
            if hook in found.gradients:
                total[layer] += found.gradients[hook].sum(0)
        progress(start + len(own), steps)
    effects: Tensor = ((rows.actual - rows.baseline) * total / steps).sum(-1)
    return effects


@torch.no_grad()
def _patched(rows: _Rows, batch_size: int, progress: Callable[[int, int | None], None]) -> Float[Tensor, "layer seq"]:
    hooks, value = _hooks(rows.model), float(rows.run(1, {})[0])
    effects = torch.zeros(rows.actual.shape[:2])
    moved, done = rows.moved, 0
    for layer, hook in enumerate(hooks):
        own = moved[moved[:, 0] == layer, 1]
        for positions in own.split(batch_size) if len(own) else ():

            def patch(looked_up: Tensor, positions: Tensor = positions, layer: int = layer) -> Tensor:
                new = looked_up.clone()
                new[torch.arange(len(new), device=new.device), positions] = rows.baseline[layer, positions].to(
                    new.dtype
                )
                return new

            effects[layer, positions.cpu()] = value - rows.run(len(positions), {hook: patch}).cpu()
            done += len(positions)
            progress(done, len(moved))
    return effects
