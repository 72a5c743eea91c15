"""Products with a sparse feature matrix, in plain torch.

f is `(batch, d_sae)` with k entries a row, given as `values` and `ids`. Three products make up a training step:

1. `decode`             f W                     `(batch, d)`: a weighted sum of k rows of W;
2. `gather_dots`        (g Wᵀ) at f's entries   `(batch, k)`: the gradient of the values;
3. `weighted_row_sums`  fᵀ g                    `(d_sae, d)`: the gradient of W, with f's entries ordered by feature.

The first and the third are `embedding_bag`, which is vectorised and parallel on the CPU and never makes the dense f.
Each has its plain form beside it (`*_reference`). `sparse_decode` is the first with the other two as its gradients.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

__all__ = [
    "FeatureGroups",
    "decode",
    "decode_reference",
    "gather_dots",
    "gather_dots_reference",
    "group_by_feature",
    "sparse_decode",
    "weighted_row_sums",
    "weighted_row_sums_reference",
]


class FeatureGroups(NamedTuple):
    """The entries of a sparse feature matrix ordered by feature."""

    order: Int[Tensor, " entries"]
    """Positions in the flattened `ids`, all of feature 0 first."""
    rows: Int[Tensor, " entries"]
    """The row that each of them lies in."""
    offsets: Int[Tensor, " d_sae"]
    """Where each feature's entries start."""


def group_by_feature(ids: Int[Tensor, "batch k"], d_sae: int) -> FeatureGroups:
    """Order the entries of a sparse feature matrix by feature, rows ascending within one."""
    flat = ids.flatten()
    keys = flat.short() if d_sae <= torch.iinfo(torch.int16).max else flat.int()
    order = torch.sort(keys, stable=True).indices
    ends = torch.bincount(flat, minlength=d_sae).cumsum(0)
    return FeatureGroups(order, order // ids.shape[-1], functional.pad(ends[:-1], (1, 0)))


def decode_reference(
    values: Float[Tensor, "batch k"], ids: Int[Tensor, "batch k"], W: Float[Tensor, "d_sae d"]
) -> Float[Tensor, "batch d"]:
    """What `decode` computes, through the dense feature matrix."""
    return _dense(values, ids, len(W)) @ W


def decode(
    values: Float[Tensor, "batch k"], ids: Int[Tensor, "batch k"], W: Float[Tensor, "d_sae d"]
) -> Float[Tensor, "batch d"]:
    """Sum of k rows of W for each row of the batch, weighted by `values`."""
    if not torch.is_grad_enabled():  # a weight that requires gradients takes a slower path, even here
        values, W = values.detach(), W.detach()
    return functional.embedding_bag(ids, W, per_sample_weights=values.to(W.dtype), mode="sum")


def gather_dots_reference(
    g: Float[Tensor, "batch d"], W: Float[Tensor, "d_sae d"], ids: Int[Tensor, "batch k"]
) -> Float[Tensor, "batch k"]:
    """What `gather_dots` computes, through the dense product."""
    return (g @ W.T).gather(1, ids.long())


def gather_dots(
    g: Float[Tensor, "batch d"], W: Float[Tensor, "d_sae d"], ids: Int[Tensor, "batch k"]
) -> Float[Tensor, "batch k"]:
    """g_i · W[ids_ij] for each entry."""
    batch, k = ids.shape
    starts = torch.arange(0, batch * k, k, device=ids.device)
    bags = torch.arange(batch, device=ids.device).repeat_interleave(k)
    # The gradient of embedding_bag with respect to its weights, which autograd would call: mode 0 is "sum".
    dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        g.contiguous(), W, ids.flatten().to(starts.dtype), starts, bags, 0
    )
    return dots.view(batch, k)


def weighted_row_sums_reference(
    g: Float[Tensor, "batch d"], values: Float[Tensor, "batch k"], ids: Int[Tensor, "batch k"], d_sae: int
) -> Float[Tensor, "d_sae d"]:
    """What `weighted_row_sums` computes, through the dense feature matrix."""
    return _dense(values, ids, d_sae).T @ g


def weighted_row_sums(
    g: Float[Tensor, "batch d"], values: Float[Tensor, "batch k"], groups: FeatureGroups
) -> Float[Tensor, "d_sae d"]:
    """For each feature the sum of the rows of g that it fires on, weighted by its values; zeros where it never does."""
    if not torch.is_grad_enabled():
        values, g = values.detach(), g.detach()
    weights = values.flatten()[groups.order].to(g.dtype)
    return functional.embedding_bag(groups.rows, g.contiguous(), groups.offsets, per_sample_weights=weights, mode="sum")


def sparse_decode(
    values: Float[Tensor, "batch k"],
    ids: Int[Tensor, "batch k"],
    W: Float[Tensor, "d_sae d"],
    groups: FeatureGroups,
) -> Float[Tensor, "batch d"]:
    """`decode` with sparse gradients for `values` and W; `groups` is `group_by_feature(ids, d_sae)`."""
    return _SparseDecode.apply(values, ids, W, *groups)


def _dense(values: Tensor, ids: Tensor, d_sae: int) -> Tensor:
    return values.new_zeros(len(values), d_sae).scatter_add(1, ids.long(), values)


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, ids, W, *groups):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(values, ids, W, *groups)
        return decode(values, ids, W)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        values, ids, W, *groups = ctx.saved_tensors
        grad_values = gather_dots(grad, W, ids).to(values.dtype) if ctx.needs_input_grad[0] else None
        grad_W = weighted_row_sums(grad, values, FeatureGroups(*groups)) if ctx.needs_input_grad[2] else None
        return grad_values, None, grad_W, None, None, None
