"""Reading artefacts from end to end, on demand: every byte of a store or an index against its ledger, an SAE's weights
against its manifest. One at a time, in a thread of its own, so that no prompt waits for it."""

import time
from dataclasses import dataclass
from uuid import uuid4

from dashboards.context import Context
from dashboards.worker import Job, ModelWorker

__all__ = ["Checked", "Verifier"]

FAULTS = 20
"""Faults that are named."""


@dataclass(frozen=True)
class Checked:
    """What reading an artefact from end to end has found."""

    at: float
    """When it ended, seconds since 1970."""
    n_faults: int
    faults: tuple[str, ...]
    """The first of them, in words."""


class Verifier:
    """The verifications of a workspace; what was found is kept while the dashboard is served."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._jobs: dict[str, Job] = {}

    @property
    def worker(self) -> ModelWorker:
        """The worker that they run in."""
        return self._context.checks

    def job(self, id: str) -> Job | None:
        """The latest verification of an artefact."""
        job = self._jobs.get(id)
        if job is not None:
            job.apply_time_limit()
        return job

    def start(self, id: str) -> Job:
        """Verify an artefact of the workspace, or return the verification that is under way.

        Raises:
            UnknownNameError: there is no such artefact.
            InvalidInputError: too many wait already.
        """
        entry = self._context.workspace.find(id)
        before = self.job(entry.id)
        if before is not None and before.pending:
            return before
        job = self.worker.submit(("verify", uuid4().hex), lambda job: self._verify(job, entry.kind, entry.id))
        self._jobs[entry.id] = job
        return job

    def cancel(self, id: str) -> None:
        """Call a verification off."""
        job = self._jobs.get(id)
        if job is not None:
            self.worker.cancel(job.id)

    def _verify(self, job: Job, kind: str, id: str) -> Checked:
        workspace = self._context.workspace

        def report(done: int, total: int | None) -> None:
            job.report("reading every byte", done, total)

        job.report("opening it")
        if kind == "sae":
            workspace.sae(workspace.find(id, "sae").id)  # raises where a weight is not what the manifest says
            return Checked(time.time(), 0, ())
        faults = (workspace.store(id) if kind == "activation-store" else workspace.index(id)).verify(report)
        return Checked(time.time(), len(faults), tuple(_words(fault) for fault in faults[:FAULTS]))


def _words(fault: object) -> str:
    return ": ".join(str(part) for part in fault._asdict().values() if part)  # type: ignore[attr-defined]
