"""What the prompt page and the logit lens ask of the model worker. The functions here run in its thread; torch is
imported there.

1. `Asked` is what someone wants to run, as an address writes it: a text, or a chat that goes through a chat template
   (`dashboards.conversations`).
2. `analyse` runs the model on it and encodes what the SAE's hook sees: which features fire on each token, and the
   likeliest next tokens after each, a few positions' logits at a time.
3. `distributions` puts two analyses' next-token distributions beside each other.
4. `lens` reads the residual stream after every layer.
5. `typed` finds the vocabulary's token for what someone typed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from dashboards.context import Context
from dashboards.conversations import Prepared, Said, form_turns, prepare, turns_of
from dashboards.stored import WithMedia, stored_window, with_files
from dashboards.uploads import uploads_of
from dashboards.worker import Job
from scope.errors import InvalidInputError, MismatchError, UnknownNameError

if TYPE_CHECKING:
    import pandas as pd

    from scope.attribution.lens import LogitLens
    from scope.features.index import FeatureIndex
    from scope.features.prompt import PromptFeatures
    from scope.features.prompt_compare import PromptComparison
    from scope.models.placement import EmbeddingPlace

__all__ = [
    "MAX_LENS_TOKENS",
    "MAX_TOKENS",
    "N_PREDICTIONS",
    "Analysis",
    "Asked",
    "Distributions",
    "LensMode",
    "Prediction",
    "PromptJobs",
    "TypedToken",
    "prompt_jobs",
]

MAX_TOKENS = 4096
"""Longest prompt that the prompt page takes, or the model's context where that is shorter."""
MAX_LENS_TOKENS = 512
"""Longest prompt of the logit lens: every layer's logits are computed for every token."""
LENS_TIME_LIMIT = 900.0
"""Seconds."""
N_PREDICTIONS = 10
LENS_TOP = 10
MAX_DIGITS = 10
MAX_FILES = 8
"""Images and sounds of a prompt."""
LensMode = Literal["", "read", "splice"]


