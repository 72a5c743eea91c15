"""The k largest entries of each row, exactly, and the TopK encoder built on them.

`torch.topk` on the CPU looks at every entry of a row with a heap. Two stages are three times as fast:

1. fold the row's n entries into n/g groups of g and take each group's maximum, one vectorised pass;
2. the k groups with the largest maxima hold the row's k largest entries (an entry outside of them is no larger than
   each of their k maxima), so the answer is the top k of those k x g entries.

`topk_reference` is the plain form of `topk`, `topk_encode_reference` that of `topk_encode`. Rows of bfloat16 on a CUDA
device go through a Triton kernel of the same two stages (`scope.kernels.triton.selection`).
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from scope.kernels import sparse
from scope.kernels.tensors import uses_triton

__all__ = [
    "EncodedTopK",
    "TopK",
    "keep_largest",
    "keep_largest_reference",
    "largest_of_all",
    "linear_topk",
    "topk",
    "topk_encode",
    "topk_encode_reference",
    "topk_reference",
]

GROUP = 8
"""g of the two stages: 8 and 16 were the fastest of 4 to 32 at rows of 4,096 entries."""
CHUNK_ROWS = 512
"""Rows that the CPU encodes at once, so that their pre-activations are still in cache when the top k is taken."""


class TopK(NamedTuple):
    """The k largest entries of each row, in no particular order."""

    values: Float[Tensor, "batch k"]
    ids: Int[Tensor, "batch k"]


class EncodedTopK(NamedTuple):
    """The result of the TopK encoder."""

    values: Float[Tensor, "batch k"]
    """ReLU of the k largest pre-activations; differentiable."""
    ids: Int[Tensor, "batch k"]
    """Which features they belong to."""
    groups: sparse.FeatureGroups
    """The same entries ordered by feature, for gradients."""


def topk_reference(pre: Float[Tensor, "batch n"], k: int) -> TopK:
    """What `topk` computes, in one call."""
    return TopK(*torch.topk(pre, k, dim=-1, sorted=False))


def topk(pre: Float[Tensor, "batch n"], k: int) -> TopK:
    """The k largest entries of each row; of equal entries any may be taken. Not differentiable."""
    if pre.dtype == torch.bfloat16 and uses_triton(pre):
        from scope.kernels.triton import selection

        found = selection.topk_rows(pre, k)
        if found is not None:
            return TopK(found[0].bfloat16(), found[1].long())
    n = pre.shape[-1]
    n_groups = n // GROUP
    if pre.device.type != "cpu" or n_groups < 2 * k:
        return topk_reference(pre, k)
    body = n_groups * GROUP
    maxima = pre[:, :body].view(-1, GROUP, n_groups).amax(dim=1)
    winners = torch.topk(maxima, k, dim=-1, sorted=False).indices
    candidates = (winners[:, None, :] + torch.arange(0, body, n_groups)[None, :, None]).flatten(1)
    if body < n:
        candidates = torch.cat([candidates, torch.arange(body, n).expand(len(pre), -1)], dim=1)
    values, places = torch.topk(pre.gather(1, candidates), k, dim=-1, sorted=False)
    return TopK(values, candidates.gather(1, places))


def keep_largest_reference(pre: Float[Tensor, "batch n"], n_valid: Int[Tensor, ""], k: int) -> Float[Tensor, "batch n"]:
    """What `keep_largest` computes, through a sorted copy."""
    valid = torch.arange(pre.shape[1], device=pre.device) < n_valid
    ranked = torch.where(valid, pre, -torch.inf).sort(dim=-1, descending=True).values
    kth = ranked[:, min(k, pre.shape[1]) - 1 :][:, :1]
    return torch.where(valid & (pre >= kth), pre, 0.0).relu()


def keep_largest(pre: Float[Tensor, "batch n"], n_valid: Int[Tensor, ""], k: int) -> Float[Tensor, "batch n"]:
    """ReLU of each row's k largest entries among its first `n_valid`, zero elsewhere; of equal entries all are kept.

    `n_valid` lies on the device, so that the Triton kernel's caller need not wait for it.
    """
    if pre.dtype == torch.bfloat16 and uses_triton(pre):
        from scope.kernels.triton import selection

        if pre.shape[1] <= selection.MAX_ROW_IN_REGISTERS:
            return selection.keep_largest(pre, n_valid, k)
    n = int(n_valid)
    kept = pre[:, :n].relu()
    if k < n:
        smallest = topk(pre[:, :n].contiguous(), k).values.amin(dim=-1, keepdim=True)
        kept = kept * (kept >= smallest)
    return functional.pad(kept, (0, pre.shape[1] - n))


def topk_encode_reference(
    x: Float[Tensor, "batch d_in"], W: Float[Tensor, "d_sae d_in"], b: Float[Tensor, " d_sae"], k: int
) -> TopK:
    """What `topk_encode` computes, dense and with autograd's own gradients."""
    values, ids = topk_reference(x @ W.T + b, k)
    return TopK(values.relu(), ids)


