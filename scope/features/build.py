"""`build_index`: from a source of activations and an SAE to a `FeatureIndex`."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from scope.features.index import FeatureIndex

__all__ = ["build_index"]


def build_index(
    source: Any,
    sae: Any,
    out: str | Path,
    *,
    model: Any = None,
    metrics: Mapping[str, float] | None = None,
    allow_mismatch: bool = False,
    batch_size: int = 4096,
    segment_firings: int = 2**24,
    progress: Callable[[int, int | None], None] | None = None,
) -> FeatureIndex:
    """Index every firing of `sae` over the rows of `source`.

    Args:
        source: an ActivationStore, or anything with its `batches`, `rows`, `sequences`, `documents` and `spec`.
        sae: the dictionary; its `hook_name` says which activations it reads.
        out: folder of the index, `NAME.index`. Taken as it is when it already holds this very index, resumed when
            it holds part of it.
        model: gives tokens their strings and features their logit effects; without it tokens show as their ids.
        metrics: numbers to keep in the manifest, such as fvu, l0 and delta_ce.
        allow_mismatch: index although the SAE was trained on another model or tokenizer; recorded in the manifest.
        batch_size: rows to encode at once.
        segment_firings: firings to hold in memory at once, about 16 bytes each.
        progress: called with (work done, work in all), in rows.
    Raises:
        UnknownNameError: the store lacks the SAE's hook.
        MismatchError: the SAE has another width, model or tokenizer than the store.
        OccupiedError: `out` holds something else.
        NonFiniteError: an activation or a feature is NaN or infinite.
    """
    raise NotImplementedError
