"""`attribute`: how much each feature and each error node of some SAEs did for a target.

The effect of a node a (a feature's activation at a token, or the error there) is what the target loses when the node
takes its baseline's value a', everything before it being as it was and everything after it reacting:

    effect(a) = T(x) - T(x | a := a')

Every method estimates this same number, with this same sign:

- "activation_patching": the definition itself, a run for each node, in batches. The yardstick.
  (Vig et al. 2020, arXiv 2004.12265, section 3; Zhang & Nanda 2023, arXiv 2309.16042)
- "gradient_x_activation": (a - a') . dT/da at x. One forward and one backward pass.
  (Shrikumar et al. 2016, arXiv 1605.01713, with a baseline)
- "attribution_patching": (a - a') . dT/da at x', where the nodes of one SAE are at their baseline. (Nanda 2023,
  "Attribution patching", takes the corrupted run's gradient; Syed et al. 2023, arXiv 2310.10348, the clean run's, which
  is "gradient_x_activation" here)
- "integrated_gradients": (a - a') . mean over α of dT/da at x' + α (x - x'), the nodes of one SAE moving together.
  Over all nodes of an SAE the effects add up to T(x) - T(x'), but for the steps' error: `completeness` says how well.
  (Sundararajan et al. 2017, arXiv 1703.01365, equation 1; on features and errors Marks et al. 2024, arXiv 2403.19647,
  section 2)
- "eap_ig": (a - a') . mean over α of dT/da where the token embeddings are those of the baseline, plus α of the way to
  the prompt's. One path for all SAEs. (Hanna et al. 2024, arXiv 2403.17806, equation 3)

A decoder is linear, so that dT/df_i = W_dec[i] . dT/dx and dT/derror = dT/dx: one gradient gives all nodes of a token.

Steps: 1. what is asked is checked; 2. the prompt and its counterfactual run once, which gives all nodes a and a';
3. the method finds the gradient at each hook, or patches; 4. nodes with a = a' are left out of the table. Gradients of
several targets come from the same passes, a run for each target and α.
"""

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from scope.attribution.baselines import Baseline, NodeValues, hooks_of, node_values, zero
from scope.attribution.evaluate import check_targets, evaluate, evaluate_each
from scope.attribution.memory import attribution_needs, require_attribution_fits
from scope.attribution.targets import Target
from scope.errors import InvalidInputError, UnknownNameError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["ERROR", "METHODS", "Attribution", "attribute", "prepare"]

ERROR = -1
"""What stands in the column `feature` for an error node."""
BATCH = 32
"""Runs at once."""

Progress = Callable[[int, int | None], None]


@dataclass(frozen=True, eq=False)
class SaeNodes:
    """The nodes of one SAE on one prompt."""

    sae: Any
    reads: str
    writes: str
    actual: NodeValues
    baseline: NodeValues

    @property
    def change(self) -> NodeValues:
        """a - a'."""
        return NodeValues(self.actual.features - self.baseline.features, self.actual.errors - self.baseline.errors)

    @property
    def decoder(self) -> Float[Tensor, "d_sae d_out"]:
        """W_dec, float32, on the model's device."""
        return self.sae.W_dec.detach().float().to(self.actual.errors.device)

    def firing(self) -> Int[Tensor, "n 2"]:
        """(position, feature) of every feature node that is not as its baseline."""
        return self.change.features.nonzero()


@dataclass(frozen=True, eq=False)
class Prepared:
    """A prompt with all its nodes."""

    tokens: Int[Tensor, " seq"]
    baseline: Baseline
    other: Int[Tensor, " seq"] | None
    """Tokens of the counterfactual prompt."""
    nodes: tuple[SaeNodes, ...]


