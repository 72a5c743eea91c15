"""Edits of whole activations: ablate, set, scale, steer, project out, patch. x is the activation of one token."""

import torch
from jaxtyping import Float
from torch import Tensor

from scope.errors import InvalidInputError, MismatchError, OutOfRangeError
from scope.interventions.edit import Edit, Positions, as_positions
from scope.models.edits import EditContext

__all__ = ["ablate", "add_direction", "patch", "project_out", "scale", "set_"]


def ablate(hook: str, positions: Positions = None, *, keep_bos: bool = False) -> Edit:
    """x -> 0."""
    return Edit(hook, lambda value, context: torch.zeros_like(value), as_positions(positions), keep_bos, by_token=True)


def set_(hook: str, new: float | Float[Tensor, "*row"], positions: Positions = None, *, keep_bos: bool = False) -> Edit:
    """x -> `new`: a number, or a row of the hook's shape (such as the mean activation)."""
    row, shape = _row(new)
    return Edit(
        hook,
        lambda value, context: row.to(value.device, value.dtype).expand_as(value),
        as_positions(positions),
        keep_bos,
        shape,
        by_token=True,
    )


def scale(hook: str, factor: float, positions: Positions = None, *, keep_bos: bool = False) -> Edit:
    """x -> `factor` x."""
    return Edit(hook, lambda value, context: factor * value, as_positions(positions), keep_bos, by_token=True)


def add_direction(
    hook: str,
    direction: Float[Tensor, "*row"],
    strength: float = 1.0,
    positions: Positions = None,
    *,
    keep_bos: bool = False,
) -> Edit:
    """x -> x + `strength` × `direction` (steering). The direction is taken as long as it is."""
    row, shape = _row(direction)

    def steer(value: Tensor, context: EditContext) -> Tensor:
        return value + strength * row.to(value.device, value.dtype)

    return Edit(hook, steer, as_positions(positions), keep_bos, shape, by_token=True)


def project_out(
    hook: str, directions: Float[Tensor, "*n d"], positions: Positions = None, *, keep_bos: bool = False
) -> Edit:
    """x -> x minus its projection onto one direction `(d,)`, or onto the span of several `(n, d)`.

    Raises:
        InvalidInputError: a direction is zero, or some depend on others.
    """
    rows = torch.as_tensor(directions).detach().double()
    rows = rows[None] if rows.ndim == 1 else rows
    if rows.ndim != 2 or torch.linalg.matrix_rank(rows) < len(rows):
        raise InvalidInputError(
            f"directions have shape {tuple(rows.shape)}; expected (d,) or (n, d), independent of each other and not 0."
        )
    basis = torch.linalg.qr(rows.T).Q  # (d, n), orthonormal columns

    def project(value: Tensor, context: EditContext) -> Tensor:
        flat = value.flatten(2) if value.ndim > 3 else value
        axes = basis.to(flat.device, flat.dtype)
        return (flat - (flat @ axes) @ axes.T).view(value.shape)

    return Edit(hook, project, as_positions(positions), keep_bos, width=rows.shape[1], by_token=True)


def patch(hook: str, source: Float[Tensor, "seq *row"], positions: Positions = None) -> Edit:
    """x at a position -> what `source`, the activations of another run, has at the same position.

    Args:
        hook: the hook's name.
        source: such as `other_run.activations[hook]`.
        positions: which positions; None for all, and then both texts must have the same number of tokens. While a text
            is being written, the prompt is what must have as many, and new tokens keep their activations.

    Raises:
        OutOfRangeError: a position that the source does not have.
        MismatchError: (when run) the texts differ in length and no positions are given.
    """
    chosen = as_positions(positions)
    beyond = [position for position in chosen or () if position >= len(source)]
    if beyond:
        raise OutOfRangeError(f"Position {beyond[0]} is out of range: the source has {len(source)} tokens.")

    def replace(value: Tensor, context: EditContext) -> Tensor:
        start, n = context.start, value.shape[1]
        length = n if context.n_prompt is None else context.n_prompt
        if chosen is None and len(source) != length:
            raise MismatchError(
                f"The source has {len(source)} tokens, the text {length}; say which positions to patch."
            )
        places = [place for place in (range(len(source)) if chosen is None else chosen) if start <= place < start + n]
        new = value.clone()
        new[:, [place - start for place in places]] = source[places].to(value.device, value.dtype)
        return new

    return Edit(hook, replace, chosen, row_shape=tuple(source.shape[1:]), by_token=True)


def _row(new: float | Tensor) -> tuple[Tensor, tuple[int, ...] | None]:
    """A number or a row as a tensor, and the shape that it asks of a hook."""
    row = torch.as_tensor(new)
    return row, tuple(row.shape) if row.ndim else None
