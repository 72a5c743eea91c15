"""`DriverPass`: one pass over the rows that a capture lacks, whose row groups are computed elsewhere.

1. The planner thread tokenises and commits the plan, as in a local pass.
2. *Lanes* take row groups: each is a thread that reads a group's windows from the plan, has a worker compute it, and
   commits the shards that the worker wrote. There are as many row groups on their way as there are lanes; that bounds
   memory and keeps each worker a group ahead.
3. An error in any lane stops the others as a local pass stops: what is written is committed, the rest is dropped.
4. Temporary files of workers that died are cleared away in the end, when nobody writes any more.
"""

import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from uuid import uuid4

from activations.engines.crew import Compute, RemoteCrew
from activations.engines.worker import GroupWork, Job
from activations.errors import InterruptedRunError
from activations.layout import PLAN
from activations.passes import CapturePass, PassSettings
from activations.pipeline import Channel, Worker
from activations.storage import Storage

__all__ = ["DriverPass"]


class DriverPass(CapturePass):
    """A pass that is computed by a crew's workers."""

    def __init__(self, crew: RemoteCrew, settings: PassSettings) -> None:
        super().__init__(crew.model, settings)
        self.crew = crew
        writer = settings.writer
        self.job = Job(uuid4().hex, _place(writer.storage), writer.spec, settings.captures, settings.batch_size)
        self._rows_committed = 0
        self._finished: Channel[int] = Channel(len(crew.lanes))
        self._lanes_left = len(crew.lanes)
        self._lanes_lock = threading.Lock()
        self._stopping = False

    def _threads(self) -> list[Worker]:
        return [
            *(
                Worker(f"lane {number}", partial(self._lane, compute), self._wind_down)
                for number, compute in enumerate(self.crew.lanes)
            ),
            Worker("planner", self._plan, self._wind_down),
        ]

    def _drive(self) -> None:
        """Count what the lanes have done."""
        for n_rows in self._finished:
            self._rows_committed += n_rows
            self._report()

    def _join(self, threads: Sequence[Worker]) -> None:
        """When this returns no worker writes any more."""
        for thread in threads:
            thread.join_fully()
        self._clear_temporaries()

    def _lane(self, compute: Compute) -> None:
        try:
            for group in self.groups:
                plan, start = self.writer.ledger.records[PLAN][group], self._start(group)
                if start == plan.row_stop:
                    continue
                objects = compute(self.job, GroupWork(plan, self._windows(group)))
                if objects is None:
                    if not self._stopping:
                        raise InterruptedRunError(f"A worker gave up row group {group} unasked.")
                    return
                self.writer.commit_hooks(self.captures, group, objects)
                self._finished.put(plan.row_stop - start)
        finally:
            with self._lanes_lock:
                self._lanes_left -= 1
                if not self._lanes_left:
                    self._finished.close()

    @property
    def _rows_done(self) -> int:
        return self._rows_committed

    def _raise(self, own: BaseException | None, theirs: BaseException | None) -> None:
        try:
            super()._raise(own, theirs)
        except InterruptedRunError as error:  # of a worker's death, which is told in full: the notes say how to resume
            raise InterruptedRunError(" ".join([str(error), *getattr(error, "__notes__", ())])) from error.__cause__

    def _wind_down(self) -> None:
        self._stopping = True
        self.groups.stop()
        self._finished.stop()
        self.crew.stop()

    def _clear_temporaries(self) -> None:
        for array in self.writer.layout.hook_arrays(self.shapes):
            self.writer.storage.remove_temporaries(array)


def _place(storage: Storage) -> str:
    """Where a store lies, as workers in other folders find it."""
    return str(storage.location.resolve() if isinstance(storage.location, Path) else storage.location)
