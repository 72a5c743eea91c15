"""Matryoshka BatchTopK: nested dictionaries in one, each of which must reconstruct the input alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional

from scope.errors import InvalidInputError
from scope.saes.active import Active
from scope.saes.batchtopk import BatchTopKConfig, BatchTopKSAE
from scope.saes.registry import register
from scope.saes.sharing import Sharing

__all__ = ["MatryoshkaConfig", "MatryoshkaSAE"]

DEFAULT_SHARES = (16, 8, 4, 2, 1)


@dataclass(frozen=True, kw_only=True)
class MatryoshkaConfig(BatchTopKConfig):
    """Configuration of a `MatryoshkaSAE`."""

    architecture: ClassVar[str] = "matryoshka"

    prefixes: tuple[int, ...]
    """Widths of the nested dictionaries, ascending; the last one is d_sae."""

    def __post_init__(self) -> None:
        super().__post_init__()
        widths = self.prefixes
        ascending = all(before < after for before, after in zip((0, *widths), widths, strict=False))
        if not widths or not ascending or widths[-1] != self.d_sae:
            raise InvalidInputError(
                f"prefixes are {', '.join(map(str, widths)) or 'none'}; expected ascending widths from 1 to d_sae, "
                f"{self.d_sae:,}, such as {', '.join(map(str, default_prefixes(self.d_sae)))}."
            )

    @classmethod
    def for_training(cls, *, d_sae: int, k: int, **common: Any) -> "MatryoshkaConfig":
        given = tuple(common.pop("prefixes", default_prefixes(d_sae)))
        prefixes = given if given and given[-1] >= d_sae else (*given, d_sae)
        return cls(d_sae=d_sae, k=k, prefixes=prefixes, **common)


def default_prefixes(d_sae: int) -> tuple[int, ...]:
    """Five widths, each twice the one before, up to d_sae; fewer where there are few features."""
    return tuple(sorted({d_sae // share for share in DEFAULT_SHARES} - {0}))


@register(MatryoshkaConfig)
class MatryoshkaSAE(BatchTopKSAE):
    """The Matryoshka BatchTopK autoencoder of Bussmann et al. 2025, "Learning multi-level features" (2503.17547), 3.

        f = ReLU(BatchTopK((x - b_dec) W_enc + b_enc))      x_hat_m = f[:m] W_dec[:m] + b_dec

        loss = mean over rows of the sum over prefixes m of ‖x - x_hat_m‖², plus AuxK on the whole

    The first features must do well alone, so they learn what is general, and later ones do not absorb them. Trained, it
    is a JumpReLU SAE, as BatchTopK is.
    """

    cfg: MatryoshkaConfig

    def _further_terms(self, active: Active, x: Tensor, target: Tensor, sharing: Sharing) -> Mapping[str, Tensor]:
        widths = self.cfg.prefixes
        features = self.share.ids(self.d_sae, x.device)
        decoded: Tensor = self.b_dec
        total = x.new_zeros(())
        for start, stop in zip((0, *widths[:-2]), widths[:-1], strict=True):
            between = (features >= start) & (features < stop)
            decoded = decoded + sharing.sum_over_features(active.keep(between).decode(self.decoder()))
            total = total + functional.mse_loss(decoded, target, reduction="sum") / len(x)
        return {"nested": total} if len(widths) > 1 else {}
