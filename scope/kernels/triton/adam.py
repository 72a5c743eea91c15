"""One step of Adam over the rows of a matrix, in one pass over parameters and moments.

One program takes one row: it reads the gradient only where the row has one, takes out of it what lies along the row
(where the rows are to keep their norm), moves the row, brings it back to norm 1, and writes the copy in the compute
dtype.
"""

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["adam_rows"]

FLAT = 1024
"""Entries that a program takes of a vector."""


@triton.jit
def _adam_rows(
    parameter, mean, square, gradient, counts, slots, along, copy, control,
    d, n, lr, beta1, beta2, correction1, root_correction2, eps,
    HAS_COUNTS: tl.constexpr, HAS_SLOTS: tl.constexpr, UNIT: tl.constexpr, HAS_COPY: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    if tl.load(control + 1) > 0:  # a gradient that is not finite moves nothing
        clip = tl.load(control)
        row = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, WIDTH)
        at = row * d + column
        inside = (column < d) & (at < n)
        active = True
        if HAS_COUNTS:
            active = tl.load(counts + row) > 0
            if HAS_SLOTS:
                active = active | (tl.load(slots + row) >= 0)
        p = tl.load(parameter + at, mask=inside, other=0.0)
        g = tl.load(gradient + at, mask=inside & active, other=0.0).to(tl.float32)
        m = tl.load(mean + at, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(square + at, mask=inside, other=0.0).to(tl.float32)
        if UNIT:
            g -= tl.load(along + row) * p
        g *= clip
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        p -= (lr / correction1) * m / (tl.sqrt(v) / root_correction2 + eps)
        if UNIT:
            p /= tl.sqrt(tl.sum(p * p, 0))
        tl.store(parameter + at, p, mask=inside)
        tl.store(mean + at, m.to(mean.dtype.element_ty), mask=inside)
        tl.store(square + at, v.to(square.dtype.element_ty), mask=inside)
        if HAS_COPY:
            tl.store(copy + at, p.to(copy.dtype.element_ty), mask=inside)


def adam_rows(
    parameter: Tensor,
    mean: Tensor,
    square: Tensor,
    gradient: Tensor,
    control: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    step: int,
    eps: float,
    counts: Tensor | None = None,
    slots: Tensor | None = None,
    along: Tensor | None = None,
    copy: Tensor | None = None,
) -> None:
    """See `scope.kernels.adam.adam_rows`."""
    n = parameter.numel()
    d = parameter.shape[1] if parameter.ndim == 2 else FLAT
    width = triton.next_power_of_2(d)
    _adam_rows[(triton.cdiv(n, d),)](
        parameter, mean, square, gradient,
        counts if counts is not None else control,
        slots if slots is not None else control,
        along if along is not None else control,
        copy if copy is not None else control,
        control, d, n, lr, *betas, 1 - betas[0] ** step, (1 - betas[1] ** step) ** 0.5, eps,
        HAS_COUNTS=counts is not None, HAS_SLOTS=slots is not None, UNIT=along is not None, HAS_COPY=copy is not None,
        WIDTH=width, num_warps=8 if width > 1024 else 4,
    )  # fmt: skip
