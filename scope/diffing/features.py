"""What a given SAE makes of two models: how well it reconstructs each, and what became of each of its features.

One pass over the rows of its hook, the same tokens in both models, BOS and special tokens left out:

1. *Drift.* fvu of the SAE's reconstruction of each model's rows, about that model's own mean, over rows of at most ten
   times the median norm; and its change, the two on the same documents. Intervals resample groups of documents.
2. *Rates.* On how many rows each feature fires in each model, log2 of the ratio (smoothed as in
   `scope.features.contrast`) with its interval, the share of the rows on which it fires in either that it fires on in
   both (`agreement`), and mean strengths. A feature is `changed` where its rate differs by a factor of `FOLD` or more
   and the paired test (`scope.diffing.resampling.paired_z`) finds it, at a false discovery rate of 5%.
3. *Decoder rows.* What direction a feature stands for in a model: its decoder row plus the least-squares fit of what
   the SAE leaves of that model's rows on the feature alone,

       d_M = d + sum over rows of f_M (x_M - x_hat_M) / sum over rows of f_M²

   `decoder_cosine` is that between the two models. `decoder_cosine_halves` is that between even and odd groups of
   documents of the base model alone, so what other text does where nothing changed.
4. *Home.* The source of the text on which a feature fires at the highest rate, and log2 of that rate over its rate on
   all of the text (`lift`): what kind of text the features belong to that changed. It is the base model that says so,
   which no tuning has touched; the other one only of features that do not fire in the base model.
5. The rows on which each feature is strongest in each model.

Training on any text moves features, and hard training moves as many on nothing as on something. What a change says of
the text that was trained in, only a control can tell: `scope.diffing.control`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from scope.diffing.control import FOLD, FiringCounts, beyond_control
from scope.diffing.examples import TopRows
from scope.diffing.pair import PairedRows, PairedStores
from scope.diffing.resampling import middle_95, paired_z, two_sided, weights_of
from scope.errors import InvalidInputError
from scope.features.contrast import log_ratio
from scope.features.discoveries import discoveries
from scope.saes.base import SAE

__all__ = ["FOLD", "Drift", "FeatureChanges", "feature_changes"]

Interval = tuple[float, float]


class Drift(NamedTuple):
    """How well an SAE reconstructs each of two models."""

    hook: str
    fvu_base: float
    fvu_base_interval: Interval
    fvu_tuned: float
    fvu_tuned_interval: Interval
    fvu_change: float
    """fvu_tuned - fvu_base."""
    fvu_change_interval: Interval
    l0_base: float
    l0_tuned: float
    relative_change: float
    """Sum of ‖x_tuned - x_base‖² over the sum of ‖x_base - mean‖², of the rows of ordinary norm."""
    n_rows: int
    """Rows looked at; fvu is of those of ordinary norm among them."""


@dataclass(frozen=True, eq=False)
class FeatureChanges:
    """What became of an SAE's features."""

    drift: Drift
    table: pd.DataFrame
    """One row a feature: feature, rate_base, rate_tuned, each with _low and _high, log_ratio with _low and _high (log2
    of tuned over base), z, agreement, strength_base, strength_tuned (mean where it fires), decoder_cosine,
    decoder_cosine_halves, changed, source, lift; with a control also what `beyond_control` adds."""
    top_base: TopRows
    top_tuned: TopRows
    counts: FiringCounts
    """What a comparison with a control needs."""

    @property
    def changed(self) -> pd.DataFrame:
        """The features that changed, by how sure that is; with a control, those that did so beyond it."""
        chosen, score = ("beyond", "z_control") if "beyond" in self.table else ("changed", "z")
        found = self.table[self.table[chosen]]
        return found.iloc[np.argsort(-found[score].abs().to_numpy(), kind="stable")].reset_index(drop=True)

    def against(self, control: FiringCounts, seed: int = 0) -> "FeatureChanges":
        """The same, with what changed beyond a control."""
        return replace(self, table=beyond_control(self.table, self.counts, control, seed))

    def to_dict(self) -> dict[str, Any]:
        """The figures, JSON-able."""
        table = self.table
        fires = table[(table["rate_base"] > 0) | (table["rate_tuned"] > 0)]
        return {
            **self.drift._asdict(),
            "d_sae": len(table),
            "firing": len(fires),
            "changed": int(table["changed"].sum()),
            "more_often": int((table["changed"] & (table["log_ratio"] > 0)).sum()),
            "less_often": int((table["changed"] & (table["log_ratio"] < 0)).sum()),
            "beyond": int(table["beyond"].sum()) if "beyond" in table else None,
            "by_source": _by_source(fires),
            "mean_agreement": _mean(fires["agreement"]),
            "mean_decoder_cosine": _mean(fires["decoder_cosine"]),
            "mean_decoder_cosine_halves": _mean(fires["decoder_cosine_halves"]),
        }


