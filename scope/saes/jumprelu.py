"""JumpReLU: a feature fires where its pre-activation is above a threshold of its own, which is learned."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from scope.errors import InvalidInputError, UnknownNameError
from scope.saes.activation import Activation, listed
from scope.saes.active import Active, Dense
from scope.saes.base import SAE, SAEConfig
from scope.saes.registry import register
from scope.saes.sharing import ALONE, Sharing

if TYPE_CHECKING:
    from scope.saes.base import TrainingContext

__all__ = ["JumpReLU", "JumpReLUConfig", "JumpReLUSAE", "JumpReLUSettings", "jumprelu", "step"]

SPARSITY_LOSSES = ("step", "quadratic", "tanh")
SETTLE_SHARE = 0.5
"""A fresh SAE fires on this share of k: the thresholds start high, and what is learned first lowers them."""


def jumprelu(
    pre: Float[Tensor, "*shape"], threshold: Float[Tensor, "*shape"], bandwidth: float, ste_to_input: bool = False
) -> Float[Tensor, "*shape"]:
    """z H(z - θ), with the gradients of Rajamanoharan et al. 2024b, equation 11, H the Heaviside step.

    With K a rectangle of width 1 about 0 and ε the bandwidth,

        d/dz = H(z - θ)      d/dθ = -(θ/ε) K((z - θ)/ε)

    With `ste_to_input` the second, negated, is added to the first: the estimator depends on z - θ alone, and so does
    Anthropic's (January 2025 update, "Dictionary learning optimization techniques").
    """
    return _JumpReLU.apply(pre, threshold, bandwidth, ste_to_input)


def step(
    pre: Float[Tensor, "*shape"], threshold: Float[Tensor, "*shape"], bandwidth: float, ste_to_input: bool = False
) -> Float[Tensor, "*shape"]:
    """H(z - θ), with d/dθ = -(1/ε) K((z - θ)/ε) (equation 12), and that negated as d/dz with `ste_to_input`."""
    return _Step.apply(pre, threshold, bandwidth, ste_to_input)


def _window(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    return ((pre - threshold).abs() < bandwidth / 2).to(pre.dtype)


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pre, threshold, bandwidth, ste_to_input):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(pre, threshold)
        ctx.settings = bandwidth, ste_to_input
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        pre, threshold = ctx.saved_tensors
        bandwidth, ste_to_input = ctx.settings
        through = grad * threshold / bandwidth * _window(pre, threshold, bandwidth)
        grad_pre = grad * (pre > threshold)
        return grad_pre + through if ste_to_input else grad_pre, -through, None, None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pre, threshold, bandwidth, ste_to_input):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(pre, threshold)
        ctx.settings = bandwidth, ste_to_input
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        pre, threshold = ctx.saved_tensors
        bandwidth, ste_to_input = ctx.settings
        through = grad / bandwidth * _window(pre, threshold, bandwidth)
        return through if ste_to_input else None, -through, None, None


class JumpReLU(Activation):
    """f = pre where pre > threshold, else 0; trained with straight-through estimators and a penalty on L0.

    The penalty is, with c the sparsity coefficient, L0 the number of features that fire on a row and T its target,

        step       c mean(L0)                              Rajamanoharan et al. 2024b, equation 9
        quadratic  c mean((L0 / T - 1)²)                   the same, appendix G; Gemma Scope 2
        tanh       c mean(sum tanh(s f_i ‖W_dec,i‖))       Anthropic, January 2025 update; s is `tanh_scale`

    L0 has the gradient of `step`.
    """

    name: ClassVar[str] = "jumprelu"
    parameters: ClassVar[Mapping[str, float]] = {"b_enc": 0.0, "threshold": 0.0}
    in_feature_units: ClassVar[tuple[str, ...]] = ("b_enc", "threshold")
    coefficient: ClassVar[float | None] = 0.1
    steering_gain: ClassVar[float] = 2.0
    steering_damping: ClassVar[float] = 2.0

    def encode(self, sae: SAE, centred: Tensor) -> Tensor:
        pre = sae.pre_activations(centred, sae.b_enc)
        return pre.relu() * (pre > sae.threshold)

    def train(self, sae: SAE, centred: Tensor, context: "TrainingContext") -> Active:
        cfg: Any = sae.cfg
        with torch.no_grad():
            pre = sae.pre_activations(centred, sae.b_enc)
            # All that fires or lies in a threshold's window: the rest has neither a value nor a gradient.
            index = (pre > sae.threshold - cfg.bandwidth / 2).flatten().nonzero().flatten()
        active: Any = listed(sae, centred, index, pre)
        if active is None:
            active = Dense(pre, sae.pre_activations(centred, sae.b_enc))
        threshold = active.of(sae.threshold).expand_as(active.pre).to(active.pre.dtype)
        values = jumprelu(active.pre, threshold, cfg.bandwidth, cfg.ste_to_input)
        return replace(active, values=values)

    def penalties(self, sae: SAE, active: Active, target: Tensor, context: "TrainingContext") -> Mapping[str, Tensor]:
        cfg: Any = sae.cfg
        if cfg.sparsity_loss == "tanh":
            norms = active.of(sae.decoder().norm(dim=-1))
            each = context.sharing.sum_over_features(
                active.row_sums(torch.tanh(cfg.tanh_scale * active.values * norms))
            )
        else:
            assert active.pre is not None
            threshold = active.of(sae.threshold).expand_as(active.pre).to(active.pre.dtype)
            fires = step(active.pre, threshold, cfg.bandwidth, cfg.ste_to_input)
            each = context.sharing.sum_over_features(active.row_sums(fires))
            if cfg.sparsity_loss == "quadratic":
                each = (each / cfg.target_l0 - 1).square()
        return {"sparsity": context.sparsity_coefficient * each.mean()}

    def start_coefficient(self, sae: SAE) -> float | None:
        cfg: Any = sae.cfg
        return 2 * cfg.target_l0 if cfg.sparsity_loss == "quadratic" else self.coefficient

    @torch.no_grad()
    def settle(self, sae: SAE, centred: Tensor, k: int, sharing: Sharing = ALONE) -> None:
        pre = sae.pre_activations(centred[:1024], sae.b_enc)
        n = max(1, int(SETTLE_SHARE * k * len(pre)))
        sae.threshold.fill_(float(sharing.nth_largest(pre, n)))

    @torch.no_grad()
    def after_step(self, sae: SAE, counts: Tensor) -> None:
        sae.threshold.clamp_(min=0)  # below 0 negative pre-activations would pass


@dataclass(frozen=True, kw_only=True)
class JumpReLUSettings:
    """How thresholds are trained; afterwards none of it matters."""

    bandwidth: float = 0.5
    """Width of the window about a threshold in which it is learned, in units of scaled pre-activations."""
    sparsity_loss: str = "step"
    """What is penalised: "step", "quadratic" or "tanh"."""
    target_l0: float | None = None
    """Features a row that the quadratic penalty aims at."""
    tanh_scale: float = 4.0
    """Steepness of the tanh penalty."""
    ste_to_input: bool = False
    """Whether the straight-through estimator trains the encoder too (Anthropic), not the threshold alone."""

    def require_sense(self) -> None:
        """Raise `InvalidInputError` unless the settings make sense."""
        if not self.bandwidth > 0:
            raise InvalidInputError(f"bandwidth is {self.bandwidth}; expected a positive number.")
        if self.sparsity_loss not in SPARSITY_LOSSES:
            raise UnknownNameError("sparsity loss", self.sparsity_loss, SPARSITY_LOSSES)
        if self.target_l0 is not None and not self.target_l0 > 0:
            raise InvalidInputError(f"target_l0 is {self.target_l0}; expected a positive number.")
        if self.sparsity_loss == "quadratic" and self.target_l0 is None:
            raise InvalidInputError("The quadratic sparsity loss needs target_l0, the L0 that it aims at.")


@dataclass(frozen=True, kw_only=True)
class JumpReLUConfig(JumpReLUSettings, SAEConfig):
    """Configuration of a `JumpReLUSAE`."""

    architecture: ClassVar[str] = "jumprelu"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_sense()

    @classmethod
    def for_training(cls, *, d_sae: int, k: int, **common: Any) -> "JumpReLUConfig":
        return cls(d_sae=d_sae, **{"target_l0": float(k), **common})


@register(JumpReLUConfig)
class JumpReLUSAE(SAE):
    """The JumpReLU autoencoder of Rajamanoharan et al. 2024, "Jumping ahead" (arXiv 2407.14435), 3.

        f = pre H(pre - θ),  pre = (x - b_dec) W_enc + b_enc      x_hat = f W_dec + b_dec

        loss = mean over rows of ‖x - x_hat‖² + the penalty of `JumpReLU`

    with a threshold θ_i ≥ 0 for each feature. It is learned as it is, not as its logarithm: an optimiser that moves a
    parameter by about the learning rate hardly moves a logarithm.
    """

    cfg: JumpReLUConfig
    activation = JumpReLU()
