"""A standing intervention under which a graph explains the model.

1. `graph_edits` checks a set of interventions against the model and the graph's dictionaries, before anything runs, and
   refuses what is not affine in the residual stream: a router's choice, queries and keys, what is inside of an MLP.
2. Those on features of the graph's own transcoders change the nodes: a feature that is set or patched has its new value
   and nothing comes into it, one that is scaled passes on that much of it, one that is ablated is not there. Where BOS
   is among the tokens, whose MLPs are error nodes, the change there is part of the error.
3. All others are `LinearEdit`s at their hooks, put together from one run (`scope.attribution.freezing`).
4. Wherever a graph is tested, the model runs under the same edits: `edited_handlers` puts them among the handlers of a
   pass, in the places that they have in `model.run`.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from scope.attribution.dictionaries import MlpDictionaries
from scope.errors import InvalidInputError
from scope.interventions.edit import Edit, combine
from scope.interventions.resolving import Maxima, Plan, SaesByName, plans_of, sources_of
from scope.interventions.spec import InterventionSpec
from scope.interventions.words import intervention_words
from scope.models.attention import attention_of_the_plain_run
from scope.models.dictionaries import hook_of
from scope.models.edits import EditContext, Edits, apply_edits
from scope.models.hooks import HookPoint
from scope.models.taps import Handler

if TYPE_CHECKING:
    from scope.attribution.graph import CircuitGraph

__all__ = ["Change", "GraphEdits", "edited_handlers", "edits_of", "graph_edits"]

PLACES = ("hook_resid_pre", "attn.hook_z", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post")
"""Hooks of a layer where an intervention is affine in what the nodes of a graph write."""
Told = Callable[["Change", Edit, Tensor, Tensor, EditContext], None]
"""Hears of each edit what went in, what came out, and what the edit was told."""


@dataclass(frozen=True, eq=False)
class Change:
    """One intervention of the set."""

    number: int
    plan: Plan
    edits: tuple[Edit, ...]
    layer: int | None
    """The layer whose features it changes, where they are nodes of the graph."""
    source: Tensor | None
    """Of a patch, what the features' transcoder reads of the other prompt."""


@dataclass(frozen=True, eq=False)
class GraphEdits:
    """Interventions in force on a graph's prompt."""

    spec: InterventionSpec
    """With firing strengths in the place of multiples of a maximum."""
    changes: tuple[Change, ...]

    def for_run(self) -> Edits:
        """As `model.run` takes them."""
        edits = [edit for change in self.changes for edit in change.edits]
        return combine(*edits, freeze_attention=self.spec.freeze_attention)

    def own(self, layer: int) -> list[Change]:
        """Those on features of the graph's transcoder of a layer."""
        return [change for change in self.changes if change.layer == layer]

    def changed(
        self, layer: int, features: Float[Tensor, "batch seq d_sae"], context: EditContext
    ) -> Float[Tensor, "batch seq d_sae"]:
        """The features of a layer after what is done to them."""
        for change in self.own(layer):
            ids = list(change.plan.one.features)
            after = features.clone()
            after[..., ids] = change.plan.feature_change(change.source)(features[..., ids], context).to(features.dtype)
            features = torch.where(_where(change, features, context)[..., None], after, features)
        return features

    def factors(
        self, layer: int, positions: Int[Tensor, " n"], ids: Int[Tensor, " n"], context: EditContext
    ) -> Float[Tensor, " n"]:
        """How far each feature's value follows what it reads: 1, or what scales it, or 0 where it is held."""
        found = torch.ones(len(ids), device=ids.device)
        for change in self.own(layer):
            one = change.plan.one
            there = _where(change, context.tokens, context)[0].to(ids.device)[positions.to(ids.device)]
            for place, feature in enumerate(one.features):
                factor = one.values[place] if one.kind == "scale" else 0.0
                found = torch.where(there & (ids == feature), factor, found)
        return found

    @contextmanager
    def attention(self, model: Any, tokens: Int[Tensor, " seq"]) -> Iterator[None]:
        """Within it the model attends as the interventions want it: by itself, or as it does without them."""
        if not self.spec.freeze_attention:
            yield
            return
        with attention_of_the_plain_run(model, tokens[None]):
            yield


