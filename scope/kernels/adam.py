"""One step of Adam over a weight, with what training a dictionary adds to it, in one pass over memory.

Kingma & Ba 2015 (arXiv 1412.6980), algorithm 1, and for a decoder whose rows have norm 1:

1. take out of the gradient what lies along the row, since it would only change the row's norm;
2. multiply by the clipping factor, which lies on the device: nobody waits for it;
3. advance both moments and the weight, also where the gradient is zero, as dense Adam does;
4. bring the rows back to norm 1;
5. write the copy of the weight in the compute dtype.

Nothing moves unless the gradient is finite (`control`).
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from scope.kernels.tensors import uses_triton

__all__ = ["EPS", "adam_rows", "adam_rows_reference"]

EPS = 1e-8
"""Adam's epsilon, torch's default."""


def adam_rows_reference(
    parameter: Float[Tensor, "*shape"],
    mean: Float[Tensor, "*shape"],
    square: Float[Tensor, "*shape"],
    gradient: Float[Tensor, "*shape"],
    control: Float[Tensor, "2"],
    *,
    lr: float,
    betas: tuple[float, float],
    step: int,
    active: Tensor | None = None,
    along: Float[Tensor, " rows"] | None = None,
    copy: Float[Tensor, "*shape"] | None = None,
) -> None:
    """What `adam_rows` does, a term at a time."""
    if not control[1] > 0:
        return
    g = gradient.float()
    if active is not None:
        g = torch.where(active[:, None], g, 0.0)
    if along is not None:
        g = g - along[:, None] * parameter
    g = g * control[0]
    mean.lerp_(g, 1 - betas[0])
    square.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
    denominator = (square.sqrt() / (1 - betas[1] ** step) ** 0.5).add_(EPS)
    parameter.addcdiv_(mean, denominator, value=-lr / (1 - betas[0] ** step))
    if along is not None:
        parameter.div_(parameter.norm(dim=-1, keepdim=True))
    if copy is not None:
        copy.copy_(parameter)


def adam_rows(
    parameter: Float[Tensor, "*shape"],
    mean: Float[Tensor, "*shape"],
    square: Float[Tensor, "*shape"],
    gradient: Float[Tensor, "*shape"],
    control: Float[Tensor, "2"],
    *,
    lr: float,
    betas: tuple[float, float],
    step: int,
    counts: Int[Tensor, " rows"] | None = None,
    slots: Int[Tensor, " rows"] | None = None,
    along: Float[Tensor, " rows"] | None = None,
    copy: Float[Tensor, "*shape"] | None = None,
) -> None:
    """One step of Adam, in place.

    Args:
        parameter: a contiguous matrix or vector, float32.
        mean, square: Adam's moments.
        gradient: in any floating dtype; on the CPU it may be overwritten.
        control: on the device: the clipping factor, and whether to step at all (above 0).
        lr: learning rate.
        betas: decay rates of the moments.
        step: this step's number, from 1, for the bias corrections.
        counts: rows without a count (and without a slot) have no gradient; `gradient` is not read there.
        slots: rows with a slot (0 or more) have a gradient too.
        along: what of each row's gradient lies along it. Given, the rows have norm 1 before and after.
        copy: receives the new parameter in its own dtype.
    """
    if uses_triton(parameter):
        from scope.kernels.triton import adam

        adam.adam_rows(
            parameter, mean, square, gradient, control, lr=lr, betas=betas, step=step, eps=EPS,
            counts=counts, slots=slots, along=along, copy=copy,
        )  # fmt: skip
        return
    if not control[1] > 0:
        return
    g = gradient.float()
    if counts is not None:
        idle = counts == 0 if slots is None else (counts == 0) & (slots < 0)
        g[idle] = 0
    if along is not None:
        g.addcmul_(along[:, None], parameter, value=-1)
    if control[0] != 1:
        g.mul_(control[0])
    torch._fused_adam_(
        [parameter], [g], [mean], [square], [], [torch.tensor(float(step))],
        lr=lr, beta1=betas[0], beta2=betas[1], weight_decay=0.0, eps=EPS, amsgrad=False, maximize=False,
    )  # fmt: skip
    if along is not None:
        parameter.div_(torch.linalg.vector_norm(parameter, dim=-1, keepdim=True))
    if copy is not None:
        copy.copy_(parameter)
