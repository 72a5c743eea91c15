"""What the steering page asks of the model worker: a prompt gone on from under interventions, token by token.

1. `Steer` is what an address asks for: features pushed by so many times their own maximum, or interventions that the
   workspace keeps under a name, and how to write.
2. `SteerJobs.spec` makes declared interventions of it, the same that the command line and Python take.
3. The job writes; what there is after each token is the job's `partial`, `{condition: text}`; its result is a
   `Steered`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dashboards.context import Context
from dashboards.marks import marks_of
from dashboards.prompts import Asked, PromptJobs, prompt_jobs
from dashboards.worker import Job
from scope.errors import InvalidInputError, ScopeError, UnknownNameError

if TYPE_CHECKING:
    from scope.features.index import FeatureIndex
    from scope.interventions.spec import InterventionSpec
    from scope.interventions.steering import Steering

__all__ = [
    "LENGTHS",
    "MAX_PUSHED",
    "SLIDER",
    "STEP",
    "TEMPERATURES",
    "Push",
    "Steer",
    "SteerJobs",
    "Steered",
    "pushes_text",
    "suggested",
]

SLIDER = 10.0
"""Multiples of a feature's maximum at either end of its slider."""
STEP = 0.25
MAX_PUSHED = 12
"""Features that are pushed at once, at most."""
LENGTHS = (20, 40, 80)
"""New tokens that can be chosen."""
TEMPERATURES = (0.0, 0.7, 1.0)
PARTS = ("all", "prompt", "generated")
TIME_LIMIT = 600.0
"""Seconds."""


@dataclass(frozen=True)
class Push:
    """One feature and how far it is pushed."""

    feature: int
    times: float
    """Multiples of its own maximum; negative ones suppress."""


def pushes_text(pushes: tuple[Push, ...]) -> str | None:
    """Pushes as an address writes them: "17:2,4:-1.5"; None for none."""
    return ",".join(f"{one.feature}:{one.times:g}" for one in pushes) or None


def suggested(index: "FeatureIndex", found: Sequence[int], words: str) -> list[int]:
    """Features that a search has found, those first that are about its words: whose label says them, then whose top
    tokens have them early, then those that push them (the search looks at all of these)."""
    folded = " ".join(words.split()).casefold()
    labels, top_tokens = marks_of(index).labels, index.table["top_tokens"]
    ranks = {}
    for feature in found:
        tokens = [" ".join(str(token).split()).casefold() for token in top_tokens.iloc[feature]]
        exact = next((place for place, token in enumerate(tokens) if token == folded), math.inf)
        within = next((place for place, token in enumerate(tokens) if folded in token), math.inf)
        label = folded in labels.get(feature, "").casefold()
        ranks[feature] = (not label, exact, within)
    return sorted(found, key=ranks.__getitem__)


def _pushes(text: str) -> tuple[Push, ...]:
    """Those that can be read, each feature once."""
    found: dict[int, Push] = {}
    for part in text.split(",")[: 4 * MAX_PUSHED]:
        feature, _, times = part.partition(":")
        try:
            size = float(times or 1.0)
        except ValueError:
            continue
        if feature.isascii() and feature.isdigit() and len(feature) < 10 and math.isfinite(size):
            found[int(feature)] = Push(int(feature), min(SLIDER, max(-SLIDER, size)))
    return tuple(found.values())[:MAX_PUSHED]


@dataclass(frozen=True)
class Steer:
    """What to do while the model writes; what cannot be read is left as it is by default."""

    pushes: tuple[Push, ...] = ()
    named: str = ""
    """Interventions of the workspace; then nothing else is pushed."""
    n_tokens: int = 40
    temperature: float = 0.0
    seed: int = 0
    during: str = "all"
    freeze: bool = False

    @classmethod
    def of(cls, query: Mapping[str, Any] | None) -> "Steer":
        """What an address asks for (`push`, `named`, `n`, `t`, `seed`, `during`, `freeze`)."""
        query = query or {}
        n, t, seed = (str(query.get(name, "")) for name in ("n", "t", "seed"))
        temperatures = {f"{one:g}": one for one in TEMPERATURES}
        during = str(query.get("during", ""))
        named = str(query.get("named") or "")
        return cls(
            pushes=() if named else _pushes(str(query.get("push") or "")),
            named=named,
            n_tokens=int(n) if n in map(str, LENGTHS) else 40,
            temperature=temperatures.get(t, 0.0),
            seed=int(seed) if seed.isascii() and seed.isdigit() and len(seed) < 10 else 0,
            during=during if during in PARTS else "all",
            freeze=query.get("freeze") == "1",
        )

    @property
    def empty(self) -> bool:
        """Whether nothing is done to the model."""
        return not self.named and not any(push.times for push in self.pushes)


@dataclass(frozen=True, eq=False)
class Steered:
    """What was written, and the new tokens as they read."""

    steering: "Steering"
    tokens: dict[str, list[str]]
    """By condition."""
    wanted: Steer
    """What was asked for."""


