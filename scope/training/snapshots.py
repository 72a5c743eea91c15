"""Decoders kept along the way, so that births and splits of features can be followed over a training.

`NAME.snapshots/step-N.safetensors` beside the output folder `NAME` holds W_dec `(d_sae, d_out)` after step N, in the
model's own units, and says in its header, as a checkpoint does, which step that was. Of `n` snapshots the last is taken
half-way, and each other at half the steps of the one after it: features come early, and split late.
"""

import json
from pathlib import Path

from jaxtyping import Float
from safetensors.torch import save as serialise
from torch import Tensor

from activations.manifest import write_atomically
from scope.errors import InvalidInputError
from scope.training.runs import snapshots_beside

__all__ = ["save_snapshot", "snapshot_steps"]


def snapshot_steps(n_steps: int, n: int) -> frozenset[int]:
    """After which of a run's steps its `n` snapshots are taken; fewer where the run is too short to halve so often.

    Raises:
        InvalidInputError: `n` is negative.
    """
    if n < 0:
        raise InvalidInputError(f"snapshots is {n}; expected 0 or more.")
    return frozenset(step for part in range(1, n + 1) if (step := n_steps >> part) > 0)


def save_snapshot(out: Path, rows: Float[Tensor, "d_sae d_out"], steps: int, tokens: int, seconds: float) -> None:
    """Write the decoder after a step beside the output folder `out`."""
    folder = snapshots_beside(out)
    folder.mkdir(parents=True, exist_ok=True)
    state = json.dumps({"steps_done": steps, "tokens_done": tokens, "seconds": seconds})
    content = serialise({"W_dec": rows.detach().cpu().contiguous()}, metadata={"state": state})
    write_atomically(folder / f"step-{steps:09d}.safetensors", content)
