"""From declared interventions to edits of one model.

1. The model, each SAE, hook, head, feature, direction and position is checked; nothing has been computed by then.
2. Every prompt that something is patched from runs once, with all hooks that are wanted of it.
3. Each intervention becomes edits, in the order in which they were declared.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scope.errors import InvalidInputError, MismatchError, OutOfRangeError, UnknownNameError
from scope.interventions import activations
from scope.interventions.edit import Edit, as_positions, combine
from scope.interventions.experts import (
    changed_experts,
    forbid_expert,
    force_expert,
    require_enough,
    swap_experts,
)
from scope.interventions.features import changed_features, checked_ids
from scope.interventions.spec import COMPONENTS, ROUTING, Intervention, InterventionSpec
from scope.models.dictionaries import as_read, hook_of
from scope.models.edits import EditContext, EditFunction, Edits

__all__ = ["Control", "Maxima", "Plan", "SaesByName", "control", "intervene", "plans_of", "resolve", "sources_of"]

SaesByName = Any
"""An SAE for all interventions, a mapping from names to SAEs, or a function from a name to one."""
Maxima = Callable[[str, int], float] | None
"""From an SAE's name and a feature to the feature's largest firing strength."""


class Control(NamedTuple):
    """Random directions of the norm of what is added."""

    edits: Mapping[str, EditFunction]
    norm: float
    """Euclidean, over all that is added."""


def resolve(spec: InterventionSpec, model: Any, saes: SaesByName = None, maxima: Maxima = None) -> Edits:
    """The edits that a set of interventions stands for, for `run`, `generate`, `cross_entropy` and `intervene`.

    Args:
        spec: what is to be done.
        model: a `scope.models.LanguageModel`.
        saes: one SAE, SAEs by the names that the interventions use, or a function that finds one by its name.
        maxima: says a feature's largest firing strength, for interventions whose unit that is.

    Raises:
        MismatchError: it is for another model; an SAE or a direction does not fit its hook.
        UnknownNameError: there is no such hook or SAE.
        OutOfRangeError: a layer, head, expert, feature or position that does not exist.
        InvalidInputError: maxima are needed and not given; or the layer has no experts, or too few that are not
            forbidden. All before the model runs.
    """
    plans = plans_of(spec, model, saes, maxima)
    sources = sources_of(model, plans)
    edits = [edit for plan in plans for edit in plan.edits(sources)]
    return combine(*edits, freeze_attention=spec.freeze_attention)


def plans_of(spec: InterventionSpec, model: Any, saes: SaesByName = None, maxima: Maxima = None) -> list["Plan"]:
    """A set of interventions, each checked against a model: arguments and errors as for `resolve`."""
    if spec.model not in ("", model.name, model.files.load_name):
        raise MismatchError(f"These interventions are for the model {spec.model}; this is {model.name}.")
    plans = [Plan(one, model, saes, maxima) for one in spec.interventions]
    _require_experts_left(model, spec)
    return plans


def control(
    spec: InterventionSpec, model: Any, saes: SaesByName = None, maxima: Maxima = None, seed: int = 0
) -> Control | None:
    """The same with a random direction of equal norm in the place of each that is added: much of what a strong push
    does, any push of that size does. None where something else than adding is done."""
    if any(one.kind != "add" for one in spec.interventions):
        return None
    generator = torch.Generator().manual_seed(seed)
    edits: list[Edit] = []
    squares = 0.0
    for one in spec.interventions:
        plan = Plan(one, model, saes, maxima)
        hook, pushed = plan.added()
        noise = torch.randn(pushed.shape, generator=generator)
        squares += float(pushed.norm()) ** 2
        edits.append(plan.placed(activations.add_direction(hook, noise * (pushed.norm().cpu() / noise.norm()))))
    return Control(combine(*edits, freeze_attention=spec.freeze_attention), squares**0.5)


@contextmanager
def intervene(model: Any, spec: InterventionSpec, saes: SaesByName = None, maxima: Maxima = None) -> Iterator[Any]:
    """Have declared interventions in force within a `with` block: see `resolve` and `LanguageModel.intervene`."""
    with model.intervene(resolve(spec, model, saes, maxima)):
        yield model


class Plan:
    """One intervention, checked against a model."""

    def __init__(self, one: Intervention, model: Any, saes: SaesByName, maxima: Maxima) -> None:
        self.one, self.model = one, model
        self.positions = as_positions(one.positions)
        if self.positions and max(self.positions) >= model.max_context_size:
            raise OutOfRangeError(
                f"Position {max(self.positions)} is out of range: {model.name} takes {model.max_context_size:,} tokens."
            )
        self.sae = _sae_of(one.sae, saes) if one.features else None
        self.hook = self._checked_hook()
        self.row_shape = model.hook_table[self.hook].row_shape or ()
        if one.direction and len(one.direction) != torch.Size(self.row_shape).numel():
            raise MismatchError(
                f"The direction has {len(one.direction)} entries; {self.hook} has rows of shape {self.row_shape}."
            )
        self.strengths = self._strengths(maxima)
        self.tokens = model.prompt_tokens(one.prompt) if one.kind == "patch" else None
        if self.tokens is not None and self.positions and max(self.positions) >= len(self.tokens):
            raise OutOfRangeError(
                f"Position {max(self.positions)} is out of range: the prompt that is patched from has "
                f"{len(self.tokens)} tokens."
            )

    def _checked_hook(self) -> str:
        """Where the change is made."""
        one, model = self.one, self.model
        if self.sae is not None:
            checked_ids(self.sae, one.features)
            ports = self.sae.cfg.ports
            if len(ports.inputs) > 1 or len(ports.outputs) > 1:
                raise InvalidInputError("Interventions take features of SAEs of one hook, and of transcoders.")
            written = ports.outputs[0].hook if ports.outputs else hook_of(self.sae)
            for hook, width in ((hook_of(self.sae), self.sae.d_in), (written, self.sae.d_out)):
                row = model.hook_table[str(hook)].row_shape
                if row is None or torch.Size(row).numel() != width:
                    raise MismatchError(f"The SAE has a width of {width:,} at {hook}; the model has rows of {row}.")
            return str(model.resolve_hook(str(written)))
        if one.layer is not None and not 0 <= one.layer < model.n_layers:
            raise OutOfRangeError(f"There is no layer {one.layer}: {model.name} has 0 to {model.n_layers - 1}.")
        if one.heads:
            beyond = [head for head in one.heads if not 0 <= head < model.layout.n_heads]
            if beyond:
                raise OutOfRangeError(f"There is no head {beyond[0]}: a layer has 0 to {model.layout.n_heads - 1}.")
            return f"blocks.{one.layer}.attn.hook_z"
        if one.experts:
            self._expert_edits()  # making them checks them
            return f"blocks.{one.layer}.moe.{'hook_logits' if one.kind in ROUTING else 'hook_expert_out'}"
        return str(model.resolve_hook(COMPONENTS[one.component].format(layer=one.layer) if one.component else one.hook))

    def _strengths(self, maxima: Maxima) -> tuple[float, ...]:
        """The values of features as firing strengths."""
        one = self.one
        if one.unit == "strength":
            return one.values
        if maxima is None:
            raise InvalidInputError(
                "Values in multiples of a feature's maximum need an index of the SAE, which knows it: give --index."
            )
        return tuple(value * maxima(one.sae, id) for value, id in zip(one.values, one.features, strict=True))

    @property
    def wanted(self) -> str:
        """The hook whose activations a patch needs of the other prompt."""
        return hook_of(self.sae) if self.sae is not None else self.hook

    def edits(self, sources: Mapping[tuple[int, ...], Mapping[str, Tensor]]) -> list[Edit]:
        """What is to be done to the model."""
        one = self.one
        source = None if self.tokens is None else sources[tuple(self.tokens.tolist())][self.wanted]
        if one.kind == "add":
            return [self.placed(activations.add_direction(*self.added()))]
        if self.sae is not None:
            if one.kind == "project_out":
                rows = self.sae.W_dec.detach()[list(one.features)]
                return [self.placed(activations.project_out(self.hook, rows))]
            return [self.placed(edit) for edit in self._feature_edits(source)]
        if one.experts:
            return [self.placed(edit) for edit in self._expert_edits()]
        if one.direction:
            return [self.placed(self._along_direction())]
        if source is not None:
            edit = activations.patch(self.hook, source, self.positions)
        elif one.kind == "scale":
            edit = activations.scale(self.hook, _number(one.value))
        else:
            edit = activations.set_(self.hook, _number(one.value) if one.kind == "set" else 0.0)
        return [self.placed(_of_heads(edit, one.heads) if one.heads else edit)]

    def added(self) -> tuple[str, Tensor]:
        """The hook, and what is added there, in the shape of a row."""
        if self.sae is None:
            return self.hook, _number(self.one.value) * torch.tensor(self.one.direction).view(self.row_shape)
        rows = self.sae.W_dec.detach()[list(self.one.features)].float()
        sizes = torch.tensor(self.strengths, dtype=torch.float32, device=rows.device)
        return self.hook, (sizes @ torch.nn.functional.normalize(rows, dim=-1)).view(self.row_shape)

    def placed(self, edit: Edit) -> Edit:
        """The edit where and when it counts. What only reads (of a transcoder, of experts) does so everywhere."""
        if edit.hook != self.hook:
            return edit
        return replace(edit, positions=self.positions, during=self.one.during, keep_bos=self.one.keep_bos)

    def _feature_edits(self, source: Tensor | None) -> tuple[Edit, ...]:
        assert self.sae is not None
        change = self.feature_change(source)
        return changed_features(self.sae, self.one.features, change, error_term=self.one.error_term)

    def feature_change(self, source: Tensor | None) -> Callable[[Tensor, EditContext], Tensor]:
        """What is done to the features' values, (batch, seq, n); `source` is what their SAE reads of the other prompt
        of a patch."""
        one, sae, ids = self.one, self.sae, list(self.one.features)
        assert sae is not None
        norms = sae.decoder_norms[ids].clamp_min(1e-12)
        other = None
        if source is not None:
            with torch.no_grad():
                other = sae.encode(as_read(sae, source[None]))[0][:, ids]

        def change(before: Tensor, context: EditContext) -> Tensor:
            if one.kind == "scale":
                return before * torch.tensor(one.values, device=before.device)
            if one.kind == "ablate":
                return torch.zeros_like(before)
            if other is None:
                return (torch.tensor(self.strengths, device=norms.device) / norms).to(before.device).expand_as(before)
            return _from_source(before, other, context, self.positions)

        return change

    def _expert_edits(self) -> tuple[Edit, ...]:
        one, model, layer = self.one, self.model, self.one.layer or 0
        if one.kind == "swap":
            return (swap_experts(model, layer, *one.experts),)
        if one.kind in ROUTING:
            return ((forbid_expert if one.kind == "forbid" else force_expert)(model, layer, one.experts),)
        value = 0.0 if one.kind == "ablate" else _number(one.value)

        def change(made: Tensor) -> Tensor:
            return value * made if one.kind == "scale" else torch.full_like(made, value)

        return changed_experts(model, layer, one.experts, change)

    def _along_direction(self) -> Edit:
        one = self.one
        unit = torch.nn.functional.normalize(torch.tensor(one.direction, dtype=torch.float64), dim=0)
        if one.kind == "project_out":
            return activations.project_out(self.hook, unit)
        value = _number(one.value)

        def along(x: Tensor, context: EditContext) -> Tensor:
            axis = unit.to(x.device, x.dtype)
            there = x.flatten(2) @ axis
            moved = value - there if one.kind == "set" else (value - 1) * there
            return x + (moved[..., None] * axis).view(x.shape)

        return Edit(self.hook, along, by_token=True)


def _require_experts_left(model: Any, spec: InterventionSpec) -> None:
    """Refuse to forbid, one by one, more experts of a layer than can be spared anywhere."""
    forbidding = [one for one in spec.interventions if one.kind == "forbid"]
    for one in forbidding:
        together = {expert for other in forbidding if _overlap(one, other) for expert in other.experts}
        sizes = model.layout.sizes[one.layer]
        require_enough(one.layer or 0, sizes.n_experts, sizes.experts_per_token, len(together))


def _overlap(one: Intervention, other: Intervention) -> bool:
    """Whether there may be a token of a layer that both change."""
    apart = {one.during, other.during} == {"prompt", "generated"}
    places = one.positions is None or other.positions is None or bool(set(one.positions) & set(other.positions))
    return one.layer == other.layer and places and not apart


def _of_heads(edit: Edit, heads: tuple[int, ...]) -> Edit:
    """The edit, of some heads alone."""

    def only(value: Tensor, context: EditContext) -> Tensor:
        new = value.clone()
        new[:, :, list(heads)] = edit.function(value, context)[:, :, list(heads)].to(value.dtype)
        return new

    return replace(edit, function=only)


def _from_source(before: Tensor, other: Tensor, context: EditContext, positions: tuple[int, ...] | None) -> Tensor:
    """Values of another prompt at the same positions; where it has none, those that were there."""
    start, n = context.start, before.shape[1]
    length = n if context.n_prompt is None else context.n_prompt
    if positions is None and len(other) != length:
        raise MismatchError(
            f"The prompt that is patched from has {len(other)} tokens, the text {length}; say which positions to patch."
        )
    after = before.clone()
    shared = max(0, min(n, len(other) - start))
    after[:, :shared] = other[start : start + shared].to(before.device, before.dtype)
    return after


def sources_of(model: Any, plans: list[Plan]) -> dict[tuple[int, ...], dict[str, Tensor]]:
    """What every prompt that is patched from has at the hooks that are wanted of it, with what is in force there."""
    wanted: dict[tuple[int, ...], set[str]] = {}
    for plan in plans:
        if plan.tokens is not None:
            wanted.setdefault(tuple(plan.tokens.tolist()), set()).add(plan.wanted)
    return {
        ids: model.run(torch.tensor(ids), hooks=sorted(hooks), logits=False).activations
        for ids, hooks in wanted.items()
    }


def _sae_of(name: str, saes: SaesByName) -> Any:
    if saes is None:
        raise InvalidInputError("These interventions are on features; give their SAE.")
    if isinstance(saes, Mapping):
        if name in saes:
            return saes[name]
        if name or len(saes) != 1:
            raise UnknownNameError("SAE", name, [str(known) for known in saes])
        return next(iter(saes.values()))
    if hasattr(saes, "W_dec"):
        fingerprint = str(getattr(saes, "fingerprint", ""))
        if re.fullmatch(r"[0-9a-f]{12}", name) and fingerprint and not fingerprint.startswith(name):
            raise MismatchError(f"The features are of the SAE {name}; this one is {fingerprint[:12]}.")
        return saes
    return saes(name)


def _number(value: Any) -> float:
    return float(value[0] if isinstance(value, tuple) else value)
