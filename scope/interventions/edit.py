"""What an intervention is: a hook, a function of the activation there, and the positions where it counts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, SupportsIndex

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from scope.errors import InvalidInputError, MismatchError, OutOfRangeError
from scope.models.edits import EditContext, EditFunction, Edits, Several
from scope.models.hooks import HookPoint

__all__ = ["During", "Edit", "Integers", "Positions", "as_integers", "as_positions", "combine"]

Integers = SupportsIndex | Sequence[SupportsIndex] | np.ndarray | Tensor
"""One integer or several."""
Positions = Integers | None
"""One token position, several, or None for all. Position 0 is BOS where the tokenizer has one."""
During = Literal["all", "prompt", "generated"]
"""Which part of a text that is being written counts: all of it, the prompt's tokens, or those after them. Where
nothing is written, everything is prompt."""


@dataclass(frozen=True)
class Edit:
    """A change of the activation at one hook. It is itself a function that `model.run` takes as an edit."""

    hook: str
    """The hook's name."""
    function: Callable[[Tensor, EditContext], Tensor]
    """From the activation (batch, seq, *row_shape) to what takes its place."""
    positions: tuple[int, ...] | None = None
    """Where the change counts; None for everywhere."""
    keep_bos: bool = False
    """Leave the BOS token that starts a window as it is."""
    row_shape: tuple[int, ...] | None = None
    """Shape that a token's activation must have; None where any will do."""
    width: int | None = None
    """Number of entries that a token's activation must have; None where any will do."""
    during: During = "all"
    """Which part of a text that is being written counts."""
    by_token: bool = False
    """Whether the function finds what takes a token's place from that token's activation alone."""
    reads_last: bool = False
    """Whether it changes nothing and wants what all other edits of the hook leave: `combine` puts it behind them."""

    def __call__(self, value: Tensor, context: EditContext) -> Tensor:
        """The activation with the change made where it counts.

        Raises:
            OutOfRangeError: a position that the text does not have.
        """
        new = self.function(value, context)
        where = self.where(value, context)
        if where is None or new.shape != value.shape:  # `run` refuses another shape
            return new
        return torch.where(where.view(*where.shape, *[1] * (value.ndim - 2)), new.to(value.dtype), value)

    def where(self, value: Tensor, context: EditContext) -> Bool[Tensor, "batch seq"] | None:
        """Which tokens count; None for all."""
        if self.positions is None and not self.keep_bos and self.during == "all":
            return None
        n = value.shape[1]
        where = torch.ones(value.shape[:2], dtype=torch.bool, device=value.device)
        if self.positions is not None:
            if context.n_prompt is None:
                self._check_positions(n)
            where.zero_()
            where[:, [place - context.start for place in self.positions if 0 <= place - context.start < n]] = True
        if self.during != "all":
            written = torch.arange(context.start, context.start + n, device=value.device)
            written = written >= (context.start + n if context.n_prompt is None else context.n_prompt)
            where = where & (written if self.during == "generated" else ~written)
        return where & ~context.bos if self.keep_bos else where

    def check(self, point: HookPoint, n_tokens: int) -> None:
        """Refuse a hook or a text that the edit does not fit; called before the model runs.

        Raises:
            MismatchError: the hook's activations have another shape.
            OutOfRangeError: the text is too short for the positions.
        """
        self._check_positions(n_tokens)
        row = point.row_shape
        if self.positions is not None and row is None:
            raise InvalidInputError(f"{point.name} has no token positions of its own (shape {point.shape}).")
        if self.row_shape is not None and row != self.row_shape:
            raise MismatchError(f"The edit is for rows of shape {self.row_shape}; {point.name} has {row}.")
        if self.width is not None and (row is None or torch.Size(row).numel() != self.width):
            raise MismatchError(f"The edit reads {self.width} dimensions; {point.name} has rows of shape {row}.")

    def _check_positions(self, n_tokens: int) -> None:
        for position in self.positions or ():
            if position >= n_tokens:
                raise OutOfRangeError(f"Position {position} is out of range: the text has {n_tokens} tokens.")


def as_positions(positions: Positions) -> tuple[int, ...] | None:
    """Positions as a tuple.

    Raises:
        OutOfRangeError: a negative position; count from the start.
        InvalidInputError: no positions at all.
    """
    if positions is None:
        return None
    chosen = tuple(as_integers(positions, "Positions"))
    if not chosen:
        raise InvalidInputError("No positions were given; leave them out to edit all.")
    negative = [position for position in chosen if position < 0]
    if negative:
        raise OutOfRangeError(f"Position {negative[0]} is negative; positions count from 0, the start of the text.")
    return chosen


def as_integers(values: Integers, what: str) -> list[int]:
    """One integer or several as a list; raises `InvalidInputError` for anything else."""
    tensor = torch.as_tensor(values)
    wrong = tensor.is_floating_point() or tensor.dtype == torch.bool or tensor.ndim > 1
    if wrong and tensor.numel():
        raise InvalidInputError(f"{what} are integers; got {tensor.dtype} of shape {tuple(tensor.shape)}.")
    return [int(value) for value in tensor.flatten()]


def combine(*edits: Edit, freeze_attention: bool = False) -> Edits:
    """Edits as `model.run` takes them. Those of one hook are made in the order given; hooks are reached in model
    order whatever the order here.

    Args:
        edits: any number of them.
        freeze_attention: let the model attend where it attends without the edits; values are live.
    """
    by_hook: dict[str, list[EditFunction]] = {}
    for edit in sorted(edits, key=lambda edit: edit.reads_last):
        by_hook.setdefault(edit.hook, []).append(edit)
    joined = {hook: there[0] if len(there) == 1 else Several(tuple(there)) for hook, there in by_hook.items()}
    return Edits(joined, freeze_attention)
