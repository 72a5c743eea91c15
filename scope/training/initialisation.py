"""What a run learns from a sample of its rows before the first step: their scale and their centre."""

from jaxtyping import Float
from torch import Tensor

from scope.errors import InvalidInputError

__all__ = ["centre_of", "expected_norm_scale", "geometric_median"]


def expected_norm_scale(sample: Float[Tensor, "rows d_in"]) -> float:
    """The factor after which rows have a norm of sqrt(d_in) on average."""
    mean_norm = float(sample.double().norm(dim=-1).mean())
    if mean_norm == 0:
        raise InvalidInputError("All activations of the sample are zero; there is nothing to train on.")
    return float(sample.shape[-1] ** 0.5 / mean_norm)


def centre_of(sample: Float[Tensor, "rows d_in"], kind: str) -> Float[Tensor, " d_in"]:
    """The centre of the rows, by its name in `scope.training.config.CENTRES`."""
    if kind == "geometric_median":
        return geometric_median(sample)
    return sample.mean(dim=0) if kind == "mean" else sample.new_zeros(sample.shape[-1])


def geometric_median(sample: Float[Tensor, "rows d_in"], iterations: int = 100) -> Float[Tensor, " d_in"]:
    """The point with the smallest sum of distances to the rows, by Weiszfeld's algorithm.

    Unlike the mean it hardly moves for a few rows far out (Bricken et al. 2023 initialise b_dec with it).
    """
    point = sample.mean(dim=0)
    for _ in range(iterations):
        distances = (sample - point).norm(dim=-1, keepdim=True).clamp_min(1e-6)
        moved = (sample / distances).sum(dim=0) / (1 / distances).sum()
        if (moved - point).norm() <= 1e-5 * point.norm():
            return moved
        point = moved
    return point
