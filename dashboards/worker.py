"""The model worker: one thread that runs everything that needs a model, behind a queue.

Browsing never waits for a model. A page submits a job, gets it back at once, and polls it:

1. `submit` puts the job into the queue, or returns the one that is queued, running or done under the same key;
2. the thread takes jobs in the order they came, and reports what it is doing through `Job.report`;
3. a job ends as done, failed, cancelled or timed out. A job that runs cannot be killed inside the model's forward
   pass: it is called off at its next `report`, and whoever waits for it is answered at once.
"""

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any
from uuid import uuid4

from dashboards.turns import TURNS
from scope.errors import InvalidInputError, ScopeError

__all__ = ["CalledOffError", "Job", "JobState", "ModelWorker"]

KEPT_JOBS = 64
MAX_QUEUED = 32
TIME_LIMIT = 600.0
"""Seconds that a job may run, loading the model included."""


class CalledOffError(ScopeError):
    """The job was cancelled or ran out of time; raised inside it at its next report."""


class JobState(StrEnum):
    """Where a job stands."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass
class Job:
    """One request to the worker."""

    id: str
    key: object
    """Jobs with equal keys have equal results."""
    function: Callable[["Job"], Any]
    time_limit: float
    """Seconds."""
    state: JobState = JobState.QUEUED
    step: str = "waiting for the model"
    """What it is doing, in words."""
    done: int = 0
    total: int | None = None
    """Progress within the step, where it can be counted."""
    partial: Any = None
    """What is known already, of a job whose result comes piece by piece."""
    result: Any = None
    error: Exception | None = None
    submitted_at: float = field(default_factory=time.monotonic)
    started_at: float | None = None

    @property
    def pending(self) -> bool:
        """Whether it is still worth waiting for."""
        return self.state in (JobState.QUEUED, JobState.RUNNING)

    @property
    def seconds(self) -> float:
        """Time since it was submitted."""
        return time.monotonic() - self.submitted_at

    def apply_time_limit(self) -> None:
        """End a job that has run for longer than it may."""
        if self.state is not JobState.RUNNING or self.started_at is None:
            return
        if time.monotonic() - self.started_at > self.time_limit:
            self.error = TimeoutError(
                f"It was stopped after {self.time_limit:g} seconds while {self.step}. Ask for less at once."
            )
            self.state = JobState.FAILED

    def report(self, step: str, done: int = 0, total: int | None = None) -> None:
        """Say what the job is doing.

        Raises:
            CalledOffError: nobody waits for it any more, or its time is up.
        """
        self.apply_time_limit()
        if not self.pending:
            raise CalledOffError("The request was called off.")
        self.step, self.done, self.total = step, done, total


class ModelWorker:
    """One thread, one queue. The thread starts with the first job and never keeps the process alive.

    Args:
        time_limit: seconds that a job may run.
        name: of its thread.
    """

    def __init__(self, time_limit: float = TIME_LIMIT, name: str = "model-worker") -> None:
        self.time_limit, self.name = time_limit, name
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._queue: deque[Job] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._running: Job | None = None

    def submit(self, key: object, function: Callable[[Job], Any], time_limit: float | None = None) -> Job:
        """Queue `function`, or return the job that has the same key and is not failed or cancelled.

        Raises:
            InvalidInputError: the queue is full.
        """
        with self._changed:
            for job in reversed(self._jobs.values()):
                if job.key == key and job.state not in (JobState.FAILED, JobState.CANCELLED):
                    return job
            if len(self._queue) >= MAX_QUEUED:
                raise InvalidInputError(f"{MAX_QUEUED} requests already wait for the model. Try again in a minute.")
            job = Job(uuid4().hex, key, function, time_limit or self.time_limit)
            self._jobs[job.id] = job
            self._forget_old()
            self._queue.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name=self.name, daemon=True)
                self._thread.start()
            self._changed.notify_all()
            return job

    def get(self, id: str) -> Job | None:
        """The job with this id, its time limit applied; None once it has been forgotten."""
        with self._changed:
            job = self._jobs.get(id)
            if job is not None:
                job.apply_time_limit()
            return job

    def result(self, key: object) -> Any:
        """What the job with this key has found, as far as one is done and still known; else None."""
        with self._changed:
            for job in reversed(self._jobs.values()):
                if job.key == key and job.state is JobState.DONE:
                    return job.result
        return None

    def position(self, job: Job) -> int:
        """How many requests are served before this one (0: it is next, or running)."""
        with self._changed:
            busy = int(self._running is not None and self._running is not job)
            return self._queue.index(job) + busy if job in self._queue else 0

    def wait(self, job: Job, timeout: float) -> None:
        """Block until a job has ended, at most `timeout` seconds. Others may draw meanwhile (`turns`)."""
        with TURNS.left(), self._changed:
            self._changed.wait_for(lambda: not job.pending, timeout)

    def cancel(self, id: str) -> None:
        """Call a job off. One that has ended stays as it is."""
        with self._changed:
            job = self._jobs.get(id)
            if job is not None and job.pending:
                job.state = JobState.CANCELLED
                if job in self._queue:
                    self._queue.remove(job)
                self._changed.notify_all()

    def _forget_old(self) -> None:
        for id in [id for id, job in self._jobs.items() if not job.pending][: max(0, len(self._jobs) - KEPT_JOBS)]:
            del self._jobs[id]

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._queue:
                    self._changed.wait()
                job = self._running = self._queue.popleft()
                job.state, job.started_at = JobState.RUNNING, time.monotonic()
            try:
                result, error = job.function(job), None
            except Exception as raised:  # whatever it is, the one who asked has to see it
                result, error = None, raised
            with self._changed:
                self._running = None
                if job.pending:
                    job.result, job.error = result, error
                    job.state = JobState.DONE if error is None else JobState.FAILED
                self._changed.notify_all()
