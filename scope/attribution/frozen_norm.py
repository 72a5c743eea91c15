"""A norm of a frozen prompt: linear, as its denominators are held at what they were."""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["FrozenNorm", "norm_denominator"]


@dataclass(frozen=True, eq=False)
class FrozenNorm:
    """x -> gain (x - mean x) / denominator, the mean only for a LayerNorm, the denominator as it was."""

    gain: Float[Tensor, " d_model"]
    denominator: Float[Tensor, " seq"]
    centred: bool
    bias: Float[Tensor, " d_model"] | None

    def __call__(self, x: Float[Tensor, "*batch n d_model"], rows: slice) -> Float[Tensor, "*batch n d_model"]:
        """The norm of the rows of some positions, without its bias."""
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        return x * self.gain / self.denominator[rows, None]

    def without_bias(self, output: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """What the model's norm gave, without its bias."""
        return output if self.bias is None else output - self.bias

    def backward(
        self, gradient: Float[Tensor, "*batch n d_model"], rows: slice | Int[Tensor, " n"]
    ) -> Float[Tensor, "*batch n d_model"]:
        """The gradient at the norm's input, for the rows of some positions."""
        gradient = gradient * (self.gain / self.denominator[rows, None])
        return gradient - gradient.mean(-1, keepdim=True) if self.centred else gradient

    def add_backward(
        self, into: Float[Tensor, "*batch n d_model"], gradient: Float[Tensor, "*batch n d_model"], rows: slice
    ) -> None:
        """`into += backward(gradient, rows)`, in one pass over both where the mean is no part of it."""
        if self.centred:
            into += self.backward(gradient, rows)
        else:
            into.addcmul_(gradient, self.gain / self.denominator[rows, None])


def norm_denominator(x: Float[Tensor, "*rows width"], centred: bool, eps: float) -> Float[Tensor, "*rows"]:
    """What a norm divides its rows by: RMSNorm, or LayerNorm where it is centred."""
    x = x.float()
    if centred:
        x = x - x.mean(-1, keepdim=True)
    return (x.square().mean(-1) + eps).sqrt()
