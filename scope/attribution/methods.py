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
several targets, on several prompts, come from the same passes, a run for each prompt, target and α.
"""

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from scope.attribution.baselines import Baseline, zero
from scope.attribution.evaluate import Changes, check_targets, evaluate, evaluate_each
from scope.attribution.memory import attribution_needs, require_attribution_fits
from scope.attribution.sae_nodes import Prepared, prepare
from scope.attribution.targets import Target
from scope.errors import InvalidInputError, UnknownNameError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["ERROR", "METHODS", "Attribution", "attribute"]

ERROR = -1
"""What stands in the column `feature` for an error node."""
BATCH = 32
"""Runs at once."""

Progress = Callable[[int, int | None], None]


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
        batch_size: runs at once: of an integral's steps, of nodes that are patched, of targets and prompts. So many
            prompts as share a batch are prepared together.
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
    if method not in METHODS:
        raise UnknownNameError("method", method, METHODS)
    if steps < 1 or batch_size < 1:
        raise InvalidInputError(f"steps is {steps} and batch_size {batch_size}; expected 1 or more.")
    many = isinstance(prompt, list) and bool(prompt) and all(isinstance(text, str) for text in prompt)
    prompts = prompt if many else [prompt]
    targets = list(target) if isinstance(target, Sequence) else [target]
    lengths = []
    for one in prompts:
        tokens = model.prompt_tokens(one)
        check_targets(model, tokens, targets)
        lengths.append(len(tokens))
    several = saes if isinstance(saes, Sequence) else [saes]
    needs = attribution_needs(model, max(lengths), several, method == "eap_ig")
    integrated = steps if method in ("integrated_gradients", "eap_ig") else 1
    patched = method == "activation_patching"
    alone = patched or model.layout.family.denoises  # what denoises may read what a shorter prompt is padded with
    together = 1 if alone else max(1, min(len(prompts), batch_size // (integrated * len(targets))))
    at_once = batch_size if patched else min(batch_size, integrated * len(targets) * together)
    require_attribution_fits(needs, at_once, not patched, memory_gb, model.device, together)
    found: list[list[Attribution]] = []
    for start in range(0, len(prompts), together):
        prepared = [prepare(model, one, saes, baseline or zero()) for one in prompts[start : start + together]]
        work = _Work(model, prepared, targets, steps, batch_size, nodes, progress or (lambda done, total: None))
        results = _results(work, method)
        found += [results[at : at + len(targets)] for at in range(0, len(results), len(targets))]
    by_prompt = found if isinstance(target, Sequence) else [one[0] for one in found]
    return by_prompt if many else by_prompt[0]


class Effects(NamedTuple):
    """A method's answer for one SAE."""

    features: Float[Tensor, "seq d_sae"]
    """Effects of the feature nodes; NaN where they were not asked for."""
    errors: Float[Tensor, " seq"]
    baseline_value: float | None = None
    """T(x') where the method promises completeness."""


Gradients = dict[str, Float[Tensor, "seq width"]]
"""Of one target, by hook."""


class _Job(NamedTuple):
    """One target on one prompt."""

    prompt: int
    target: Target


class _Run(NamedTuple):
    """A pass of one prompt, at a place α between its baseline and itself."""

    prompt: int
    alpha: float


@dataclass(frozen=True, eq=False)
class _Work:
    """Some targets on some prompts."""

    model: Any
    prompts: Sequence[Prepared]
    targets: Sequence[Target]
    steps: int
    batch_size: int
    asked: Sequence[tuple[str, int, int]] | None
    progress: Progress

    @property
    def hooks(self) -> list[str]:
        """Where the SAEs write."""
        return [nodes.writes for nodes in self.prompts[0].nodes]

    def evaluate(self, jobs: Sequence[_Job], **options: Any) -> Any:
        rows = [self.prompts[job.prompt].tokens for job in jobs]
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return evaluate(self.model, tokens, [job.target for job in jobs], lengths=[*map(len, rows)], **options)

    def evaluate_each(self, prepared: Prepared, runs: int, changes: Changes) -> Tensor:
        return evaluate_each(self.model, prepared.tokens.expand(runs, -1), self.targets, changes)

    def parts(self) -> Iterator[Sequence[_Job]]:
        """All targets of all prompts, no more than `batch_size` together: their gradients are held at once."""
        jobs = [_Job(prompt, target) for prompt in range(len(self.prompts)) for target in self.targets]
        for start in range(0, len(jobs), self.batch_size):
            yield jobs[start : start + self.batch_size]

    def mean_gradients(
        self,
        jobs: Sequence[_Job],
        places: Sequence[float],
        hooks: Sequence[str],
        change: Callable[[Sequence[_Run]], Changes] | None = None,
    ) -> list[Gradients]:
        """The mean over α in `places` of each target's gradients at `hooks`; `change` gives a batch's changes."""
        sums: list[Gradients] = [{} for _ in jobs]
        runs = [(number, place) for number in range(len(jobs)) for place in places]
        for start in range(0, len(runs), self.batch_size):
            batch = runs[start : start + self.batch_size]
            changes = change([_Run(jobs[number].prompt, place) for number, place in batch]) if change else None
            found = self.evaluate([jobs[number] for number, _ in batch], hooks=hooks, changes=changes, grad=True)
            for hook, gradients in found.gradients.items():
                for (number, _), gradient in zip(batch, gradients, strict=True):
                    own = sums[number]
                    gradient = gradient[: len(self.prompts[jobs[number].prompt].tokens)]
                    own[hook] = own[hook] + gradient if hook in own else gradient
        return [{hook: total / len(places) for hook, total in own.items()} for own in sums]