def topk_encode(
    x: Float[Tensor, "batch d_in"], W: Float[Tensor, "d_sae d_in"], b: Float[Tensor, " d_sae"], k: int
) -> EncodedTopK:
    """ReLU of the k largest of x Wᵀ + b, with gradients that touch only the features taken.

    Args:
        x: input rows, centred already.
        W: one row per feature, contiguous.
        b: one bias per feature.
        k: features taken on each row, at most d_sae.
    """
    values, ids, order, rows, offsets = _TopKEncode.apply(x, W, b, k)
    return EncodedTopK(values, ids, sparse.FeatureGroups(order, rows, offsets))


def largest_of_all(values: Float[Tensor, "batch k"], n: int) -> Bool[Tensor, "batch k"]:
    """Which are the `n` largest entries of the whole matrix, the first of equal ones. Nobody waits for the device."""
    order = torch.sort(values.flatten(), descending=True, stable=True).indices
    mask = torch.zeros(values.numel(), dtype=torch.bool, device=values.device)
    return mask.index_fill_(0, order[:n], True).view(values.shape)


def linear_topk(
    x: Float[Tensor, "batch d_in"], W: Float[Tensor, "d_sae d_in"], b: Float[Tensor, " d_sae"], k: int
) -> TopK:
    """The k largest entries of each row of x Wᵀ + b. Not differentiable."""
    if x.device.type != "cpu" or len(x) <= CHUNK_ROWS:
        return topk(torch.addmm(b, x, W.T), k)
    values, ids = x.new_empty(len(x), k), torch.empty(len(x), k, dtype=torch.int64)
    buffer = x.new_empty(CHUNK_ROWS, len(W))
    for start in range(0, len(x), CHUNK_ROWS):
        rows = slice(start, min(start + CHUNK_ROWS, len(x)))
        pre = torch.mm(x[rows], W.T, out=buffer[: rows.stop - start]).add_(b)
        values[rows], ids[rows] = topk(pre, k)
    return TopK(values, ids)


class _TopKEncode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W, b, k):  # type: ignore[no-untyped-def]
        values, ids = linear_topk(x, W, b, k)
        values = values.relu_()
        groups = sparse.group_by_feature(ids, len(W))
        ctx.save_for_backward(x, W, values, ids, *groups)
        ctx.mark_non_differentiable(ids, *groups)
        return values, ids, *groups

    @staticmethod
    def backward(ctx, grad_values, *_):  # type: ignore[no-untyped-def]
        x, W, values, ids, *groups = ctx.saved_tensors
        grad = grad_values * (values > 0)
        grad_x = sparse.decode(grad, ids, W) if ctx.needs_input_grad[0] else None
        grad_W = sparse.weighted_row_sums(x, grad, sparse.FeatureGroups(*groups))
        grad_b = sparse.weighted_row_sums(x.new_ones(len(x), 1), grad, sparse.FeatureGroups(*groups)).squeeze(1)
        return grad_x, grad_W, grad_b, None
