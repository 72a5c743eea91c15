"""From pre-activations to features: what an activation function is, and what it does in training.

An activation function belongs to one architecture's file (`standard`, `gated`, `topk`, `batchtopk`, `jumprelu`);
transcoders, crosscoders and cross-layer transcoders choose one of them (`scope.saes.choice`). It holds no tensors: its
parameters lie on the SAE, under the names that SAELens's files have.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from scope.kernels import entries
from scope.saes.active import Active, Dense, Listed
from scope.saes.sharing import ALONE, Sharing

if TYPE_CHECKING:
    from scope.saes.base import SAE, TrainingContext

__all__ = ["Activation", "listed"]

LISTED_SHARE = 1 / 8
"""Where more of the features fire, the dense layout is the faster one."""


class Activation:
    """The base of all activation functions; see the module's docstring."""

    name: ClassVar[str] = ""
    parameters: ClassVar[Mapping[str, float]] = {"b_enc": 0.0}
    """Parameters `(d_sae,)` of the SAE, each with its initial value."""
    buffers: ClassVar[tuple[str, ...]] = ()
    """Numbers that it keeps on the SAE, for all features together, and that no gradient moves."""
    in_feature_units: ClassVar[tuple[str, ...]] = ("b_enc",)
    """Those that scale as the features do, buffers too."""
    centring: ClassVar[tuple[str, ...]] = ("b_enc",)
    """Those that take up the inputs' centre where no b_dec is subtracted."""
    coefficient: ClassVar[float | None] = None
    """Weight that its sparsity penalty starts from; None where k alone says how many features fire."""

    steering_gain: ClassVar[float] = 1.0
    """How much faster than usual the L0 controller moves the penalty's weight."""
    steering_damping: ClassVar[float] = 0.5
    """How strongly it reacts at once."""

    def encode(self, sae: "SAE", centred: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Features, dense, outside of training."""
        raise NotImplementedError

    def encode_sparse(self, sae: "SAE", centred: Float[Tensor, "*batch d_in"]) -> tuple[Tensor, Tensor] | None:
        """Ids and values of what fires, where that is found faster than `encode`; None where it is not."""
        return None

    def train(self, sae: "SAE", centred: Float[Tensor, "batch d_in"], context: "TrainingContext") -> Active:
        """Features of a training batch, differentiable."""
        raise NotImplementedError

    def penalties(
        self, sae: "SAE", active: Active, target: Float[Tensor, "batch d_out"], context: "TrainingContext"
    ) -> Mapping[str, Float[Tensor, ""]]:
        """Terms that it adds to the loss, weighted, by name."""
        return {}

    def start_coefficient(self, sae: "SAE") -> float | None:
        """Weight that the sparsity penalty of this SAE starts from; None where there is none."""
        return self.coefficient

    def bias_of(self, sae: "SAE") -> Float[Tensor, " d_sae"]:
        """The bias that decides which features fire."""
        bias: Tensor = sae.b_enc
        return bias

    def settle(self, sae: "SAE", centred: Float[Tensor, "rows d_in"], k: int, sharing: Sharing = ALONE) -> None:
        """Start from a sample of centred inputs where about k features fire on a row."""

    def for_inference(self, sae: "SAE") -> "SAE":
        """The SAE as it is stored and used, when training is over."""
        return sae

    def after_step(self, sae: "SAE", counts: Int[Tensor, " d_sae"]) -> None:
        """Bring its parameters back to where they make sense, after the optimiser moved them."""


def listed(
    sae: "SAE", centred: Float[Tensor, "batch d_in"], index: Int[Tensor, " entries"], pre: Float[Tensor, "batch d_sae"]
) -> Active | None:
    """Pre-activations at flat positions, in the listed layout; None where the dense one is better.

    Args:
        sae: has one encoder for all features, and `b_enc`.
        centred: its inputs.
        index: ascending positions in the flattened pre-activations.
        pre: all pre-activations, computed without gradients.
    """
    if not sae.has_one_encoder or len(index) > LISTED_SHARE * pre.numel():
        return None
    places = entries.places_of(index, len(centred), sae.d_sae)
    values = entries.encode_at(centred, sae.W_enc.T, sae.b_enc, places, pre)
    return Listed(values, places, sae.d_sae, pre=values)


def pre_activations_alone(sae: "SAE", centred: Tensor) -> Tensor:
    """Pre-activations without gradients."""
    with torch.no_grad():
        return sae.pre_activations(centred, sae.b_enc)


def dense_at(pre: Tensor, index: Tensor) -> Dense:
    """Dense features that are the pre-activations at flat positions, and 0 elsewhere."""
    mask = torch.zeros(pre.numel(), dtype=torch.bool, device=pre.device)
    mask[index] = True
    return Dense(pre * mask.view(pre.shape), pre)
