"""The sparse products of one training step, each as a function for any device with its plain reference beside it.

A step has f, `(batch, d_sae)`, with k entries a row. Beside the encode product it needs

0. `centre`              the encoder's input and the rows' norms;
1. `residual_and_dots`   x_hat - x, and (x_hat - x) · W_dec at f's entries: the gradient of the values;
2. `group_entries`       f's entries ordered by feature, and the features by how often they fire;
3. `feature_sums`        for each feature three sums over its entries: firings, the bias's gradient, and what of the
                         decoder's gradient lies along its row (Σ value x gradient, without touching the gradient);
4. `feature_rows`        the gradients of W_dec and W_enc: sums of batch rows over each feature's entries. Rows of
                         features without an entry may be left unwritten: whoever reads them asks the counts.

On a CUDA device they are Triton kernels (`scope.kernels.triton`), elsewhere torch operations. Every sum is in float32
and in a fixed order, so that a step gives the same bits each time.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from scope.kernels import sparse
from scope.kernels.tensors import uses_triton

__all__ = [
    "EntryGroups",
    "FeatureSums",
    "Residual",
    "centre",
    "centre_reference",
    "feature_rows",
    "feature_rows_reference",
    "feature_sums",
    "feature_sums_reference",
    "group_entries",
    "residual_and_dots",
    "residual_and_dots_reference",
]


class Residual(NamedTuple):
    """What the decoder leaves over."""

    residual: Float[Tensor, "batch d_in"]
    """x_hat - x, in the decoder's dtype."""
    dots: Float[Tensor, "batch k"]
    """Its products with the decoder rows of the row's entries, float32; 0 where an entry is not counted."""
    squares: Float[Tensor, " batch"]
    """‖x_hat - x‖², float32."""


class EntryGroups(NamedTuple):
    """The entries of a sparse feature matrix ordered by feature."""

    order: Int[Tensor, " entries"]
    """Positions in the flattened ids, all of feature 0 first, rows ascending within one; at the end those of none."""
    offsets: Int[Tensor, " d_sae_and_one"]
    """Where each feature's entries start; the last is where they all end."""
    ranked: Int[Tensor, " d_sae"]
    """Features, those with the most entries first."""


class FeatureSums(NamedTuple):
    """Sums over each feature's entries."""

    fired: Int[Tensor, " d_sae"]
    """Entries whose value is above 0."""
    bias_gradient: Float[Tensor, " d_sae"]
    """Σ gradient."""
    along: Float[Tensor, " d_sae"]
    """Σ value x gradient: with unit decoder rows, the decoder gradient's component along the row."""


def centre_reference(
    x: Float[Tensor, "batch d_in"], scale: float, b: Float[Tensor, " d_in"], dtype: torch.dtype
) -> tuple[Float[Tensor, "batch d_in"], Float[Tensor, " batch"]]:
    """What `centre` computes."""
    target = x.float() * scale
    return (target - b).to(dtype), target.square().sum(1)


def centre(
    x: Float[Tensor, "batch d_in"], scale: float, b: Float[Tensor, " d_in"], dtype: torch.dtype
) -> tuple[Float[Tensor, "batch d_in"], Float[Tensor, " batch"]]:
    """The encoder's input, scale x - b, in `dtype`, and ‖scale x‖² of each row, float32."""
    if uses_triton(x):
        from scope.kernels.triton import products

        return products.centre(x.contiguous(), scale, b, dtype)
    return centre_reference(x, scale, b, dtype)


def residual_and_dots_reference(
    x: Float[Tensor, "batch d_in"],
    scale: float,
    values: Float[Tensor, "batch k"],
    ids: Int[Tensor, "batch k"],
    W: Float[Tensor, "d_sae d_in"],
    b: Float[Tensor, " d_in"],
    counted: Bool[Tensor, "batch k"] | None = None,
) -> Residual:
    """What `residual_and_dots` computes, in plain products."""
    x_hat = sparse.decode_reference(values.float(), ids, W.float()) + b
    residual = x_hat - scale * x.float()
    dots = torch.where(
        values != 0 if counted is None else counted, sparse.gather_dots_reference(residual, W.float(), ids), 0.0
    )
    return Residual(residual.to(W.dtype), dots, residual.square().sum(1))


def residual_and_dots(
    x: Float[Tensor, "batch d_in"],
    scale: float,
    values: Float[Tensor, "batch k"],
    ids: Int[Tensor, "batch k"],
    W: Float[Tensor, "d_sae d_in"],
    b: Float[Tensor, " d_in"],
    counted: Bool[Tensor, "batch k"] | None = None,
    dtype: torch.dtype | None = None,
) -> Residual:
    """The reconstruction's error and the gradient of half its square with respect to the values.

    Args:
        x: raw rows, any floating dtype.
        scale: what they are multiplied by.
        values: feature activations, float32.
        ids: their features.
        W: decoder rows, in the compute dtype.
        b: decoder bias, float32.
        counted: the entries whose dot products are wanted; their values may be 0, those of others are. None: those with
            a value.
        dtype: of the residual; None for W's.
    """
    if uses_triton(x):
        from scope.kernels.triton import products

        return Residual(*products.residual_and_dots(x.contiguous(), scale, values, ids, W, b, counted, dtype))
    if counted is not None:
        return _of_counted(x, scale, values, ids, W, b, counted)
    residual = sparse.decode(values, ids, W).float().add_(b).sub_(x, alpha=scale)
    squares = torch.linalg.vector_norm(residual, dim=1).square_()
    residual = residual.to(W.dtype)
    dots = sparse.gather_dots(residual, W, ids).float().masked_fill_(values == 0, 0.0)
    return Residual(residual, dots, squares)


