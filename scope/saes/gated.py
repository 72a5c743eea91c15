"""Gated: one half of the encoder decides whether a feature fires, the other half how strongly."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from torch.nn import functional

from scope.saes.activation import Activation
from scope.saes.active import Active, Dense
from scope.saes.base import SAE, SAEConfig
from scope.saes.registry import register

if TYPE_CHECKING:
    from scope.saes.base import TrainingContext

__all__ = ["Gated", "GatedConfig", "GatedSAE"]


class Gated(Activation):
    """Whether gate = proj + b_gate is above 0, times ReLU(exp(r_mag) proj + b_mag), with proj = centred W_enc."""

    name: ClassVar[str] = "gated"
    parameters: ClassVar[Mapping[str, float]] = {"b_gate": 0.0, "b_mag": 0.0, "r_mag": 0.0}
    in_feature_units: ClassVar[tuple[str, ...]] = ("b_gate", "b_mag")
    centring: ClassVar[tuple[str, ...]] = ("b_gate", "b_mag")
    coefficient: ClassVar[float | None] = 1.0

    def encode(self, sae: SAE, centred: Tensor) -> Tensor:
        return self._features(sae, sae.project(centred))[0]

    def train(self, sae: SAE, centred: Tensor, context: "TrainingContext") -> Active:
        features, gate = self._features(sae, sae.project(centred))
        return Dense(features, gate)

    def penalties(self, sae: SAE, active: Active, target: Tensor, context: "TrainingContext") -> Mapping[str, Tensor]:
        assert active.pre is not None
        open_gates, W_dec = active.pre.relu(), sae.decoder()
        b_dec: Tensor = sae.b_dec
        sharing = context.sharing
        sparsity = sharing.sum_over_features((open_gates * sae.output_norms(W_dec)).sum(dim=-1)).mean()
        if sae.cfg.freeze_decoder_for_gate:  # type: ignore[attr-defined]
            W_dec, b_dec = W_dec.detach(), b_dec.detach()
        error = functional.mse_loss(
            sharing.sum_over_features(open_gates @ W_dec) + b_dec, target, reduction="sum"
        ) / len(target)
        return {"sparsity": context.sparsity_coefficient * sparsity, "gate": error}

    def bias_of(self, sae: SAE) -> Tensor:
        bias: Tensor = sae.b_gate
        return bias

    @staticmethod
    def _features(sae: SAE, projected: Tensor) -> tuple[Tensor, Tensor]:
        gate = projected + sae.b_gate
        return (gate > 0) * (projected * sae.r_mag.exp() + sae.b_mag).relu(), gate


@dataclass(frozen=True, kw_only=True)
class GatedConfig(SAEConfig):
    """Configuration of a `GatedSAE`."""

    architecture: ClassVar[str] = "gated"

    freeze_decoder_for_gate: bool = True
    """Whether the gate's own reconstruction leaves the decoder alone, as in the paper; SAELens trains it too."""

    @classmethod
    def for_training(cls, *, d_sae: int, k: int, **common: Any) -> "GatedConfig":
        return cls(d_sae=d_sae, **common)


@register(GatedConfig)
class GatedSAE(SAE):
    """The gated autoencoder of Rajamanoharan et al. 2024, "Improving dictionary learning" (arXiv 2404.16014), 3.

        proj = (x - b_dec) W_enc      gate = proj + b_gate
        f = H(gate) ReLU(exp(r_mag) proj + b_mag)      x_hat = f W_dec + b_dec

    The penalty acts on the gates alone, so that it does not shrink the features (equation 8): with the decoder held
    fixed in the last term,

        loss = mean over rows of ‖x - x_hat‖² + coefficient x sum over i of ReLU(gate_i) ‖W_dec,i‖
                                              + ‖x - ReLU(gate) W_dec - b_dec‖²
    """

    cfg: GatedConfig
    activation = Gated()