@dataclass(frozen=True, eq=False)
class Attribution:
    """What the nodes of some SAEs did for one target on one prompt."""

    target: str
    method: str
    baseline: str
    tokens: tuple[str, ...]
    """The prompt's tokens as they read."""
    value: float
    """T(x)."""
    table: "pd.DataFrame"
    """hook, position, token, feature (-1: the error node), strength and baseline_strength (firing strength, or norm of
    the error), effect: by absolute effect, the largest first."""
    baseline_values: Mapping[str, float] = field(default_factory=dict)
    """Per hook T(x') with all of its SAE's nodes at their baseline; filled where the method promises completeness."""
    seconds: float = 0.0
    """That the method took; of several targets at once each one's share."""

    @property
    def completeness(self) -> dict[str, float]:
        """Per hook Σ effects / (T(x) - T(x')): 1 where nothing is lost. Only for integrated gradients."""
        sums = self.table.groupby("hook")["effect"].sum()
        return {
            hook: float(sums.get(hook, 0.0)) / (self.value - value)
            for hook, value in self.baseline_values.items()
            if self.value != value
        }

    def features(self, n: int | None = None) -> "pd.DataFrame":
        """The table without error nodes; summed over positions, the largest first."""
        rows = self.table[self.table["feature"] != ERROR]
        summed = rows.groupby(["hook", "feature"])[["effect"]].sum().reset_index()
        return summed.sort_values("effect", key=abs, ascending=False, ignore_index=True).head(n or len(summed))

    def _repr_html_(self) -> str:
        from html import escape

        head = (
            f"<b>{escape(self.target)}</b> = {self.value:.4g} · {escape(self.method)}, {escape(self.baseline)} baseline"
        )
        return head + self.table.head(20).to_html(escape=True)


def prepare(model: Any, prompt: Any, saes: Any, baseline: Baseline) -> Prepared:
    """Run a prompt and its counterfactual, and find all nodes.

    Raises:
        UnknownNameError, MismatchError, InvalidInputError: an SAE does not fit the model, or two read one hook; or the
            counterfactual has another number of tokens.
    """
    several = list(saes) if isinstance(saes, Sequence) else [saes]
    if not several:
        raise InvalidInputError("No SAE was given; attribution is to the features of at least one.")
    tokens = model.prompt_tokens(prompt)
    pairs = [(sae, *hooks_of(model, sae)) for sae in several]
    if len({writes for _, _, writes in pairs}) < len(pairs):
        raise InvalidInputError("Two SAEs write to the same hook; the nodes of a hook are those of one SAE.")
    hooks = list(dict.fromkeys(hook for _, reads, writes in pairs for hook in (reads, writes)))
    other = baseline.tokens(model, tokens) if baseline.kind == "counterfactual" else None

    def nodes_of(ids: Tensor) -> list[NodeValues]:
        seen = model.run(ids, hooks=hooks, logits=False).activations
        bos = bool(model.bos_mask(ids[None])[0, 0])
        return [node_values(sae, seen[reads].flatten(1), seen[writes].flatten(1), bos) for sae, reads, writes in pairs]

    actual = nodes_of(tokens)
    bos = bool(model.bos_mask(tokens[None])[0, 0])
    if other is None:
        base = [baseline.of(model, sae, own, bos) for (sae, _, _), own in zip(pairs, actual, strict=True)]
    else:
        base = nodes_of(other)
    nodes = tuple(SaeNodes(*pair, own, there) for pair, own, there in zip(pairs, actual, base, strict=True))
    return Prepared(tokens, baseline, other, nodes)


