"""Sources in memory and synthetic activations with known features."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from activations.source import ActivationBatch, RowFlag
from activations.spec import StorageDtype

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads cost more than they save on tensors this small, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class MemorySource:
    """An `ActivationSource` over one float32 tensor, for one hook."""

    def __init__(self, values: Tensor, flags: np.ndarray | None = None, hook: str = HOOK) -> None:
        self.values = values
        self.flags = np.zeros(len(values), np.uint8) if flags is None else flags.astype(np.uint8)
        self.hook = hook

    hooks = property(lambda self: (self.hook,))
    n_rows = property(lambda self: len(self.values))
    dtype: StorageDtype = "float32"
    fingerprint = "e" * 64

    def hook_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.values.shape[1:])

    def document_at(self, row: int) -> dict[str, object]:
        return {"title": f"document {row // 100}"}

    def batches(self, hooks: Sequence[str], batch_size: int, start: int = 0) -> Iterator[ActivationBatch]:
        for at in range(start, len(self.values), batch_size):
            part = slice(at, min(at + batch_size, len(self.values)))
            values = self.values[part].numpy()
            norms = np.linalg.norm(values.reshape(len(values), -1), axis=1).astype(np.float32)
            rows = np.arange(part.start, part.stop)
            yield ActivationBatch(rows, {self.hook: values}, self.flags[part], {self.hook: norms})


class Synthetic(NamedTuple):
    """Rows that are sparse sums of known directions."""

    rows: Tensor
    directions: Tensor


def synthetic(n: int, d_in: int = 32, n_features: int = 64, active: int = 4, seed: int = 0) -> Synthetic:
    """`n` rows, each the sum of `active` random features with values from 0.5 to 1.5, about a common centre."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(n_features, d_in, generator=generator)
    directions /= directions.norm(dim=-1, keepdim=True)
    ids = torch.rand(n, n_features, generator=generator).topk(active, dim=-1).indices
    values = torch.zeros(n, n_features).scatter_(1, ids, 0.5 + torch.rand(n, active, generator=generator))
    return Synthetic(20 * (values @ directions) + 3, directions)


def mean_max_cosine(W_dec: Tensor, directions: Tensor) -> float:
    """MCC: the mean cosine between true features and the SAE's, under the best one-to-one assignment."""
    found = W_dec.detach() / W_dec.detach().norm(dim=-1, keepdim=True)
    cosines = (directions @ found.T).numpy()
    return float(cosines[linear_sum_assignment(-cosines)].mean())


def with_flags(n: int, every: int, flag: RowFlag) -> np.ndarray:
    """Flags with `flag` on each `every`-th row."""
    flags = np.zeros(n, np.uint8)
    flags[::every] = flag
    return flags
