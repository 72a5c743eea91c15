"""The sums behind `reconstruction_metrics`, its figures, and intervals from resampling documents.

The definitions are in `scope.training.metrics`.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from scope.saes.base import SAE

__all__ = ["Interval", "ReconstructionMetrics", "Tally", "bootstrap"]

OVER_DENSE = 0.1
RESAMPLES = 1000

Interval = tuple[float, float]


class ReconstructionMetrics(NamedTuple):
    """See the module's docstring for the definitions."""

    fvu: float
    """Over rows of at most ten times the median norm: the one to compare by."""
    fvu_interval: Interval | None
    """95% interval of `fvu`; None without documents."""
    fvu_all: float
    """Over all rows but BOS."""
    fvu_all_interval: Interval | None
    l0: float
    l0_interval: Interval | None
    dead_share: float
    """Share of features that never fired on `n_rows` rows."""
    over_dense_share: float
    cosine: float
    n_rows: int
    """Rows looked at."""
    n_within_norm: int
    """Those of at most ten times the median norm."""
    density: Float[np.ndarray, " d_sae"]
    """Share of rows on which each feature fires."""
    fvu_by_output: dict[str, float] | None = None
    """`fvu` at each output's hook, where there are several."""

    def to_dict(self) -> dict[str, Any]:
        """The figures without the densities, JSON-able."""
        figures = self._asdict()
        figures.pop("density")
        if figures["fvu_by_output"] is None:
            figures.pop("fvu_by_output")
        return figures


def bootstrap(
    statistic: Callable[[Float[np.ndarray, "samples parts"]], Float[np.ndarray, " samples"]],
    sums: Float[np.ndarray, "documents parts"],
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Interval:
    """The 95% percentile interval of a statistic of sums over documents.

    Args:
        statistic: from the sums of each resample to its value.
        sums: what each document adds to them.
    """
    generator = np.random.default_rng(seed)
    n = len(sums)
    counts = generator.multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):  # a resample of few documents may leave nothing to divide by
        values = statistic(counts @ sums)
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(low), float(high)


