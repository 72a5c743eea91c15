"""What the prompt page asks of the model worker. The functions here run in its thread; torch is imported there.

1. `analyse` runs the model on a text and encodes what the SAE's hook sees: which features fire on each token, and the
   likeliest next tokens after each.
2. `push` takes such an analysis and one next token, and says how far each firing moves that token's logit.
3. `read_token` finds the vocabulary's token for what someone typed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from dashboards.context import Context
from dashboards.worker import Job
from scope.errors import InvalidInputError, MismatchError, UnknownNameError

if TYPE_CHECKING:
    import pandas as pd

    from scope.features.index import FeatureIndex
    from scope.features.prompt import PromptFeatures

__all__ = ["MAX_TOKENS", "N_PREDICTIONS", "Analysis", "Prediction", "PromptJobs", "Push", "TypedToken", "prompt_jobs"]

MAX_TOKENS = 512
"""Longest prompt that the page takes. All its logits are held at once: 0.5 GB with Gemma's vocabulary."""
N_PREDICTIONS = 10
CHUNK = 64


@dataclass(frozen=True)
class Prediction:
    """A likely next token."""

    token_id: int
    text: str
    probability: float


@dataclass(frozen=True, eq=False)
class Analysis:
    """What a prompt does in the model, as far as the page shows it."""

    text: str
    features: "PromptFeatures"
    """Without its logits, which are large."""
    predictions: list[list[Prediction]]
    """Per position the likeliest next tokens."""

    @property
    def n_tokens(self) -> int:
        """Tokens of the prompt, BOS included."""
        return len(self.features.tokens)

    @property
    def special(self) -> list[int]:
        """Positions of BOS and other special tokens, on which features are left out."""
        from activations.source import RowFlag

        return [int(place) for place in np.flatnonzero(self.features.flags & (RowFlag.BOS | RowFlag.SPECIAL))]


@dataclass(frozen=True, eq=False)
class Push:
    """How far every firing of a prompt moves the logit of one next token, along the residual stream alone."""

    token_id: int
    text: str
    table: "pd.DataFrame"
    """Columns feature, position, strength, effect."""


@dataclass(frozen=True)
class TypedToken:
    """The single tokens that what someone typed can stand for, the likeliest reading first."""

    choices: list[tuple[int, str]]