class Asked(NamedTuple):
    """What someone wants to run."""

    text: str
    """The text, or a chat as JSON: [[role, content], …], or an object with messages and tools."""
    chat: bool = False
    window: bool = False
    """The text is the number of a stored window with images or sounds."""
    media: tuple[str, ...] = ()
    """Digests of files that were handed over (`dashboards.uploads`)."""

    @classmethod
    def of(cls, query: Mapping[str, Any] | None, suffix: str = "") -> "Asked":
        """The prompt of an address, its names ending in `suffix`: `window`, which has no suffix, or `chat` where it is
        there, else `text`."""
        query = query or {}
        window = str(query.get("window") or "") if not suffix else ""
        if window.isascii() and window.isdigit() and len(window) < MAX_DIGITS:
            return cls(window, window=True)
        chat = str(query.get(f"chat{suffix}") or "")
        media = str(query.get("media") or "") if not suffix else ""
        files = tuple(name for name in media.split(",")[:MAX_FILES] if name.isascii() and name.isalnum())
        return cls(chat or str(query.get(f"text{suffix}") or ""), bool(chat), media=files)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to run."""
        if self.media:
            return False
        return not any(said or calls for _, said, calls, _ in form_turns(self.text)[0]) if self.chat else not self.text


@dataclass(frozen=True)
class Prediction:
    """A likely next token."""

    token_id: int
    text: str
    probability: float


@dataclass(frozen=True, eq=False)
class Analysis:
    """What a prompt does in the model, as far as the page shows it."""

    asked: Asked
    features: "PromptFeatures"
    """Without its logits, which are large."""
    predictions: list[list[Prediction]]
    """Per position the likeliest next tokens."""
    said: tuple[Said, ...] = ()
    """Of a chat: what each token is."""
    shown: WithMedia | None = None
    """Its images and sounds."""

    @property
    def turns(self) -> dict[int, str]:
        """Of a chat: the position that each turn begins at, or a part of another kind, and what it is."""
        return turns_of(self.said)

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
class Distributions:
    """What may come next after a position of each of two prompts."""

    table: "pd.DataFrame"
    """Columns token_id, token, a, b (probabilities): the likeliest of either, by the larger probability."""
    divergence: float
    """Jensen-Shannon divergence of the two, in bits: 0 where they are equal, 1 where they share nothing."""


class _Lens(NamedTuple):
    lens: "LogitLens"
    said: tuple[Said, ...]
    """Of a chat: what each token is."""


@dataclass(frozen=True)
class TypedToken:
    """The single tokens that what someone typed can stand for, the likeliest reading first."""

    choices: list[tuple[int, str]]


class PromptJobs:
    """The jobs of the prompt page and the logit lens, and the models and SAEs that they keep loaded."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self._models: dict[str, Any] = {}
        self._saes: dict[str, Any] = {}
        self._comparison: tuple[Analysis, Analysis, PromptComparison] | None = None

    # --- called by pages ------------------------------------------------------------------------------------------

    def submit_analysis(self, index: str, prompt: Asked | str) -> Job:
        """Queue the analysis of a prompt; the job's result is an `Analysis`."""
        asked = prompt if isinstance(prompt, Asked) else Asked(prompt)
        return self.context.worker.submit(_analysis_key(index, asked), lambda job: self._analyse(job, index, asked))

    def submit_distributions(self, index: str, a: Asked, at_a: int, b: Asked, at_b: int) -> Job:
        """Queue the comparison of what comes next after two positions; the job's result is a `Distributions`."""
        key = ("distributions", index, a, at_a, b, at_b)
        return self.context.worker.submit(key, lambda job: self._distributions(job, index, (a, at_a), (b, at_b)))

    def submit_lens(
        self, index: str, asked: Asked, mode: LensMode = "", follow: tuple[int, ...] = (), position: int | None = None
    ) -> Job:
        """Queue the logit lens, at all positions or at one; `lens` and `lens_said` have its result."""
        key = ("lens", index, asked, mode, follow, position)
        return self.context.worker.submit(
            key, lambda job: self._lens(job, index, asked, mode, follow, position), time_limit=LENS_TIME_LIMIT
        )

    def submit_typed(self, index: str, typed: str) -> Job:
        """Queue the look-up of a typed token; the job's result is a `TypedToken`."""
        return self.context.worker.submit(("typed", index, typed), lambda job: self._typed(job, index, typed))

    def analysis(self, index: str, prompt: Asked | str) -> Analysis | None:
        """The analysis of a prompt, where it is done."""
        asked = prompt if isinstance(prompt, Asked) else Asked(prompt)
        return self.context.worker.result(_analysis_key(index, asked))

    def distributions(self, index: str, a: Asked, at_a: int, b: Asked, at_b: int) -> Distributions | None:
        """What comes next after two positions, where that is done."""
        return self.context.worker.result(("distributions", index, a, at_a, b, at_b))

    def lens(
        self, index: str, asked: Asked, mode: LensMode = "", follow: tuple[int, ...] = (), position: int | None = None
    ) -> "LogitLens | None":
        """The logit lens, where it is done."""
        found: _Lens | None = self.context.worker.result(("lens", index, asked, mode, follow, position))
        return None if found is None else found.lens

    def lens_said(self, index: str, asked: Asked, mode: LensMode = "") -> tuple[Said, ...]:
        """What each token of a chat is, where the lens at all positions is done; nothing of a text."""
        found: _Lens | None = self.context.worker.result(("lens", index, asked, mode, (), None))
        return () if found is None else found.said

    def d_vocab(self, index: str) -> int:
        """The size of the vocabulary, once the model has been loaded; else 0."""
        model = self._models.get(str(self.context.index(index).model_info["name"]))
        return 0 if model is None else int(model.d_vocab)

    def comparison(self, a: Analysis, b: Analysis) -> "PromptComparison":
        """What differs between two prompts; the last one is kept, because every click on the page asks again."""
        from scope.features.prompt_compare import compare_prompts

        known = self._comparison
        if known is None or known[0] is not a or known[1] is not b:
            known = self._comparison = (a, b, compare_prompts(a.features, b.features))
        return known[2]

    # --- run by the worker ----------------------------------------------------------------------------------------

    def _analyse(self, job: Job, index: str, asked: Asked) -> Analysis:
        model, sae = self._loaded(job, index)
        shown = self._with_media(model, index, asked)
        if shown is None:
            prompt, n_tokens, said = self._prepared(model, index, asked)
        else:
            prompt, n_tokens, said = shown.prompt, shown.n_tokens, shown.said
        _check_length(model, n_tokens, MAX_TOKENS)
        job.report(f"running the model on {n_tokens:,} tokens")
        from scope.features.prompt import features_on_prompt

        found = features_on_prompt(model, sae, prompt, index=self.context.index(index), logits=False)
        return Analysis(asked, found, _predictions(model, found.final_residual, job), said, shown)

    def _distributions(self, job: Job, index: str, *sides: tuple[Asked, int]) -> Distributions:
        import pandas as pd
        import torch

        from scope.models.losses import residual_logits

        model, _ = self._loaded(job, index)
        rows = []
        for asked, position in sides:
            analysis = self.analysis(index, asked) or self._analyse(job, index, asked)
            rows.append(analysis.features.final_residual[position])
        job.report("reading the predictions")
        with torch.no_grad(), model.lock:
            logits = residual_logits(model, torch.from_numpy(np.stack(rows)))
        p = logits.double().cpu().softmax(-1)
        middle = p.mean(0)
        divergence = torch.special.xlogy(p, p / middle).nan_to_num(0).sum(-1).mean() / np.log(2)
        best = p.topk(N_PREDICTIONS, dim=-1).indices.flatten().unique()
        best = best[p[:, best].amax(0).argsort(descending=True, stable=True)]
        strings = model.vocabulary_strings(best.tolist())
        table = pd.DataFrame({"token_id": best.numpy(), "token": strings, "a": p[0, best], "b": p[1, best]})
        return Distributions(table, float(divergence))

    def _lens(
        self, job: Job, index: str, asked: Asked, mode: LensMode, follow: tuple[int, ...], position: int | None
    ) -> _Lens:
        from scope.attribution.lens import logit_lens

        model, sae = self._loaded(job, index)
        prompt, n_tokens, said = self._prepared(model, index, asked)
        _check_length(model, n_tokens, MAX_LENS_TOKENS)
        job.report(f"running the model on {n_tokens:,} tokens")
        if position is not None:
            position = min(position, n_tokens - 1)
        lens = logit_lens(
            model,
            prompt,
            positions=None if position is None else [position],
            k=LENS_TOP,
            follow=follow,
            sae=sae if mode else None,
            sae_mode=mode or "read",
            progress=lambda done, total: job.report("reading the layers", done, total),
        )
        return _Lens(lens, said)

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

    def sae(self, job: Job, index: str) -> Any:
        """The SAE of an index, loaded once; called in the worker's thread only."""
        info = self.context.index(index).sae_info
        fingerprint = str(info["fingerprint"])
        if fingerprint not in self._saes:
            job.report("loading the SAE")
            self._saes[fingerprint] = _load_sae(self.context.workspace, info)
        return self._saes[fingerprint]

    def analysed(self, job: Job, index: str, asked: Asked) -> Analysis:
        """The analysis of a prompt, known or made now, for other jobs of the same worker; called in its thread only."""
        return self.analysis(index, asked) or self._analyse(job, index, asked)

    def prompt_of(self, model: Any, index: str, asked: Asked, most: int = MAX_TOKENS) -> Any:
        """What the model is given for a prompt of at most `most` tokens: a text or token ids.

        Raises:
            InvalidInputError: it is too long, or a chat for a tokenizer that has no template.
        """
        prompt, n_tokens, _ = self._prepared(model, index, asked)
        _check_length(model, n_tokens, most)
        return prompt

    def _prepared(self, model: Any, index: str, asked: Asked) -> Prepared:
        """What the model is given; chats are written as those of the index are, where it does not say otherwise."""
        if asked.window or asked.media:
            raise InvalidInputError(
                "A prompt with images or sounds is read on the prompt page, by strength and by direct effect; give a "
                "text or a chat here."
            )
        return prepare(model, asked.text, asked.chat, self._template(index, asked))

    def _template(self, index: str, asked: Asked) -> str | None:
        template = self.context.chat_template
        return self.context.index(index).chat_template if asked.chat and template is None else template

    def _with_media(self, model: Any, index: str, asked: Asked) -> WithMedia | None:
        """A stored window, or a prompt with files; None of a prompt without."""
        if asked.window:
            return stored_window(model, self.context.index(index), int(asked.text))
        if not asked.media:
            return None
        files = [uploads_of(self.context).get(digest) for digest in asked.media]
        return with_files(model, asked.text, asked.chat, files, self._template(index, asked))

    def model(self, job: Job, name: str) -> Any:
        """A model by what it is loaded as, loaded once whoever asks; called in the worker's thread only."""
        known = next((one for one in self._models.values() if one.files.load_name == name), None)
        if known is None:
            job.report(f"loading {name}, which takes some seconds the first time")
            from scope.models import LanguageModel

            known = LanguageModel.load(name, embeddings=self.context.embeddings)
            self._models[str(known.name)] = known
        return known

    def _loaded(self, job: Job, index: str) -> tuple[Any, Any]:
        """The model and the SAE of an index, loaded once."""
        opened, sae = self.context.index(index), self.sae(job, index)
        name = str(opened.model_info["name"])
        if name not in self._models:
            job.report(f"loading {name}, which takes some seconds the first time")
            self._models[name] = _load_model(opened, self.context.embeddings)
        model = self._models[name]
        if opened.hook_name != sae.hook_name:
            raise MismatchError(f"The SAE reads {sae.hook_name}, the index {opened.hook_name}.")
        return model, sae


