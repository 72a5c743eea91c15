"""What the model's side knows of SAEs: the protocol `Dictionary`, and how one is matched to a hook."""

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from scope.errors import InvalidInputError, MismatchError
from scope.models.hooks import HookPoint, HookTable

__all__ = ["Dictionary", "Saes", "as_read", "hook_of", "resolve_dictionaries"]


@runtime_checkable
class Dictionary(Protocol):
    """What is asked of an SAE."""

    @property
    def hook_name(self) -> str | None: ...
    @property
    def d_in(self) -> int: ...
    @property
    def d_sae(self) -> int: ...
    def encode(self, x: Tensor, /) -> Tensor: ...
    def decode(self, f: Tensor, /) -> Tensor: ...


Saes = Dictionary | Sequence[Dictionary] | Mapping[str, Dictionary]


def hook_of(sae: Dictionary) -> str:
    """The hook that an SAE reads; raises `InvalidInputError` where it does not say."""
    if not sae.hook_name:
        raise InvalidInputError("This SAE does not say which hook it reads; set hook_name in its metadata.")
    return sae.hook_name


def require_same_output(sae: Dictionary) -> None:
    """Refuse to splice in what reads one hook and writes another (a transcoder)."""
    output = getattr(sae, "hook_name_out", None)
    if output not in (None, sae.hook_name):
        raise InvalidInputError(f"This SAE reads {sae.hook_name} and writes {output}; it cannot be spliced in.")


def as_read(sae: Dictionary, value: Float[Tensor, "batch seq *row"]) -> Float[Tensor, "batch seq d_in"]:
    """An activation as an SAE reads it: heads side by side, in the dtype and on the device of its weights."""
    x = value.flatten(2)
    weight = next(sae.parameters(), None) if isinstance(sae, nn.Module) else None
    return x if weight is None else x.to(weight.device, weight.dtype)


def resolve_dictionaries(table: HookTable, saes: Saes, splice: bool) -> dict[str, list[tuple[str, Dictionary]]]:
    """SAEs by canonical hook name, each with the key under which its features are returned.

    Raises:
        UnknownNameError: the model lacks the hook of an SAE.
        MismatchError: an SAE's width is not the hook's.
        InvalidInputError: two SAEs would get the same key, or be spliced in at one hook.
    """
    if isinstance(saes, Mapping):
        named = list(saes.items())
    else:
        several = [saes] if isinstance(saes, Dictionary) else saes
        named = [(table[hook_of(sae)].name, sae) for sae in several]
    if len({key for key, _ in named}) < len(named):
        raise InvalidInputError("Two SAEs read the same hook; give them names: saes={'a': ..., 'b': ...}.")
    resolved: dict[str, list[tuple[str, Dictionary]]] = {}
    for key, sae in named:
        point = table[hook_of(sae)]
        if _width(point) != sae.d_in:
            raise MismatchError(f"The SAE {key!r} reads {sae.d_in} dimensions; {point.name} has {_width(point)}.")
        if splice:
            require_same_output(sae)
        resolved.setdefault(point.name, []).append((key, sae))
    crowded = [name for name, there in resolved.items() if len(there) > 1]
    if splice and crowded:
        raise InvalidInputError(f"Only one SAE can be spliced in at {crowded[0]}; got {len(resolved[crowded[0]])}.")
    return resolved


def _width(point: HookPoint) -> int:
    if point.row_shape is None:
        raise InvalidInputError(f"{point.name} has no row per token (shape {point.shape}): no SAE can read it.")
    return torch.Size(point.row_shape).numel()
