"""What features do while a text is denoised, and when its tokens are committed.

Of an index, or of the store that it was made of (`scope denoise`), whose rows are steps of canvases
(`activations.denoising`):

    rate(f | step) = rows of the step on which f fires / indexed rows of the step
    commits(step)  = tokens that are committed for good at the end of the step

and, for all features at once, how far the steps that a feature fires at lie from the steps that there are, with n its
firings, N the indexed rows, and mean and variance those of the rows' steps:

    z = (mean step of its firings - mean) / sqrt(variance / n * (N - n) / (N - 1))

Below 0 it fires early, on noise; above 0 late. Rows of a text depend on each other: an interval or a z says how well
the rate of these texts is known, not of others. Later steps have fewer rows where canvases end early.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from activations.denoising import STATES
from activations.store import ActivationStore
from scope.errors import InvalidInputError
from scope.features.statistics import wilson

if TYPE_CHECKING:
    import pandas as pd

    from scope.features.index import FeatureIndex

__all__ = ["commit_table", "features_by_step", "generation_cells", "rate_by_step"]

CHUNK_ROWS = 2**16


def rate_by_step(index: "FeatureIndex", feature: int) -> "pd.DataFrame":
    """How often a feature fires at each step.

    Returns:
        Columns step, n_firings, n_rows (indexed rows of the step), rate, rate_low, rate_high (Wilson, 95%), mean_value
        (of its firings), mean_value missing where it does not fire.

    Raises:
        InvalidInputError: the text was not denoised.
        OutOfRangeError: there is no such feature.
    """
    import pandas as pd

    reader = index._reader
    feature = reader.check_feature(feature)
    step, indexed = _steps(index)
    rows, values = reader.firing_arrays(feature, 0, reader.n_firings_of(feature))
    n_rows = np.bincount(step[indexed])
    firings = np.bincount(step[rows], minlength=len(n_rows))
    strength = np.bincount(step[rows], weights=values, minlength=len(n_rows))
    low, high = wilson(firings, n_rows)
    return pd.DataFrame(
        {
            "step": np.arange(len(n_rows)),
            "n_firings": firings,
            "n_rows": n_rows,
            "rate": firings / np.maximum(n_rows, 1),
            "rate_low": low,
            "rate_high": high,
            "mean_value": np.divide(strength, firings, out=np.full(len(n_rows), np.nan), where=firings > 0),
        }
    )


def features_by_step(index: "FeatureIndex", n: int = 10, least_firings: int = 10) -> "pd.DataFrame":
    """The features that fire earliest and those that fire latest.

    Args:
        index: of a text that was denoised.
        n: how many of each.
        least_firings: features that fire less often are left out.

    Returns:
        Columns feature, when ("early", "late"), z, mean_step, n_firings, top_token: early ones first, by z.

    Raises:
        InvalidInputError: the text was not denoised.
    """
    import pandas as pd

    step, indexed = _steps(index)
    sums, counts = np.zeros(index.d_sae), np.zeros(index.d_sae, np.int64)
    for start in range(0, index.n_rows, CHUNK_ROWS):
        rows, features, _ = index._reader.fired_on(start, min(index.n_rows, start + CHUNK_ROWS))
        sums += np.bincount(features, weights=step[rows], minlength=index.d_sae)
        counts += np.bincount(features, minlength=index.d_sae)
    own = step[indexed].astype(float)
    spread = own.var() / np.maximum(counts, 1) * (len(own) - counts) / max(len(own) - 1, 1)
    mean = sums / np.maximum(counts, 1)
    z = np.divide(mean - own.mean(), np.sqrt(spread), out=np.zeros(index.d_sae), where=spread > 0)
    table = pd.DataFrame(
        {
            "feature": np.arange(index.d_sae),
            "when": np.where(z < 0, "early", "late"),
            "z": z,
            "mean_step": mean,
            "n_firings": counts,
            "top_token": index.table["top_token"].to_numpy(),
        }
    )
    table = table[(counts >= least_firings) & (z != 0)].sort_values("z", kind="stable")
    early, late = table[table["when"] == "early"].head(n), table[table["when"] == "late"].tail(n)
    return pd.concat([early, late.iloc[::-1]], ignore_index=True)


def commit_table(source: "FeatureIndex | ActivationStore") -> "pd.DataFrame":
    """How many tokens are committed for good at each step.

    Returns:
        Columns step, n_tokens, share (of all tokens that were to be filled in), so_far (the same, summed up). The last
        row, with step -1, has the tokens that no step committed: the loop ended, and filled them in.

    Raises:
        InvalidInputError: the text was not denoised.
    """
    import pandas as pd

    step, state, commit = (_column(source, name) for name in ("step", "state", "commit_step"))
    cells = (step == 0) & (state != STATES.index("prompt"))
    commits = commit[cells]
    # Rows may have been cut off before the step at which a token is committed.
    n_steps = 1 + max(int(step.max()), int(commits.max(initial=-1)))
    numbers = [*range(n_steps), -1]
    counts = np.array([np.count_nonzero(commits == number) for number in numbers])
    share = counts / max(len(commits), 1)
    return pd.DataFrame({"step": numbers, "n_tokens": counts, "share": share, "so_far": share.cumsum()})


def generation_cells(index: "FeatureIndex", document: int, feature: int | None = None) -> "pd.DataFrame":
    """One generation, cell by cell: what stood at each position of each canvas at each step.

    Args:
        index: of a text that was denoised.
        document: its number.
        feature: whose strength is told.

    Returns:
        As `FeatureIndex.document_tokens`, with a column value, 0 where the feature does not fire or none is asked for.

    Raises:
        InvalidInputError: the text was not denoised, or has no such document.
        OutOfRangeError: there is no such feature.
    """
    index._reader.require_spoken("state")
    if feature is None:
        return index.document_tokens(document).assign(value=0.0)
    return index.document_values(feature, document)


def _steps(index: "FeatureIndex") -> tuple[np.ndarray, np.ndarray]:
    """The step of each row, and which rows are indexed (bool)."""
    step, flags = _column(index, "step"), index._reader.row_column("flags").all()
    return step, flags & int(index.manifest["excluded_flags"]) == 0


def _column(source: Any, name: str) -> np.ndarray:
    """A column of all rows."""
    if isinstance(source, ActivationStore):
        if name not in source.token_columns:
            raise InvalidInputError(
                f"{source.path} was not denoised: its rows have no {name}. Capture with scope denoise."
            )
        if not source.n_rows:
            raise InvalidInputError(f"{source.path} has no committed rows yet.")
        return source.column(name, 0, source.n_rows)
    source._reader.require_spoken("state")
    column: np.ndarray = source._reader.row_column(name).all()
    return column
