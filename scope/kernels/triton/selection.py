"""The k largest bfloat16 entries of each row in one pass, and a threshold that keeps the k largest in place.

One program takes one row.

1. The row is read once, as groups of 8 x PIECES entries (PIECES runs of 8 neighbours), of which only the maxima stay.
2. bfloat16 has 65,536 values, so their order is that of 16-bit integers, and the k-th largest maximum is found
   exactly, by fixing its 16 bits from the highest down: a bit is set if at least k maxima stay as large.
3. The k groups with the largest maxima hold the k largest entries (any other entry is no larger than each of the k
   maxima); of equal maxima the first groups are taken.
4. Their entries are read again, a hundredth of the row, and the same search over them gives the k entries. Of equal
   entries the first are taken, so that the result does not depend on timing.

The search is RadixSelect (Alabi et al. 2012, "Fast k-selection algorithms for graphics processing units") with one
bit a pass, on registers. (Two bits a pass, three counts packed in one sum, were slower on an H100.)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["keep_largest", "topk_rows"]

RUN = 8
"""Neighbours in a run: 16 bytes of bfloat16, what one thread reads at once."""
MAX_GROUPS = 2048
MAX_ROW_IN_REGISTERS = 16_384
"""Widest row that `keep_largest` takes."""


@triton.jit
def _ordered(x):
    """bfloat16 as integers of the same order, from 0 up; -0 and +0 differ."""
    bits = x.to(tl.int16, bitcast=True).to(tl.int32)
    return tl.where(bits < 0, -1 - bits, bits + 32768)


@triton.jit
def _kth_largest(keys, k):
    """The k-th largest of at least k keys of 16 bits; keys below 0 do not count."""
    found = 0
    for step in tl.static_range(16):
        raised = found | (1 << (15 - step))
        enough = tl.sum((keys >= raised).to(tl.int32), 0) >= k
        found = tl.where(enough, raised, found)
    return found


@triton.jit
def _first_largest(keys, k):
    """Which entries are the k largest, the first of equal ones, and the place of each among those taken."""
    kth = _kth_largest(keys, k)
    above = (keys > kth).to(tl.int32)
    tied = (keys == kth).to(tl.int32)
    ties_wanted = k - tl.sum(above, 0)
    taken = (above == 1) | ((tied == 1) & (tl.cumsum(tied, 0) <= ties_wanted))
    return taken, tl.cumsum(taken.to(tl.int32), 0) - 1


@triton.jit
def _topk_rows(
    pre,
    values,
    ids,
    n,
    k,
    GROUPS: tl.constexpr,
    PIECES: tl.constexpr,
    K_PADDED: tl.constexpr,
    RUN: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    pre += row * n
    values += row * k
    ids += row * k
    group = tl.arange(0, GROUPS)
    run = tl.arange(0, RUN)
    maxima = tl.full((GROUPS,), -1, tl.int32)
    for piece in range(PIECES):
        at = piece * GROUPS * RUN + group[:, None] * RUN + run[None, :]
        entries = tl.load(pre + at, mask=at < n, other=0.0)
        maxima = tl.maximum(maxima, tl.max(tl.where(at < n, _ordered(entries), -1), 1))
    taken, place = _first_largest(maxima, k)
    tl.store(ids + place, group, mask=taken)
    tl.debug_barrier()  # the ids of the groups are read back by other threads
    slot = tl.arange(0, K_PADDED)
    winners = tl.load(ids + slot, mask=slot < k, other=0)
    tl.debug_barrier()
    within = tl.arange(0, PIECES * RUN)
    at2 = winners[:, None] * RUN + ((within // RUN) * (GROUPS * RUN) + within % RUN)[None, :]
    valid = (slot[:, None] < k) & (at2 < n)
    entries2 = tl.load(pre + at2, mask=valid, other=0.0)
    keys = tl.reshape(tl.where(valid, _ordered(entries2), -1), (K_PADDED * PIECES * RUN,))
    at_flat = tl.reshape(at2, (K_PADDED * PIECES * RUN,))
    entries_flat = tl.reshape(entries2.to(tl.float32), (K_PADDED * PIECES * RUN,))
    taken2, place2 = _first_largest(keys, k)
    tl.store(ids + place2, at_flat, mask=taken2)
    tl.store(values + place2, entries_flat, mask=taken2)


def topk_rows(pre: Tensor, k: int) -> tuple[Tensor, Tensor] | None:
    """Values (float32) and ids (int32) of the k largest entries of each row; None for shapes it is not made for."""
    batch, n = pre.shape
    if pre.dtype != torch.bfloat16 or not pre.is_contiguous() or n >= 2**30:
        return None
    k_padded = triton.next_power_of_2(k)
    groups = min(max(triton.next_power_of_2(triton.cdiv(n, 4 * RUN)), k_padded, 16), MAX_GROUPS)
    pieces = triton.next_power_of_2(triton.cdiv(n, groups * RUN))
    # A group that lies past the row's end has no maximum; k groups must have one.
    if k > min(groups, triton.cdiv(n, RUN)) or k_padded * pieces * RUN > 16_384:
        return None
    values = torch.empty(batch, k, dtype=torch.float32, device=pre.device)
    ids = torch.empty(batch, k, dtype=torch.int32, device=pre.device)
    _topk_rows[(batch,)](
        pre,
        values,
        ids,
        n,
        k,
        GROUPS=groups,
        PIECES=pieces,
        K_PADDED=k_padded,
        RUN=RUN,
        num_warps=8 if groups >= 1024 else 4,
    )
    return values, ids


@triton.jit
def _keep_largest(pre, out, n_valid, n, k, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    valid = column < tl.minimum(tl.load(n_valid), n)
    entries = tl.load(pre + row * n + column, mask=valid, other=0.0)
    keys = tl.where(valid, _ordered(entries), -1)
    kept = (keys >= _kth_largest(keys, k)) & (keys > 32768)  # above +0
    tl.store(out + row * n + column, tl.where(kept, entries.to(tl.float32), 0.0).to(tl.bfloat16), mask=column < n)


def keep_largest(pre: Tensor, n_valid: Tensor, k: int) -> Tensor:
    """ReLU of each row's k largest entries among its first `n_valid`, zero elsewhere; of equal entries all are kept."""
    batch, n = pre.shape
    out = torch.empty_like(pre)
    width = triton.next_power_of_2(n)
    _keep_largest[(batch,)](pre, out, n_valid, n, k, WIDTH=width, num_warps=16 if width > 4096 else 8)
    return out
