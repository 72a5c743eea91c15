"""Checkpoints: everything that a trainer needs to go on as if it had never stopped, in one safetensors file.

Weights, Adam's moments and the firing counters are tensors; the scale and the counts stand as JSON in the file's
header. One file, replaced atomically: a reader sees the old checkpoint or the new one. Where several processes train
one SAE, the first one writes the same file for all, so that any number of processes can go on from it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise

from activations.manifest import write_atomically
from scope.errors import IntegrityError

if TYPE_CHECKING:
    from torch import Tensor

    from scope.training.trainer import SAETrainer

__all__ = ["Progress", "load_checkpoint", "save_checkpoint"]


class Progress(NamedTuple):
    """What the loop, not the trainer, has to know to go on."""

    log_bytes: int
    """Length of the run log at the checkpoint."""
    seconds: float
    """Time spent in the loop until then."""


def save_checkpoint(
    path: Path, tensors: "Mapping[str, Tensor]", counters: Mapping[str, Any], progress: Progress
) -> None:
    """Replace the checkpoint at `path` by a trainer's `state_tensors` and `counters`."""
    state = json.dumps({**counters, **progress._asdict()}, allow_nan=False)
    on_host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, serialise(on_host, metadata={"state": state}))


def load_checkpoint(path: Path, trainer: "SAETrainer") -> Progress:
    """Put a trainer of the same settings where the checkpoint was taken.

    Raises:
        IntegrityError: the file cannot be read or does not fit the trainer.
    """
    try:
        with safe_open(path, framework="pt") as file:
            state: dict[str, Any] = json.loads(file.metadata()["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        progress = Progress(state.pop("log_bytes"), state.pop("seconds"))
        trainer.restore(tensors, state)
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise IntegrityError(
            f"The checkpoint {path} cannot be used ({error}). Delete its folder to start the run anew."
        ) from error
    return progress
