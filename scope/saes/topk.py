"""TopK: on each row the k largest pre-activations, and nothing else, become features."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from scope.errors import InvalidInputError
from scope.kernels.sparse import sparse_decode
from scope.kernels.topk import topk, topk_encode
from scope.saes.base import SAE, SAEConfig, SparseFeatures, TrainingContext, TrainingLoss
from scope.saes.registry import register

__all__ = ["TopKConfig", "TopKSAE"]


@dataclass(frozen=True, kw_only=True)
class TopKConfig(SAEConfig):
    """Configuration of a `TopKSAE`."""

    architecture: ClassVar[str] = "topk"

    k: int
    """Features that fire on each row, at most: of the k largest pre-activations those above 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.k <= self.d_sae:
            raise InvalidInputError(f"k is {self.k:,}; expected at least 1 and at most d_sae, {self.d_sae:,}.")

    @classmethod
    def for_training(cls, *, d_in: int, d_sae: int, k: int, **common: Any) -> "TopKConfig":
        return cls(d_in=d_in, d_sae=d_sae, k=k, **common)


@register(TopKConfig)
class TopKSAE(SAE):
    """The TopK autoencoder of Gao et al. 2024, "Scaling and evaluating sparse autoencoders" (arXiv 2406.04093), 2.3.

        f = ReLU(TopK((x - b_dec) W_enc + b_enc))      x_hat = f W_dec + b_dec

    where TopK keeps a row's k largest entries and zeroes the rest (without `apply_b_dec_to_input`, x is not centred).
    It is trained on the squared error and AuxK (appendix A.2), which lets features that have not fired for long model
    what the others leave over: with e = x - x_hat, held fixed, and ê its reconstruction from the `k_aux` dead features
    with the largest pre-activations,

        loss = mean over rows of ‖e‖² + auxk_coefficient ‖e - ê‖².
    """

    cfg: TopKConfig

    def encode(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*rows d_sae"]:
        pre = self._pre_activations(x)
        values, ids = torch.topk(pre, self.cfg.k, dim=-1, sorted=False)
        return torch.zeros_like(pre).scatter(-1, ids, values.relu())

    def encode_sparse(self, x: Float[Tensor, "*batch width"]) -> SparseFeatures:
        pre = self._pre_activations(x)
        if pre.requires_grad:
            values, ids = torch.topk(pre, self.cfg.k, dim=-1, sorted=False)
        else:
            flat = topk(pre.reshape(-1, self.d_sae), self.cfg.k)
            values, ids = (part.view(*pre.shape[:-1], self.cfg.k) for part in flat)
        return SparseFeatures(ids, values.relu())

    def training_loss(self, x: Float[Tensor, "batch d_in"], context: TrainingContext) -> TrainingLoss:
        centred = self._centred(x)
        values, ids, groups = topk_encode(centred, self.W_enc.T, self.b_enc, self.cfg.k)
        x_hat = sparse_decode(values, ids, self.W_dec, groups) + self.b_dec
        error = functional.mse_loss(x_hat, x, reduction="sum") / len(x)
        total = error
        parts = {}
        if context.dead is not None and context.auxk_coefficient:
            auxk = context.auxk_coefficient * self._auxk(centred, x - x_hat.detach(), context)
            total = total + auxk
            parts["auxk"] = auxk.detach()
        return TrainingLoss(total, error.detach(), SparseFeatures(ids, values.detach()), parts)

    def _auxk(self, centred: Tensor, residual: Tensor, context: TrainingContext) -> Tensor:
        assert context.dead is not None
        dead = context.dead.nonzero().flatten()
        activations = functional.linear(centred, self.W_enc.T[dead], self.b_enc[dead]).relu()
        if len(dead) > context.k_aux:
            smallest = topk(activations.detach(), context.k_aux).values.amin(dim=-1, keepdim=True)
            activations = activations * (activations >= smallest)
        # Few dead features explain little of the error; full weight would only make them noisy.
        share = min(1.0, len(dead) / context.k_aux)
        return share * functional.mse_loss(activations @ self.W_dec[dead], residual, reduction="sum") / len(residual)

    def _centred(self, x: Tensor) -> Tensor:
        return x - self.b_dec if self.cfg.apply_b_dec_to_input else x

    def _pre_activations(self, x: Tensor) -> Tensor:
        return functional.linear(self._centred(self.rows_of(x)), self.W_enc.T, self.b_enc)
