"""What a feature is worth to the model: the loss with it and with it ablated, where it fires most strongly.

1. The feature's strongest examples are taken from an index, each with all of the window before it, as the model had it.
2. The model reads them twice, as they are and with the feature set to 0 on every token of them (what the SAE misses of
   the activation stays as it is).
3. At each token, change = loss without the feature - loss with it, in nats: above 0 the feature helped to predict that
   token from those before it. Before the feature's first firing nothing can change.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scope.errors import InvalidInputError

if TYPE_CHECKING:
    from scope.features.examples import Example
    from scope.features.index import FeatureIndex

__all__ = ["AblationEffect", "ablation_effect"]

DRAWS = 1000
"""Of the bootstrap."""


@dataclass(frozen=True, eq=False)
class AblationEffect:
    """The change of the loss when a feature is ablated, on its strongest examples."""

    feature: int
    examples: pd.DataFrame
    """One row per example: row, strength, document, title, language, n_tokens (after the feature's first firing in the
    window, which the means are over), loss, ablated_loss, change (means, nats), next_change (on the token right after
    the example's own)."""
    tokens: pd.DataFrame
    """One row per token that is shown: example (its place in `examples`), row, token, strength, loss, ablated_loss,
    change. NaN on the first token of a window, which nothing predicts."""
    mean_change: float
    """Mean of `change` over the examples, nats."""
    interval: tuple[float, float]
    """95%, by bootstrapping documents; NaN where all examples are of one document, which says nothing of others."""

    def _repr_html_(self) -> str:
        low, high = self.interval
        head = f"<b>Feature {self.feature} ablated</b>: {self.mean_change:+.3g} nats a token ({low:.3g} to {high:.3g})"
        return head + self.examples.to_html(escape=True)


def ablation_effect(
    index: "FeatureIndex",
    model: Any,
    sae: Any,
    feature: int,
    n: int = 12,
    window: tuple[int, int] = (24, 24),
    batch_size: int = 1024,
    progress: Callable[[int, int], None] | None = None,
) -> AblationEffect:
    """Ablate a feature on its strongest examples.

    Args:
        index: has the examples.
        model: the `scope.models.LanguageModel` that the index was built from.
        sae: the index's SAE.
        feature: its id.
        n: examples, at most.
        window: tokens before and after an example's own that are shown; the model also reads what is before them.
        batch_size: tokens at once, padding included.
        progress: told (windows read, in all), and may raise to end the work.

    Raises:
        OutOfRangeError: there is no such feature.
        MismatchError: model, SAE and index do not belong together.
        InvalidInputError: the feature never fires in the index, or n is below 1.
    """
    from scope.features.prompt import require_same
    from scope.interventions.edit import combine
    from scope.interventions.features import ablate_features

    require_same(model, sae, index)
    if n < 1:
        raise InvalidInputError(f"n is {n}; expected 1 or more.")
    examples = index.top_examples(feature, n, window, per_sequence=1)
    if not examples:
        raise InvalidInputError(f"Feature {feature} never fires in {index.name}; there is nothing to ablate it on.")
    starts = [index.window_start(example.row) for example in examples]
    texts = [
        index.tokens(start, example.start_row + len(example.tokens))["token_id"].to_numpy(np.int64)
        for start, example in zip(starts, examples, strict=True)
    ]
    total = 2 * len(texts)

    def told(before: int) -> Callable[[int, int | None], None] | None:
        return None if progress is None else lambda done, _: progress(before + done, total)

    plain = model.cross_entropy(texts, None, batch_size, told(0))
    edits = combine(ablate_features(sae, feature))
    ablated = model.cross_entropy(texts, edits, batch_size, told(len(texts)))
    frames = [
        _tokens(index, place, start, example, *losses)
        for place, (start, example, *losses) in enumerate(zip(starts, examples, plain, ablated, strict=True))
    ]
    table = pd.DataFrame([_example(frame, example) for frame, example in zip(frames, examples, strict=True)])
    shown = [frame[frame["row"] >= example.start_row] for frame, example in zip(frames, examples, strict=True)]
    tokens = pd.concat(shown, ignore_index=True)
    return AblationEffect(feature, table, tokens, float(table["change"].mean()), _interval(table))


def _tokens(
    index: "FeatureIndex", place: int, start: int, example: "Example", loss: np.ndarray, ablated: np.ndarray
) -> pd.DataFrame:
    """All tokens that the model has read of one example."""
    stop = example.start_row + len(example.tokens)
    texts = index.tokens(start, stop)["token"].tolist()
    texts[len(texts) - len(example.tokens) :] = example.tokens
    first = np.array([np.nan], np.float32)
    frame = pd.DataFrame(
        {
            "example": place,
            "row": np.arange(start, stop),
            "token": texts,
            "strength": index.values_on(example.feature, start, stop),
            "loss": np.concatenate([first, loss]),
            "ablated_loss": np.concatenate([first, ablated]),
        }
    )
    return frame.assign(change=frame["ablated_loss"] - frame["loss"])


def _example(frame: pd.DataFrame, example: "Example") -> dict[str, Any]:
    fired = frame["strength"].to_numpy() > 0
    after = frame[np.concatenate([[False], np.logical_or.accumulate(fired)[:-1]])]
    next_one = frame.loc[frame["row"] == example.row + 1, "change"]
    means = after[["loss", "ablated_loss", "change"]].mean()
    return {
        "row": example.row,
        "strength": example.value,
        "document": example.document,
        "title": example.title,
        "language": example.language,
        "n_tokens": len(after),
        **{str(name): float(value) for name, value in means.items()},
        "next_change": float(next_one.iloc[0]) if len(next_one) else float("nan"),
    }


def _interval(table: pd.DataFrame) -> tuple[float, float]:
    """Of the mean over examples, drawing documents with replacement."""
    by_document = table.dropna(subset=["change"]).groupby("document")["change"].agg(["sum", "count"])
    if len(by_document) < 2:
        return float("nan"), float("nan")
    drawn = np.random.default_rng(0).integers(len(by_document), size=(DRAWS, len(by_document)))
    sums, counts = by_document["sum"].to_numpy()[drawn].sum(1), by_document["count"].to_numpy()[drawn].sum(1)
    low, high = np.quantile(sums / counts, [0.025, 0.975])
    return float(low), float(high)
