"""`model.run`: one prompt through the model, with activations, features, splices, edits and gradients.

At each hook, in this order:
1. the edits of that hook change the activation;
2. an SAE on that hook encodes it, and where it is to be spliced in, its reconstruction takes the activation's place;
3. what the model goes on with is recorded.
Hooks are reached in model order. The pass ends after the last hook that anything depends on.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from scope.errors import InvalidInputError, UnknownNameError
from scope.models.attention import attention_of_the_plain_run
from scope.models.dictionaries import Dictionary, Saes, as_read, resolve_dictionaries
from scope.models.edits import EditContext, EditFunction, apply_edits, freezes_attention, resolve_edits
from scope.models.hooks import HookPoint, HookTable
from scope.models.media import MediaInputs

if TYPE_CHECKING:
    from scope.models.language_model import LanguageModel

__all__ = ["RunResult", "SpliceMode", "run"]

SpliceMode = Literal["without_error", "with_error"]


@dataclass(frozen=True, repr=False)
class RunResult:
    """What a run of one prompt gave."""

    tokens: Int[Tensor, " seq"]
    """The prompt's token ids, BOS included."""
    logits: Float[Tensor, "n d_vocab"] | None
    """Logits of the next token after each position (after the last one only, for `logits="last"`)."""
    activations: dict[str, Tensor]
    """Per hook, under the name it was asked by, (seq, *row_shape): what the model went on with."""
    features: dict[str, Float[Tensor, "seq d_sae"]]
    """Per SAE its feature activations, those of the BOS token included."""

    def __repr__(self) -> str:
        def shapes(tensors: Mapping[str, Tensor]) -> str:
            return "{" + ", ".join(f"{name}: {tuple(tensor.shape)}" for name, tensor in tensors.items()) + "}"

        logits = None if self.logits is None else tuple(self.logits.shape)
        return (
            f"RunResult({len(self.tokens)} tokens, logits={logits}, activations={shapes(self.activations)}, "
            f"features={shapes(self.features)})"
        )


@dataclass
class _AtHook:
    """What is to be done at one hook; called with the activation, gives what takes its place."""

    point: HookPoint
    edits: list[EditFunction]
    dictionaries: list[tuple[str, Dictionary]]
    splice: SpliceMode | None
    record: bool
    grad: bool
    context: EditContext
    activations: dict[str, Tensor]
    features: dict[str, Tensor]

    def __call__(self, value: Tensor) -> Tensor | None:
        new = apply_edits(self.edits, value, self.context) if self.edits else value
        for key, dictionary in self.dictionaries:
            new = self._through(key, dictionary, new)
        if self.record:
            new = self._recorded(new)
        return None if new is value else new

    def _through(self, key: str, dictionary: Dictionary, value: Tensor) -> Tensor:
        x = as_read(dictionary, value)
        features = dictionary.encode(x)
        if self.grad:
            features, self.features[key] = _grown(features)
        else:
            self.features[key] = features[0]
        if self.splice is None:
            return value
        reconstruction = dictionary.decode(features)
        if self.splice == "with_error":
            reconstruction = reconstruction + (x - reconstruction).detach()
        bos = self.context.bos[..., None].to(x.device)
        reconstruction = torch.where(bos, x, reconstruction)
        return reconstruction.to(value.device, value.dtype).view(value.shape)

    def _recorded(self, value: Tensor) -> Tensor:
        if not self.grad:
            self.activations[self.point.name] = value[0]
            return value
        value, self.activations[self.point.name] = _grown(value)
        return value


def _grown(value: Tensor) -> tuple[Tensor, Tensor]:
    """A copy of `value` (1, seq, ...) and its first entry (seq, ...), which keeps its gradient and which the copy
    depends on. Where nothing before needs a gradient, the graph begins here."""
    inner = value.squeeze(0).clone()
    if inner.requires_grad:
        inner.retain_grad()
    elif inner.is_floating_point():
        inner.requires_grad_()
    return inner.unsqueeze(0), inner


def run(
    model: "LanguageModel",
    tokens: Int[Tensor, " seq"],
    hooks: Sequence[str],
    saes: Saes,
    splice: SpliceMode | Literal[False] | None,
    edits: Mapping[str, EditFunction] | None,
    grad: bool,
    logits: bool | Literal["last"],
    media: MediaInputs | None = None,
) -> RunResult:
    """See `LanguageModel.run`."""
    table = model.hook_table
    if splice not in (None, False, "without_error", "with_error"):
        raise UnknownNameError("way to splice", splice, ["without_error", "with_error"])
    asked = {name: table[name].name for name in ([hooks] if isinstance(hooks, str) else hooks)}
    changes = resolve_edits(table, edits, len(tokens))
    dictionaries = resolve_dictionaries(table, saes, splice=bool(splice))
    wanted = {*asked.values(), *dictionaries}
    needed = {*wanted, *(changes if logits else _early_enough(table, changes, wanted))}
    names = sorted(needed, key=table.rank)
    batch = tokens[None]
    bos = model.bos_mask(batch)
    activations: dict[str, Tensor] = {}
    features: dict[str, Tensor] = {}
    handlers = {
        table[name]: _AtHook(
            point=table[name],
            edits=changes.get(name, []),
            dictionaries=dictionaries.get(name, []),
            splice=splice or None,
            record=name in asked.values(),
            grad=grad,
            context=EditContext(name, batch, bos),
            activations=activations,
            features=features,
        )
        for name in names
    }
    freeze = freezes_attention(edits)
    if freeze and any(point.path == "bridge" for point in handlers):
        raise InvalidInputError("Attention cannot be held beside hooks that only the bridge sees; ask for others.")
    if freeze and media is not None:
        raise InvalidInputError("Attention cannot be held where a prompt has images or sounds.")
    held = attention_of_the_plain_run(model, batch) if freeze and handlers else nullcontext()
    with model.lock, held, torch.set_grad_enabled(grad):
        output = model.forward(batch, handlers, logits, media=media)
    return RunResult(
        tokens=tokens,
        logits=None if output is None else output[0],
        activations={name: activations[canonical] for name, canonical in asked.items()},
        features=features,
    )


def _early_enough(table: HookTable, changes: Iterable[str], wanted: Iterable[str]) -> list[str]:
    """Hooks of edits that something wanted may depend on: all but those after the last wanted hook."""
    last = max((table.rank(name) for name in wanted), default=-1)
    ordered = all(table[name].path == "fast" for name in (*changes, *wanted))
    return [name for name in changes if not ordered or table.rank(name) <= last]
