"""From the model's results to committed row groups: the collector and the writers of a capture.

A row group is filled batch by batch in buffers that have the layout of its shards. When it is full its shards go to
the writers; when the last of them is on disk the row group is committed and the buffers serve the next one.
"""

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np

from activations.append import fill_earlier
from activations.arrays import ArrayLayout, ObjectRecord, ShardBuffer
from activations.batching import Batch
from activations.errors import MismatchError, NonFiniteError
from activations.pipeline import Channel
from activations.source import PendingRows
from activations.spec import StorageDtype
from activations.store import ActivationStore
from activations.writer import StoreWriter

__all__ = ["Collector", "GroupTask"]

EXPONENT_BITS = {"bfloat16": 0x7F80, "float16": 0x7C00}
"""All of them set: a NaN or an Inf."""

LARGEST = {"bfloat16": 3e38, "float16": 65_000.0, "float32": 3e38}
"""A number that each storage dtype holds, little short of its largest."""
SCATTER_THREADS = 4
"""Hooks whose rows are looked through and put in place at once."""

Buffers = dict[str, ShardBuffer]
"""One row group's shards, by array."""


class GroupTask:
    """A row group on its way through the pipeline."""

    def __init__(self, group: int, row_start: int, n_rows: int, n_batches: int, n_earlier: int = 0) -> None:
        self.group = group
        self.row_start = row_start
        self.n_rows = n_rows
        self.n_earlier = n_earlier
        """First rows of the group that were committed before, and are taken over from there."""
        self.batches_left = n_batches
        self.buffers: Buffers | None = None
        self.objects: dict[str, ObjectRecord] = {}


class _Result(NamedTuple):
    task: GroupTask
    batch: Batch
    pending: PendingRows


class _Job(NamedTuple):
    task: GroupTask
    array: str
    buffer: ShardBuffer


class Collector:
    """Takes results in `add`, and commits row groups; `collect` and `write` are the bodies of its threads.

    Args:
        writer: the store.
        captures: the ledger's ids of what this pass fills.
        hooks: canonical hook names.
        arrays: layouts of all arrays of the pass, by path.
        pending: results that may wait, at most.
        in_flight: row groups whose buffers exist at once, at most.
    """

    def __init__(
        self,
        writer: StoreWriter,
        captures: Sequence[str],
        hooks: Sequence[str],
        arrays: Mapping[str, ArrayLayout],
        pending: int,
        in_flight: int,
    ) -> None:
        self.results: Channel[_Result] = Channel(pending)
        self.jobs: Channel[_Job] = Channel(len(arrays) * in_flight)
        self.rows_collected = 0
        self._writer, self._captures, self._hooks, self._arrays = writer, captures, tuple(hooks), dict(arrays)
        self._free: Channel[Buffers | None] = Channel(in_flight)
        for _ in range(in_flight):
            self._free.put(None)  # made when it is first needed
        self._lock = threading.Lock()

    def add(self, task: GroupTask, batch: Batch, pending: PendingRows) -> None:
        """Hand over a batch's result; waits while too many are on their way."""
        self.results.put(_Result(task, batch, pending))

    def stop(self) -> None:
        """Drop everything that is not being written this moment."""
        for channel in (self.results, self.jobs, self._free):
            channel.stop()

    def collect(self) -> None:
        """Fill row groups until the results end."""
        with ThreadPoolExecutor(min(SCATTER_THREADS, len(self._hooks)), "scatter") as pool:
            for task, batch, pending in self.results:
                if task.buffers is None:
                    task.buffers = self._free.get() or self._new_buffers()
                    if task.n_earlier:
                        fill_earlier(self._writer, task.group, task.n_earlier, self._hooks, task.buffers)
                values = pending.wait()
                for _ in pool.map(partial(self._scatter, task, batch, values), self._hooks):
                    pass  # the first error of a hook is raised here
                task.batches_left -= 1
                self.rows_collected += len(batch.rows)
                if task.batches_left == 0:
                    for array, buffer in task.buffers.items():
                        self.jobs.put(_Job(task, array, buffer))

    def write(self) -> None:
        """Write shards until the jobs end, and commit each row group with its last one."""
        for task, array, buffer in self.jobs:
            name, record = self._writer.write_shard(array, task.group, buffer, task.n_rows)
            with self._lock:
                task.objects[name] = record
                is_last = len(task.objects) == len(self._arrays)
            if is_last:
                self._writer.commit_hooks(self._captures, task.group, task.objects)
                self._free.put(task.buffers)

    def _new_buffers(self) -> Buffers:
        return {array: ShardBuffer(layout) for array, layout in self._arrays.items()}

    def _scatter(self, task: GroupTask, batch: Batch, values: Mapping[str, np.ndarray], hook: str) -> None:
        """Look through a hook's rows and put them in place."""
        assert task.buffers is not None
        array, norm_array = self._writer.layout.hook_array(hook), self._writer.layout.norm_array(hook)
        rows, norms = values[hook], values[f"norm/{hook}"]
        n_tokens = sum(map(len, batch.windows))
        expected = (n_tokens, *self._arrays[array].feature_shape)
        if rows.shape != expected or norms.shape != (n_tokens,):
            raise MismatchError(
                f"The model gave {hook} the shape {rows.shape} and its norms {norms.shape} for {n_tokens} tokens; "
                f"expected {expected}."
            )
        places = np.arange(n_tokens) if batch.kept is None else np.flatnonzero(batch.kept)
        bad = _first_non_finite(rows, norms, places, self._writer.spec.dtype)
        if bad is not None:
            self._refuse(hook, task.row_start + int(batch.rows[bad]), float(norms[places[bad]]))
        task.buffers[array].put(batch.rows, rows, places)
        task.buffers[norm_array].put(batch.rows, norms, places)

    def _refuse(self, hook: str, row: int, norm: float) -> None:
        document = ActivationStore.open(self._writer.storage).document_at(row)
        name = document["title"] or f"number {document['document']}"
        dtype = self._writer.spec.dtype
        if np.isfinite(norm):
            problem = f"a value too large for {dtype} (the row's norm is {norm:,.0f})"
            advice = "Store bfloat16 or float32."
        else:
            problem = "a NaN or Inf"
            advice = "The model made it; look at this document, or run the model in another dtype."
        raise NonFiniteError(f"The hook {hook} gave {problem} at row {row:,}, in the document {name!r}. {advice}")


def _first_non_finite(rows: np.ndarray, norms: np.ndarray, places: np.ndarray, dtype: StorageDtype) -> int | None:
    """The first of these places whose row holds a NaN or Inf, in the stored bits or in its norm.

    Only rows of a large norm are looked at: no entry is larger than the norm, so that below the dtype's largest value
    all of them are finite.
    """
    norms = norms[places]
    suspects = np.flatnonzero(~(norms < LARGEST[dtype]))
    if not len(suspects):
        return None
    bits = rows[places[suspects]].reshape(len(suspects), -1)
    if dtype == "float32":
        finite = np.isfinite(bits)
    else:
        mask = np.uint16(EXPONENT_BITS[dtype])
        finite = (bits.view(np.uint16) & mask) != mask
    bad = suspects[~(finite.all(axis=1) & np.isfinite(norms[suspects]))]
    return int(bad[0]) if len(bad) else None
