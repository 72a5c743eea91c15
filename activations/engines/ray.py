"""Capture by the actors of a Ray cluster.

1. Where `RAY_ADDRESS` is set, that cluster is used, else one is started on this machine for the length of the capture:
   it listens on the loopback device only, sends no usage statistics, and its workers import what this process can.
2. Each actor makes the model once, from a function that is sent to it, and has a `GroupWorker`. It has a GPU to itself
   where there are some, else an equal share of the processors.
3. The driver makes no model: actors answer for it, and share the tokenising.
4. An actor that dies is started again by Ray, and what it was asked is asked again. A row group is computed from its
   tokens alone, so the store ends as if nothing had happened. An error of the model is no death: it ends the run.

The store lies where all workers reach it under the driver's path: on one machine, or a shared file system.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import Any

from activations.engines.crew import Compute, Objects, RemoteCrew
from activations.engines.worker import LANES, GroupWork, Job, JobWorkers, ModelCard, ModelProxy
from activations.errors import InterruptedRunError, InvalidInputError, MismatchError
from activations.source import HookedModel

__all__ = ["RayCrew", "start_local_ray"]

DEFAULT_WORKERS = 2
RESTARTS = 8
"""How often an actor may die before the run gives up."""
STARTS = 4
"""Attempts to start Ray: on a busy machine its own limit of 30 seconds may be too short."""
ASIDE = 2
"""Calls that an actor answers besides its row groups: for a tokenisation, and to stop."""
LOCAL_ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # no cluster of several machines: loopback only, on Linux too
    "RAY_USAGE_STATS_ENABLED": "0",
}


class RayCrew(RemoteCrew):
    """Actors that compute row groups.

    Args:
        make_model: sent to each actor, which calls it once; a function or class that cloudpickle can take.
        workers: how many actors; None for one a GPU, or two where there is none.
        gpus_per_worker: None for 1 where the cluster has GPUs, else 0.

    Raises:
        InvalidInputError: ray is not installed, or `workers` is below 1.
    """

    def __init__(
        self, make_model: Callable[[], HookedModel], workers: int | None = None, gpus_per_worker: int | None = None
    ) -> None:
        if workers is not None and workers < 1:
            raise InvalidInputError(f"workers is {workers}; expected at least 1.")
        _import_ray()
        self._make_model, self._workers, self._gpus = make_model, workers, gpus_per_worker
        self._actors: list[Any] = []
        self._model: ModelProxy | None = None
        self._owns_ray = False

    @property
    def model(self) -> HookedModel:
        if self._model is None:
            self._start()
            card = _answer(self._actors[0].card.remote())
            self._model = ModelProxy(card, self._ask)
        return self._model

    @property
    def lanes(self) -> Sequence[Compute]:
        return [partial(self._compute, actor) for _ in range(LANES) for actor in self._actors]

    def stop(self) -> None:
        for actor in self._actors:
            with contextlib.suppress(Exception):  # one that is dead has stopped
                actor.stop.remote()

    def _ask(self, name: str, *given: Any) -> Any:
        """Have the first actor call a method of its model; documents are tokenised by all of them at once."""
        if name != "encode_documents":
            return _answer(self._actors[0].ask.remote(name, *given))
        (given,) = given
        share = max(1, -(-len(given) // len(self._actors)))
        parts = [given[first : first + share] for first in range(0, len(given), share)]
        asked = [actor.ask.remote(name, part) for actor, part in zip(self._actors, parts, strict=False)]
        return [tokens for answer in asked for tokens in _answer(answer)]

    def _start(self) -> None:
        ray = _import_ray()
        if not ray.is_initialized():
            if os.environ.get("RAY_ADDRESS"):
                ray.init(log_to_driver=False)
            else:
                start_local_ray(self._workers)
            self._owns_ray = True
        resources = ray.cluster_resources()
        n_gpus, n_cpus = int(resources.get("GPU", 0)), resources.get("CPU", 1.0)
        gpus = self._gpus if self._gpus is not None else int(n_gpus > 0)
        workers = self._workers or (max(1, n_gpus // gpus) if gpus else DEFAULT_WORKERS)
        if workers * gpus > n_gpus:
            raise InvalidInputError(
                f"{workers} workers with {gpus} GPUs each were asked for; the Ray cluster has {n_gpus}. Ask for fewer "
                "workers, or for a model that runs on the CPU with 0 GPUs a worker."
            )
        actor = ray.remote(
            num_cpus=max(1, int(n_cpus // workers)) if n_cpus >= workers else n_cpus / workers,
            num_gpus=gpus,
            max_restarts=RESTARTS,
            max_task_retries=RESTARTS,
            max_concurrency=LANES + ASIDE,
        )(_Actor)
        self._actors = [actor.remote(self._make_model) for _ in range(workers)]

    def _compute(self, actor: Any, job: Job, work: GroupWork) -> Objects | None:
        assert self._model is not None
        objects = _answer(actor.compute.remote(job, work, self._model.identity))
        return None if objects is None else dict(objects)

    def __enter__(self) -> "RayCrew":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        ray = _import_ray()
        for actor in self._actors:
            ray.kill(actor)
        self._actors, self._model = [], None
        if self._owns_ray:
            ray.shutdown()
            self._owns_ray = False


class _Actor:
    """What runs in an actor. The model is made on first use, so that its errors arrive as they are."""

    def __init__(self, make_model: Callable[[], HookedModel]) -> None:
        self._make_model = make_model
        self._lock = threading.Lock()
        self._made: HookedModel | None = None
        self._workers = JobWorkers()

    def card(self) -> ModelCard:
        """What the driver needs to know of the model."""
        return ModelCard.of(self._model())

    def ask(self, name: str, *given: Any) -> Any:
        """Call a method of the model."""
        return getattr(self._model(), name)(*given)

    def compute(self, job: Job, work: GroupWork, identity: Any) -> Objects | None:
        """Compute a row group of a pass, if the model is the one that is expected."""
        model = self._model()
        if model.identity != identity:
            raise MismatchError(
                f"A worker has another model than the first: {model.identity}; expected {identity}. "
                "Give all nodes of the cluster the same model files and devices."
            )
        return self._workers.compute(model, job, work)

    def stop(self) -> None:
        """Let the pass end early."""
        self._workers.stop()

    def _model(self) -> HookedModel:
        with self._lock:
            if self._made is None:
                self._made = self._make_model()
            return self._made


def start_local_ray(workers: int | None = None) -> None:
    """Start Ray on this machine, reachable from this machine only, for as long as this process lives or until
    `ray.shutdown()`. There are at least as many processor slots as workers."""
    search_path = os.pathsep.join(path for path in sys.path if path)
    with _environment(LOCAL_ENVIRONMENT | {"PYTHONPATH": search_path}):
        ray = _import_ray()
        # Ray reads the variable when it is imported, which may have happened before.
        ray._private.ray_constants.ENABLE_RAY_CLUSTER = False
        for attempt in range(STARTS):
            try:
                ray.init(
                    address="local",
                    num_cpus=max(os.cpu_count() or 1, workers or DEFAULT_WORKERS),
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level="ERROR",
                )
                return
            except Exception as error:  # Ray gives its processes 30 seconds, and then raises nothing narrower
                ray.shutdown()
                if attempt == STARTS - 1:
                    raise InterruptedRunError(f"Ray could not be started on this machine: {error}") from error


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _answer(reference: Any) -> Any:
    """What an actor's call gives; an error in it is raised as the actor raised it."""
    ray = _import_ray()
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise (error.cause or error) from error
    except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError) as error:
        raise InterruptedRunError(f"A Ray worker died {RESTARTS + 1} times: {error}") from error


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise InvalidInputError(
            "The engine ray needs the package ray, which is not installed. "
            "Install it with: pip install 'scope-workbench[ray]'"
        ) from error
    return ray