def attribute(
    model: Any,
    prompt: Any,
    target: Target | Sequence[Target],
    saes: Any,
    method: str = "integrated_gradients",
    baseline: Baseline | None = None,
    *,
    steps: int = 10,
    batch_size: int = BATCH,
    nodes: "Sequence[tuple[str, int, int]] | None" = None,
    memory_gb: float | None = None,
    progress: Progress | None = None,
) -> Any:
    """Attribute one target, or several, to the features and error nodes of some SAEs.

    Args:
        model: a `scope.models.LanguageModel`.
        prompt: a text, chat messages or token ids; a list of texts gives a list of results.
        target: one of `scope.attribution.targets`, or several.
        saes: one SAE or transcoder, or several at different hooks.
        method: see the module.
        baseline: what nodes are set against; by default zero. Give `counterfactual(prompt)` where there is a behaviour.
        steps: of the methods that integrate: the number of midpoints between baseline and prompt.
        batch_size: runs at once: of an integral's steps, of nodes that are patched, of targets.
        nodes: for activation patching, which nodes to patch, as (hook, position, feature); None for all.
        memory_gb: memory that it may take beside the model and the SAEs, in GB; None for what is free.
        progress: called with (runs done, runs in all).

    Returns:
        An `Attribution`; a list of them for several targets, and a list over prompts of either for several prompts.

    Raises:
        UnknownNameError: there is no such method or hook.
        OutOfRangeError: a position, token or feature that does not exist.
        MismatchError: an SAE or a counterfactual prompt does not fit.
        InvalidInputError: something else that was given is wrong, or it takes more memory than there is. All before
            anything but the nodes is computed.
    """
    if isinstance(prompt, list) and prompt and all(isinstance(text, str) for text in prompt):
        return [
            attribute(
                model,
                text,
                target,
                saes,
                method,
                baseline,
                steps=steps,
                batch_size=batch_size,
                nodes=nodes,
                memory_gb=memory_gb,
                progress=progress,
            )
            for text in prompt
        ]
    if method not in METHODS:
        raise UnknownNameError("method", method, METHODS)
    if steps < 1 or batch_size < 1:
        raise InvalidInputError(f"steps is {steps} and batch_size {batch_size}; expected 1 or more.")
    targets = list(target) if isinstance(target, Sequence) else [target]
    tokens = model.prompt_tokens(prompt)
    check_targets(model, tokens, targets)
    several = saes if isinstance(saes, Sequence) else [saes]
    needs = attribution_needs(model, len(tokens), several, method == "eap_ig")
    runs = {"activation_patching": batch_size, "integrated_gradients": steps * len(targets)}
    runs["eap_ig"] = runs["integrated_gradients"]
    at_once = min(batch_size, runs.get(method, len(targets)))
    require_attribution_fits(needs, at_once, method != "activation_patching", memory_gb, model.device)
    prepared = prepare(model, prompt, saes, baseline or zero())
    work = _Work(model, prepared, targets, steps, batch_size, nodes, progress or (lambda done, total: None))
    found, answers, seconds = [], METHODS[method](work), 0.0
    for one in targets:
        started = time.perf_counter()
        effects = next(answers)
        seconds += time.perf_counter() - started
        found.append(_result(work, one, method, effects))
    found = [replace(one, seconds=seconds / len(targets)) for one in found]
    return found if isinstance(target, Sequence) else found[0]


class Effects(NamedTuple):
    """A method's answer for one SAE."""

    features: Float[Tensor, "seq d_sae"]
    """Effects of the feature nodes; NaN where they were not asked for."""
    errors: Float[Tensor, " seq"]
    baseline_value: float | None = None
    """T(x') where the method promises completeness."""


Gradients = dict[str, Float[Tensor, "seq width"]]
"""Of one target, by hook."""


@dataclass(frozen=True, eq=False)
class _Work:
    """Some targets on one prompt."""

    model: Any
    prepared: Prepared
    targets: Sequence[Target]
    steps: int
    batch_size: int
    asked: Sequence[tuple[str, int, int]] | None
    progress: Progress

    def evaluate(self, targets: Sequence[Target], **options: Any) -> Any:
        tokens = self.prepared.tokens.expand(len(targets), -1)
        return evaluate(self.model, tokens, targets, **options)

    def evaluate_each(self, runs: int, changes: Mapping[str, Callable[[Tensor], Tensor]]) -> Tensor:
        return evaluate_each(self.model, self.prepared.tokens.expand(runs, -1), self.targets, changes)

    def parts(self) -> Iterator[Sequence[Target]]:
        """The targets, no more than `batch_size` together: their gradients are held at once."""
        for start in range(0, len(self.targets), self.batch_size):
            yield self.targets[start : start + self.batch_size]

    def mean_gradients(
        self,
        targets: Sequence[Target],
        places: Sequence[float],
        hooks: Sequence[str],
        change: Callable[[Tensor], Any] | None = None,
    ) -> list[Gradients]:
        """The mean over α in `places` of each target's gradients at `hooks`; `change` gives a batch's changes for its
        α."""
        sums: list[Gradients] = [{} for _ in targets]
        runs = [(number, place) for number in range(len(targets)) for place in places]
        for start in range(0, len(runs), self.batch_size):
            batch = runs[start : start + self.batch_size]
            changes = None
            if change is not None:
                changes = change(torch.tensor([place for _, place in batch], device=self.model.device))
            asked = [targets[number] for number, _ in batch]
            found = self.evaluate(asked, hooks=hooks, changes=changes, grad=True)
            for hook, gradients in found.gradients.items():
                for (number, _), gradient in zip(batch, gradients, strict=True):
                    own = sums[number]
                    own[hook] = own[hook] + gradient if hook in own else gradient
        return [{hook: total / len(places) for hook, total in own.items()} for own in sums]