def prompt_jobs(context: Context) -> PromptJobs:
    """The one `PromptJobs` of a dashboard, so that no page loads a model that another has loaded."""
    jobs = context.shared.setdefault("prompt-jobs", PromptJobs(context))
    assert isinstance(jobs, PromptJobs)
    return jobs


def _analysis_key(index: str, asked: Asked) -> tuple[Any, ...]:
    return ("analyse", index, asked)


def _check_length(model: Any, n_tokens: int, most: int) -> None:
    limit = min(most, model.max_context_size)
    if n_tokens > limit:
        raise InvalidInputError(
            f"The prompt has {n_tokens:,} tokens; this page takes up to {limit:,} (the model's own context is "
            f"{model.max_context_size:,}). Shorten it by {n_tokens - limit:,}."
        )


def _load_model(index: "FeatureIndex", embeddings: "EmbeddingPlace") -> Any:
    """The model that an index was built from, from this machine."""
    from scope.models import LanguageModel

    info = index.model_info
    name = info.get("load_name") or info["name"]
    return LanguageModel.load(name, revision=info.get("revision"), embeddings=embeddings)


def _predictions(model: Any, residual: np.ndarray, job: Job) -> list[list[Prediction]]:
    """The likeliest next tokens at each position, from the last residual stream."""
    import torch

    from scope.models.losses import likeliest_tokens

    ids, probabilities = likeliest_tokens(
        model,
        torch.from_numpy(residual),
        N_PREDICTIONS,
        lambda done, total: job.report("reading the predictions", done, total),
    )
    unique = sorted(set(ids.flatten().tolist()))
    strings = dict(zip(unique, model.vocabulary_strings(unique), strict=True))
    return [
        [Prediction(token, strings[token], probability) for token, probability in zip(row, chances, strict=True)]
        for row, chances in zip(ids.tolist(), probabilities.tolist(), strict=True)
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
