"""What keeps features few during a run: the L0 controller, and the penalty on features that fire too often.

`SparsityController` steers the coefficient of the sparsity penalty so that nobody searches for it by hand:

1. over the sparsity warm-up the coefficient rises linearly from 0 to its start, and nothing is steered;
2. then, with e a running mean of log(L0 / target), limited to ±1, the logarithm of the coefficient goes up by a gain
   times e each step, and a damping times e is added on top: the first finds the level, the second calms the way there.
   The gain is such that the coefficient can go anywhere within a run. Where features come and go slowly (JumpReLU,
   whose thresholds move by about the learning rate) the damping is higher.

`FrequencyPenalty` keeps a running share of rows on which each feature fires. With p that share and `cap` the largest
that costs nothing, a feature's activations are added to the loss with the weight coefficient x max(0, p / cap - 1).

Both keep their state on the training's device, and nothing here makes the device wait.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from scope.saes.base import SAE
from scope.training.config import TrainConfig

__all__ = ["FrequencyPenalty", "SparsityController"]

INTEGRAL_RUN = 15.0
"""How far log(coefficient) can move over a whole run, with e at its limit."""
MIN_INTEGRAL, MAX_INTEGRAL = 0.0005, 0.03
ERROR_RATE = 0.1
"""Share that each batch has in the running mean of log(L0 / target)."""
FREQUENCY_RATE = 0.01


class SparsityController:
    """The coefficient of the sparsity penalty over a run; see the module's docstring.

    Args:
        start: the coefficient after the warm-up.
        steps: steps in the run.
        warmup: share of the run over which the coefficient rises from 0.
        steer: False keeps it at `start`.
        gain: how much faster than usual the coefficient moves.
        damping: what times the error is added to the coefficient's logarithm.
        device: where its state lies.
    """

    def __init__(
        self,
        start: float,
        steps: int,
        warmup: float,
        steer: bool,
        device: str,
        gain: float = 1.0,
        damping: float = 0.5,
    ) -> None:
        self.warmup_steps, self.steer, self.damping = warmup * steps, steer, damping
        self.integral = gain * min(MAX_INTEGRAL, max(MIN_INTEGRAL, INTEGRAL_RUN / steps))
        self._log = torch.full((), math.log(start), device=device)
        self._error = torch.zeros((), device=device)

    @classmethod
    def of(cls, config: TrainConfig, sae: SAE) -> "SparsityController | None":
        """The controller of a run; None where the activation function has no penalty."""
        act = sae.activation
        default = act.start_coefficient(sae)
        if default is None:
            return None
        start = config.sparsity_coefficient if config.sparsity_coefficient is not None else default
        steer, gains = config.l0_controller, (act.steering_gain, act.steering_damping)
        return cls(start, config.steps, config.sparsity_warmup, steer, config.device, *gains)

    def coefficient(self, step: int) -> Float[Tensor, ""]:
        """The coefficient that holds at a step, from 0 to `steps` - 1."""
        rising = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        push = self.damping * self._error if self.steer and step >= self.warmup_steps else 0.0
        return rising * torch.exp(self._log + push)

    def observe(self, steps_done: int, l0: Float[Tensor, ""], target: float) -> None:
        """Take note of a step's L0 and move the coefficient."""
        self._error.lerp_(torch.log(l0.clamp_min(1e-3 * target) / target).clamp(-1, 1), ERROR_RATE)
        if self.steer and steps_done >= self.warmup_steps:
            self._log.add_(self._error, alpha=self.integral)

    def state(self) -> dict[str, Tensor]:
        """All that its later steps depend on, by name."""
        return {"sparsity.log": self._log, "sparsity.error": self._error}


class FrequencyPenalty:
    """Weights for features that fire too often; see the module's docstring.

    Smith et al. 2025, "Negative results for SAEs on downstream tasks", appendix, penalise dense features of JumpReLU
    SAEs in this spirit; here the weight acts on the activations, which every architecture has.
    """

    def __init__(self, coefficient: float, cap: float, d_sae: int, device: str) -> None:
        self.strength, self.cap = coefficient, cap
        self._shares = torch.zeros(d_sae, device=device)

    @classmethod
    def of(cls, config: TrainConfig, sae: SAE) -> "FrequencyPenalty | None":
        """The penalty of a run; None where it has none."""
        if not config.frequency_coefficient:
            return None
        return cls(config.frequency_coefficient, config.frequency_cap, sae.d_sae, config.device)

    def weights(self) -> Float[Tensor, " d_sae"]:
        """The weight of each feature's activations in the loss."""
        return self.strength * (self._shares / self.cap - 1).clamp_min(0)

    def observe(self, counts: Int[Tensor, " d_sae"], n_rows: int) -> None:
        """Take note of the rows on which each feature fired."""
        self._shares.lerp_(counts / n_rows, FREQUENCY_RATE)

    def state(self) -> dict[str, Tensor]:
        """All that its later steps depend on, by name."""
        return {"frequency.shares": self._shares}