def _linear(work: _Work, gradients: Mapping[str, Tensor]) -> list[Effects]:
    """(a - a') . gradient, for all nodes of all SAEs."""
    found = []
    for nodes in work.prepared.nodes:
        change = nodes.change
        gradient = gradients.get(nodes.writes, torch.zeros_like(change.errors))
        found.append(Effects(change.features * (gradient @ nodes.decoder.T), (change.errors * gradient).sum(-1)))
    return found


def _gradient_x_activation(work: _Work) -> Iterator[list[Effects]]:
    hooks = [nodes.writes for nodes in work.prepared.nodes]
    for part in work.parts():
        for gradients in work.mean_gradients(part, [1.0], hooks):
            yield _linear(work, gradients)


def _between(nodes: SaeNodes, alphas: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """Changes that put the SAE's activation at x' + α (x - x'), α for each run."""
    start, end = nodes.baseline.activation(nodes.sae), nodes.actual.activation(nodes.sae)

    def move(value: Tensor) -> Tensor:
        weights = alphas.view(-1, *[1] * (start.ndim))
        new = start + weights * (end - start)
        return new.to(value.dtype).view(len(alphas), *value.shape[1:])

    return {nodes.writes: move}


def _at_one_hook(work: _Work, places: Sequence[float], complete: bool) -> Iterator[list[Effects]]:
    for part in work.parts():
        by_sae = []
        for nodes in work.prepared.nodes:
            change = functools.partial(_between, nodes)
            gradients = work.mean_gradients(part, places, [nodes.writes], change)
            bases: list[float | None] = [None] * len(part)
            if complete:
                at_baseline = torch.zeros(len(part), device=work.model.device)
                bases = work.evaluate(part, changes=change(at_baseline)).values.tolist()
            by_sae.append(zip(gradients, bases, strict=True))
        for answers in zip(*by_sae, strict=True):
            effects = _linear(work, {hook: own for gradients, _ in answers for hook, own in gradients.items()})
            yield [found._replace(baseline_value=base) for found, (_, base) in zip(effects, answers, strict=True)]


def _attribution_patching(work: _Work) -> Iterator[list[Effects]]:
    return _at_one_hook(work, [0.0], complete=False)


def _midpoints(steps: int) -> list[float]:
    return [(step + 0.5) / steps for step in range(steps)]


def _integrated_gradients(work: _Work) -> Iterator[list[Effects]]:
    return _at_one_hook(work, _midpoints(work.steps), complete=True)


def _eap_ig(work: _Work) -> Iterator[list[Effects]]:
    prepared, model = work.prepared, work.model
    if prepared.baseline.kind == "mean":
        raise InvalidInputError(
            "eap_ig moves the token embeddings, for which a mean baseline says nothing; use zero() or counterfactual()."
        )
    ids = prepared.tokens
    end = model.run(ids, hooks=["hook_embed"], logits=False).activations["hook_embed"]
    if prepared.other is None:
        start = torch.zeros_like(end)
        if bool(model.bos_mask(ids[None])[0, 0]):
            start[0] = end[0]
    else:
        start = model.run(prepared.other, hooks=["hook_embed"], logits=False).activations["hook_embed"]

    def change(alphas: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
        weights = alphas.view(-1, 1, 1).to(end.dtype)
        return {"hook_embed": lambda value: (start + weights * (end - start)).to(value.dtype)}

    hooks = [nodes.writes for nodes in prepared.nodes]
    for part in work.parts():
        for gradients in work.mean_gradients(part, _midpoints(work.steps), hooks, change):
            yield _linear(work, gradients)


def _activation_patching(work: _Work) -> Iterator[list[Effects]]:
    return iter(_patched(work))


@torch.no_grad()
def _patched(work: _Work) -> list[list[Effects]]:
    prepared, asked = work.prepared, work.asked
    clean = work.evaluate_each(1, {})
    wanted = []
    for nodes in prepared.nodes:
        change = nodes.change
        moved = [(nodes, int(p), int(f)) for p, f in nodes.firing().tolist()]
        moved += [(nodes, int(p), ERROR) for p in (change.errors.abs().amax(-1) > 0).nonzero().flatten().tolist()]
        if asked is not None:
            keys = {(work.model.resolve_hook(hook), p, f) for hook, p, f in asked}
            moved = [node for node in moved if (nodes.writes, *node[1:]) in keys or (nodes.reads, *node[1:]) in keys]
        wanted.append(moved)
    total, done = sum(map(len, wanted)), 0
    found: list[list[Effects]] = [[] for _ in work.targets]
    for nodes, there in zip(prepared.nodes, wanted, strict=True):
        change, decoder = nodes.change, nodes.decoder
        empty = 0.0 if asked is None else float("nan")
        features = change.features.new_full((len(work.targets), *change.features.shape), empty)
        errors = change.errors.new_full((len(work.targets), len(change.errors)), empty)
        for start in range(0, len(there), work.batch_size):
            batch = there[start : start + work.batch_size]
            shifts = torch.stack(
                [change.errors[p] if f == ERROR else change.features[p, f] * decoder[f] for _, p, f in batch]
            )
            places = torch.tensor([p for _, p, _ in batch], device=shifts.device)

            def patch(value: Tensor, shifts: Tensor = shifts, places: Tensor = places) -> Tensor:
                new = value.flatten(2).clone()
                runs = torch.arange(len(new), device=new.device)
                new[runs, places] -= shifts.to(new.dtype)
                return new.view(value.shape)

            effects = (clean - work.evaluate_each(len(batch), {nodes.writes: patch})).to(features.device)
            for run, (_, p, f) in enumerate(batch):
                if f == ERROR:
                    errors[:, p] = effects[:, run]
                else:
                    features[:, p, f] = effects[:, run]
            done += len(batch)
            work.progress(done, total)
        for own, *answer in zip(found, features, errors, strict=True):
            own.append(Effects(*answer))
    return found


METHODS: dict[str, Callable[[_Work], Iterator[list[Effects]]]] = {
    "activation_patching": _activation_patching,
    "gradient_x_activation": _gradient_x_activation,
    "attribution_patching": _attribution_patching,
    "integrated_gradients": _integrated_gradients,
    "eap_ig": _eap_ig,
}


def _result(work: _Work, target: Target, method: str, effects: list[Effects]) -> Attribution:
    import pandas as pd

    prepared, model = work.prepared, work.model
    texts = [token.text for token in model.token_strings(prepared.tokens)]
    parts = []
    for nodes, found in zip(prepared.nodes, effects, strict=True):
        places = nodes.firing()
        p, f = places.T.cpu()
        norms = nodes.sae.decoder_norms.to(nodes.actual.features.device)[places[:, 1]]
        own = (nodes.actual.features[places[:, 0], places[:, 1]] * norms).cpu().numpy()
        base = (nodes.baseline.features[places[:, 0], places[:, 1]] * norms).cpu().numpy()
        parts.append(_part(nodes.writes, p.numpy(), f.numpy(), own, base, found.features.cpu()[p, f].numpy()))
        moved = (nodes.change.errors.abs().amax(-1) > 0).nonzero().flatten().cpu()
        parts.append(
            _part(
                nodes.writes,
                moved.numpy(),
                ERROR,
                nodes.actual.errors.norm(dim=-1).cpu()[moved].numpy(),
                nodes.baseline.errors.norm(dim=-1).cpu()[moved].numpy(),
                found.errors.cpu()[moved].numpy(),
            )
        )
    table = pd.concat(parts, ignore_index=True).dropna(subset=["effect"])
    table.insert(2, "token", [texts[position] for position in table["position"]])
    table = table.sort_values("effect", key=abs, ascending=False, kind="stable", ignore_index=True)
    base_values = {
        nodes.writes: found.baseline_value
        for nodes, found in zip(prepared.nodes, effects, strict=True)
        if found.baseline_value is not None
    }
    value = float(work.evaluate([target]).values[0])
    return Attribution(target.name, method, prepared.baseline.kind, tuple(texts), value, table, base_values)


def _part(hook: str, positions: Any, features: Any, strengths: Any, base: Any, effects: Any) -> "pd.DataFrame":
    import pandas as pd

    return pd.DataFrame(
        {
            "hook": hook,
            "position": positions,
            "feature": features,
            "strength": strengths,
            "baseline_strength": base,
            "effect": effects,
        }
    )