def _by_source(fires: pd.DataFrame) -> list[dict[str, Any]]:
    """By home of the features: how many fire, changed, and of those fire more often; with a control, beyond it."""
    parts = {"changed": fires["changed"], "more_often": fires["changed"] & (fires["log_ratio"] > 0)}
    if "beyond" in fires:
        parts |= {"beyond": fires["beyond"], "beyond_more_often": fires["beyond"] & (fires["log_ratio"] > 0)}
    counted = pd.DataFrame({"firing": True, **parts}, index=fires.index).groupby(fires["source"]).sum()
    rows: list[dict[Any, Any]] = counted.astype(int).reset_index(names="source").to_dict("records")
    return rows


def _mean(values: pd.Series) -> float | None:
    return float(values.mean()) if values.notna().any() else None


@torch.inference_mode()
def feature_changes(sae: SAE, hook: str, stores: PairedStores, seed: int = 0) -> FeatureChanges:
    """What an SAE makes of both models.

    Args:
        sae: reads and writes one hook.
        hook: its name in both stores.
        stores: the two models' activations on one text.
        seed: of the intervals.

    Raises:
        InvalidInputError: the SAE reads several hooks, or writes another than it reads.
    """
    if len(sae.cfg.ports.inputs) != 1 or sae.cfg.ports.outputs:
        raise InvalidInputError(
            f"The architecture {sae.cfg.architecture} reads or writes several hooks; give SAEs that reconstruct one."
        )
    sums = _Sums(sae, stores.n_groups, stores.sources)
    for rows in stores.paired_rows(hook, sae.device):
        sums.add(rows)
    base, tuned = (side.top for side in sums.sides)
    return FeatureChanges(sums.drift(hook, seed), sums.table(seed), base, tuned, sums.counts())


