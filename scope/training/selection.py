"""What fires in a fast step (`scope.training.fast`): for each architecture its entries, and JumpReLU's estimators.

Entries stand in a `(batch, width)` matrix, as many on each row as the fullest row has, or a guess of it:

    topk        the k largest pre-activations of each row; width is k.
    batchtopk   the k x rows largest of the whole batch.
    jumprelu    those above θ - ε/2: all that fires (above θ) or lies in a threshold's window (within ε/2 of it). The
                rest has neither a value nor a gradient.

Where the host may look (the CPU) the width follows from the batch and nothing is left out. On a GPU, where nobody may
wait for the device, a row takes the `width` largest at most: of a batchtopk `batchtopk_width`, of a jumprelu as many as
`next_width` makes of the fullest row some steps before; what it leaves out are the entries that are farthest below
their thresholds. For jumprelu the same two-stage selection as topk's finds them, on pre - θ + ε/2.

`estimate` holds the gradients of `scope.saes.jumprelu` at the entries. With G the gradient of the loss with respect to
a feature's value, H = 1 where it fires, K = 1 in the window, and s the penalty's derivative with respect to the row's
L0 (c/B for "step", 2c(L0/T - 1)/(T B) for "quadratic"),

    at the pre-activation   G H    (+ K (G θ + s)/ε  with `ste_to_input`)
    at the threshold        -K (G θ + s)/ε

"tanh" has no s; it adds c t (1 - tanh²(t f))/B to G, t its scale (decoder rows have norm 1 here).
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from scope.kernels.entries import largest
from scope.kernels.tensors import uses_triton
from scope.kernels.topk import largest_of_all, linear_topk
from scope.saes.base import SAE

__all__ = [
    "Estimates",
    "Selected",
    "batchtopk_width",
    "estimate",
    "next_width",
    "padded",
    "select_batchtopk",
    "select_jumprelu",
]

WIDEST = 4
"""Multiple of k that a row takes at most on a GPU: of a batchtopk (but see `LEAST_WIDTH`), of a jumprelu at first."""
LEAST_WIDTH = 64
"""Entries that a row of a batchtopk has room for on a GPU at least: with a small k some want more than `WIDEST` x k."""
MAX_WIDTH = 512
"""Entries of a row that a jumprelu takes on a GPU at most: what the selection's kernel holds at 65,536 features."""
ROOM = 1.25
"""The next width has so much more room than the fullest row needed."""


class Selected(NamedTuple):
    """The entries of a batch."""

    values: Float[Tensor, "batch width"]
    """Feature activations, 0 or more, float32."""
    ids: Int[Tensor, "batch width"]
    """Their features, int32."""
    counted: Bool[Tensor, "batch width"] | None = None
    """Which of them are entries at all; None for all."""
    pre: Float[Tensor, "batch width"] | None = None
    """Pre-activations, float32, where they are needed later."""


class Estimates(NamedTuple):
    """JumpReLU's gradients at the entries, and its penalty."""

    at_pre: Float[Tensor, "batch width"]
    at_threshold: Float[Tensor, "batch width"]
    penalty: Float[Tensor, ""]


def batchtopk_width(k: int, d_sae: int) -> int:
    """Entries of a row that a batchtopk takes on a GPU at most."""
    return min(max(WIDEST * k, LEAST_WIDTH), d_sae)


def next_width(fullest: int | None, k: int, d_sae: int) -> int:
    """Entries of a row to make room for, as a power of two, after a step whose fullest row had so many."""
    wanted = WIDEST * k if fullest is None else max(2 * k, int(ROOM * fullest))
    return min(1 << (wanted - 1).bit_length(), max(MAX_WIDTH, k), d_sae)