def graph_edits(
    spec: InterventionSpec,
    model: Any,
    dictionaries: MlpDictionaries,
    tokens: Int[Tensor, " seq"],
    saes: SaesByName = None,
    maxima: Maxima = None,
) -> GraphEdits:
    """Interventions as a graph takes them.

    Args:
        spec: what is done to the model.
        model: a `scope.models.LanguageModel`.
        dictionaries: the graph's.
        tokens: the graph's prompt.
        saes: SAEs of features, as for `scope.interventions.resolving.resolve`; the graph's transcoders are also found
            by their ids, the first 12 hex digits of the fingerprint.
        maxima: as for `resolve`.

    Raises:
        InvalidInputError: something that has no exact place in a graph; the message says what, and what has.
        MismatchError, UnknownNameError, OutOfRangeError: as for `resolve`, and a position that the prompt lacks.
    """
    plans = plans_of(spec, model, saes if saes is not None else _among(dictionaries), maxima)
    layers = [_checked(plan, model, dictionaries) for plan in plans]
    _require_order(plans, layers)
    for plan in plans:  # what the edits check, before a patch's prompt is run
        plan.placed(Edit(plan.hook, lambda value, context: value)).check(model.hook_table[plan.hook], len(tokens))
    with torch.no_grad():
        sources = sources_of(model, plans)
    changes = []
    for number, (plan, layer) in enumerate(zip(plans, layers, strict=True)):
        source = None if plan.tokens is None else sources[tuple(plan.tokens.tolist())][plan.wanted]
        changes.append(Change(number, plan, tuple(plan.edits(sources)), layer, source))
        for edit in changes[-1].edits:
            edit.check(model.hook_table[edit.hook], len(tokens))
    settled = tuple(
        replace(plan.one, value=plan.strengths, unit="strength") if plan.one.unit == "maximum" else plan.one
        for plan in plans
    )
    return GraphEdits(replace(spec, interventions=settled), tuple(changes))


def edits_of(graph: "CircuitGraph", model: Any, dictionaries: MlpDictionaries, saes: SaesByName) -> GraphEdits | None:
    """The interventions under which a graph explains its model; None where there are none."""
    if graph.spec is None:
        return None
    tokens = torch.tensor(graph.token_ids, device=model.device)
    return graph_edits(replace(graph.spec, model=""), model, dictionaries, tokens, saes)


def edited_handlers(
    model: Any,
    edits: GraphEdits | None,
    tokens: Int[Tensor, "batch seq"],
    before: Mapping[str, Handler],
    after: Mapping[str, Handler],
    *,
    own: bool = True,
    told: Told | None = None,
) -> dict[HookPoint, Handler]:
    """Handlers of a pass under interventions, in model order.

    Args:
        model: the model.
        edits: what is in force.
        tokens: of the pass.
        before: by hook name, who sees or changes what is there before it is edited, edits of own features excepted.
        after: by hook name, who sees it afterwards.
        own: whether features of the graph's transcoders are edited; not where what MLPs write has them in it.
        told: hears of every edit that is not one of own features.
    """
    table, bos = model.hook_table, model.bos_mask(tokens)
    first: dict[str, list[Edit]] = {}
    then: dict[str, list[tuple[Change, Edit]]] = {}
    for change in edits.changes if edits is not None else ():
        for edit in change.edits:
            if change.layer is None:
                then.setdefault(table[edit.hook].name, []).append((change, edit))
            elif own:
                first.setdefault(table[edit.hook].name, []).append(edit)
    firsts, lasts = ({table[name].name: handler for name, handler in some.items()} for some in (before, after))

    def handler(name: str) -> Handler:
        context = EditContext(name, tokens, bos)

        def at(value: Tensor) -> Tensor | None:
            given = value
            value = apply_edits(first.get(name, ()), value, context)
            if name in firsts:
                new = firsts[name](value)
                value = value if new is None else new
            for change, edit in then.get(name, ()):
                new = apply_edits((edit,), value, context)
                if told is not None:
                    told(change, edit, value, new, context)
                value = new
            if name in lasts:
                new = lasts[name](value)
                value = value if new is None else new
            return None if value is given else value

        return at

    names = sorted({*first, *then, *firsts, *lasts}, key=table.rank)
    return {table[name]: handler(name) for name in names}


