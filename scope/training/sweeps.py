"""What a sweep trains: every combination of some settings, all of which can take the same batches."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from scope.errors import InvalidInputError
from scope.training.config import SWEPT, TrainConfig

__all__ = ["SweepRun", "require_one_pass", "sweep"]

SHARED = ("tokens", "batch_size", "seed", "shuffle_bytes", "max_norm_ratio", "balance", "parallel", "device")
"""Settings that decide which batches come, and so must be the same for all runs."""


@dataclass(frozen=True)
class SweepRun:
    """One SAE of a sweep."""

    name: str
    """Its folder's name."""
    hooks: tuple[str, ...]
    """What it reads."""
    hooks_out: tuple[str, ...]
    """What it writes, where that is another hook."""
    config: TrainConfig
    """Its settings."""


def sweep(config: TrainConfig, hooks: Sequence[str], **values: Sequence[Any]) -> list[SweepRun]:
    """An SAE for each hook and each combination of the given values, in that order.

    Args:
        config: the settings that all share.
        hooks: one-hook SAEs are trained on each of these.
        values: for some of `SWEPT` (arch, d_sae, k, lr) the values to combine.

    Raises:
        InvalidInputError: a setting cannot be swept, or a combination makes no sense.
    """
    for name in values:
        if name not in SWEPT:
            raise InvalidInputError(f"{name} cannot be swept; expected some of {', '.join(SWEPT)}.")
    names = [name for name in SWEPT if values.get(name)]
    varying = [name for name in names if len(values[name]) > 1]
    runs = []
    for hook in hooks:
        for combination in itertools.product(*[values[name] for name in names]):
            chosen: dict[str, Any] = dict(zip(names, combination, strict=True))
            parts = [f"{name}-{_text(value)}" for name, value in chosen.items() if name in varying]
            name = "_".join([hook] * (len(hooks) > 1) + parts) or hook
            runs.append(SweepRun(name, (hook,), (), replace(config, **chosen)))
    return runs


def require_one_pass(runs: Sequence[SweepRun]) -> None:
    """Raise `InvalidInputError` unless there are runs, with different names, that take the same batches."""
    if not runs:
        raise InvalidInputError("A sweep needs at least one run.")
    names = [run.name for run in runs]
    for name in names:
        if names.count(name) > 1 or not name or "/" in name:
            raise InvalidInputError(f"A run of the sweep is named {name!r}; names are folders', each another.")
    for setting in SHARED:
        found = sorted({getattr(run.config, setting) for run in runs})
        if len(found) > 1:
            raise InvalidInputError(
                f"The runs of a sweep share their batches, but {setting} is {' and '.join(map(str, found))}. "
                "Train them one by one."
            )


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