class Tally:
    """Sums over the rows looked at. Targets are shifted by b_dec, so that sums of squares lose no digits."""

    def __init__(self, sae: SAE, limits: Sequence[float], documents: np.ndarray | None) -> None:
        self.sae, self.limits = sae, limits
        self.widths = [port.width for port in sae.cfg.ports.outputs or sae.cfg.ports.inputs]
        self.codes = None if documents is None else np.unique(documents, return_inverse=True)[1]
        n_documents = 1 if self.codes is None else int(self.codes.max()) + 1
        n_sums = 1 + 2 * len(self.widths) + sae.d_out
        # Per document: rows, each output's residual squares, each output's squares, and the sum of the rows, of those
        # within the limits.
        self.within = torch.zeros(n_documents, n_sums, dtype=torch.float64, device=sae.device)
        self.beyond = torch.zeros(n_documents, n_sums, dtype=torch.float64, device=sae.device)
        # Per document: firings, rows.
        self.fired = torch.zeros(n_documents, 2, dtype=torch.float64, device=sae.device)
        self.firings = torch.zeros(sae.d_sae, dtype=torch.int64, device=sae.device)
        self.cosines, self.n_rows = 0.0, 0

    def add(self, rows: np.ndarray, x: Tensor, y: Tensor) -> None:
        features = self.sae.encode_sparse(x)
        y_hat = self.sae.reconstruct(x, features).double()
        residual, shifted = y.double() - y_hat, y.double() - self.sae.b_dec.double()
        squares = [self._by_output(part.square()) for part in (residual, shifted)]
        parts = torch.cat([torch.ones_like(squares[0][:, :1]), *squares, shifted], dim=1)
        inside = torch.stack(
            [part.norm(dim=-1) <= limit for part, limit in zip(y.split(self.widths, dim=-1), self.limits, strict=True)]
        ).all(dim=0)
        codes = torch.zeros(len(x), dtype=torch.int64) if self.codes is None else torch.from_numpy(self.codes[rows])
        codes = codes.to(x.device)
        self.within.index_add_(0, codes[inside], parts[inside])
        self.beyond.index_add_(0, codes[~inside], parts[~inside])
        n_fired = (features.values > 0).sum(dim=-1).double()
        self.fired.index_add_(0, codes, torch.stack([n_fired, torch.ones_like(n_fired)], dim=1))
        self.firings += torch.bincount(features.ids[features.values > 0].long(), minlength=self.sae.d_sae)
        self.cosines += float(torch.cosine_similarity(y.double(), y_hat, dim=-1).sum())
        self.n_rows += len(x)

    def _by_output(self, squares: Tensor) -> Tensor:
        return torch.stack([part.sum(dim=-1) for part in squares.split(self.widths, dim=-1)], dim=-1)

    def result(self, seed: int) -> ReconstructionMetrics:
        within, n = self.within.cpu().numpy(), len(self.widths)
        whole = within + self.beyond.cpu().numpy()
        inside, everything = within.sum(axis=0), whole.sum(axis=0)
        fired = self.fired.cpu().numpy()
        seen = fired[:, 1] > 0
        l0_interval = None
        if self.codes is not None:
            l0_interval = bootstrap(lambda drawn: drawn[:, 0] / drawn[:, 1], fired[seen], seed)
        density = self.firings.cpu().numpy() / self.n_rows
        fvus = self._fvus(inside)
        ports = self.sae.cfg.ports.outputs or self.sae.cfg.ports.inputs
        return ReconstructionMetrics(
            fvu=float(fvus.mean()),
            fvu_interval=self._interval(within[seen], seed),
            fvu_all=float(self._fvus(everything).mean()),
            fvu_all_interval=self._interval(whole[seen], seed),
            l0=float(density.sum()),
            l0_interval=l0_interval,
            dead_share=float((density == 0).mean()),
            over_dense_share=float((density > OVER_DENSE).mean()),
            cosine=self.cosines / self.n_rows,
            n_rows=self.n_rows,
            n_within_norm=int(inside[0]),
            density=density,
            fvu_by_output=(
                {str(port.hook): float(fvu) for port, fvu in zip(ports, fvus, strict=True)} if n > 1 else None
            ),
        )

    def _interval(self, sums: np.ndarray, seed: int) -> Interval | None:
        """The interval of the fvu from the sums of each document, about the mean of all."""
        if self.codes is None:
            return None
        n, total = len(self.widths), sums.sum(axis=0)
        parts = np.concatenate([sums[:, 1 : 1 + n], self._totals(sums, total[1 + 2 * n :] / total[0])], axis=1)
        return bootstrap(lambda drawn: (drawn[:, :n] / drawn[:, n:]).mean(axis=1), parts, seed)

    def _fvus(self, sums: np.ndarray) -> np.ndarray:
        """The fvu of each output."""
        n = len(self.widths)
        fvus: np.ndarray = sums[1 : 1 + n] / self._totals(sums, sums[1 + 2 * n :] / sums[0])
        return fvus

    def _totals(self, sums: np.ndarray, mean: np.ndarray) -> np.ndarray:
        """sum ‖y - mean‖² of each output, from the sums of 1, ‖y‖² and y."""
        n, at = len(self.widths), np.cumsum([0, *self.widths])
        rows, squares, vectors = sums[..., 0], sums[..., 1 + n : 1 + 2 * n], sums[..., 1 + 2 * n :]
        parts = [slice(start, stop) for start, stop in itertools.pairwise(at)]
        totals = [
            squares[..., i] - 2 * vectors[..., part] @ mean[part] + rows * (mean[part] @ mean[part])
            for i, part in enumerate(parts)
        ]
        return np.stack(totals, axis=-1)
