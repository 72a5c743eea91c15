"""Whether what one would say of the reference model still holds of the other, statement by statement.

For a quantised file and its reference: a statement holds where its figure is on the stated side of its limit. The
limits are ours; each stands beside its figure in the report, so that a reader can set another.

1. Predictions: both have the same likeliest next token on at least `TOP1` of the tokens.
2. Loss: the cross-entropy differs by at most `CE_NATS` nats a token.
3. For each SAE: the `N_TOP` features that fire most in the one are those of the other, at least `OVERLAP` of them;
   firings fall on the same rows, with a mean agreement of at least `AGREEMENT`; no more than `CHANGED` of the features
   that fire changed their rate; and the readings that are taken through it (`scope.diffing.readings`) are the same:
   delta_ce, the cost of splicing it in, but for `CE_NATS`, the logit lens's likeliest token on at least `TOP1` of the
   rows, and at least `ATTRIBUTED` of the features that a prediction is attributed to.
"""

from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from scope.diffing.features import FeatureChanges
from scope.diffing.layers import LayerChanges
from scope.diffing.readings import Readings

__all__ = ["Conclusion", "conclusions_of", "top_overlap"]

TOP1, CE_NATS, OVERLAP, AGREEMENT, CHANGED, ATTRIBUTED = 0.9, 0.05, 0.9, 0.75, 0.01, 0.75
N_TOP = 100


class Conclusion(NamedTuple):
    """A statement about the reference model, and whether it holds of the other."""

    statement: str
    figure: float
    limit: float
    holds: bool

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return self._asdict()


def conclusions_of(
    layers: LayerChanges | None,
    features: dict[str, FeatureChanges],
    readings: dict[str, tuple[Readings, Readings]],
) -> list[Conclusion]:
    """What holds.

    Args:
        layers: the comparison of the predictions.
        features: by name of the SAE, what became of its features.
        readings: by name of the SAE, of the reference and of the other model.
    """
    found = []
    if layers is not None:
        whole = layers.predictions.iloc[0]
        found.append(_at_least("The likeliest next token is the same", whole["top1"], TOP1))
        found.append(_at_most("The loss is the same, in nats", abs(whole["ce_change"]), CE_NATS))
    for name, changes in features.items():
        figures = changes.to_dict()
        found.append(
            _at_least(f"{name}: the features that fire most are the same", top_overlap(changes.table), OVERLAP)
        )
        if figures["mean_agreement"] is not None:
            found.append(_at_least(f"{name}: features fire on the same rows", figures["mean_agreement"], AGREEMENT))
            share = figures["changed"] / figures["firing"]
            found.append(_at_most(f"{name}: features keep their rates, all but", share, CHANGED))
        if name in readings:
            found += _same_readings(name, *readings[name])
    return found


def _same_readings(name: str, base: Readings, other: Readings) -> list[Conclusion]:
    change = abs(other.delta_ce - base.delta_ce)
    found = [_at_most(f"{name}: splicing it in costs the same, in nats", change, CE_NATS)]
    if base.lens is not None and other.lens is not None:
        same = float(np.mean(base.lens == other.lens))
        found.append(_at_least(f"{name}: the logit lens reads the same token at its layer", same, TOP1))
    pairs = [(a, b) for a, b in zip(base.attributed, other.attributed, strict=True) if a]
    if pairs:
        same = float(np.mean([len(a & b) / len(a) for a, b in pairs]))
        found.append(_at_least(f"{name}: predictions are attributed to the same features", same, ATTRIBUTED))
    return found


def _at_least(statement: str, figure: float, limit: float) -> Conclusion:
    return Conclusion(statement, float(figure), limit, bool(figure >= limit))


def _at_most(statement: str, figure: float, limit: float) -> Conclusion:
    return Conclusion(statement, float(figure), limit, bool(figure <= limit))


def top_overlap(table: pd.DataFrame, n: int = N_TOP) -> float:
    """Share of the `n` features of the highest rate in the base model that are among those of the other."""
    n = max(1, min(n, int((table["rate_base"] > 0).sum())))
    best = [set(np.argsort(-table[name].to_numpy(), kind="stable")[:n]) for name in ("rate_base", "rate_tuned")]
    return len(best[0] & best[1]) / n
