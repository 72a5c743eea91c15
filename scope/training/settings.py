"""What a fine-tuning is configured by. Light to import: the CLI makes its options from it."""

import math
from dataclasses import dataclass

from scope.errors import InvalidInputError

__all__ = ["FinetuneConfig"]


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Settings of an end-to-end fine-tuning."""

    tokens: int = 200_000
    """Tokens to train on; more than the store has means several passes."""
    batch_tokens: int = 1024
    """Tokens in a step, about: whole windows."""
    lr: float = 5e-5
    """Peak learning rate of Adam."""
    warmup: float = 0.05
    """Share of the run over which the learning rate rises linearly from 0; it falls to 0 over all the rest."""
    mse_weight: float = 1.0
    """Weight of the reconstruction's fvu beside the KL, which is scaled to the same size. 0: KL alone."""
    seed: int = 0
    """Seed of the order of the windows."""

    def __post_init__(self) -> None:
        for name in ("tokens", "batch_tokens"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"{name} is {getattr(self, name):,}; expected at least 1.")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise InvalidInputError(f"lr is {self.lr}; expected a positive number.")
        if not 0 <= self.warmup < 1:
            raise InvalidInputError(f"warmup is {self.warmup}; expected a share of the run, less than 1.")
        if not self.mse_weight >= 0:
            raise InvalidInputError(f"mse_weight is {self.mse_weight}; expected 0 or more.")
