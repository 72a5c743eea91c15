"""Batches on the device before they are asked for, so that a GPU never waits for its input.

1. A thread takes batches from the stream (which reads ahead from the disk in a thread of its own), copies each to
   pinned memory and from there to the device, on a CUDA stream of its own.
2. The step's stream waits for that copy's event, not the host; the memory is given back when the step is through.

The thread is `DEPTH` batches ahead. On the CPU batches pass through as they are.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from activations.pipeline import Channel, Worker
from scope.kernels.tensors import sent
from scope.training.data import Batch

__all__ = ["DEPTH", "Timed", "on_device"]

DEPTH = 3
"""Batches that lie on the device in advance."""


Item = TypeVar("Item")


class Timed(Generic[Item]):
    """An iterator that knows how long its consumer has waited for it.

    On a GPU the host runs at most two steps ahead of the device (`scope.training.fast`): where it waits for long here,
    the device has nothing to do.
    """

    def __init__(self, items: Iterator[Item]) -> None:
        self._items = items
        self.waited = 0.0
        """Seconds spent in `next` so far."""

    def __iter__(self) -> "Timed[Item]":
        return self

    def __next__(self) -> Item:
        started = time.perf_counter()
        try:
            return next(self._items)
        finally:
            self.waited += time.perf_counter() - started


class _Sent(NamedTuple):
    batch: Batch
    done: torch.cuda.Event


def on_device(batches: Iterator[Batch], device: torch.device | str) -> Iterator[Batch]:
    """The same batches, their values on `device`.

    Args:
        batches: a stream of batches on the host, or of a live model's on its own GPU.
        device: where the steps run.
    """
    device = torch.device(device)
    if device.type != "cuda":
        yield from batches
        return
    channel: Channel[_Sent] = Channel(DEPTH)

    def send() -> None:
        copies = torch.cuda.Stream(device)
        for rows, values in batches:
            with torch.cuda.stream(copies):
                there = _each(values, lambda tensor: _on_its_way(tensor, device, copies))
                done = torch.cuda.Event()
                done.record(copies)
            channel.put(_Sent(Batch(rows, there), done))
        channel.close()

    worker = Worker("prefetch", send, channel.close)
    worker.start()
    try:
        for batch, done in channel:
            here = torch.cuda.current_stream(device)
            here.wait_event(done)
            _each(batch.values, lambda tensor, stream=here: tensor.record_stream(stream))
            yield batch
    finally:
        channel.stop()
        worker.join_fully()
    if worker.error is not None:
        raise worker.error


def _on_its_way(tensor: Tensor, device: torch.device, copies: torch.cuda.Stream) -> Tensor:
    if tensor.device.type == "cpu":
        return sent(tensor, device)
    copies.wait_stream(torch.cuda.default_stream(tensor.device))  # a live source computed it there
    return tensor.to(device, non_blocking=True)


def _each(values: Any, act: Callable[..., Any]) -> Any:
    """What `act` makes of a batch's values, which are one tensor or a tensor for each hook."""
    return {hook: act(tensor) for hook, tensor in values.items()} if isinstance(values, Mapping) else act(values)
