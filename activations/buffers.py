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
        for hook, rows in values.items():
            if hook not in self._slots:
                self._slots[hook] = self._new(hook, rows)
            if isinstance(rows, np.ndarray):
                self._slots[hook][slots] = rows
            else:
                self._slots[hook].index_copy_(0, _indices(slots, rows), rows)

    def take(self, slots: np.ndarray) -> dict[str, Any]:
        """Copies of the rows in these slots, by hook."""
        return {hook: taken(values, slots) for hook, values in self._slots.items()}

    def _new(self, hook: str, like: Any) -> Any:
        empty = self._empty[hook]
        if isinstance(like, np.ndarray):
            return np.empty((self._capacity, *empty.shape[1:]), empty.dtype)
        return like.new_empty((self._capacity, *like.shape[1:]))


def taken(values: Any, places: np.ndarray) -> Any:
    """The rows at some places, copied: of a numpy array, or of a torch tensor on its device."""
    if isinstance(values, np.ndarray):
        return values.take(places, axis=0)
    return values.index_select(0, _indices(places, values))


def concatenated(pieces: Sequence[Any]) -> Any:
    """Rows of several arrays, or of several tensors."""
    if len(pieces) == 1:
        return pieces[0]
    if isinstance(pieces[0], np.ndarray):
        return np.concatenate(pieces)
    import torch

    return torch.cat(list(pieces))


def _indices(places: np.ndarray, like: Any) -> Any:
    import torch

    indices = torch.from_numpy(np.ascontiguousarray(places, np.int64))
    if like.device.type == "cuda":
        return indices.pin_memory().to(like.device, non_blocking=True)
    return indices.to(like.device)
