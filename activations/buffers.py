"""Rows in the slots of a buffer, on the host or on the device of a live source's tensors."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["RowBuffer", "concatenated", "taken"]


class RowBuffer:
    """Slots for the rows of some hooks. They are numpy arrays, or torch tensors on the device of what comes first.

    Args:
        capacity: slots.
        empty: per hook an array without rows, `(0, *feature_shape)` in the storage dtype.
    """

    def __init__(self, capacity: int, empty: Mapping[str, np.ndarray]) -> None:
        self._capacity, self._empty = capacity, empty
        self._slots: dict[str, Any] = {}

    def put(self, slots: np.ndarray, values: Mapping[str, Any]) -> None:
        """Put rows into slots."""
        indices = _indices(slots, values)
        for hook, rows in values.items():
            if hook not in self._slots:
                self._slots[hook] = self._new(hook, rows)
            if isinstance(rows, np.ndarray):
                self._slots[hook][indices] = rows
            else:
                self._slots[hook].index_copy_(0, indices, rows)

    def take(self, slots: np.ndarray) -> dict[str, Any]:
        """Copies of the rows in these slots, by hook."""
        return taken(self._slots, slots)

    def _new(self, hook: str, like: Any) -> Any:
        empty = self._empty[hook]
        if isinstance(like, np.ndarray):
            return np.empty((self._capacity, *empty.shape[1:]), empty.dtype)
        return like.new_empty((self._capacity, *like.shape[1:]))


def taken(values: Mapping[str, Any], places: np.ndarray) -> dict[str, Any]:
    """By hook the rows at some places, copied: of numpy arrays, or of torch tensors on their device."""
    indices = _indices(places, values)
    return {
        hook: rows.take(indices, axis=0) if isinstance(rows, np.ndarray) else rows.index_select(0, indices)
        for hook, rows in values.items()
    }


def concatenated(pieces: Sequence[Any]) -> Any:
    """Rows of several arrays, or of several tensors."""
    if len(pieces) == 1:
        return pieces[0]
    if isinstance(pieces[0], np.ndarray):
        return np.concatenate(pieces)
    import torch

    return torch.cat(list(pieces))


def _indices(places: np.ndarray, values: Mapping[str, Any]) -> Any:
    """Places as what all of these values take, made and sent to their device once."""
    like = next(iter(values.values()), places)
    if isinstance(like, np.ndarray):
        return places
    import torch

    indices = torch.from_numpy(np.ascontiguousarray(places, np.int64))
    if like.device.type == "cuda":
        return indices.pin_memory().to(like.device, non_blocking=True)
    return indices.to(like.device)