class _Side:
    """Sums over the rows of one model."""

    def __init__(self, sae: SAE, n_groups: int) -> None:
        device = sae.device
        self.top = TopRows(sae.d_sae, device=device)
        self.firings = torch.zeros(n_groups, sae.d_sae, dtype=torch.float64, device=device)
        self.strength = torch.zeros(sae.d_sae, dtype=torch.float64, device=device)
        # Of rows of ordinary norm, by group; the last column counts the rows.
        self.residual = torch.zeros(n_groups, dtype=torch.float64, device=device)
        self.square = torch.zeros(n_groups, dtype=torch.float64, device=device)
        self.total = torch.zeros(n_groups, sae.d_in, dtype=torch.float64, device=device)
        # By half of the groups: what is left along each feature, and the feature's own square.
        self.left = torch.zeros(2, sae.d_sae, sae.d_in, device=device)
        self.own = torch.zeros(2, sae.d_sae, dtype=torch.float64, device=device)

    def add(self, sae: SAE, x: Tensor, rows: PairedRows, by_group: Tensor) -> Tensor:
        """See some rows; which features fire on each, bool."""
        f = sae.encode(x).float()
        fires = f > 0
        strengths = f * sae.decoder_norms
        self.top.add(strengths, rows.rows)
        self.firings += (by_group.T @ fires.float()).double()
        self.strength += strengths.sum(dim=0, dtype=torch.float64)
        within = rows.within.float()[:, None]
        error = (x - sae.decode(f).float()) * within
        shifted = (x - sae.b_dec.float()) * within
        self.residual += (by_group.double().T @ error.double().square().sum(dim=1, keepdim=True))[:, 0]
        self.square += (by_group.double().T @ shifted.double().square().sum(dim=1, keepdim=True))[:, 0]
        self.total += by_group.double().T @ shifted.double()
        even = torch.from_numpy(rows.groups % 2 == 0).to(x.device)
        for half, chosen in enumerate((even, ~even)):
            self.left[half] += f[chosen].T @ error[chosen]
            self.own[half] += (f[chosen] * within[chosen]).double().square().sum(dim=0)
        return fires

    def fvu(self, weights: Tensor, n: Tensor) -> Tensor:
        """fvu of each weighting of the groups."""
        mean_part = (weights @ self.total).square().sum(dim=1) / (weights @ n).clamp_min(1)
        return (weights @ self.residual) / (weights @ self.square - mean_part)

    def directions(self, sae: SAE, half: int | None = None) -> Tensor:
        """What each feature stands for here; NaN where it has not fired."""
        left, own = (self.left.sum(0), self.own.sum(0)) if half is None else (self.left[half], self.own[half])
        return sae.W_dec.float() + left / torch.where(own > 0, own, torch.nan).float()[:, None]