def select_batchtopk(
    centred: Float[Tensor, "batch d_in"],
    W: Float[Tensor, "d_sae d_in"],
    b: Float[Tensor, " d_sae"],
    k: int,
) -> Selected:
    """The k x batch largest pre-activations above 0."""
    if uses_triton(centred):
        values, ids = linear_topk(centred, W, b, batchtopk_width(k, len(W)))
        values = values.float().relu_()
        values = torch.where(largest_of_all(values, k * len(values)), values, 0.0)
        return Selected(values, ids.int(), values > 0)
    pre = torch.addmm(b, centred, W.T)
    return padded(pre, largest(pre, k * len(pre)))


def select_jumprelu(
    centred: Float[Tensor, "batch d_in"],
    W: Float[Tensor, "d_sae d_in"],
    b: Float[Tensor, " d_sae"],
    threshold: Float[Tensor, " d_sae"],
    bandwidth: float,
    width: int,
) -> Selected:
    """What fires or lies in a window, from bias and threshold in float32; on a GPU at most `width` entries a row."""
    floor = threshold - bandwidth / 2
    if uses_triton(centred):
        margin, ids = linear_topk(centred, W, (b - floor).to(W.dtype), width)
        margin = margin.float()
        pre = margin + floor[ids]
        values = torch.where(margin > bandwidth / 2, pre, 0.0).relu_()
        return Selected(values, ids.int(), margin > 0, pre)
    dense = torch.addmm(b, centred, W.T)
    found = padded(dense, (dense > floor).flatten().nonzero().flatten())
    assert found.counted is not None
    assert found.pre is not None
    fires = found.counted & (found.pre > threshold[found.ids.long()])
    return found._replace(values=torch.where(fires, found.pre, 0.0).relu_())


def padded(pre: Float[Tensor, "batch d_sae"], index: Int[Tensor, " entries"]) -> Selected:
    """The entries at ascending flat positions; the host waits for their number."""
    batch, d_sae = pre.shape
    rows, ids = index // d_sae, index % d_sae
    counts = torch.bincount(rows, minlength=batch)
    width = max(1, int(counts.max()))
    counted = torch.arange(width, device=pre.device) < counts[:, None]
    all_ids = torch.zeros(batch, width, dtype=torch.int32, device=pre.device)
    all_ids[counted] = ids.int()
    values = torch.zeros(batch, width, device=pre.device)
    values[counted] = pre.flatten()[index].float()
    return Selected(values.clamp_min(0), all_ids, counted, values)


def estimate(
    sae: SAE,
    selected: Selected,
    at_values: Float[Tensor, "batch width"],
    coefficient: Float[Tensor, ""],
) -> Estimates:
    """JumpReLU's gradients at its entries; see the module's docstring.

    Args:
        sae: a JumpReLU.
        selected: its entries.
        at_values: the reconstruction's gradient with respect to the values.
        coefficient: weight of the penalty.
    """
    cfg: Any = sae.cfg
    values, ids, counted, pre = selected
    assert counted is not None
    assert pre is not None
    n_rows = len(values)
    theta = sae.threshold.float()[ids.long()]
    fires = counted & (values > 0)
    window = counted & ((pre - theta).abs() < cfg.bandwidth / 2)
    slope: Tensor | float = 0.0
    if cfg.sparsity_loss == "tanh":
        bent = torch.tanh(cfg.tanh_scale * values)
        penalty = coefficient * bent.sum() / n_rows
        at_values = at_values + coefficient * cfg.tanh_scale / n_rows * (1 - bent.square())
    else:
        l0 = fires.sum(dim=1, keepdim=True)
        if cfg.sparsity_loss == "quadratic":
            off = l0 / cfg.target_l0 - 1
            penalty, slope = coefficient * off.square().mean(), 2 * coefficient / (cfg.target_l0 * n_rows) * off
        else:
            penalty, slope = coefficient * l0.float().mean(), coefficient / n_rows
    through = torch.where(window, (at_values * theta + slope) / cfg.bandwidth, 0.0)
    at_pre = torch.where(fires, at_values, 0.0)
    return Estimates(at_pre + through if cfg.ste_to_input else at_pre, -through, penalty)
