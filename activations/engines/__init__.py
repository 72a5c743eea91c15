"""Engines: where the model's work on the row groups of a capture is done.

- `local`: in this process (`activations.passes`).
- `ray`: by actors of a Ray cluster, or of this machine (`activations.engines.ray`).
- `torchrun`: by the processes that torchrun has started (`activations.engines.torchrun`).

With all of them one process, the driver, holds the store's lock, tokenises, and commits; workers run the model on row
groups and write their shards. The store that comes out is the same, byte for byte, as long as the model gives the
same numbers on each worker.
"""

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal, get_args

from activations.errors import InvalidInputError, UnknownNameError

if TYPE_CHECKING:
    from activations.engines.crew import Crew
    from activations.source import HookedModel

__all__ = ["Engine", "detected_engine", "is_follower", "open_crew"]

Engine = Literal["local", "ray", "torchrun"]


def detected_engine(environment: Mapping[str, str] = os.environ) -> Engine:
    """`torchrun` where torchrun started this process with others, else `local`."""
    started = "TORCHELASTIC_RUN_ID" in environment and int(environment.get("WORLD_SIZE", "1")) > 1
    return "torchrun" if started else "local"


def is_follower(engine: Engine, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process works for another one, which says what is to be said."""
    return engine == "torchrun" and environment.get("RANK", "0") != "0"


def open_crew(
    engine: Engine,
    model: "HookedModel | Callable[[], HookedModel]",
    workers: int | None,
    gpus_per_worker: int | None,
) -> "Crew":
    """Who does a capture's work; a context manager. Nothing is started before its model is asked for.

    Args:
        engine: one of the three.
        model: the model, or a function that makes it; engines with several processes want a function.
        workers: how many, for Ray; None for one a GPU, or two where there is none.
        gpus_per_worker: for Ray; None for 1 where the cluster has GPUs.

    Raises:
        InvalidInputError: the engine cannot be used with these settings, or its package is not installed.
        UnknownNameError: there is no such engine.
    """
    if engine not in get_args(Engine):
        raise UnknownNameError("engine", engine, get_args(Engine))
    if engine != "ray" and (workers is not None or gpus_per_worker is not None):
        more = "torchrun's --nproc-per-node says how many there are" if engine == "torchrun" else "local is one process"
        raise InvalidInputError(f"The number of workers is for the engine ray; the engine is {engine} ({more}).")
    if engine == "local":
        from activations.engines.crew import LocalCrew

        return LocalCrew(model)
    if hasattr(type(model), "forward_rows"):
        raise InvalidInputError(
            f"The engine {engine} makes a model in each worker: give a function that makes one, not a model."
        )
    if engine == "ray":
        from activations.engines.ray import RayCrew

        return RayCrew(model, workers, gpus_per_worker)  # type: ignore[arg-type]
    from activations.engines.torchrun import TorchrunCrew

    return TorchrunCrew(model)  # type: ignore[arg-type]
