"""Training: `train` from a source to an SAE on disk, `train_sweep` to many, `SAETrainer` a batch at a time, metrics."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scope.training.config import TrainConfig
    from scope.training.finetune import finetune_kl
    from scope.training.report import TrainReport
    from scope.training.run import train, train_sweep
    from scope.training.settings import FinetuneConfig
    from scope.training.sweeps import SweepRun, sweep
    from scope.training.trainer import SAETrainer

__all__ = [
    "FinetuneConfig",
    "SAETrainer",
    "SweepRun",
    "TrainConfig",
    "TrainReport",
    "finetune_kl",
    "sweep",
    "train",
    "train_sweep",
]

_HOMES = {
    "FinetuneConfig": "settings",
    "finetune_kl": "finetune",
    "SAETrainer": "trainer",
    "SweepRun": "sweeps",
    "TrainConfig": "config",
    "TrainReport": "report",
    "sweep": "sweeps",
    "train": "run",
    "train_sweep": "run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
