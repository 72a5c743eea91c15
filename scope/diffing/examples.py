"""Where features fire most, gathered while rows stream by, and the text around it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

if TYPE_CHECKING:
    from activations.store import ActivationStore
    from scope.models import LanguageModel

__all__ = ["TopRows", "snippets"]

BEFORE, AFTER = 12, 4


class TopRows:
    """The rows on which each feature is strongest.

    Args:
        d_sae: features.
        n: rows of each that are kept.
    """

    def __init__(self, d_sae: int, n: int = 4, device: torch.device | str = "cpu") -> None:
        self.values = torch.zeros(n, d_sae, device=device)
        """Strengths `(n, d_sae)`, descending; 0 where a feature fires on fewer rows."""
        self.rows = torch.full((n, d_sae), -1, dtype=torch.int64, device=device)
        """Row ids; -1 where there is none."""

    def add(self, strengths: Float[Tensor, "rows d_sae"], rows: Int[np.ndarray, " rows"]) -> None:
        """See some more rows."""
        n = len(self.values)
        best = strengths.topk(min(n, len(strengths)), dim=0)
        ids = torch.from_numpy(rows).to(self.rows.device)[best.indices]
        values = torch.cat([self.values, best.values])
        order = values.topk(n, dim=0)
        self.rows = torch.cat([self.rows, ids]).gather(0, order.indices)
        self.values = order.values
        self.rows[self.values <= 0] = -1

    def of(self, feature: int) -> list[tuple[int, float]]:
        """(row, strength) of one feature, the strongest first."""
        pairs = zip(self.rows[:, feature].tolist(), self.values[:, feature].tolist(), strict=True)
        return [(row, value) for row, value in pairs if row >= 0]


def snippets(
    store: "ActivationStore", model: "LanguageModel", places: Sequence[tuple[int, float]]
) -> list[dict[str, Any]]:
    """The text around some rows, JSON-able: row, strength, source, title, before, token, after."""
    found = []
    for row, strength in places:
        document = store.document_at(row)
        sequence = int(document["sequence"])
        first, last = max(0, row - BEFORE), min(store.n_rows, row + AFTER + 1)
        columns = store.rows(first, last)
        same = columns.sequence == sequence
        ids = columns.token_id[same].tolist()
        at = row - first - int(np.argmax(same))
        texts = [token.text for token in model.token_strings(ids)]
        found.append(
            {
                "row": row,
                "strength": strength,
                "source": str(document.get("source") or ""),
                "title": str(document.get("title") or ""),
                "before": "".join(texts[:at]),
                "token": texts[at],
                "after": "".join(texts[at + 1 :]),
            }
        )
    return found
