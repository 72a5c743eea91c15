"""Checkpoints: everything that a trainer needs to go on as if it had never stopped, in one safetensors file.

Weights, Adam's moments and the firing counters are tensors; the scale and the counts stand as JSON in the file's
header. One file, replaced atomically: a reader sees the old checkpoint or the new one.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise

from activations.manifest import write_atomically
from scope.errors import IntegrityError
from scope.training.trainer import SAETrainer

__all__ = ["Progress", "load_checkpoint", "save_checkpoint"]


class Progress(NamedTuple):
    """What the loop, not the trainer, has to know to go on."""

    log_bytes: int
    """Length of the run log at the checkpoint."""
    seconds: float
    """Time spent in the loop until then."""


def save_checkpoint(path: Path, trainer: SAETrainer, progress: Progress) -> None:
    """Replace the checkpoint at `path`."""
    state = json.dumps({**trainer.counters(), **progress._asdict()}, allow_nan=False)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in trainer.state_tensors().items()}
    write_atomically(path, serialise(tensors, metadata={"state": state}))


def load_checkpoint(path: Path, trainer: SAETrainer) -> Progress:
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
