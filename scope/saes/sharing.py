"""Who else computes a training step: what an architecture has to know of other processes.

A step may be shared by n processes in two ways:

- by rows: each has some rows of the batch, and all features;
- by features: each has all rows of the batch, and the features r, r + n, r + 2n, … for its rank r.

An architecture is written once. Where a sum runs over features, or a choice over more rows or features than a process
has, it asks `TrainingContext.sharing`. `Sharing` itself is one process alone, whose answers are its own numbers;
`scope.training.distributed` has the others.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from scope.kernels.entries import largest
from scope.kernels.topk import topk

__all__ = ["ALONE", "FeatureShare", "Sharing"]


class FeatureShare(NamedTuple):
    """Which features of a dictionary a process has: `first`, and every `stride`-th after it. Strided, the densest
    prefix of a Matryoshka dictionary is divided as evenly as the whole."""

    first: int = 0
    stride: int = 1

    def count(self, d_sae: int) -> int:
        """How many they are."""
        return len(range(self.first, d_sae, self.stride))

    def of(self, rows: Tensor) -> Tensor:
        """Their rows of a tensor with one row for each feature."""
        return rows[self.first :: self.stride]

    def ids(self, n: int, device: torch.device | str = "cpu") -> Int[Tensor, " n"]:
        """Their feature ids."""
        return self.first + self.stride * torch.arange(n, device=device)


class Sharing:
    """One process alone; see the module's docstring for the others."""

    features = FeatureShare()
    """The features that this process has."""

    def sum_over_features(self, partial: Tensor) -> Tensor:
        """The sum over all features of what is the sum over this process's; differentiable."""
        return partial

    def read_by_features(self, tensor: Tensor) -> Tensor:
        """A tensor that all features read: its gradient is the sum of what the features of each process give."""
        return tensor

    def among_largest(self, values: Float[Tensor, "batch c"], k: int) -> Bool[Tensor, "batch c"] | None:
        """Which of this process's candidates are among the k largest of their row, over all processes.

        Args:
            values: the k largest of this process's features on each row, 0 or more, or all where they are fewer.
            k: how many are taken of each row.

        Returns:
            The mask; None where all are taken.
        """
        return None

    def kth_largest(self, values: Float[Tensor, "batch n"], k: int, n_all: int) -> Float[Tensor, "batch 1"] | None:
        """The k-th largest entry of each row over all processes; None where there are k or fewer.

        Args:
            values: this process's entries.
            k: the rank.
            n_all: entries of a row over all processes.
        """
        return topk(values, k).values.amin(dim=-1, keepdim=True) if n_all > k else None

    def largest(self, pre: Float[Tensor, "batch d_sae"], n: int) -> Int[Tensor, " entries"]:
        """Flat positions, ascending, of this process's entries among the `n` largest above 0 of all processes."""
        return largest(pre, n)

    def nth_largest(self, pre: Float[Tensor, "batch d_sae"], n: int) -> Float[Tensor, ""]:
        """The n-th largest entry over all features, or 0 where it is below; fewer than n count as so many."""
        return pre.flatten().topk(min(n, pre.numel())).values[-1].clamp_min(0)

    def smallest(self, values: Float[Tensor, " entries"]) -> Float[Tensor, ""]:
        """The smallest of all processes' entries; infinite where there are none."""
        return values.min() if len(values) else values.new_full((), torch.inf)


ALONE = Sharing()