class PromptJobs:
    """The jobs of the prompt page, and the models and SAEs that they keep loaded."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self._models: dict[str, Any] = {}
        self._saes: dict[str, Any] = {}

    # --- called by pages ------------------------------------------------------------------------------------------

    def submit_analysis(self, index: str, text: str) -> Job:
        """Queue the analysis of a text; the job's result is an `Analysis`."""
        return self.context.worker.submit(_analysis_key(index, text), lambda job: self._analyse(job, index, text))

    def submit_push(self, index: str, text: str, token_id: int) -> Job:
        """Queue the direct effects on one next token; the job's result is a `Push`."""
        key = _push_key(index, text, token_id)
        return self.context.worker.submit(key, lambda job: self._push(job, index, text, token_id))

    def submit_typed(self, index: str, typed: str) -> Job:
        """Queue the look-up of a typed token; the job's result is a `TypedToken`."""
        return self.context.worker.submit(("typed", index, typed), lambda job: self._typed(job, index, typed))

    def analysis(self, index: str, text: str) -> Analysis | None:
        """The analysis of a text, where it is done."""
        return self.context.worker.result(_analysis_key(index, text))

    def push(self, index: str, text: str, token_id: int | None) -> Push | None:
        """The direct effects on a next token, where they are done."""
        return None if token_id is None else self.context.worker.result(_push_key(index, text, token_id))

    # --- run by the worker ----------------------------------------------------------------------------------------

    def _analyse(self, job: Job, index: str, text: str) -> Analysis:
        model, sae = self._loaded(job, index)
        n_tokens = len(model.tokenize(text))
        limit = min(MAX_TOKENS, model.max_context_size)
        if n_tokens > limit:
            raise InvalidInputError(
                f"The prompt has {n_tokens:,} tokens; this page takes up to {limit:,} (the model's own context is "
                f"{model.max_context_size:,}). Shorten it."
            )
        job.report(f"running the model on {n_tokens:,} tokens")
        from scope.features.prompt import features_on_prompt

        found = features_on_prompt(model, sae, text, index=self.context.index(index))
        predictions = _predictions(model, found.next_logits, job.report)
        return Analysis(text, replace(found, next_logits=np.empty((0, 0), dtype=np.float32)), predictions)

    def _push(self, job: Job, index: str, text: str, token_id: int) -> Push:
        from scope.attribution.direct import direct_logit_effects

        analysis = self.analysis(index, text) or self._analyse(job, index, text)
        model, sae = self._loaded(job, index)
        if not 0 <= token_id < model.d_vocab:
            raise UnknownNameError("token", token_id, hint=f"The vocabulary has tokens 0 to {model.d_vocab - 1:,}.")
        job.report("tracing the direct paths")
        table = direct_logit_effects(model, sae, analysis.features, None, token_id)
        return Push(token_id, model.vocabulary_strings([token_id])[0], table)

    def _typed(self, job: Job, index: str, typed: str) -> TypedToken:
        model, _ = self._loaded(job, index)
        readings = [typed] if typed[:1].isspace() else [f" {typed}", typed]
        choices, pieces = [], []
        for reading in readings:
            (ids,) = model.encode_documents([reading])
            if len(ids) == 1:
                choices.append((int(ids[0]), model.vocabulary_strings(ids)[0]))
            pieces.append(model.vocabulary_strings(ids))
        if not choices:
            parts = ", ".join(f"“{piece}”" for piece in pieces[0])
            raise InvalidInputError(f"“{typed}” is {len(pieces[0])} tokens ({parts}). Type the first of them.")
        return TypedToken(choices)

    def loaded(self, job: Job, index: str) -> tuple[Any, Any]:
        """The model and the SAE of an index, for other jobs of the same worker; called in its thread only."""
        return self._loaded(job, index)

    def _loaded(self, job: Job, index: str) -> tuple[Any, Any]:
        """The model and the SAE of an index, loaded once."""
        opened = self.context.index(index)
        fingerprint = str(opened.sae_info["fingerprint"])
        if fingerprint not in self._saes:
            job.report("loading the SAE")
            self._saes[fingerprint] = _load_sae(self.context.workspace, opened.sae_info)
        name = str(opened.model_info["name"])
        if name not in self._models:
            job.report(f"loading {name}, which takes some seconds the first time")
            self._models[name] = _load_model(opened)
        model = self._models[name]
        if opened.hook_name != self._saes[fingerprint].hook_name:
            raise MismatchError(f"The SAE reads {self._saes[fingerprint].hook_name}, the index {opened.hook_name}.")
        return model, self._saes[fingerprint]


def prompt_jobs(context: Context) -> PromptJobs:
    """The one `PromptJobs` of a dashboard, so that no page loads a model that another has loaded."""
    jobs = context.shared.setdefault("prompt-jobs", PromptJobs(context))
    assert isinstance(jobs, PromptJobs)
    return jobs


def _analysis_key(index: str, text: str) -> tuple[str, ...]:
    return ("analyse", index, text)


def _push_key(index: str, text: str, token_id: int) -> tuple[str, str, str, int]:
    return ("push", index, text, token_id)


def _load_model(index: "FeatureIndex") -> Any:
    """The model that an index was built from, from this machine."""
    from scope.models import LanguageModel

    info = index.model_info
    return LanguageModel.load(info.get("load_name") or info["name"], revision=info.get("revision"))


def _predictions(
    model: Any, logits: np.ndarray, report: Callable[[str, int, int | None], None]
) -> list[list[Prediction]]:
    """The likeliest next tokens at each position, `logits` being `(seq, d_vocab)`."""
    import torch

    ids, probabilities = [], []
    for start in range(0, len(logits), CHUNK):
        report("reading the predictions", start, len(logits))
        chunk = torch.from_numpy(logits[start : start + CHUNK])
        best = chunk.topk(N_PREDICTIONS, dim=-1)
        ids += best.indices.tolist()
        probabilities += (best.values - chunk.logsumexp(dim=-1, keepdim=True)).exp().tolist()
    unique = sorted({token for row in ids for token in row})
    strings = dict(zip(unique, model.vocabulary_strings(unique), strict=True))
    return [
        [Prediction(token, strings[token], probability) for token, probability in zip(row, chances, strict=True)]
        for row, chances in zip(ids, probabilities, strict=True)
    ]


def _load_sae(workspace: Any, info: Mapping[str, Any]) -> Any:
    """The SAE of an index: the workspace's, or the published one that it was made with, if that is on this machine."""
    from scope.saes.formats import load
    from scope.saes.formats.addresses import is_address

    try:
        return workspace.sae(str(info["fingerprint"]))
    except UnknownNameError:
        source = info["metadata"].get("source")
        if not is_address(source):
            raise
        return load(source, hook=info["hook_name"])
