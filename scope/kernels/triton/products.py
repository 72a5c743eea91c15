"""Products with a sparse feature matrix on a GPU: each reads the rows it needs once, and nothing else.

`residual_and_dots` holds a tile of the k decoder rows of one token in registers; from it come, without a second read,
the reconstruction's tile, its error, and that tile's part of the k dot products with the error. Entries whose value is
0, or those that are not counted, are passed over: nothing is read for them, and their dot product is 0.

`feature_rows` sums, for each feature, the batch rows that it fires on. Most features fire on a few rows and some on
half of them. The densest features, as few as they are, hold most entries: for them it is a dense product, which tensor
cores do at next to no cost. For each of the others one program sums its rows, in order of their counts, which is what
balances the load. No sum depends on timing.
"""

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["centre", "feature_rows", "feature_sums", "residual_and_dots"]

DENSE_FEATURES = 2048
"""How many of the densest features go through a dense product."""


@triton.jit
def _centre(x, b, centred, squares, scale, d, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < d
    target = tl.load(x + row * d + column, mask=inside, other=0.0).to(tl.float32) * scale
    less = target - tl.load(b + column, mask=inside, other=0.0)
    tl.store(centred + row * d + column, less.to(centred.dtype.element_ty), mask=inside)
    tl.store(squares + row, tl.sum(target * target, 0))


def centre(x: Tensor, scale: float, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """scale x - b in `dtype`, and the squared norm of each row of scale x, float32."""
    batch, d = x.shape
    centred = torch.empty(batch, d, dtype=dtype, device=x.device)
    squares = torch.empty(batch, dtype=torch.float32, device=x.device)
    _centre[(batch,)](x, b, centred, squares, scale, d, WIDTH=triton.next_power_of_2(d), num_warps=4)
    return centred, squares


@triton.jit
def _residual_and_dots(
    x, values, ids, counted, W, b, residual, dots, squares, scale, d, k,
    HAS_COUNTED: tl.constexpr, K_PADDED: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, K_PADDED)
    feature = tl.load(ids + row * k + slot, mask=slot < k, other=0).to(tl.int64)
    value = tl.load(values + row * k + slot, mask=slot < k, other=0.0)
    wanted = value != 0
    if HAS_COUNTED:
        wanted = tl.load(counted + row * k + slot, mask=slot < k, other=0) != 0
    products = tl.zeros((K_PADDED, COLUMNS), tl.float32)
    square = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, d, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < d
        tile = tl.load(
            W + feature[:, None] * d + column[None, :], mask=wanted[:, None] & inside[None, :], other=0.0
        ).to(tl.float32)
        target = tl.load(x + row * d + column, mask=inside, other=0.0).to(tl.float32) * scale
        centre = tl.load(b + column, mask=inside, other=0.0)
        error = tl.sum(tile * value[:, None], 0) + centre - target
        square += error * error
        products += tile * error[None, :]
        tl.store(residual + row * d + column, error.to(residual.dtype.element_ty), mask=inside)
    tl.store(dots + row * k + slot, tl.sum(products, 1), mask=slot < k)
    tl.store(squares + row, tl.sum(square, 0))


def residual_and_dots(
    x: Tensor,
    scale: float,
    values: Tensor,
    ids: Tensor,
    W: Tensor,
    b: Tensor,
    counted: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """x_hat - scale x in `dtype`, by default W's, its dot products with the k rows of W, and its squared norm, both
    float32."""
    batch, d = x.shape
    k = ids.shape[1]
    residual = torch.empty(batch, d, dtype=dtype or W.dtype, device=x.device)
    dots = torch.empty(batch, k, dtype=torch.float32, device=x.device)
    squares = torch.empty(batch, dtype=torch.float32, device=x.device)
    k_padded = triton.next_power_of_2(k)
    columns = max(16, min(256, 4096 // k_padded))
    _residual_and_dots[(batch,)](
        x, values, ids, values if counted is None else counted.view(torch.uint8), W, b, residual, dots, squares,
        scale, d, k, HAS_COUNTED=counted is not None,
        K_PADDED=k_padded, COLUMNS=columns, num_warps=2 if k_padded * columns <= 4096 else 4,
    )  # fmt: skip
    return residual, dots, squares


@triton.jit
def _feature_sums(order, offsets, values, gradients, fired, bias_gradient, along, ENTRIES: tl.constexpr):
    feature = tl.program_id(0)
    start, end = tl.load(offsets + feature), tl.load(offsets + feature + 1)
    n_fired = tl.zeros((ENTRIES,), tl.int32)
    total = tl.zeros((ENTRIES,), tl.float32)
    product = tl.zeros((ENTRIES,), tl.float32)
    for at in range(start, end, ENTRIES):
        entry = at + tl.arange(0, ENTRIES)
        inside = entry < end
        place = tl.load(order + entry, mask=inside, other=0)
        value = tl.load(values + place, mask=inside, other=0.0)
        gradient = tl.load(gradients + place, mask=inside, other=0.0)
        n_fired += (value > 0).to(tl.int32)
        total += gradient
        product += value * gradient
    tl.store(fired + feature, tl.sum(n_fired, 0))
    tl.store(bias_gradient + feature, tl.sum(total, 0))
    tl.store(along + feature, tl.sum(product, 0))


def feature_sums(values: Tensor, gradients: Tensor, order: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each feature: rows on which it fires, sum of its gradients, sum of values x gradients."""
    d_sae = len(offsets) - 1
    fired = torch.empty(d_sae, dtype=torch.int32, device=values.device)
    bias_gradient, along = torch.empty(2, d_sae, dtype=torch.float32, device=values.device)
    _feature_sums[(d_sae,)](order, offsets, values, gradients, fired, bias_gradient, along, ENTRIES=64, num_warps=1)
    return fired, bias_gradient, along


@triton.jit
def _feature_rows(
    source, weights, order, offsets, ranked, slots, extra, out, squares, d, k, first, begin, stop,
    HAS_EXTRA: tl.constexpr, ALL: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    feature = tl.load(ranked + first + tl.program_id(0)).to(tl.int64)
    start, end = tl.load(offsets + feature), tl.load(offsets + feature + 1)
    slot = tl.load(slots + feature) if HAS_EXTRA else -1
    square = 0.0
    mine = (feature >= begin) & (feature < stop)
    if mine & ((end > start) | (slot >= 0) | ALL):
        column = tl.arange(0, WIDTH)
        inside = column < d
        acc = tl.zeros((WIDTH,), tl.float32)
        if HAS_EXTRA:
            acc += tl.load(
                extra + tl.maximum(slot, 0).to(tl.int64) * d + column, mask=inside & (slot >= 0), other=0.0
            ).to(tl.float32)
        for at in range(start, end, ROWS):
            entry = at + tl.arange(0, ROWS)
            place = tl.load(order + entry, mask=entry < end, other=0)
            weight = tl.load(weights + place, mask=entry < end, other=0.0)
            row = (place // k).to(tl.int64)
            tile = tl.load(
                source + row[:, None] * d + column[None, :], mask=(entry < end)[:, None] & inside[None, :], other=0.0
            )
            acc += tl.sum(tile.to(tl.float32) * weight[:, None], 0)
        stored = acc.to(out.dtype.element_ty)
        tl.store(out + feature * d + column, stored, mask=inside)
        kept = stored.to(tl.float32)
        square = tl.sum(kept * kept, 0)
    tl.store(squares + feature, square, mask=mine)


def feature_rows(
    source: Tensor,
    weights: Tensor,
    ids: Tensor,
    order: Tensor,
    offsets: Tensor,
    ranked: Tensor,
    out: Tensor,
    slots: Tensor | None = None,
    extra: Tensor | None = None,
    parts: Sequence[slice] = (),
    written: Callable[[int], None] | None = None,
) -> Tensor:
    """Write the rows of (sparse weights)ᵀ source for active features to `out`; returns every row's squared norm.

    With parts, slices of the features, the rows of all features are written, and `written` is called after each part.
    """
    d, k, d_sae = source.shape[1], weights.shape[1], len(out)
    squares = torch.empty(d_sae, dtype=torch.float32, device=source.device)
    n_dense = min(DENSE_FEATURES, d_sae)
    densest = ranked[:n_dense].long()
    rows = _dense_rows(source, weights, ids, ranked, n_dense)
    if slots is not None and extra is not None:
        slot = slots[densest, None]
        rows += torch.where(slot >= 0, extra[slot.flatten().clamp_min(0).long()], 0.0)
    out.index_copy_(0, densest, rows)
    squares.index_copy_(0, densest, torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32).square_())
    has_extra = slots is not None and extra is not None
    width = triton.next_power_of_2(d)
    for number, part in enumerate(parts or (slice(0, d_sae),)):
        if d_sae > n_dense:
            _feature_rows[(d_sae - n_dense,)](
                source, weights, order, offsets, ranked, slots if has_extra else ranked, extra if has_extra else out,
                out, squares, d, k, n_dense, part.start, part.stop,
                HAS_EXTRA=has_extra, ALL=bool(parts), WIDTH=width, ROWS=2, num_warps=8 if width > 1024 else 4,
            )  # fmt: skip
        if written is not None:
            written(number)
    return squares


def _dense_rows(source: Tensor, weights: Tensor, ids: Tensor, ranked: Tensor, n_dense: int) -> Tensor:
    """weightsᵀ source for the first features of `ranked`, through their dense columns."""
    rank = torch.empty_like(ranked)
    rank[ranked.long()] = torch.arange(len(ranked), dtype=ranked.dtype, device=ranked.device)
    column = rank[ids.long()].clamp_max(n_dense).long()
    # All other entries share the column after the last; eight columns more keep rows at 16 bytes.
    dense = torch.zeros(len(source), n_dense + 8, dtype=source.dtype, device=source.device)
    dense.scatter_(1, column, weights.to(source.dtype))
    return dense[:, :n_dense].T @ source
