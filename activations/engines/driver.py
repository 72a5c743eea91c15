"""`DriverPass`: one pass over the rows that a capture lacks, whose row groups are computed elsewhere.

1. The planner thread tokenises and commits the plan, as in a local pass.
2. *Lanes* take row groups: each is a thread that reads a group's windows from the plan, has a worker compute it, and
   commits the shards that the worker wrote. There are as many row groups on their way as there are lanes; that bounds
   memory and keeps each worker a group ahead.
3. An error in any lane stops the others as a local pass stops: what is written is committed, the rest is dropped.
4. Temporary files of workers that died are cleared away in the end, when nobody writes any more.
"""

import threading
from functools import partial
from pathlib import Path
from uuid import uuid4

from activations.engines.crew import Compute, RemoteCrew
from activations.engines.worker import GroupWork, Job
from activations.errors import InterruptedRunError
from activations.layout import PLAN
from activations.passes import CapturePass, Progress
from activations.pipeline import Channel, Stopped, Worker
from activations.storage import Storage
from activations.text import TextSource
from activations.writer import StoreWriter

__all__ = ["DriverPass"]


class DriverPass(CapturePass):
    """A pass that is computed by a crew's workers."""

    def __init__(
        self,
        crew: RemoteCrew,
        text: TextSource | None,
        writer: StoreWriter,
        capture_id: str,
        max_tokens: int | None,
        batch_size: int,
        progress: Progress | None,
    ) -> None:
        super().__init__(crew.model, text, writer, capture_id, max_tokens, batch_size, progress)
        self.crew = crew
        self.job = Job(uuid4().hex, _place(writer.storage), writer.spec, capture_id, batch_size)
        done = writer.ledger.records[capture_id].values()
        self.rows_before = sum(record.row_stop - record.row_start for record in done)
        self.rows_committed = 0
        self._finished: Channel[int] = Channel(len(crew.lanes))
        self._lanes_left = len(crew.lanes)
        self._lanes_lock = threading.Lock()
        self._stopping = False
        self._stopped_by: BaseException | None = None

    def run(self) -> None:
        """Capture what is missing; whatever stops it, threads have ended and no worker writes when this returns."""
        planner = Worker("planner", self._plan, self._wind_down)
        lanes = [
            Worker(f"lane {number}", partial(self._lane, compute), self._wind_down)
            for number, compute in enumerate(self.crew.lanes)
        ]
        own: BaseException | None = None
        interrupts = self.writer.interrupts
        with interrupts.stopping(self._wind_down):
            try:
                for worker in (planner, *lanes):
                    worker.start()
                for n_rows in self._finished:
                    self.rows_committed += n_rows
                    self._report()
            except BaseException as error:
                own = error
                self._wind_down()
            for worker in (*lanes, planner):
                worker.join_fully()
        if interrupts.noted and (own is None or isinstance(own, Stopped)):
            own = KeyboardInterrupt()
        self._clear_temporaries()
        own = self._stopped_by or own
        theirs = next((worker.error for worker in (*lanes, planner) if worker.error is not None), None)
        if own is not None or theirs is not None:
            self._raise(own, theirs)
        self._report()

    def stop(self, error: BaseException) -> None:
        """End early from another thread; `run` raises the error."""
        self._stopped_by = error
        self._wind_down()

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
                self.writer.commit_hooks(self.capture_id, group, objects)
                self._finished.put(plan.row_stop - start)
        finally:
            with self._lanes_lock:
                self._lanes_left -= 1
                if not self._lanes_left:
                    self._finished.close()

    def _report(self) -> None:
        if self.progress is not None:
            state = self.writer.plan_state
            total = state.n_rows if state.complete else self.max_tokens
            self.progress(self.rows_before + self.rows_committed, total)

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
        hooks = self.writer.ledger.declarations[self.capture_id]["hooks"]
        for array in self.writer.layout.hook_arrays({hook: declared["shape"] for hook, declared in hooks.items()}):
            self.writer.storage.remove_temporaries(array)


def _place(storage: Storage) -> str:
    """Where a store lies, as workers in other folders find it."""
    return str(storage.location.resolve() if isinstance(storage.location, Path) else storage.location)
