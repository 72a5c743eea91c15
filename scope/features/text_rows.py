"""Rows of an index as text: tokens, and firings with where they come from."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from activations.media import MEDIA_COLUMNS
from scope.features.layout import ROW_COLUMNS, SPOKEN
from scope.features.media import shown_tokens

if TYPE_CHECKING:
    from scope.features.reader import IndexReader

__all__ = ["firings", "tokens"]


def tokens(reader: "IndexReader", rows: np.ndarray) -> pd.DataFrame:
    """Columns row, token (display string), token_id, sequence, position, flags; of chats also role, kind, message; of
    a text with media also modality, medium and the places of soft tokens (`activations.media`); of denoising also
    state, step, block, final (display string), final_id, commit_step."""
    columns = {name: reader.row_column(name).take(rows) for name in ROW_COLUMNS}
    for name in reader.spoken:
        columns[name] = np.array(SPOKEN[name], object)[reader.row_column(name).take(rows)]
    further = ["message"] if "role" in reader.spoken else []
    if "modality" in reader.spoken:
        further += [name for name in MEDIA_COLUMNS if name != "modality"]
    if "state" in reader.spoken:
        further += ["step", "block", "final_id", "commit_step"]
    columns |= {name: reader.row_column(name).take(rows) for name in further}
    if "state" in reader.spoken:
        columns["final"] = np.array(reader.vocabulary.display(columns["final_id"]), object)
    return pd.DataFrame({"row": rows, "token": shown_tokens(reader, rows), **columns})


def firings(
    reader: "IndexReader", features: Sequence[int], limit_per_feature: int | None, start: int = 0
) -> pd.DataFrame:
    """See `FeatureIndex.activations`."""
    parts = []
    for feature in features:
        n = reader.n_firings_of(feature)
        stop = n if limit_per_feature is None else min(start + limit_per_feature, n)
        rows, values = reader.firing_arrays(feature, min(start, stop), stop)
        parts.append(pd.DataFrame({"feature": feature, "row": rows, "value": values}))
    table = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame({"feature": [], "row": [], "value": []})
    return _with_provenance(reader, table)


def _with_provenance(reader: "IndexReader", table: pd.DataFrame) -> pd.DataFrame:
    rows = table["row"].to_numpy(np.int64)
    windows = reader.windows
    documents = windows.document[windows.place[reader.row_column("sequence").take(rows)]]
    infos = [reader.document_info(document) for document in documents.tolist()]
    return table.assign(
        token=reader.vocabulary.strings(reader.row_column("token_id").take(rows)),
        position=reader.row_column("position").take(rows),
        document=documents,
        title=[info.title for info in infos],
        source=[info.source for info in infos],
        language=[info.language for info in infos],
    )
