"""The features of a training batch, in the layout that fits how many fire.

Every layout has the same few operations, so that a loss is written once:

    values         feature activations, differentiable
    pre            pre-activations in the same layout, differentiable; None where no loss needs them
    of(v)          a per-feature vector `(d_sae,)` in the same layout
    row_sums(q)    sums over each row's features of a quantity in the same layout, `(batch,)`
    decode(W)      the values times the rows of W, `(batch, d)`
    counts()       rows on which each feature fires
    keep(mask)     the same features with values only where a per-feature mask is true

`Dense` is the plain one. `Padded` has k entries on every row (TopK), `Listed` as many as each row needs (BatchTopK,
JumpReLU). The products are those of `scope.kernels`.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from scope.kernels import entries, sparse

__all__ = ["Active", "Dense", "Listed", "Padded"]


@dataclass(frozen=True)
class Dense:
    """All features of all rows."""

    values: Float[Tensor, "batch d_sae"]
    pre: Float[Tensor, "batch d_sae"] | None = None

    def of(self, vector: Tensor) -> Tensor:
        return vector

    def row_sums(self, quantity: Tensor) -> Float[Tensor, " batch"]:
        return quantity.sum(dim=-1)

    def decode(self, W: Float[Tensor, "d_sae d"]) -> Float[Tensor, "batch d"]:
        return self.values.to(W.dtype) @ W

    def counts(self) -> Int[Tensor, " d_sae"]:
        return (self.values.detach() > 0).sum(dim=0)

    def keep(self, mask: Bool[Tensor, " d_sae"]) -> "Dense":
        return replace(self, values=self.values * mask)


@dataclass(frozen=True)
class Padded:
    """The same number of entries on each row."""

    values: Float[Tensor, "batch k"]
    ids: Int[Tensor, "batch k"]
    groups: sparse.FeatureGroups
    d_sae: int
    pre: Float[Tensor, "batch k"] | None = None

    def of(self, vector: Tensor) -> Tensor:
        return vector[self.ids.long()]

    def row_sums(self, quantity: Tensor) -> Float[Tensor, " batch"]:
        return quantity.sum(dim=-1)

    def decode(self, W: Float[Tensor, "d_sae d"]) -> Float[Tensor, "batch d"]:
        return sparse.sparse_decode(self.values, self.ids, W, self.groups)

    def counts(self) -> Int[Tensor, " d_sae"]:
        return torch.bincount(self.ids[self.values.detach() > 0], minlength=self.d_sae)

    def keep(self, mask: Bool[Tensor, " d_sae"]) -> "Padded":
        return replace(self, values=self.values * mask[self.ids.long()])


@dataclass(frozen=True)
class Listed:
    """Entries in one list, row after row."""

    values: Float[Tensor, " entries"]
    places: entries.Places
    d_sae: int
    pre: Float[Tensor, " entries"] | None = None

    def of(self, vector: Tensor) -> Tensor:
        return vector[self.places.ids]

    def row_sums(self, quantity: Tensor) -> Float[Tensor, " batch"]:
        return quantity.new_zeros(len(self.places.offsets)).index_add(0, self.places.rows, quantity)

    def decode(self, W: Float[Tensor, "d_sae d"]) -> Float[Tensor, "batch d"]:
        return entries.decode_entries(self.values, self.places, W)

    def counts(self) -> Int[Tensor, " d_sae"]:
        return torch.bincount(self.places.ids[self.values.detach() > 0], minlength=self.d_sae)

    def keep(self, mask: Bool[Tensor, " d_sae"]) -> "Listed":
        return replace(self, values=self.values * mask[self.places.ids])


Active = Dense | Padded | Listed
