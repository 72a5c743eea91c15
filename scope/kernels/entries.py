"""A sparse feature matrix whose rows have different numbers of entries, and the encoder that makes one.

BatchTopK and JumpReLU fire on as many features as a row needs. The entries are kept in one list, row after row:

1. someone picks positions of the dense pre-activations (`nonzero` of a mask, or the n largest: `largest`);
2. `encode_at` gives the pre-activations there, with gradients that touch the picked entries alone;
3. `decode_entries` is the product with the decoder, with sparse gradients too.

`encode_at_reference` and `decode_entries_reference` are the plain forms, dense and with autograd's own gradients.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from scope.kernels import sparse

__all__ = [
    "Places",
    "decode_entries",
    "decode_entries_reference",
    "encode_at",
    "encode_at_reference",
    "largest",
    "places_of",
]

SAMPLE_STRIDE = 61
"""`largest` guesses its threshold from every 61st entry: odd, so that it meets all features."""
SAMPLE_MARGIN = 1.5


class Places(NamedTuple):
    """Where the entries of a sparse `(batch, d_sae)` matrix stand, row after row."""

    rows: Int[Tensor, " entries"]
    ids: Int[Tensor, " entries"]
    offsets: Int[Tensor, " batch"]
    """Where each row's entries start."""
    groups: sparse.FeatureGroups
    """The same entries ordered by feature."""


def largest(pre: Float[Tensor, "batch d_sae"], n: int) -> Int[Tensor, " entries"]:
    """Flat positions, ascending, of the `n` largest entries above 0 of the whole matrix, or of all that are above 0.

    A threshold guessed from a sample leaves few candidates; where it leaves too few, all entries above 0 are looked at.
    """
    flat = pre.detach().flatten()
    sample = flat[::SAMPLE_STRIDE]
    rank = int(SAMPLE_MARGIN * n / SAMPLE_STRIDE) + 1
    floor = torch.topk(sample, rank).values[-1].clamp_min(0) if rank < len(sample) else flat.new_zeros(())
    candidates = (flat > floor).nonzero().flatten()
    if len(candidates) < n:
        candidates = (flat > 0).nonzero().flatten()
    if len(candidates) <= n:
        return candidates
    return candidates[torch.topk(flat[candidates], n, sorted=False).indices].sort().values


def places_of(index: Int[Tensor, " entries"], batch: int, d_sae: int) -> Places:
    """The places at ascending flat positions of a `(batch, d_sae)` matrix."""
    rows, ids = index // d_sae, index % d_sae
    ends = torch.bincount(rows, minlength=batch).cumsum(0)
    keys = ids.short() if d_sae <= torch.iinfo(torch.int16).max else ids.int()
    order = torch.sort(keys, stable=True).indices
    feature_ends = torch.bincount(ids, minlength=d_sae).cumsum(0)
    groups = sparse.FeatureGroups(order, rows[order], functional.pad(feature_ends[:-1], (1, 0)))
    return Places(rows, ids, functional.pad(ends[:-1], (1, 0)), groups)


def encode_at_reference(
    x: Float[Tensor, "batch d_in"], W: Float[Tensor, "d_sae d_in"], b: Float[Tensor, " d_sae"], places: Places
) -> Float[Tensor, " entries"]:
    """What `encode_at` computes, through the dense pre-activations."""
    return (x @ W.T + b)[places.rows, places.ids]


def encode_at(
    x: Float[Tensor, "batch d_in"],
    W: Float[Tensor, "d_sae d_in"],
    b: Float[Tensor, " d_sae"],
    places: Places,
    pre: Float[Tensor, "batch d_sae"],
) -> Float[Tensor, " entries"]:
    """Entries of x Wᵀ + b, with gradients through these entries alone; `pre` is that product, already computed."""
    return _EncodeAt.apply(x, W, b, pre.detach(), places.rows, places.ids, places.offsets, *places.groups)


def decode_entries_reference(
    values: Float[Tensor, " entries"], places: Places, W: Float[Tensor, "d_sae d"]
) -> Float[Tensor, "batch d"]:
    """What `decode_entries` computes, through the dense feature matrix."""
    dense = values.new_zeros(len(places.offsets), len(W)).index_put((places.rows, places.ids), values)
    return dense @ W


def decode_entries(
    values: Float[Tensor, " entries"], places: Places, W: Float[Tensor, "d_sae d"]
) -> Float[Tensor, "batch d"]:
    """The sum of the rows of W at each row's entries, weighted by `values`, with sparse gradients for both."""
    return _DecodeEntries.apply(values, W, places.rows, places.ids, places.offsets, *places.groups)


def _bags(values: Tensor, ids: Tensor, offsets: Tensor, W: Tensor) -> Tensor:
    return functional.embedding_bag(ids, W, offsets, per_sample_weights=values.to(W.dtype), mode="sum")


def _feature_sums(g: Tensor, values: Tensor, groups: sparse.FeatureGroups) -> Tensor:
    """For each feature the sum of the rows of g that it has an entry on, weighted by its values."""
    weights = values[groups.order].to(g.dtype)
    return functional.embedding_bag(groups.rows, g.contiguous(), groups.offsets, per_sample_weights=weights, mode="sum")


class _EncodeAt(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W, b, pre, rows, ids, offsets, *groups):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, W, b, ids, offsets, *groups)
        return pre[rows, ids]

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, W, b, ids, offsets, *parts = ctx.saved_tensors
        groups = sparse.FeatureGroups(*parts)
        grad = grad.to(x.dtype)
        grad_x = _bags(grad, ids, offsets, W) if ctx.needs_input_grad[0] else None
        grad_W = _feature_sums(x, grad, groups)
        grad_b = torch.zeros_like(b).index_add_(0, ids, grad.to(b.dtype))
        return grad_x, grad_W, grad_b, *[None] * 7


class _DecodeEntries(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, W, rows, ids, offsets, *groups):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(values, W, rows, ids, offsets, *groups)
        return _bags(values, ids, offsets, W)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        values, W, rows, ids, offsets, *groups = ctx.saved_tensors
        grad_values = grad_W = None
        if ctx.needs_input_grad[0]:
            # The gradient of embedding_bag with respect to its weights, which autograd would call: mode 0 is "sum".
            grad_values = torch.ops.aten._embedding_bag_per_sample_weights_backward(
                grad.contiguous(), W, ids, offsets, rows, 0
            ).to(values.dtype)
        if ctx.needs_input_grad[1]:
            grad_W = _feature_sums(grad, values, sparse.FeatureGroups(*groups))
        return grad_values, grad_W, *[None] * 6
