"""Edits of an SAE's features, and the SAE itself spliced in. f = encode(x) are the features of one token.

By default the part of x that the SAE misses stays: changing features from f to f' changes x by
decode(f') - decode(f) and by nothing else. With `error_term=False`, x becomes decode(f').
The BOS token is left as it is by default: SAEs are not trained on it.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from scope.errors import InvalidInputError, OutOfRangeError
from scope.interventions.edit import Edit, Integers, Positions, as_integers, as_positions
from scope.models.dictionaries import Dictionary, as_read, hook_of, require_same_output
from scope.models.edits import EditContext
from scope.saes.base import SAE

__all__ = [
    "ablate_features",
    "changed_features",
    "checked_ids",
    "scale_features",
    "set_features",
    "splice",
    "splice_edits",
]


def splice(sae: Dictionary, error_term: bool = False, *, keep_bos: bool = True) -> Edit:
    """x -> decode(encode(x)), plus (x - that) as a constant where `error_term` is true.

    With the error term values stay as they are, while gradients go through the features.
    """

    def reconstruct(value: Tensor, context: EditContext) -> Tensor:
        x = as_read(sae, value)
        reconstruction = sae.decode(sae.encode(x))
        if error_term:
            reconstruction = reconstruction + (x - reconstruction).detach()
        return reconstruction.to(value.device, value.dtype).view(value.shape)

    return Edit(_hook_to_write(sae), reconstruct, None, keep_bos, width=sae.d_in, by_token=True)


def splice_edits(sae: SAE, *, keep_bos: bool = True) -> dict[str, Edit]:
    """Edits, by hook, after which the model goes on with what an SAE makes of its activations.

    An SAE's reconstruction takes the place of what it reads. A transcoder reads its input as it comes, and its output
    takes the place of what it writes. A cross-layer transcoder does so at all its layers: what it writes at a layer
    comes from what it read there and in the layers before, in the model so changed. The edits of one call belong
    together and are for one pass after another, not for passes at the same time.

    Raises:
        InvalidInputError: the SAE names no hook; or it is a crosscoder, whose reconstructions follow from one another;
            or a cross-layer transcoder of TopK, whose features in one layer depend on later ones.
    """
    ports = sae.cfg.ports
    if not all(port.hook for side in ports for port in side):
        raise InvalidInputError("This SAE does not say which hooks it reads and writes; set them in its metadata.")
    if not ports.outputs:
        if len(ports.inputs) > 1:
            raise InvalidInputError(
                "A crosscoder cannot be spliced in: it reconstructs several hooks from all of them together, and the "
                "later ones follow from the earlier ones."
            )
        return {str(sae.hook_name): splice(sae, keep_bos=keep_bos)}
    if len(ports.inputs) > 1 and sae.activation.name == "topk":
        raise InvalidInputError(
            "A cross-layer transcoder of TopK cannot be spliced in: which features of a layer fire depends on the "
            "layers after it. One of batchtopk, jumprelu or relu can."
        )
    seen: list[Tensor] = []

    def reader(number: int) -> Edit:
        def read(value: Tensor, context: EditContext) -> Tensor:
            del seen[number:]
            seen.append(as_read(sae, value))
            return value

        return Edit(str(ports.inputs[number].hook), read, width=ports.inputs[number].width, by_token=True)

    def writer(number: int) -> Edit:
        start = sum(port.width for port in ports.outputs[:number])
        width = ports.outputs[number].width

        def write(value: Tensor, context: EditContext) -> Tensor:
            if len(seen) <= number:
                raise InvalidInputError(f"{ports.outputs[number].hook} comes before {ports.inputs[number].hook}.")
            later = [seen[0].new_zeros(*seen[0].shape[:-1], port.width) for port in ports.inputs[len(seen) :]]
            written = sae(torch.cat([*seen, *later], dim=-1))[..., start : start + width]
            return written.to(value.device, value.dtype).view(value.shape)

        return Edit(str(ports.outputs[number].hook), write, None, keep_bos, width=width, by_token=True)

    edits = [make(number) for number in range(len(ports.inputs)) for make in (reader, writer)]
    return {edit.hook: edit for edit in edits}


def ablate_features(
    sae: Dictionary,
    ids: Integers,
    positions: Positions = None,
    *,
    error_term: bool = True,
    keep_bos: bool = True,
) -> Edit:
    """f_i -> 0 for each feature `i` of `ids`."""
    return _edit(sae, ids, lambda f, context: torch.zeros_like(f), positions, error_term, keep_bos)


def set_features(
    sae: Dictionary,
    ids: Integers,
    values: float | Sequence[float] | Float[Tensor, " n"],
    positions: Positions = None,
    *,
    error_term: bool = True,
    keep_bos: bool = True,
) -> Edit:
    """f_i -> its value: one for all features of `ids`, or one for each."""
    new = torch.as_tensor(values, dtype=torch.float32)
    n = len(as_integers(ids, "Feature ids"))
    if new.ndim and tuple(new.shape) != (n,):
        raise InvalidInputError(f"values have shape {tuple(new.shape)}; expected a number, or {n} of them.")

    def change(f: Tensor, context: EditContext) -> Tensor:
        return new.to(f.device, f.dtype).expand_as(f)

    return _edit(sae, ids, change, positions, error_term, keep_bos)


def scale_features(
    sae: Dictionary,
    ids: Integers,
    factor: float,
    positions: Positions = None,
    *,
    error_term: bool = True,
    keep_bos: bool = True,
) -> Edit:
    """f_i -> `factor` f_i for each feature `i` of `ids`."""
    return _edit(sae, ids, lambda f, context: factor * f, positions, error_term, keep_bos)


def _edit(
    sae: Dictionary,
    ids: Integers,
    change: Callable[[Tensor, EditContext], Tensor],
    positions: Positions,
    error_term: bool,
    keep_bos: bool,
) -> Edit:
    """The edit that changes features `ids`; `change` is given their values, (batch, seq, n)."""
    chosen = checked_ids(sae, ids)

    def through(value: Tensor, context: EditContext) -> Tensor:
        x = as_read(sae, value)
        before = sae.encode(x)
        after = before.clone()
        after[..., chosen] = change(before[..., chosen], context).to(before.dtype)
        if not error_term:
            new = sae.decode(after)
        elif isinstance(sae, SAE):  # the decoder is linear: only the rows of what changed are needed
            new = x + (after[..., chosen] - before[..., chosen]) @ sae.W_dec[chosen]
        else:
            new = x + sae.decode(after) - sae.decode(before)
        return new.to(value.device, value.dtype).view(value.shape)

    return Edit(_hook_to_write(sae), through, as_positions(positions), keep_bos, width=sae.d_in, by_token=True)


def changed_features(
    sae: SAE, ids: Integers, change: Callable[[Tensor, EditContext], Tensor], *, error_term: bool = True
) -> tuple[Edit, ...]:
    """Edits that change features of an SAE or a transcoder: of an SAE one, of a transcoder one that reads and one that
    adds to what is written (f' - f) W_dec.

    Args:
        sae: an SAE, or a transcoder of one layer.
        ids: features.
        change: from their values, (batch, seq, n), to what takes their place.
        error_term: keep what the dictionary misses of what it writes to.
    """
    chosen = checked_ids(sae, ids)
    ports = sae.cfg.ports
    reads = hook_of(sae)
    if not ports.outputs or ports.outputs[0].hook == reads:
        return (_edit(sae, ids, change, None, error_term, False),)
    seen: list[Tensor] = []

    def read(value: Tensor, context: EditContext) -> Tensor:
        seen[:] = [sae.encode(as_read(sae, value))]
        return value

    def write(value: Tensor, context: EditContext) -> Tensor:
        if not seen:
            raise InvalidInputError(f"{ports.outputs[0].hook} comes before {reads}.")
        before = seen.pop()
        after = before.clone()
        after[..., chosen] = change(before[..., chosen], context).to(before.dtype)
        if error_term:
            moved = (after[..., chosen] - before[..., chosen]) @ sae.W_dec[chosen]
            return value + moved.to(value.device, value.dtype).view(value.shape)
        return sae.decode(after).to(value.device, value.dtype).view(value.shape)

    written = str(ports.outputs[0].hook)
    return (
        Edit(reads, read, width=sae.d_in, by_token=True),
        Edit(written, write, width=ports.outputs[0].width, by_token=True),
    )


def checked_ids(sae: Dictionary, ids: Integers) -> list[int]:
    chosen = as_integers(ids, "Feature ids")
    if not chosen or len(set(chosen)) < len(chosen):
        raise InvalidInputError(f"Feature ids must be at least one and all different; got {chosen}.")
    for feature in chosen:
        if not 0 <= feature < sae.d_sae:
            raise OutOfRangeError(f"Feature {feature} is out of range: the SAE has features 0 to {sae.d_sae - 1:,}.")
    return chosen


def _hook_to_write(sae: Dictionary) -> str:
    require_same_output(sae)
    return hook_of(sae)
