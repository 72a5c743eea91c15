"""What the prompt page asks of the model worker about one next token: what each firing of a prompt did for its logit,
or for the difference of two logits, by the method that is chosen.

The direct effect needs nothing but the residual stream and is known at once; each position pushes its own next token.
The other methods are `scope.attribution`'s: they take the effect on the logit after one position, through all layers,
against a baseline at which no feature fires.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from dashboards.context import Context
from dashboards.prompts import Asked, PromptJobs, prompt_jobs
from dashboards.worker import Job
from scope.errors import InvalidInputError, UnknownNameError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["METHODS", "Method", "Push", "PushAsked", "PushJobs"]

PUSH_TIME_LIMIT = 900.0
"""Seconds."""


class Method(NamedTuple):
    """A way to find effects."""

    button: str
    words: str
    """What the numbers are."""
    term: str
    """In the glossary."""
    most: int
    """Tokens of a prompt, at most."""


METHODS: dict[str, Method] = {
    "direct": Method("Direct", "direct effect on the logit", "effect", 4096),
    "gradient_x_activation": Method("Gradient", "gradient × activation", "gradient_x_activation", 1024),
    "attribution_patching": Method("Attribution patching", "attribution patching", "attribution_patching", 1024),
    "integrated_gradients": Method("Integrated gradients", "integrated gradients", "integrated_gradients", 512),
    "activation_patching": Method("Exact", "exact effect on the logit", "activation_patching", 128),
}
"""By their names in an address; all but the first are `scope.attribution`'s."""


class PushAsked(NamedTuple):
    """One next token, and how its logit is attributed."""

    token_id: int
    against: int | None = None
    """Another next token: then the difference of the two logits is attributed."""
    method: str = "direct"
    """One of `METHODS`."""
    after: int | None = None
    """After which position; None for the last one. The direct effect looks after each position."""


@dataclass(frozen=True, eq=False)
class Push:
    """What every firing of a prompt did for the logit of one next token."""

    token_id: int
    text: str
    table: "pd.DataFrame"
    """Columns feature, position, effect (logits)."""
    method: str = "direct"
    against: str | None = None
    """What the other token reads, where a difference is attributed."""
    after: int | None = None
    """After which position; None where each has its own next token."""
    value: float | None = None
    """The logit, or the difference, itself; None for the direct effect."""
    completeness: float | None = None
    """The effects of all firings and of the SAE's errors, as a share of what `value` is above the baseline's; None
    where the method promises nothing."""

    @property
    def how(self) -> Method:
        """The method."""
        return METHODS[self.method]


class PushJobs:
    """The jobs that attribute a next token."""

    def __init__(self, context: Context) -> None:
        self.context = context

    @property
    def prompts(self) -> PromptJobs:
        """The prompt page's other jobs, which keep the models."""
        return prompt_jobs(self.context)

    def submit(self, index: str, asked: Asked, wanted: PushAsked) -> Job:
        """Queue it; the job's result is a `Push`."""
        return self.context.worker.submit(
            ("push", index, asked, wanted), lambda job: self._push(job, index, asked, wanted), PUSH_TIME_LIMIT
        )

    def found(self, index: str, asked: Asked, wanted: PushAsked | None) -> Push | None:
        """What is known already."""
        return None if wanted is None else self.context.worker.result(("push", index, asked, wanted))

    def _push(self, job: Job, index: str, asked: Asked, wanted: PushAsked) -> Push:
        model, _ = self.prompts.loaded(job, index)
        tokens = [wanted.token_id, *([] if wanted.against is None else [wanted.against])]
        for token in tokens:
            if not 0 <= token < model.d_vocab:
                raise UnknownNameError("token", token, hint=f"The vocabulary has tokens 0 to {model.d_vocab - 1:,}.")
        if len(set(tokens)) < len(tokens):
            raise InvalidInputError("The two next tokens are the same; their difference is 0.")
        texts = model.vocabulary_strings(tokens)
        against = texts[1] if wanted.against is not None else None
        if wanted.method == "direct":
            return Push(wanted.token_id, texts[0], self._direct(job, index, asked, tokens), against=against)
        return self._attributed(job, index, asked, wanted, texts[0], against)

    def _direct(self, job: Job, index: str, asked: Asked, tokens: list[int]) -> "pd.DataFrame":
        from scope.attribution.direct import direct_logit_effects

        analysis = self.prompts.analysed(job, index, asked)
        model, sae = self.prompts.loaded(job, index)
        job.report("tracing the direct paths")
        table = direct_logit_effects(model, sae, analysis.features, None, tokens[0])
        if len(tokens) == 1:
            return table
        other = direct_logit_effects(model, sae, analysis.features, None, tokens[1])
        both = table.merge(
            other[["position", "feature", "effect"]], on=["position", "feature"], suffixes=("", "_other")
        )
        return both.assign(effect=both["effect"] - both["effect_other"]).drop(columns="effect_other")

    def _attributed(
        self, job: Job, index: str, asked: Asked, wanted: PushAsked, text: str, against: str | None
    ) -> Push:
        from scope.attribution.methods import ERROR, attribute
        from scope.attribution.targets import logit, logit_difference

        model, sae = self.prompts.loaded(job, index)
        prompt = self.prompts.prompt_of(model, index, asked, METHODS[wanted.method].most)
        tokens = model.prompt_tokens(prompt)
        after = len(tokens) - 1 if wanted.after is None else min(wanted.after, len(tokens) - 1)
        if wanted.against is None:
            target = logit(wanted.token_id, after)
        else:
            target = logit_difference(wanted.token_id, wanted.against, after)
        job.report(f"attributing through {model.n_layers} layers")
        found = attribute(
            model,
            tokens,
            target,
            sae,
            wanted.method,
            progress=lambda done, total: job.report("intervening on each firing", done, total),
        )
        table = found.table[found.table["feature"] != ERROR].rename(columns={"strength": "value"})
        completeness = next(iter(found.completeness.values()), None)
        return Push(wanted.token_id, text, table, wanted.method, against, after, found.value, completeness)
