"""`GroupWorker`: a model that computes row groups for a driver elsewhere, several at once.

1. The driver sends a row group's windows of tokens (`GroupWork`); the worker needs nothing of the plan.
2. Inside, an ordinary pass (`activations.passes.CapturePass`) runs on what arrives: while one group's results are
   copied, checked and written, the next group's forward pass runs. `LANES` groups a worker keep it busy.
3. Where a pass commits, the worker hands the records of the group's shards to whoever waits in `compute`. Shards have
   their final names already; they are visible once the driver commits them. Writing one twice writes the same bytes.
"""

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, NamedTuple

from activations.batching import Window
from activations.chats import ChatTokens
from activations.documents import Document
from activations.engines.crew import Objects
from activations.layout import PLAN
from activations.ledger import GroupRecord, Ledger
from activations.media import MediaTokens, held
from activations.passes import GROUPS_IN_FLIGHT, CapturePass, PassSettings
from activations.pipeline import Channel, Stopped, Worker
from activations.source import HookedModel, ModelIdentity
from activations.spec import CaptureSpec
from activations.writer import StoreWriter

__all__ = ["LANES", "GroupWork", "GroupWorker", "Job", "JobWorkers", "ModelCard", "ModelProxy"]

LANES = GROUPS_IN_FLIGHT + 1
"""Row groups with one worker at once: those in its memory, and one that waits for the model."""


class Job(NamedTuple):
    """One pass over a store, as a worker needs to know it."""

    id: str
    """Another for each pass."""
    folder: str
    """The store, at the same path for driver and workers."""
    spec: CaptureSpec
    captures: tuple[str, ...]
    batch_size: int


class GroupWork(NamedTuple):
    """One row group to compute."""

    plan: GroupRecord
    windows: list[Window]


@dataclass(frozen=True)
class ModelCard:
    """What a driver without a model of its own knows of its workers'."""

    identity: ModelIdentity
    special_token_ids: frozenset[int]
    max_context_size: int
    default_batch_size: int
    pads: bool
    chat_template: str | None

    @classmethod
    def of(cls, model: HookedModel) -> "ModelCard":
        return cls(
            model.identity,
            model.special_token_ids,
            model.max_context_size,
            model.default_batch_size,
            model.pads,
            model.chat_template,
        )


class ModelProxy:
    """A `HookedModel` whose answers come from a worker's model; it cannot run itself.

    Args:
        card: what does not change.
        ask: calls a method of a worker's model, by name.
    """

    def __init__(self, card: ModelCard, ask: Callable[..., Any]) -> None:
        self.identity, self.special_token_ids = card.identity, card.special_token_ids
        self.max_context_size, self.default_batch_size = card.max_context_size, card.default_batch_size
        self.pads, self.chat_template = card.pads, card.chat_template
        self._ask = ask

    def known_hooks(self) -> list[str]:
        return list(self._ask("known_hooks"))

    def resolve_hook(self, name: str) -> str:
        return str(self._ask("resolve_hook", name))

    def hook_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._ask("hook_shape", name))

    def encode_documents(self, texts: Any) -> list[Any]:
        return list(self._ask("encode_documents", texts))

    def encode_chats(self, chats: Any, template: str) -> list[ChatTokens]:
        return list(self._ask("encode_chats", chats, template))

    def processor_hash(self) -> str:
        return str(self._ask("processor_hash"))

    def max_medium_tokens(self, kind: str, seconds: float) -> int:
        return int(self._ask("max_medium_tokens", kind, seconds))

    def encode_media(self, documents: Sequence[Document], template: str | None) -> list[MediaTokens]:
        # A worker may have no path to the files.
        sent = [replace(one, media=tuple(map(held, one.media))) for one in documents]
        return list(self._ask("encode_media", sent, template))

    def token_texts(self, ids: Any) -> list[str]:
        return list(self._ask("token_texts", ids))

    def forward_rows(self, *_: Any) -> Any:
        raise AssertionError("the model runs in the workers")