class SteerJobs:
    """The jobs of the steering page."""

    def __init__(self, context: Context) -> None:
        self.context = context

    @property
    def prompts(self) -> PromptJobs:
        """The prompt page's jobs, which keep the models."""
        return prompt_jobs(self.context)

    def spec(self, index: str, wanted: Steer, name: str = "") -> "InterventionSpec":
        """Declared interventions.

        Raises:
            UnknownNameError: the workspace keeps none of this name.
            InvalidInputError: nothing is to be done; or a feature never fires, so that it has no maximum.
            OutOfRangeError: there is no such feature.
        """
        from scope.interventions.spec import Intervention, InterventionSpec

        if wanted.named:
            return self.context.workspace.intervention(wanted.named)
        if wanted.empty:
            raise InvalidInputError("Nothing is pushed yet. Add a feature and move its slider.")
        opened = self.context.index(index)
        for push in wanted.pushes:
            self.maximum(index, push.feature)
        pushed = [push for push in wanted.pushes if push.times]
        one = Intervention(
            kind="add",
            sae=str(opened.sae_info["fingerprint"])[:12],
            features=tuple(push.feature for push in pushed),
            value=tuple(push.times for push in pushed),
            unit="maximum",
            during=wanted.during,  # type: ignore[arg-type]
        )
        return InterventionSpec(
            interventions=(one,), name=name, model=str(opened.model_info["name"]), freeze_attention=wanted.freeze
        )

    def maximum(self, index: str, feature: int) -> float:
        """A feature's largest firing strength.

        Raises:
            OutOfRangeError: there is no such feature.
            InvalidInputError: it never fires.
        """
        from dashboards.queries import feature_id

        opened = self.context.index(index)
        largest = float(opened.table["max_value"].iloc[feature_id(opened, str(feature))])
        if not largest > 0:
            raise InvalidInputError(
                f"Feature {feature} never fires in the text of this index, so it has no maximum to push it by."
            )
        return largest

    def submit(self, index: str, asked: Asked, wanted: Steer) -> Job:
        """Queue the writing; the job's result is a `Steered`.

        Raises:
            ScopeError: what is asked for makes no sense.
        """
        spec = self.spec(index, wanted)
        key = ("steer", index, asked, wanted, repr(spec))
        return self.context.worker.submit(key, lambda job: self._steer(job, index, asked, wanted, spec), TIME_LIMIT)

    def _steer(self, job: Job, index: str, asked: Asked, wanted: Steer, spec: "InterventionSpec") -> Steered:
        from scope.interventions.resolving import control
        from scope.interventions.steering import steer_with

        model, sae = self.prompts.loaded(job, index)
        fingerprint = str(self.context.index(index).sae_info["fingerprint"])

        def sae_of(name: str) -> Any:
            return sae if not name or fingerprint.startswith(name) else self.context.workspace.sae(name)

        def maxima(name: str, feature: int) -> float:
            return self.maximum(index if not name or fingerprint.startswith(name) else self.index_of(name), feature)

        prompt = self.prompts.prompt_of(model, index, asked)
        job.report("reading the prompt")
        edits = spec.resolve(model, sae_of, maxima)
        beside = control(spec, model, sae_of, maxima, wanted.seed)

        def listen(done: int, texts: Mapping[str, str]) -> None:
            job.partial = dict(texts)
            job.report("writing", done, wanted.n_tokens)

        found = steer_with(
            model,
            edits,
            beside,
            prompt,
            wanted.n_tokens,
            temperature=wanted.temperature,
            seed=wanted.seed,
            listen=listen,
        )
        tokens = {}
        for name, part in (("plain", found.plain), ("steered", found.steered), ("random", found.random)):
            if part is not None:
                texts = model.token_strings(part.generation.tokens.tolist())
                tokens[name] = [one.display for one in texts[part.generation.n_prompt :]]
        return Steered(found, tokens, wanted)

    def index_of(self, sae: str) -> str:
        """An index of the SAE with this id or name.

        Raises:
            UnknownNameError: there is none.
        """
        for entry in self.context.indexes():
            about = entry.manifest.get("sae", {})
            if str(about.get("fingerprint", "")).startswith(sae):
                return entry.id
        raise UnknownNameError("index of the SAE", sae, hint="Its features' maxima are known to an index: scope index.")

    def save(self, index: str, wanted: Steer, name: str) -> "InterventionSpec":
        """Keep what is pushed under a name.

        Raises:
            ScopeError: nothing is pushed, or the name cannot be one.
        """
        spec = self.spec(index, wanted, name.strip())
        self.context.workspace.save_intervention(spec)
        return spec

    def kept(self) -> list[str]:
        """Names of the interventions that the workspace keeps."""
        try:
            return self.context.workspace.interventions()
        except (ScopeError, OSError):
            return []
