"""Firings as sortable integers: pure numpy, no files.

A firing is (feature, strength, row). Strengths are bfloat16 bits; `order_key` maps them to uint16 so that a smaller
key is a stronger firing, and a firing packs into one uint64, feature | key | row from high bits to low, whose numeric
order is the order of the feature lists: by feature, strongest first, equal ones by row. numpy sorts such integers
with vector instructions, seven times as fast as it argsorts.
"""

from typing import NamedTuple

import numpy as np

from scope.errors import InvalidInputError

__all__ = [
    "KEY_BITS",
    "RowFirings",
    "Unpacked",
    "bits_for",
    "from_order_key",
    "order_key",
    "pack",
    "sort_rows",
    "unpack",
]

KEY_BITS = 16


class RowFirings(NamedTuple):
    """The firings of some rows, row by row, the strongest first within a row."""

    counts: np.ndarray
    """int64 `(n_rows,)`: firings on each row."""
    features: np.ndarray
    """uint32 `(n_firings,)`."""
    values: np.ndarray
    """bfloat16 bits, uint16 `(n_firings,)`."""


class Unpacked(NamedTuple):
    """The parts of packed firings."""

    features: np.ndarray
    """uint32."""
    values: np.ndarray
    """bfloat16 bits, uint16."""
    rows: np.ndarray
    """uint64."""


def bits_for(n: int) -> int:
    """Bits that hold 0 to n - 1; at least 1."""
    return max(1, (n - 1).bit_length())


def order_key(values: np.ndarray) -> np.ndarray:
    """uint16 keys of bfloat16 bits: the larger the number, the smaller its key."""
    negative = values >> 15 != 0
    return np.where(negative, values, ~values & np.uint16(0x7FFF)).astype(np.uint16)


def from_order_key(keys: np.ndarray) -> np.ndarray:
    """The inverse of `order_key`."""
    negative = keys >> 15 != 0
    return np.where(negative, keys, ~keys & np.uint16(0x7FFF)).astype(np.uint16)


def pack(features: np.ndarray, values: np.ndarray, rows: np.ndarray, row_bits: int) -> np.ndarray:
    """Firings as uint64, unsorted.

    Args:
        features, values (bfloat16 bits), rows: `(n,)` each.
        row_bits: bits of the row part; features must fit into what is left, 48 - row_bits.
    """
    packed: np.ndarray = features.astype(np.uint64)
    np.left_shift(packed, np.uint64(KEY_BITS), out=packed)
    np.bitwise_or(packed, order_key(values), out=packed)
    np.left_shift(packed, np.uint64(row_bits), out=packed)
    np.bitwise_or(packed, rows.astype(np.uint64), out=packed)
    return packed


def unpack(packed: np.ndarray, row_bits: int) -> Unpacked:
    """The inverse of `pack`."""
    rows = packed & np.uint64((1 << row_bits) - 1)
    keys = (packed >> np.uint64(row_bits)).astype(np.uint16)
    features = (packed >> np.uint64(row_bits + KEY_BITS)).astype(np.uint32)
    return Unpacked(features, from_order_key(keys), rows)


def sort_rows(ids: np.ndarray, values: np.ndarray, d_sae: int) -> RowFirings:
    """Firings of a batch as they come from `encode_sparse`, in index order and without the zeros.

    Args:
        ids: integers `(n_rows, k)`, feature ids.
        values: bfloat16 bits, uint16 `(n_rows, k)`, firing strengths; zero where nothing fires.
    Raises:
        InvalidInputError: an id that is no feature.
    """
    id_bits = bits_for(d_sae)
    fires = values & np.uint16(0x7FFF) != 0
    if fires.any() and (int(ids[fires].max()) >= d_sae or int(ids[fires].min()) < 0):
        raise InvalidInputError(f"The SAE returned feature ids outside 0 to {d_sae - 1:,}.")
    word = np.uint32 if id_bits + KEY_BITS <= 32 else np.uint64
    packed: np.ndarray = order_key(values).astype(word)
    np.left_shift(packed, word(id_bits), out=packed)
    np.bitwise_or(packed, np.where(fires, ids, 0).astype(word), out=packed)
    packed[~fires] = np.iinfo(word).max
    packed.sort(axis=1)
    counts = fires.sum(axis=1, dtype=np.int64)
    kept = packed[np.arange(packed.shape[1]) < counts[:, None]]
    features = (kept & word((1 << id_bits) - 1)).astype(np.uint32)
    return RowFirings(counts, features, from_order_key((kept >> word(id_bits)).astype(np.uint16)))
