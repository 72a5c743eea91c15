"""What the feature page asks of the model worker: the effects of one feature on all logits.

The index keeps the tokens that a feature pushes most, up and down. The whole vocabulary is one row of W_dec times W_U,
which needs the model; the vector is kept with the worker's other results, and the card under the pointer reads it too.
"""

from typing import NamedTuple

import numpy as np

from dashboards.context import Context
from dashboards.prompts import PromptJobs, prompt_jobs
from dashboards.worker import Job

__all__ = ["AllLogits", "FeatureJobs", "known_effects"]

N_BINS = 80


class AllLogits(NamedTuple):
    """One feature's effects on every token's logit, per unit of firing strength."""

    effects: np.ndarray
    """float32 `(d_vocab,)`, the vocabulary mean removed."""
    edges: np.ndarray
    """float64 `(N_BINS + 1,)`."""
    counts: np.ndarray
    """int64 `(N_BINS,)`: tokens in each bin."""


class FeatureJobs:
    """The jobs of the feature page."""

    def __init__(self, context: Context) -> None:
        self.context = context

    @property
    def prompts(self) -> PromptJobs:
        """The prompt page's jobs, which keep the models."""
        return prompt_jobs(self.context)

    def submit_logits(self, index: str, feature: int) -> Job:
        """Queue the effects on all logits; the job's result is an `AllLogits`."""
        return self.context.worker.submit(_key(index, feature), lambda job: self._logits(job, index, feature))

    def logits(self, index: str, feature: int) -> AllLogits | None:
        """The effects on all logits, where they are known."""
        found = self.context.worker.result(_key(index, feature))
        return found if isinstance(found, AllLogits) else None

    def _logits(self, job: Job, index: str, feature: int) -> AllLogits:
        from scope.features import all_logits

        model, sae = self.prompts.loaded(job, index)
        job.report(f"multiplying its decoder row with W_U ({model.d_vocab:,} tokens)")
        effects = next(all_logits.AllLogits(sae, model).of([feature]))
        counts, edges = np.histogram(effects, bins=N_BINS)
        return AllLogits(effects, edges, counts)


def _key(index: str, feature: int) -> tuple[str, str, int]:
    return ("logits", index, feature)


def known_effects(context: Context, index: str, feature: int | None) -> np.ndarray | None:
    """A feature's effects on all logits, where someone has asked for them before."""
    if feature is None:
        return None
    found = FeatureJobs(context).logits(index, feature)
    return None if found is None else found.effects
