"""BatchTopK: over a whole batch the k x rows largest pre-activations become features, so that rows may share."""

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from scope.saes.activation import Activation, dense_at, listed
from scope.saes.active import Active
from scope.saes.base import SAE, SAEConfig
from scope.saes.jumprelu import JumpReLU, JumpReLUConfig, JumpReLUSAE
from scope.saes.registry import register
from scope.saes.topk import require_k

if TYPE_CHECKING:
    from scope.saes.base import TrainingContext

__all__ = ["BatchTopK", "BatchTopKConfig", "BatchTopKSAE", "followed_threshold"]

THRESHOLD_RATE = 0.01
"""Share that each batch has in the running mean of the smallest value that fires."""


class BatchTopK(Activation):
    """In training the k x rows largest positive pre-activations of the batch; later those above a fixed threshold.

    The threshold is the running mean of each batch's smallest value that fires (Bussmann et al. 2024, equation 5).
    """

    name: ClassVar[str] = "batchtopk"
    buffers: ClassVar[tuple[str, ...]] = ("threshold",)
    in_feature_units: ClassVar[tuple[str, ...]] = ("b_enc", "threshold")

    def encode(self, sae: SAE, centred: Tensor) -> Tensor:
        pre = sae.pre_activations(centred, sae.b_enc)
        return pre.relu() * (pre > sae.threshold)

    def train(self, sae: SAE, centred: Tensor, context: "TrainingContext") -> Active:
        k = context.k or sae.cfg.k  # type: ignore[attr-defined]
        with torch.no_grad():
            pre = sae.pre_activations(centred, sae.b_enc)
            index = context.sharing.largest(pre, k * (context.n_rows or len(pre)))
            smallest = context.sharing.smallest(pre.flatten()[index])
            sae.threshold.copy_(followed_threshold(sae.threshold, smallest))
        few = listed(sae, centred, index, pre)
        return few if few is not None else dense_at(sae.pre_activations(centred, sae.b_enc), index)

    def for_inference(self, sae: SAE) -> SAE:
        return as_jumprelu(sae)


def followed_threshold(threshold: Tensor, smallest: Tensor) -> Tensor:
    """The running threshold after a batch whose smallest value that fires is `smallest`; infinite where none does."""
    smallest = smallest.to(threshold.dtype)
    moved = torch.where(threshold == 0, smallest, threshold + THRESHOLD_RATE * (smallest - threshold))
    return torch.where(torch.isfinite(smallest), moved, threshold)


@dataclass(frozen=True, kw_only=True)
class BatchTopKConfig(SAEConfig):
    """Configuration of a `BatchTopKSAE`."""

    architecture: ClassVar[str] = "batchtopk"

    k: int
    """Features that fire on a row, on average over a batch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_k(self.k, self.d_sae)

    @classmethod
    def for_training(cls, *, d_sae: int, k: int, **common: Any) -> Any:
        return cls(d_sae=d_sae, k=k, **common)


@register(BatchTopKConfig)
class BatchTopKSAE(SAE):
    """The BatchTopK autoencoder of Bussmann et al. 2024, "BatchTopK sparse autoencoders" (arXiv 2412.06410), 3.

        f = ReLU(BatchTopK((x - b_dec) W_enc + b_enc))      x_hat = f W_dec + b_dec

    where BatchTopK keeps the k n largest entries of the n rows of a batch. The loss is TopK's. So that a row's features
    do not depend on the rows beside it, training keeps a running threshold, and the trained SAE is a JumpReLU SAE with
    that threshold for all features: this is how it is stored, as SAELens stores it.
    """

    activation = BatchTopK()


@torch.no_grad()
def as_jumprelu(sae: SAE) -> SAE:
    """The SAE with the same weights, JumpReLU, and an SAE's one threshold for all features."""
    inference: SAE
    if any(f.name == "activation" for f in fields(sae.cfg)):
        cfg = replace(sae.cfg, activation=JumpReLU.name, k=None)  # type: ignore[call-arg]
        inference = type(sae)(cfg, initialise=False, device=sae.device, share=sae.share)
    else:
        shared = {f.name: getattr(sae.cfg, f.name) for f in fields(SAEConfig)}
        inference = JumpReLUSAE(JumpReLUConfig(**shared), initialise=False, device=sae.device, share=sae.share)
    threshold = sae.threshold.expand(sae.d_sae)
    inference.to(sae.dtype).load_state_dict({**sae.state_dict(), "threshold": threshold})
    return inference