def _linear(prepared: Prepared, gradients: Mapping[str, Tensor]) -> list[Effects]:
    """(a - a') . gradient, for all nodes of all SAEs."""
    found = []
    for nodes in prepared.nodes:
        change = nodes.change
        gradient = gradients.get(nodes.writes, torch.zeros_like(change.errors))
        found.append(Effects(change.features * (gradient @ nodes.decoder.T), (change.errors * gradient).sum(-1)))
    return found


def _gradient_x_activation(work: _Work) -> Iterator[list[Effects]]:
    for jobs in work.parts():
        for job, gradients in zip(jobs, work.mean_gradients(jobs, [1.0], work.hooks), strict=True):
            yield _linear(work.prompts[job.prompt], gradients)


def _moved(hook: str, ways: Sequence[tuple[Tensor, Tensor]], runs: Sequence[_Run]) -> Changes:
    """Changes that put what each run has at a hook at start + α (end - start); `ways` has both for each prompt."""
    new = [start + alpha * (end - start) for (start, end), alpha in ((ways[run.prompt], run.alpha) for run in runs)]

    def move(value: Tensor) -> Tensor:
        moved = value.flatten(2).clone()
        for row, own in zip(moved, new, strict=True):  # what lies behind a shorter prompt is never read
            row[: len(own)] = own.to(value.dtype)
        return moved.view(value.shape)

    return {hook: move}


def _at_one_hook(work: _Work, places: Sequence[float], complete: bool) -> Iterator[list[Effects]]:
    changes = []
    for number, hook in enumerate(work.hooks):
        of_prompts = [prepared.nodes[number] for prepared in work.prompts]
        ways = [(own.baseline.activation(own.sae), own.actual.activation(own.sae)) for own in of_prompts]
        changes.append(functools.partial(_moved, hook, ways))
    for jobs in work.parts():
        by_sae = []
        for hook, change in zip(work.hooks, changes, strict=True):
            gradients = work.mean_gradients(jobs, places, [hook], change)
            bases: list[float | None] = [None] * len(jobs)
            if complete:
                at_baseline = change([_Run(job.prompt, 0.0) for job in jobs])
                bases = work.evaluate(jobs, changes=at_baseline).values.tolist()
            by_sae.append(zip(gradients, bases, strict=True))
        for job, *answers in zip(jobs, *by_sae, strict=True):
            together = {hook: own for gradients, _ in answers for hook, own in gradients.items()}
            effects = _linear(work.prompts[job.prompt], together)
            yield [found._replace(baseline_value=base) for found, (_, base) in zip(effects, answers, strict=True)]


def _attribution_patching(work: _Work) -> Iterator[list[Effects]]:
    return _at_one_hook(work, [0.0], complete=False)


def _midpoints(steps: int) -> list[float]:
    return [(step + 0.5) / steps for step in range(steps)]


def _integrated_gradients(work: _Work) -> Iterator[list[Effects]]:
    return _at_one_hook(work, _midpoints(work.steps), complete=True)


def _eap_ig(work: _Work) -> Iterator[list[Effects]]:
    change = functools.partial(_moved, "hook_embed", [_embeddings(work.model, prepared) for prepared in work.prompts])
    for jobs in work.parts():
        for job, gradients in zip(
            jobs, work.mean_gradients(jobs, _midpoints(work.steps), work.hooks, change), strict=True
        ):
            yield _linear(work.prompts[job.prompt], gradients)


def _embeddings(model: Any, prepared: Prepared) -> tuple[Tensor, Tensor]:
    """Those of a prompt's baseline, and its own."""
    if prepared.baseline.kind == "mean":
        raise InvalidInputError(
            "eap_ig moves the token embeddings, for which a mean baseline says nothing; use zero() or counterfactual()."
        )
    ids = prepared.tokens
    end = model.run(ids, hooks=["hook_embed"], logits=False).activations["hook_embed"]
    if prepared.other is not None:
        return model.run(prepared.other, hooks=["hook_embed"], logits=False).activations["hook_embed"], end
    start = torch.zeros_like(end)
    if bool(model.bos_mask(ids[None])[0, 0]):
        start[0] = end[0]
    return start, end


def _activation_patching(work: _Work) -> Iterator[list[Effects]]:
    for prepared in work.prompts:
        yield from _patched(work, prepared)


@torch.no_grad()
def _patched(work: _Work, prepared: Prepared) -> list[list[Effects]]:
    asked, clean = work.asked, work.evaluate_each(prepared, 1, {})
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

            effects = (clean - work.evaluate_each(prepared, len(batch), {nodes.writes: patch})).to(features.device)
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


def _results(work: _Work, method: str) -> list[Attribution]:
    """Those of a prompt's targets one after the other."""
    answers, seconds, found = METHODS[method](work), 0.0, []
    for jobs in work.parts():
        values = work.evaluate(jobs).values.tolist()
        for job, value in zip(jobs, values, strict=True):
            began = time.perf_counter()
            effects = next(answers)
            seconds += time.perf_counter() - began
            found.append(_result(work.model, work.prompts[job.prompt], job.target.name, method, effects, value))
    return [replace(one, seconds=seconds / len(found)) for one in found]


def _result(
    model: Any, prepared: Prepared, target: str, method: str, effects: list[Effects], value: float
) -> Attribution:
    import pandas as pd

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
    return Attribution(target, method, prepared.baseline.kind, tuple(texts), value, table, base_values)


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
