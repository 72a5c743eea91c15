"""The columns of the feature table that the SAE's weights alone make; an index that grows takes them over."""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from scope.features.steps import Step
from scope.features.vocabulary import Vocabulary

if TYPE_CHECKING:
    import pandas as pd

    from scope.features.decoder import LogitEffects, Neighbours

__all__ = ["WeightFacts", "WeightTable", "weight_facts"]

COLUMNS = (
    "top_logits",
    "top_logit_effects",
    "bottom_logits",
    "bottom_logit_effects",
    "neighbours",
    "neighbour_cosines",
    "encoder_decoder_cosine",
)


class WeightFacts(NamedTuple):
    """What the weights say of each feature."""

    neighbours: "Neighbours"
    cosine: np.ndarray
    """Of encoder and decoder, float32 `(d_sae,)`."""
    logits: "LogitEffects | None"

    @property
    def shown_tokens(self) -> np.ndarray:
        """Ids of the tokens that the columns name."""
        if self.logits is None:
            return np.empty(0, np.int64)
        return np.unique(np.concatenate([self.logits.top_tokens.ravel(), self.logits.bottom_tokens.ravel()]))

    def columns(self, vocabulary: Vocabulary) -> dict[str, Any]:
        """The columns by name."""
        d_sae, logits = len(self.cosine), self.logits
        empty: list[list[str]] = [[] for _ in range(d_sae)]
        none = [np.empty(0, np.float32)] * d_sae
        values: tuple[Any, ...] = (
            empty if logits is None else [vocabulary.strings(row) for row in logits.top_tokens],
            none if logits is None else list(logits.top_effects),
            empty if logits is None else [vocabulary.strings(row) for row in logits.bottom_tokens],
            none if logits is None else list(logits.bottom_effects),
            list(self.neighbours.features),
            list(self.neighbours.cosines),
            self.cosine,
        )
        return dict(zip(COLUMNS, values, strict=True))


class WeightTable(NamedTuple):
    """The same, as an index of the SAE holds it."""

    table: "pd.DataFrame"
    """Its feature table."""
    shown_tokens: np.ndarray
    """Tokens that it has strings for."""

    def columns(self, vocabulary: Vocabulary) -> dict[str, Any]:
        """The columns by name."""
        return {name: self.table[name].to_numpy() for name in COLUMNS}


def weight_facts(sae: Any, model: Any, step: Step) -> WeightFacts:
    """Compare decoder rows; with a model whose residual stream the SAE writes to, compute logit effects."""
    from scope.features import decoder

    unit = decoder.unit_decoder(sae)
    neighbours = decoder.nearest_decoders(unit, lambda done: step("neighbours", done, sae.d_sae))
    logits = None
    if model is not None and unit.shape[1] == model.d_model:
        logits = decoder.extreme_logits(unit, model, lambda done: step("logits", done, sae.d_sae))
    return WeightFacts(neighbours, decoder.encoder_decoder_cosine(sae), logits)
