"""What comparisons of several models with one base model, on one text, need of the base model: made once."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import Tensor

from scope.diffing.readings import Readings

__all__ = ["LayerBatch", "ReferencePass"]

LayerBatch = tuple[np.ndarray, dict[str, Tensor]]
"""Row ids, and by hook their activations, float32."""


@dataclass(eq=False)
class ReferencePass:
    """Handed from one comparison to the next; all of them have the same base model, text, settings and SAEs."""

    folder: Path
    """Where the base model's store is put; it outlasts a comparison."""
    layers: list[LayerBatch] = field(default_factory=list)
    """The residual stream after each layer, `layer_tokens` rows in all: rows × layers × d_model × 4 bytes."""
    readings: dict[str, Readings] = field(default_factory=dict)
    """By name of the SAE."""
