"""What the experts page asks of the model worker, which runs it in its thread; torch is imported there.

1. Of a store that has the router's choices: the load of every layer's experts (`load`), what one layer's experts are
   for (`groups`), and which features fire on whose tokens (`pairs`).
2. Of the model: where each token of a prompt goes (`routing`), and what an edit of the router changes (`effects`).
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from dashboards.components.prompt_state import whole_number, whole_numbers
from dashboards.context import Context
from dashboards.models import ModelFacts, ModelJobs
from dashboards.prompts import MAX_LENS_TOKENS, Asked, PromptJobs, prompt_jobs
from dashboards.worker import Job
from scope.errors import InvalidInputError, ScopeError, UnknownNameError

if TYPE_CHECKING:
    import pandas as pd

    from activations.store import ActivationStore
    from scope.features.routing import EditEffects
    from scope.workspace import Entry

__all__ = ["ACTIONS", "BY", "ExpertEdit", "ExpertJobs", "ExpertStore", "Groups", "Routed"]

STORE_TIME_LIMIT = 1800.0
"""Seconds that a pass over a store may take."""
MIN_FIRINGS = 10
"""Features that fire on fewer tokens are left out of the table of features and experts."""
N_GROUPS = 16
"""Groups whose load is drawn, at most: the largest."""
BY = ("language", "source", "token")
ACTIONS = ("forbid", "force", "swap")


class ExpertStore(NamedTuple):
    """A store of the workspace that has the router's choices."""

    entry: "Entry"
    layers: tuple[int, ...]
    hooks: tuple[str, ...]
    """All hooks that it has."""

    def layer(self, asked: int | None) -> int:
        """The layer that is asked for, or the first one."""
        return asked if asked in self.layers else self.layers[0]


class Groups(NamedTuple):
    """What the experts of a layer are for."""

    table: "pd.DataFrame"
    """As `expert_specialisation` gives it; by token, `top_group` is how the token reads."""
    load: "pd.DataFrame"
    """As `expert_load` gives it, of the largest groups."""
    n_groups: int
    """Groups in all."""


@dataclass(frozen=True, eq=False)
class Routed:
    """Where the tokens of a prompt go."""

    facts: ModelFacts
    routing: "pd.DataFrame | None" = None
    """As `prompt_routing` gives it; None for a model without experts."""
    dense: "pd.DataFrame | None" = None
    """As `dense_against_experts` gives it, for models where both stand side by side."""
    tokens: tuple[str, ...] = ()


@dataclass(frozen=True)
class ExpertEdit:
    """An edit of what the router chose."""

    action: str
    """One of `ACTIONS`."""
    layer: int
    expert: int
    other: int | None = None
    """Of a swap."""
    positions: tuple[int, ...] | None = None
    """Tokens that it counts for; None for all."""

    @classmethod
    def of(cls, query: Mapping[str, Any]) -> "ExpertEdit | None":
        """The edit of an address (`do`, `layer`, `expert`, `other`, `at`), as far as it is complete."""
        action = str(query.get("do") or "")
        layer, expert, other = (whole_number(query, name) for name in ("layer", "expert", "other"))
        if action not in ACTIONS or layer is None or expert is None or (action == "swap" and other in (None, expert)):
            return None
        return cls(action, layer, expert, other if action == "swap" else None, whole_numbers(query, "at") or None)