class _WorkerWriter(StoreWriter):
    """Writes shards as the store's writer does, but without its lock; what it would commit, it hands over."""

    def __init__(self, job: Job, hand_over: Any) -> None:
        super().__init__(job.folder, job.spec, {}, [])
        self.ledger = Ledger(self.storage)
        self._hand_over = hand_over

    def __enter__(self) -> "_WorkerWriter":
        raise AssertionError("the driver holds the store")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        raise AssertionError("the driver holds the store")

    def commit_hooks(self, captures: Sequence[str], group: int, objects: Objects) -> None:
        self._hand_over(group, dict(objects))


class _WorkerPass(CapturePass):
    """A pass whose row groups arrive one by one, planned by somebody else."""

    def __init__(self, model: HookedModel, writer: StoreWriter, job: Job, inbox: "Channel[GroupWork]") -> None:
        super().__init__(model, PassSettings(None, writer, job.captures, None, job.batch_size, None))
        self._inbox = inbox
        self._arrived: dict[int, list[Window]] = {}

    def _wind_down(self) -> None:
        self._inbox.stop()
        super()._wind_down()

    def _plan(self) -> None:
        for plan, windows in self._inbox:
            self._arrived[plan.group] = windows
            self.writer.ledger.records[PLAN][plan.group] = plan
            self.groups.put(plan.group)
        self.groups.close()

    def _windows(self, group: int) -> list[Window]:
        return self._arrived.pop(group)

    def _raise(self, own: BaseException | None, theirs: BaseException | None) -> None:
        error = theirs if isinstance(own, Stopped) or own is None else own
        raise error or Stopped  # the driver says what is committed and how to go on


class GroupWorker:
    """Computes row groups of one pass.

    Args:
        model: runs in a thread of the worker.
        job: the pass.
    """

    def __init__(self, model: HookedModel, job: Job) -> None:
        self.job = job
        self._inbox: Channel[GroupWork] = Channel(LANES)
        self._waiting: dict[int, Future[Objects | None]] = {}
        self._lock = threading.Lock()
        self._ended = False
        self._error: BaseException | None = None
        self._pass = _WorkerPass(model, _WorkerWriter(job, self._hand_over), job, self._inbox)
        self._thread = Worker("worker", self._run, lambda: None)
        self._thread.start()

    def compute(self, work: GroupWork) -> Objects | None:
        """Compute and write a row group; None if the worker was stopped before. Called from up to `LANES` threads.

        Raises:
            Whatever the pass died of, the model's own errors and `NonFiniteError` among it.
        """
        future: Future[Objects | None] = Future()
        with self._lock:
            if self._ended:
                self._settle(future)
            else:
                self._waiting[work.plan.group] = future
        if not future.done():
            with contextlib.suppress(Stopped):  # then the end of the pass settles all futures
                self._inbox.put(work)
        return future.result()

    def stop(self) -> None:
        """End early: full shards are still written, everything else is dropped."""
        self._pass.stop()

    def close(self) -> None:
        """End, after everything that was asked for."""
        self._inbox.close()
        self._thread.join_fully()

    def _run(self) -> None:
        try:
            self._pass.run()
        except Stopped:
            pass
        except BaseException as error:
            self._error = error
        self._inbox.stop()
        with self._lock:
            self._ended = True
            for future in self._waiting.values():
                self._settle(future)
            self._waiting.clear()

    def _hand_over(self, group: int, objects: Mapping[str, Any]) -> None:
        with self._lock:
            self._waiting.pop(group).set_result(objects)

    def _settle(self, future: "Future[Objects | None]") -> None:
        if self._error is not None:
            future.set_exception(self._error)
        else:
            future.set_result(None)


class JobWorkers:
    """The worker of this process, another for each pass."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._worker: GroupWorker | None = None

    def compute(self, model: HookedModel, job: Job, work: GroupWork) -> Objects | None:
        """As `GroupWorker.compute`, of the worker for this pass."""
        with self._lock:
            if self._worker is None or self._worker.job.id != job.id:
                if self._worker is not None:
                    self._worker.close()
                self._worker = GroupWorker(model, job)
            worker = self._worker
        return worker.compute(work)

    def stop(self) -> None:
        """Let the pass end early."""
        with self._lock:
            worker = self._worker
        if worker is not None:
            worker.stop()

    def close(self) -> None:
        """End, after everything that was asked for."""
        with self._lock:
            if self._worker is not None:
                self._worker.close()
