"""Capture by the processes that torchrun started, one a GPU:

    torchrun --nproc-per-node 2 --no-python scope capture --model … --data … --hook … --out …

(or `torchrun --nproc-per-node 2 -m scope.cli capture …`, or a script of one's own whose processes all call `capture`).

1. Rank 0 is the driver and a worker, all other ranks are workers. Each makes the model on the GPU of its local rank,
   once rank 0 has found the text and the store to be good.
2. Messages go through the key-value store by which the processes found each other: rank 0 puts row groups under
   `task/RANK/NUMBER` and finds the records of their shards under `done/RANK/NUMBER`. They are handed out as ranks
   finish, so a slow one holds up nobody. No collective operation is used, and no activation is sent.
3. When a process dies, torchrun ends the others: rank 0 says what is committed, and the same command goes on from
   there; with `--max-restarts N` torchrun gives it itself.

The store lies where all ranks reach it under the same path: on one machine, or a shared file system.
"""

import contextlib
import itertools
import math
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import FrameType, TracebackType
from typing import Any

from activations.engines.crew import Compute, Objects, RemoteCrew
from activations.engines.worker import LANES, GroupWork, Job, JobWorkers
from activations.errors import InterruptedRunError, InvalidInputError, MismatchError
from activations.source import HookedModel

__all__ = ["TorchrunCrew"]

POLL_SECONDS = 0.02
"""Row groups wait in line at each rank, so that nobody waits for a message."""
GRACE_SECONDS = 10.0
"""How long rank 0 waits, after it told the others to stop, for row groups that they are writing."""
NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_captures = itertools.count()
"""Numbers the captures of a process, so that the messages of one are not taken for those of another."""


