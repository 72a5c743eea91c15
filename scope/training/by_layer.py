"""A dictionary for every layer of a model: the runs that train them together."""

import re
from collections.abc import Sequence
from typing import Any

from scope.errors import InvalidInputError
from scope.training.config import TrainConfig
from scope.training.sweeps import SweepRun, sweep

__all__ = ["is_set", "layer_of", "one_for_each_layer"]

LAYER = re.compile(r"blocks\.(\d+)\.")


def layer_of(hook: str) -> int | None:
    """The layer that a hook lies in; None for one outside of the layers."""
    found = LAYER.match(hook)
    return int(found.group(1)) if found else None


def one_for_each_layer(
    config: TrainConfig, hooks: Sequence[str], hooks_out: Sequence[str], **values: Sequence[Any]
) -> list[SweepRun]:
    """A transcoder for each pair of hooks, such as what every MLP of a model reads and writes, for `train_sweep`.

    Args:
        config: the settings that all share.
        hooks: what each reads.
        hooks_out: what each writes, as many.
        values: as for `sweep`: all pairs with each combination.

    Returns:
        Runs named after the layer that they read: layer_00, layer_01, …

    Raises:
        InvalidInputError: there are not as many hooks to write as to read, or as for `sweep`.
    """
    if len(hooks) != len(hooks_out):
        raise InvalidInputError(
            f"The architecture {config.arch} reads one hook and writes one; got {len(hooks)} to read and "
            f"{len(hooks_out)} to write. Give one to write for each, in the same order, or train them one by one."
        )
    runs = []
    for number, (reads, writes) in enumerate(zip(hooks, hooks_out, strict=True)):
        layer = layer_of(reads)
        name = f"layer_{number if layer is None else layer:02d}"
        for run in sweep(config, [reads], **values):
            varied = "" if run.name == reads else f"_{run.name}"
            runs.append(SweepRun(name + varied, (reads,), (writes,), run.config))
    return runs


def is_set(runs: Sequence[SweepRun]) -> bool:
    """Whether some runs make one transcoder for each of several layers."""
    layers = [(layer_of(run.hooks[0]), layer_of(run.hooks_out[0])) for run in runs if len(run.hooks_out) == 1]
    paired = all(one is not None and one == other for one, other in layers)
    return 1 < len(runs) == len(set(layers)) == len(layers) and paired
