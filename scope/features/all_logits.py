"""The direct effect of features on every logit of the vocabulary, a few features at a time.

1. A feature's decoder row at unit norm goes through the final norm's gain and W_U, the vocabulary mean removed: its
   effect per unit of firing strength (`scope.features.decoder`). An index keeps the largest of them; all of them are
   one product with the model at hand.
2. `logit_histogram` bins them as SAEDashboard does (`LogitsHistogramConfig` in its components_config.py, 50 bins):
   equal bins between the least and the largest, each with its middle and how many tokens lie in it.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float

from scope.errors import InvalidInputError

if TYPE_CHECKING:
    from scope.saes.base import SAE

__all__ = ["N_BINS", "AllLogits", "LogitHistogram", "logit_histogram"]

N_BINS = 50
"""Bins of a histogram, as SAEDashboard's dashboards for Neuronpedia have."""
CHUNK_BYTES = 2**28
"""Size of the largest temporary matrix."""


class LogitHistogram(NamedTuple):
    """How a feature's effects on all logits are distributed."""

    values: np.ndarray
    """float64 `(n_bins,)`: the middle of each bin, logits per unit of firing strength."""
    heights: np.ndarray
    """int64 `(n_bins,)`: tokens in each."""


def logit_histogram(effects: Float[np.ndarray, " d_vocab"], n_bins: int = N_BINS) -> LogitHistogram:
    """Equal bins between the least and the largest effect."""
    heights, edges = np.histogram(effects, bins=n_bins)
    return LogitHistogram((edges[:-1] + edges[1:]) / 2, heights)


class AllLogits:
    """An SAE's features and the model that they act in.

    Raises:
        InvalidInputError: the dictionary does not write into the residual stream at one place.
    """

    def __init__(self, sae: "SAE", model: Any) -> None:
        from scope.features.decoder import unit_decoder

        unit = unit_decoder(sae)
        if unit.ndim != 2 or unit.shape[1] != model.d_model:
            raise InvalidInputError(
                "This dictionary does not write into the residual stream at one place, so its effect on the logits is "
                "not one product."
            )
        self.d_sae = len(unit)
        self._unit, self._model = unit, model

    def of(self, features: Sequence[int]) -> Iterator[Float[np.ndarray, " d_vocab"]]:
        """Each feature's effects on all logits per unit of firing strength, float32, in the order asked for."""
        chunk = max(1, CHUNK_BYTES // (4 * self._model.d_vocab))
        for start in range(0, len(features), chunk):
            rows = self._unit[list(features[start : start + chunk])]
            yield from self._model.logit_effects(rows).float().cpu().numpy()