class TorchrunCrew(RemoteCrew):
    """All ranks of a torchrun job.

    Args:
        make_model: makes the model of this rank.

    Raises:
        InvalidInputError: torchrun did not start this process.
    """

    def __init__(self, make_model: Callable[[], HookedModel]) -> None:
        missing = [name for name in NEEDED if name not in os.environ]
        if missing:
            raise InvalidInputError(
                f"The engine torchrun is for processes that torchrun started, but {missing[0]} is not set. "
                "Start it as: torchrun --nproc-per-node N --no-python scope capture …"
            )
        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.leads = self.rank == 0
        self._make_model = make_model
        self._made: HookedModel | None = None
        self._mail = _Mail(next(_captures))
        self._own = JobWorkers()
        self._give_up_at = math.inf
        """When to wait no longer for other ranks (monotonic time)."""
        self._numbers = [itertools.count() for _ in range(self.world_size)]
        self._lock = threading.Lock()

    @property
    def model(self) -> HookedModel:
        if self._made is None:
            if self.leads:
                self._mail.put("load", None)
            _take_own_gpu()
            self._made = self._make_model()
        return self._made

    @property
    def lanes(self) -> Sequence[Compute]:
        own: list[Compute] = [self._compute_here] * LANES
        others = [partial(self._compute_at, rank) for rank in range(1, self.world_size) for _ in range(LANES)]
        return [*own, *others]

    def stop(self) -> None:
        self._give_up_at = min(self._give_up_at, time.monotonic() + GRACE_SECONDS)
        with contextlib.suppress(Exception):
            self._mail.put("stop", None)
        self._own.stop()

    def share(self, figures: Mapping[str, Any]) -> None:
        self._mail.put("end", dict(figures))

    def follow(self) -> Mapping[str, Any]:
        """Work until rank 0 says that it is the end.

        Raises:
            InterruptedRunError: rank 0 failed.
        """
        # Rank 0 gets a Ctrl-C too, and says what is to be done.
        with _handled(signal.SIGINT, signal.SIG_IGN), ThreadPoolExecutor(LANES, "lane") as lanes:
            lanes.submit(self._load)
            for number in itertools.count():
                task = f"task/{self.rank}/{number}"
                while not self._mail.has(task):
                    if self._mail.has("end"):
                        return self._ended(self._mail.get("end"))
                    if self._mail.has("stop"):
                        self._own.stop()
                    time.sleep(POLL_SECONDS)
                lanes.submit(self._answer, number, *self._mail.take(task))
        raise AssertionError("numbers do not end")

    def _load(self) -> None:
        """Make the model while rank 0 makes its own; if that fails, the first row group will say so."""
        while not self._mail.has("load"):
            if self._mail.has("end"):
                return
            time.sleep(POLL_SECONDS)
        with self._lock, contextlib.suppress(Exception):
            _ = self.model

    def _ended(self, figures: Mapping[str, Any] | None) -> Mapping[str, Any]:
        if figures is None:
            self._own.stop()
            raise InterruptedRunError("Rank 0 ended the capture; its output says why.")
        return figures

    def _answer(self, number: int, job: Job, work: GroupWork, identity: Any) -> None:
        try:
            with self._lock:
                model = self.model
            if model.identity != identity:
                raise MismatchError(
                    f"Rank {self.rank} has another model than rank 0: {model.identity}; expected {identity}."
                )
            answer: Any = self._own.compute(model, job, work)
        except BaseException as error:
            answer = error
        try:
            self._mail.put(f"done/{self.rank}/{number}", answer)
        except (pickle.PicklingError, TypeError, AttributeError):
            self._mail.put(f"done/{self.rank}/{number}", RuntimeError(f"Rank {self.rank} failed: {answer!r}"))

    def _compute_here(self, job: Job, work: GroupWork) -> Objects | None:
        return self._own.compute(self.model, job, work)

    def _compute_at(self, rank: int, job: Job, work: GroupWork) -> Objects | None:
        with self._lock:
            number = next(self._numbers[rank])
            self._mail.put(f"task/{rank}/{number}", (job, work, self.model.identity))
        done = f"done/{rank}/{number}"
        while not self._mail.has(done):
            if time.monotonic() > self._give_up_at:
                return None
            time.sleep(POLL_SECONDS)
        answer = self._mail.take(done)
        if isinstance(answer, BaseException):
            raise answer
        return None if answer is None else dict(answer)

    def _terminated(self, number: int, frame: FrameType | None) -> None:
        """On SIGTERM, by which torchrun ends the other processes when one has died."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is being ended already
        self._give_up_at = 0.0
        error = InterruptedRunError("torchrun ended this process, most likely because another one had died.")
        if self.under_way is None:
            raise error
        # Not here: this runs inside the main thread, which may hold the very lock that winding down needs.
        threading.Thread(target=self.under_way.stop, args=(error,), daemon=True).start()

    def __enter__(self) -> "TorchrunCrew":
        self._handlers = contextlib.ExitStack()
        if self.leads:
            self._handlers.enter_context(_handled(signal.SIGTERM, self._terminated))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.leads and error is not None:
            with contextlib.suppress(Exception):
                self._mail.put("end", None)
        self._own.close()
        self._handlers.close()


class _Mail:
    """Messages between the ranks, each under a key of its own. They are pickled: all ranks are one program.

    Args:
        number: of the capture.
    """

    def __init__(self, number: int) -> None:
        from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]

        store, _, _ = next(iter(rendezvous("env://")))
        self._store = PrefixStore(f"capture/{number}", store)

    def put(self, key: str, content: Any) -> None:
        self._store.set(key, pickle.dumps(content))  # type: ignore[arg-type]  # bytes are taken, too

    def has(self, key: str) -> bool:
        return bool(self._store.check([key]))

    def get(self, key: str) -> Any:
        return pickle.loads(self._store.get(key))

    def take(self, key: str) -> Any:
        """Get a message that is for one rank alone, and forget it."""
        content = self.get(key)
        self._store.delete_key(key)
        return content


def _take_own_gpu() -> None:
    """Leave this process the GPU of its local rank alone, which is then "cuda" to it."""
    if "LOCAL_RANK" not in os.environ:
        return
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
    if devices and not torch.cuda.is_initialized():
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[int(os.environ["LOCAL_RANK"]) % len(devices)]


@contextlib.contextmanager
def _handled(number: signal.Signals, handler: Any) -> Iterator[None]:
    """Within it a signal is handled so; outside of the main thread, where signals cannot be caught, it does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)