def _of_counted(
    x: Tensor, scale: float, values: Tensor, ids: Tensor, W: Tensor, b: Tensor, counted: Tensor
) -> Residual:
    """`residual_and_dots` for rows with few counted entries each: the others are not looked at."""
    n_each = counted.sum(dim=1)
    starts = functional.pad(n_each.cumsum(0)[:-1], (1, 0))
    few = ids[counted].long()
    weights = values[counted].to(W.dtype)
    x_hat = functional.embedding_bag(few, W.detach(), starts, per_sample_weights=weights, mode="sum")
    residual = x_hat.float().add_(b).sub_(x, alpha=scale)
    squares = torch.linalg.vector_norm(residual, dim=1).square_()
    residual = residual.to(W.dtype)
    bags = torch.arange(len(x), device=x.device).repeat_interleave(n_each)
    # The gradient of embedding_bag with respect to its weights, which autograd would call: mode 0 is "sum".
    dots = torch.zeros_like(values)
    dots[counted] = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        residual, W.detach(), few, starts, bags, 0
    ).float()
    return Residual(residual, dots, squares)


def group_entries(
    ids: Int[Tensor, "batch k"], d_sae: int, counted: Bool[Tensor, "batch k"] | None = None
) -> EntryGroups:
    """Order the entries of a sparse feature matrix by feature, without waiting for the device.

    Entries that are not `counted` come last, past the last offset, and belong to no feature.
    """
    keys = ids.flatten() if counted is None else torch.where(counted, ids, d_sae).flatten()
    keys = keys.short() if d_sae <= torch.iinfo(torch.int16).max else keys.int()
    ordered, order = torch.sort(keys, stable=True)
    bounds = torch.arange(d_sae + 1, device=ids.device, dtype=torch.int32)
    offsets = torch.searchsorted(ordered.int(), bounds, out_int32=True)
    ranked = torch.sort(offsets.diff(), descending=True, stable=True).indices
    return EntryGroups(order.int(), offsets, ranked.int())


def feature_sums_reference(
    values: Float[Tensor, "batch k"],
    gradients: Float[Tensor, "batch k"],
    ids: Int[Tensor, "batch k"],
    d_sae: int,
) -> FeatureSums:
    """What `feature_sums` computes, one sum at a time."""
    flat = ids.flatten().long()
    zeros = values.new_zeros(d_sae)
    return FeatureSums(
        torch.zeros(d_sae, dtype=torch.int32).index_add(0, flat, (values > 0).flatten().int()),
        zeros.index_add(0, flat, gradients.flatten()),
        zeros.index_add(0, flat, (values * gradients).flatten()),
    )


def feature_sums(
    values: Float[Tensor, "batch k"],
    gradients: Float[Tensor, "batch k"],
    ids: Int[Tensor, "batch k"],
    groups: EntryGroups,
) -> FeatureSums:
    """Sums over each feature's entries; `groups` is `group_entries(ids, d_sae)`."""
    if uses_triton(values):
        from scope.kernels.triton import products

        return FeatureSums(*products.feature_sums(values, gradients, groups.order, groups.offsets))
    return feature_sums_reference(values, gradients, ids, len(groups.ranked))


def feature_rows_reference(
    source: Float[Tensor, "batch d_in"],
    weights: Float[Tensor, "batch k"],
    ids: Int[Tensor, "batch k"],
    extra: Float[Tensor, "d_sae d_in"],
) -> Float[Tensor, "d_sae d_in"]:
    """What `feature_rows` writes, with `extra` as a whole matrix: weightsᵀ source + extra."""
    return sparse.weighted_row_sums_reference(source.float(), weights.float(), ids, len(extra)) + extra.float()


def feature_rows(
    source: Float[Tensor, "batch d_in"],
    weights: Float[Tensor, "batch k"],
    ids: Int[Tensor, "batch k"],
    groups: EntryGroups,
    out: Float[Tensor, "d_sae d_in"],
    slots: Int[Tensor, " d_sae"] | None = None,
    extra: Float[Tensor, "n d_in"] | None = None,
    parts: Sequence[slice] = (),
    written: Callable[[int], None] | None = None,
) -> Float[Tensor, " d_sae"]:
    """Sum the batch rows over each feature's entries into `out`; the squared norm of each row of `out`.

    Args:
        source: batch rows, in the compute dtype.
        weights: the entries' weights, float32; 0 for those that are not counted.
        ids: the entries' features.
        groups: the entries by feature.
        out: where the rows of features with an entry, or with a slot, are written. Other rows are zero on the CPU; on
            a GPU they may be left as they are, unless there are parts.
        slots: for each feature the row of `extra` to add, or -1.
        extra: further gradients of some features.
        parts: slices that have each feature once; they are written one after the other.
        written: called with the number of each part as soon as what writes it is under way.
    """
    if uses_triton(source):
        from scope.kernels.triton import products

        return products.feature_rows(source, weights, ids, *groups, out, slots, extra, parts, written)
    order = groups.order.long()
    rows = order // weights.shape[1]
    order, rows = order[: groups.offsets[-1]], rows[: groups.offsets[-1]]
    grouped = sparse.FeatureGroups(order, rows, groups.offsets[:-1].long())
    out.copy_(sparse.weighted_row_sums(source, weights, grouped))
    if slots is not None and extra is not None:
        with_slot = (slots >= 0).nonzero().flatten()
        out[with_slot] += extra[slots[with_slot].long()]
    if written is not None:
        for number in range(len(parts)):
            written(number)
    return torch.linalg.vector_norm(out, dim=1, dtype=torch.float32).square_()
