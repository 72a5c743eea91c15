"""Training: `train` from a source to an SAE on disk, `SAETrainer` a batch at a time, metrics on held-out text."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scope.training.config import TrainConfig
    from scope.training.report import TrainReport
    from scope.training.run import train
    from scope.training.trainer import SAETrainer

__all__ = ["SAETrainer", "TrainConfig", "TrainReport", "train"]

_HOMES = {"SAETrainer": "trainer", "TrainConfig": "config", "TrainReport": "report", "train": "run"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