class _Sums:
    def __init__(self, sae: SAE, n_groups: int, sources: Sequence[str]) -> None:
        self.sae = sae
        self.sources = sources
        self.by_source = torch.zeros(2, len(sources), sae.d_sae, dtype=torch.float64, device=sae.device)
        self.rows_of_source = torch.zeros(len(sources), dtype=torch.float64, device=sae.device)
        self.sides = (_Side(sae, n_groups), _Side(sae, n_groups))
        self.n_rows = torch.zeros(n_groups, dtype=torch.float64, device=sae.device)
        self.n_within = torch.zeros(n_groups, dtype=torch.float64, device=sae.device)
        self.both = torch.zeros(sae.d_sae, dtype=torch.float64, device=sae.device)
        self.distance = 0.0

    def add(self, rows: PairedRows) -> None:
        groups = torch.from_numpy(rows.groups).to(self.sae.device)
        by_group = functional.one_hot(groups, len(self.n_rows)).float()
        values = (rows.base, rows.tuned)
        fires = [side.add(self.sae, x, rows, by_group) for side, x in zip(self.sides, values, strict=True)]
        self.both += (fires[0] & fires[1]).sum(dim=0)
        home = functional.one_hot(torch.from_numpy(rows.sources).to(self.sae.device), len(self.sources)).float()
        self.by_source += torch.stack([home.T @ part.float() for part in fires]).double()
        self.rows_of_source += home.sum(dim=0)
        self.n_rows += by_group.sum(dim=0)
        self.n_within += by_group[rows.within].sum(dim=0)
        self.distance += float((rows.tuned - rows.base)[rows.within].double().square().sum())

    def drift(self, hook: str, seed: int) -> Drift:
        n_groups = len(self.n_rows)
        base, tuned = self.sides
        all_groups = torch.ones(1, n_groups, dtype=torch.float64, device=self.sae.device)
        drawn = torch.from_numpy(weights_of(n_groups, seed)).to(self.sae.device)
        point = [side.fvu(all_groups, self.n_within).item() for side in self.sides]
        resampled = [side.fvu(drawn, self.n_within).cpu().numpy() for side in self.sides]
        intervals = [_interval(values) for values in (*resampled, resampled[1] - resampled[0])]
        n = float(self.n_rows.sum())
        variance = float(base.square.sum() - base.total.sum(0).square().sum() / self.n_within.sum())
        return Drift(
            hook=hook,
            fvu_base=point[0],
            fvu_base_interval=intervals[0],
            fvu_tuned=point[1],
            fvu_tuned_interval=intervals[1],
            fvu_change=point[1] - point[0],
            fvu_change_interval=intervals[2],
            l0_base=float(base.firings.sum()) / n,
            l0_tuned=float(tuned.firings.sum()) / n,
            relative_change=self.distance / variance,
            n_rows=int(n),
        )

    def counts(self) -> FiringCounts:
        firings = [side.firings.cpu().numpy() for side in self.sides]
        discordant = firings[0].sum(axis=0) + firings[1].sum(axis=0) - 2 * self.both.cpu().numpy()
        return FiringCounts(firings[1], discordant, self.n_rows.cpu().numpy())

    def homes(self) -> tuple[np.ndarray, np.ndarray]:
        """Each feature's source and its lift there; "" and NaN where it does not fire."""
        base, tuned = self.by_source.cpu().numpy()
        firings, rows = np.where(base.sum(axis=0) > 0, base, tuned), self.rows_of_source.cpu().numpy()
        totals, n = firings.sum(axis=0), float(rows.sum())
        lifts = np.stack([log_ratio(k, m, totals, n) for k, m in zip(firings, rows, strict=True)])
        best = lifts.argmax(axis=0)
        fires = totals > 0
        return np.where(fires, np.asarray(self.sources)[best], ""), np.where(fires, lifts.max(axis=0), np.nan)

    def table(self, seed: int) -> pd.DataFrame:
        base = self.sides[0]
        n_rows = self.n_rows.cpu().numpy()
        k = [side.firings.cpu().numpy() for side in self.sides]
        totals, n, both = [part.sum(axis=0) for part in k], float(n_rows.sum()), self.both.cpu().numpy()
        either = totals[0] + totals[1] - both
        drawn = weights_of(len(n_rows), seed)
        drawn_rows = drawn @ n_rows
        drawn_k = [drawn @ part for part in k]
        ratios = log_ratio(drawn_k[1], drawn_rows[:, None], drawn_k[0], drawn_rows[:, None])
        columns: dict[str, Any] = {"feature": np.arange(len(both))}
        for name, total, resampled in zip(("base", "tuned"), totals, drawn_k, strict=True):
            columns[f"rate_{name}"] = total / n
            columns[f"rate_{name}_low"], columns[f"rate_{name}_high"] = middle_95(resampled / drawn_rows[:, None])
        columns["log_ratio"] = log_ratio(totals[1], n, totals[0], n)
        columns["log_ratio_low"], columns["log_ratio_high"] = middle_95(ratios)
        columns["z"] = paired_z(k[0], k[1], either - both, n_rows)
        columns["agreement"] = np.divide(both, either, out=np.full(len(both), np.nan), where=either > 0)
        for name, side, total in zip(("base", "tuned"), self.sides, totals, strict=True):
            strength = side.strength.cpu().numpy()
            columns[f"strength_{name}"] = np.divide(strength, total, out=np.full(len(both), np.nan), where=total > 0)
        whole = [side.directions(self.sae) for side in self.sides]
        columns["decoder_cosine"] = _cosine(*whole)
        columns["decoder_cosine_halves"] = _cosine(*(base.directions(self.sae, half) for half in (0, 1)))
        columns["source"], columns["lift"] = self.homes()
        found = pd.DataFrame(columns)
        tested = either > 0
        changed = np.zeros(len(found), bool)
        changed[tested] = discoveries(two_sided(columns["z"][tested]))
        found["changed"] = changed & (np.abs(found["log_ratio"]) >= np.log2(FOLD))
        return found


def _interval(values: Float[np.ndarray, " samples"]) -> Interval:
    low, high = middle_95(values[:, None])
    return float(low[0]), float(high[0])


def _cosine(a: Tensor, b: Tensor) -> np.ndarray:
    return functional.cosine_similarity(a, b, dim=-1).cpu().numpy().astype(np.float64)
