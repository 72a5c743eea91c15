"""TopK: on each row the k largest pre-activations, and nothing else, become features."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from scope.errors import InvalidInputError
from scope.kernels.sparse import group_by_feature
from scope.kernels.topk import topk, topk_encode
from scope.saes.activation import Activation
from scope.saes.active import Active, Padded
from scope.saes.base import SAE, SAEConfig
from scope.saes.registry import register

if TYPE_CHECKING:
    from scope.saes.base import TrainingContext

__all__ = ["TopK", "TopKConfig", "TopKSAE", "require_k"]


class TopK(Activation):
    """f = ReLU(TopK(pre)): a row's k largest entries, those of them above 0."""

    name: ClassVar[str] = "topk"

    def encode(self, sae: SAE, centred: Tensor) -> Tensor:
        pre = sae.pre_activations(centred, sae.b_enc)
        values, ids = torch.topk(pre, _k_of(sae), dim=-1, sorted=False)
        return torch.zeros_like(pre).scatter(-1, ids, values.relu())

    def encode_sparse(self, sae: SAE, centred: Tensor) -> tuple[Tensor, Tensor]:
        k, pre = _k_of(sae), sae.pre_activations(centred, sae.b_enc)
        if pre.requires_grad:
            values, ids = torch.topk(pre, k, dim=-1, sorted=False)
        else:
            flat = topk(pre.reshape(-1, sae.d_sae), k)
            values, ids = (part.view(*pre.shape[:-1], k) for part in flat)
        return ids, values.relu()

    def train(self, sae: SAE, centred: Tensor, context: "TrainingContext") -> Active:
        k = context.k or _k_of(sae)
        candidates = self._largest(sae, centred, min(k, sae.d_sae))
        taken = context.sharing.among_largest(candidates.values.detach(), k)
        return candidates if taken is None else replace(candidates, values=candidates.values * taken)

    @staticmethod
    def _largest(sae: SAE, centred: Tensor, k: int) -> Padded:
        if sae.has_one_encoder:
            return Padded(*topk_encode(centred, sae.W_enc.T, sae.b_enc, k), sae.d_sae)
        pre = sae.pre_activations(centred, sae.b_enc)
        ids = topk(pre.detach(), k).ids
        return Padded(pre.gather(1, ids).relu(), ids, group_by_feature(ids, sae.d_sae), sae.d_sae)


@dataclass(frozen=True, kw_only=True)
class TopKConfig(SAEConfig):
    """Configuration of a `TopKSAE`."""

    architecture: ClassVar[str] = "topk"

    k: int
    """Features that fire on each row, at most: of the k largest pre-activations those above 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_k(self.k, self.d_sae)

    @classmethod
    def for_training(cls, *, d_sae: int, k: int, **common: Any) -> "TopKConfig":
        return cls(d_sae=d_sae, k=k, **common)


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
    activation = TopK()


def require_k(k: Any, d_sae: int) -> None:
    """Raise `InvalidInputError` unless k is from 1 to d_sae."""
    if not 1 <= k <= d_sae:
        raise InvalidInputError(f"k is {k:,}; expected at least 1 and at most d_sae, {d_sae:,}.")


def _k_of(sae: SAE) -> int:
    k: int = sae.cfg.k  # type: ignore[attr-defined]
    return k