class ExpertJobs:
    """The jobs of the page."""

    def __init__(self, context: Context) -> None:
        self.context = context

    @property
    def prompts(self) -> PromptJobs:
        """The prompt page's jobs, which keep the models."""
        return prompt_jobs(self.context)

    # --- called by the page ---------------------------------------------------------------------------------------

    def stores(self, index: str) -> list[ExpertStore]:
        """The stores of the index's model that have the router's choices; those that cannot be read are left out."""
        info = self.context.index(index).model_info
        found = []
        for entry in self.context.workspace.stores():
            spec = entry.manifest.get("spec") or {}
            known = info.get("weight_hash") and spec.get("weight_hash")
            same = info["weight_hash"] == spec["weight_hash"] if known else info["name"] == spec.get("model")
            if entry.problem is None and same:
                found.append(self._layers(entry))
        return [one for one in found if one is not None and one.layers]

    def store(self, index: str, id: str) -> ExpertStore | None:
        """The one of `stores` with this id, or the first.

        Raises:
            UnknownNameError: there is none with this id.
        """
        known = self.stores(index)
        if not id:
            return known[0] if known else None
        for one in known:
            if id in (one.entry.id, one.entry.name):
                return one
        raise UnknownNameError("store with a router's choices", id, [one.entry.id for one in known])

    def submit_load(self, store: ExpertStore) -> Job:
        """Queue the load by layer; the job's result is a DataFrame, as of `load_by_layer`."""
        opened = self._open(store)
        return self._submit(("experts-load", *_state(store, opened)), lambda job: _load(job, opened))

    def submit_groups(self, store: ExpertStore, layer: int, by: str) -> Job:
        """Queue what a layer's experts are for; the job's result is a `Groups`."""
        opened = self._open(store)
        key = ("experts-groups", *_state(store, opened), layer, by)
        return self._submit(key, lambda job: self._groups(job, opened, layer, by))

    def submit_pairs(self, store: ExpertStore, index: str, layer: int) -> Job:
        """Queue which features of the index's SAE fire on whose tokens; the job's result is a DataFrame, as of
        `feature_experts`."""
        opened = self._open(store)
        key = ("experts-pairs", *_state(store, opened), index, layer)
        return self._submit(key, lambda job: self._pairs(job, opened, index, layer))

    def submit_routing(self, index: str, asked: Asked) -> Job:
        """Queue where the tokens of a prompt go; the job's result is a `Routed`."""
        return self.context.worker.submit(("experts-prompt", index, asked), lambda job: self._routed(job, index, asked))

    def submit_effects(self, index: str, asked: Asked, edit: ExpertEdit, position: int | None) -> Job:
        """Queue what an edit changes; the job's result is an `EditEffects`."""
        key = ("experts-edit", index, asked, edit, position)
        return self.context.worker.submit(key, lambda job: self._effects(job, index, asked, edit, position))

    def _layers(self, entry: "Entry") -> ExpertStore | None:
        """What a store has; read once for each state of its ledger."""
        known: dict[Any, ExpertStore] = self.context.once("expert-stores", dict)
        ledger = entry.path / "ledger"
        try:
            state = (entry.id, max(path.stat().st_mtime_ns for path in (ledger, *ledger.iterdir())))
            if state in known:
                return known[state]
            hooks = self.context.workspace.store(entry.id).hooks
        except (ScopeError, OSError):
            return None
        layers = [int(name.split(".")[1]) for name in hooks if name.endswith(".moe.hook_experts")]
        known[state] = ExpertStore(entry, tuple(sorted(layers)), tuple(hooks))
        return known[state]

    def _open(self, store: ExpertStore) -> "ActivationStore":
        return self.context.workspace.store(store.entry.id)

    def _submit(self, key: Any, function: Any) -> Job:
        return self.context.worker.submit(key, function, STORE_TIME_LIMIT)

    # --- run by the worker ----------------------------------------------------------------------------------------

    def _groups(self, job: Job, store: "ActivationStore", layer: int, by: str) -> Groups:
        from scope.features.experts import expert_load, expert_specialisation

        job.report(f"counting layer {layer} by {by}")
        table, load = expert_specialisation(store, layer, by), expert_load(store, layer, by)  # type: ignore[arg-type]
        sizes = load.groupby("group")["tokens"].sum().sort_values(ascending=False, kind="stable")
        load = load[load["group"].isin(sizes.index[:N_GROUPS])]
        if by == "token":
            job.report("reading the tokenizer")
            ids = sorted({int(one) for one in (*table["top_group"], *load["group"])})
            names = dict(zip(ids, self._readings(store, ids), strict=True))
            table = table.assign(top_group=table["top_group"].map(names))
            load = load.assign(group=load["group"].map(names))
        return Groups(table, load, len(sizes))

    def _readings(self, store: "ActivationStore", ids: list[int]) -> list[str]:
        """How tokens read, each in its own way; their ids, where the tokenizer is not on this machine."""
        from scope.models.tokens import reader_of

        manifest = store.manifest
        try:
            texts = reader_of(manifest.get("load_name") or manifest["spec"]["model"]).vocabulary_strings(ids)
        except ScopeError:
            return [str(id) for id in ids]
        often = Counter(texts)
        return [text if often[text] == 1 else f"{text} ({id})" for text, id in zip(texts, ids, strict=True)]

    def _pairs(self, job: Job, store: "ActivationStore", index: str, layer: int) -> "pd.DataFrame":
        from scope.features.experts import feature_experts

        sae = self.prompts.sae(job, index)
        job.report(f"encoding the tokens of the store, for the experts of layer {layer}")
        return feature_experts(store, sae, layer, MIN_FIRINGS)

    def _routed(self, job: Job, index: str, asked: Asked) -> Routed:
        from scope.features.experts import dense_against_experts
        from scope.features.routing import prompt_routing

        facts = ModelJobs(self.context).facts(job, index)
        if not facts.experts:
            return Routed(facts)
        model, _ = self.prompts.loaded(job, index)
        prompt = self.prompts.prompt_of(model, index, asked, MAX_LENS_TOKENS)
        job.report("running the model")
        routing = prompt_routing(model, prompt)
        dense = dense_against_experts(model, prompt) if facts.beside_dense else None
        texts = routing.drop_duplicates("position").sort_values("position")["token"]
        return Routed(facts, routing, dense, tuple(texts))

    def _effects(self, job: Job, index: str, asked: Asked, edit: ExpertEdit, position: int | None) -> "EditEffects":
        from scope.features.routing import edit_effects
        from scope.interventions import combine, forbid_expert, force_expert, swap_experts

        model, sae = self.prompts.loaded(job, index)
        prompt = self.prompts.prompt_of(model, index, asked, MAX_LENS_TOKENS)
        if edit.action == "swap":
            if edit.other is None:
                raise InvalidInputError("A swap is of two experts; choose another one.")
            done = swap_experts(model, edit.layer, edit.expert, edit.other, edit.positions)
        else:
            make = forbid_expert if edit.action == "forbid" else force_expert
            done = make(model, edit.layer, edit.expert, edit.positions)
        n_tokens = len(model.prompt_tokens(prompt))
        job.report("running the model without and with it")
        at = n_tokens - 1 if position is None else min(position, n_tokens - 1)
        return edit_effects(model, prompt, combine(done), sae, at)


def _load(job: Job, store: "ActivationStore") -> "pd.DataFrame":
    from scope.features.routing import load_by_layer

    return load_by_layer(store, progress=lambda done, total: job.report("counting the layers", done, total))


def _state(store: ExpertStore, opened: "ActivationStore") -> tuple[str, int]:
    """What a store held when it was asked: it may grow."""
    return store.entry.id, opened.n_rows
