"""What the pages about a model ask of the model worker: its parts and parameters, what its per-layer embeddings wrote
on a prompt, and what that did for a next token. The functions here run in the worker's thread; torch is imported there.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from dashboards.context import Context
from dashboards.prompts import MAX_LENS_TOKENS, Asked, Prediction, PromptJobs, prompt_jobs
from dashboards.worker import Job

if TYPE_CHECKING:
    from scope.attribution.per_layer import PerLayerReport
    from scope.attribution.tables import TableEffects
    from scope.models.parameters import ParameterCount

__all__ = ["FEATURES", "ModelFacts", "ModelJobs", "Written"]

FEATURES = 16
"""Features that are listed for each layer and token, at most."""
NEXT_TOKENS = 6
"""Likely next tokens to choose from."""


class ModelFacts(NamedTuple):
    """What a model is made of."""

    name: str
    architecture: str
    """Its class in transformers."""
    n_layers: int
    d_model: int
    d_vocab: int
    max_context_size: int
    dtype: str
    device: str
    parameters: "ParameterCount"
    d_per_layer: int
    """Width of a layer's own embeddings; 0 where it has none."""
    experts: dict[int, tuple[int, int]]
    """By layer that has experts: how many, and how many of them a token goes to."""
    beside_dense: bool
    """Whether experts stand beside a dense MLP."""


@dataclass(frozen=True, eq=False)
class Written:
    """What per-layer embeddings wrote on a prompt."""

    facts: ModelFacts
    report: "PerLayerReport | None"
    """None for a model without per-layer embeddings."""
    hook: str = ""
    """What the SAE reads, where its features can be followed; else ""."""
    problem: str = ""
    """Why its features cannot."""
    next_tokens: tuple[Prediction, ...] = ()
    """The likeliest tokens after the last one."""


class ModelJobs:
    """The jobs of these pages."""

    def __init__(self, context: Context) -> None:
        self.context = context

    @property
    def prompts(self) -> PromptJobs:
        """The prompt page's jobs, which keep the models."""
        return prompt_jobs(self.context)

    def submit_facts(self, index: str) -> Job:
        """Queue what the model of an index is made of; the job's result is a `ModelFacts`."""
        return self.context.worker.submit(("facts", index), lambda job: self.facts(job, index))

    def submit_written(self, index: str, asked: Asked) -> Job:
        """Queue what per-layer embeddings write on a prompt; the job's result is a `Written`."""
        return self.context.worker.submit(("per-layer", index, asked), lambda job: self._written(job, index, asked))

    def submit_effects(self, index: str, asked: Asked, target: int) -> Job:
        """Queue what the rows of the tables did for a next token after a prompt's last one; the job's result is a
        `TableEffects`, or None for a model without per-layer embeddings."""
        return self.context.worker.submit(
            ("table-effects", index, asked, target), lambda job: self._effects(job, index, asked, target)
        )

    def facts(self, job: Job, index: str) -> ModelFacts:
        """What the model of an index is made of; called in the worker's thread only."""
        return _facts(self.prompts.loaded(job, index)[0])

    def _written(self, job: Job, index: str, asked: Asked) -> Written:
        from scope.attribution.per_layer import per_layer_writes, require_readable
        from scope.errors import InvalidInputError

        model, sae = self.prompts.loaded(job, index)
        facts = _facts(model)
        if not facts.d_per_layer:
            return Written(facts, None)
        prompt = self.prompts.prompt_of(model, index, asked, MAX_LENS_TOKENS)
        job.report("running the model")
        following = _next_tokens(model, prompt)
        try:
            require_readable(model, sae)
        except InvalidInputError as problem:
            return Written(facts, per_layer_writes(model, prompt), problem=str(problem), next_tokens=following)
        report = per_layer_writes(model, prompt, [sae], FEATURES)
        return Written(facts, report, str(sae.hook_name), next_tokens=following)

    def _effects(self, job: Job, index: str, asked: Asked, target: int) -> "TableEffects | None":
        from scope.attribution.tables import table_effects
        from scope.attribution.targets import logit

        model, _ = self.prompts.loaded(job, index)
        if not model.layout.d_per_layer:
            return None
        prompt = self.prompts.prompt_of(model, index, asked, MAX_LENS_TOKENS)
        return table_effects(
            model, prompt, logit(target), progress=lambda done, total: job.report("following the rows", done, total)
        )


def _next_tokens(model: Any, prompt: Any) -> tuple[Prediction, ...]:
    from scope.models.losses import likeliest_tokens

    last = model.layout.final_residual
    state = model.run(prompt, hooks=[last], logits=False).activations[last][-1:]
    ids, probabilities = likeliest_tokens(model, state, NEXT_TOKENS)
    texts = model.vocabulary_strings(ids[0].tolist())
    return tuple(map(Prediction, ids[0].tolist(), texts, probabilities[0].tolist()))


def _facts(model: Any) -> ModelFacts:
    layout = model.layout
    experts = {i: (sizes.n_experts, sizes.experts_per_token) for i, sizes in enumerate(layout.sizes) if sizes.n_experts}
    return ModelFacts(
        model.name,
        type(model.hf).__name__,
        layout.n_layers,
        layout.d_model,
        layout.d_vocab,
        layout.max_context_size,
        str(model.dtype).removeprefix("torch."),
        str(model.device),
        model.parameter_count(),
        int(layout.d_per_layer or 0),
        experts,
        any(layout.sizes[layer].dense for layer in experts),
    )
