"""Edges from all firing features of a layer at once: a_s d_s . g, with the gradients of many targets.

Decoder rows of all that fires are too many to keep, 2.7 GB a layer for 6,000 tokens, and are gathered for a few hundred
positions at a time, `Piece` by `Piece`. What fires where is the same for every target: it is laid out once, so that no
batch of targets waits for the device.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from scope.attribution.graph_needs import POSITION_CHUNK
from scope.attribution.reading import Firing

__all__ = ["Piece", "effects", "pieces_of"]


class Piece(NamedTuple):
    """The firing features of some positions, each position's padded to as many as the fullest has."""

    first: int
    """The first position."""
    start: int
    """Place of the first feature among the layer's firing ones, which stand in order of position."""
    places: Int[Tensor, "positions longest"]
    """Place of each feature among the layer's firing ones; behind a position's last one any other."""
    flat: Int[Tensor, " n"]
    """Where the features stand in `places`, flattened."""
    ends: list[int]
    """Features of the first n positions of the piece, for n from 0."""


def pieces_of(firing: Firing, n_tokens: int) -> list[Piece]:
    """The firing features of a layer in pieces of `POSITION_CHUNK` positions; those without any left out."""
    counts = torch.bincount(firing.position, minlength=n_tokens)
    ends = [0, *counts.cumsum(0).tolist()]
    found = []
    for first in range(0, n_tokens, POSITION_CHUNK):
        stop = min(first + POSITION_CHUNK, n_tokens)
        start, n = ends[first], ends[stop] - ends[first]
        if n == 0:
            continue
        here = counts[first:stop]
        within = torch.arange(int(here.max()), device=here.device)
        places = ((here.cumsum(0) - here)[:, None] + within).clamp_max(n - 1) + start
        flat = (within < here[:, None]).flatten().nonzero()[:, 0]
        found.append(Piece(first, start, places, flat, [end - start for end in ends[first : stop + 1]]))
    return found


def effects(
    pieces: Sequence[Piece],
    firing: Firing,
    gradient: Float[Tensor, "n rows d_model"],
    decoder: Callable[[Int[Tensor, "*any"]], Float[Tensor, "*any d_model"]],
) -> Float[Tensor, "n firing"]:
    """a_s d_s . g for every firing feature s of a layer; 0 where it fires behind the gradients' last position.

    Args:
        pieces: what `pieces_of` makes of `firing`.
        firing: the layer's features that fire.
        gradient: of each target, at what the features write, on the first `rows` positions.
        decoder: gives what a unit of features writes, from their ids.
    """
    rows = gradient.shape[1]
    found = gradient.new_zeros(len(gradient), len(firing.feature))
    for first, start, places, flat, ends in pieces:
        n = min(len(places), rows - first)
        if n <= 0:
            break
        written = decoder(firing.feature[places[:n]]).to(gradient.device)
        dots = gradient[:, first : first + n].transpose(0, 1) @ written.mT  # (positions, targets, longest)
        part = slice(start, start + ends[n])
        found[:, part] = dots.transpose(0, 1).flatten(1).index_select(1, flat[: ends[n]]) * firing.activation[part]
    return found
