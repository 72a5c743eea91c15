"""The standard SAE: every positive pre-activation is a feature, and an L1 penalty keeps them few."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from scope.saes.activation import Activation, listed
from scope.saes.active import Active, Dense
from scope.saes.base import SAE, SAEConfig
from scope.saes.registry import register

if TYPE_CHECKING:
    from scope.saes.base import TrainingContext

__all__ = ["ReLU", "StandardConfig", "StandardSAE"]


class ReLU(Activation):
    """f = ReLU(pre), with the penalty of Anthropic's April 2024 update: coefficient x mean of sum f_i ‖W_dec,i‖.

    With several outputs the norm is the sum of the norms at each (Lindsey et al. 2024, "Sparse crosscoders", 2).
    """

    name: ClassVar[str] = "relu"
    coefficient: ClassVar[float | None] = 1.0

    def encode(self, sae: SAE, centred: Tensor) -> Tensor:
        return sae.pre_activations(centred, sae.b_enc).relu()

    def train(self, sae: SAE, centred: Tensor, context: "TrainingContext") -> Active:
        with torch.no_grad():
            pre = sae.pre_activations(centred, sae.b_enc)
            index = (pre > 0).flatten().nonzero().flatten()
        few = listed(sae, centred, index, pre)
        if few is not None:
            return few
        return Dense(sae.pre_activations(centred, sae.b_enc).relu())

    def penalties(self, sae: SAE, active: Active, target: Tensor, context: "TrainingContext") -> Mapping[str, Tensor]:
        norms = sae.output_norms(sae.decoder())
        each = context.sharing.sum_over_features(active.row_sums(active.values * active.of(norms)))
        return {"sparsity": context.sparsity_coefficient * each.mean()}


@dataclass(frozen=True, kw_only=True)
class StandardConfig(SAEConfig):
    """Configuration of a `StandardSAE`."""

    architecture: ClassVar[str] = "standard"


@register(StandardConfig)
class StandardSAE(SAE):
    """The autoencoder of Bricken et al. 2023, "Towards monosemanticity", and of Anthropic's April 2024 update.

        f = ReLU((x - b_dec) W_enc + b_enc)      x_hat = f W_dec + b_dec

        loss = mean over rows of ‖x - x_hat‖² + sparsity coefficient x sum over i of f_i ‖W_dec,i‖

    The update weighs each feature by its decoder row's norm, so that the penalty cannot be escaped by small features
    with large rows. Where the trainer keeps rows at norm 1, that is Bricken et al.'s plain L1.
    """

    activation = ReLU()