def _where(change: Change, value: Tensor, context: EditContext) -> Bool[Tensor, "batch seq"]:
    where = change.edits[-1].where(value, context)
    return torch.ones_like(context.tokens, dtype=torch.bool) if where is None else where


def _among(dictionaries: MlpDictionaries) -> Callable[[str], Any]:
    """Finds the graph's own transcoders by their ids."""

    def find(name: str) -> Any:
        for sae in dictionaries.dictionaries:
            if name and len(name) >= 12 and str(sae.fingerprint).startswith(name):
                return sae
        raise InvalidInputError(
            f"These interventions are on features of {f'the SAE {name}' if name else 'an SAE without a name'}; give it."
        )

    return find


def _checked(plan: Plan, model: Any, dictionaries: MlpDictionaries) -> int | None:
    """The layer whose nodes an intervention changes; None for one at a hook of the stream."""
    one, words = plan.one, intervention_words(plan.one).removesuffix(".")
    if one.experts:
        raise InvalidInputError(
            f"“{words}” cannot be in force in a graph: what experts do is inside of an MLP, which a graph takes as its "
            "transcoder and an error. Edit what the layer's MLP writes (component mlp), or features."
        )
    if one.during == "generated":
        raise InvalidInputError(
            f"“{words}” is in force on new text alone; a graph is of its prompt, and nothing is written. Leave during "
            "out."
        )
    if one.features and not one.error_term:
        raise InvalidInputError(
            f"“{words}” with error_term false cannot be in force in a graph: what the SAE misses has to stay. Leave "
            "error_term out."
        )
    changes_values = one.kind not in ("add", "project_out")
    if plan.sae is not None and changes_values and model.resolve_hook(hook_of(plan.sae)) != plan.hook:
        layer = _own_layer(plan.sae, model, dictionaries)
        if layer is None:
            raise InvalidInputError(
                f"“{words}” is on features of a transcoder that the graph is not made with. Give that one with the "
                "graph's transcoders, or features of an SAE of the stream."
            )
        return layer
    place = plan.hook.split(".", 2)[2] if plan.hook.startswith("blocks.") else plan.hook
    if place == "hook_embed" and not model.layout.d_per_layer:
        return None
    if place not in PLACES:
        raise InvalidInputError(
            f"“{words}” is at {plan.hook}, where a graph has no exact place for it. It takes interventions on the "
            f"embeddings (hook_embed, without per-layer embeddings), and in a layer at {', '.join(PLACES)}; on heads, "
            "the components attention, mlp and residual, and features of SAEs there or of its own transcoders."
        )
    return None


def _own_layer(sae: Any, model: Any, dictionaries: MlpDictionaries) -> int | None:
    """The layer that a transcoder reads, where it is one of the graph's."""
    for layer, transcoder in dictionaries.transcoders.items():
        if model.resolve_hook(str(sae.hook_name)) != f"blocks.{layer}.ln2.hook_out":
            continue
        if transcoder is sae or transcoder.fingerprint == sae.fingerprint:
            return layer
    return None


def _require_order(plans: list[Plan], layers: list[int | None]) -> None:
    """Refuse to change a feature node twice, or after what is done to all that its MLP writes."""
    for number, (plan, layer) in enumerate(zip(plans, layers, strict=True)):
        if layer is None:
            continue
        for earlier, of in zip(plans[:number], layers[:number], strict=True):
            twice = set(earlier.one.features) & set(plan.one.features) if of == layer else set()
            if twice:
                raise InvalidInputError(
                    f"Feature {min(twice)} of the transcoder of layer {layer} is changed twice; a graph has one node "
                    "for it. Put both into one intervention."
                )
            if of is None and earlier.hook == plan.hook and earlier.one.kind != "add":
                raise InvalidInputError(
                    f"“{intervention_words(earlier.one)}” comes before a change of features of the transcoder that "
                    f"writes {plan.hook}. Put the features first."
                )
