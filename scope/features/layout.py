"""What lies where in `NAME.index/`.

    manifest.json                written last; its `arrays` says dtype and shape of every flat array
    digests.json                 size and xxh3-128 digests of every file
    rows/                        token_id, sequence, position, flags: one entry per row of the store; of chats also
                                 role, kind, message; of a text with media modality, medium and the places in them; of
                                 denoising step, block, state, final_id, commit_step
    media/                       files of images and sounds, by their digest
    by_token/                    indptr, feature, value: CSR, within a row the strongest first
    by_feature/indptr            where each feature's list starts
    by_feature/firings.zarr/     row, value: CSC, within a feature the strongest first, equal ones by row
    statistics/                  histograms, counts by language, source and token, of chats by role and kind, of media
                                 by modality, of denoising by state, co-firing features
    tables/                      features, documents, sequences, vocabulary, media (parquet)
    build/                       only while it is being built: identity.json, one record and one sorted run per segment

An index that has grown has by_feature/, statistics/, tables/ and digests.json in a folder of their own, `grown-N/`
with N the number of rows, which the manifest names as `derived`; rows/ and by_token/ are appended to, so what lies in
them beyond the recorded length belongs to an index that is still growing. Names inside an index (`by_feature/indptr`)
leave that folder out; `place_of` knows it.

A flat array is the memory of a C-ordered array and nothing else, memory-mapped when read; the suffix of its file is
its dtype. bfloat16, which numpy lacks, is `.bfloat16` on disk and uint16 bits in memory.
"""

from pathlib import Path
from typing import Final

import numpy as np

from activations.chats import CONTENT_KINDS, ROLES
from activations.denoising import STATES
from activations.media import MODALITIES

__all__ = [
    "APPENDED_PARTS",
    "DERIVED_PARTS",
    "FIRINGS",
    "FORMAT",
    "N_BINS",
    "N_COFIRING",
    "N_LOGITS",
    "N_NEIGHBOURS",
    "N_TOKENS",
    "ROW_COLUMNS",
    "SPOKEN",
    "dtype_of",
]
__all__ += ["feature_dtype", "file_of", "grown_folder", "is_appended", "listed_as", "place_of", "row_dtype"]

FORMAT: Final = "feature-index"

N_BINS: Final = 40
"""Bins of a feature's histogram, linear from 0 to its maximum."""
N_TOKENS: Final = 64
"""Tokens kept per feature, by summed strength."""
N_COFIRING: Final = 64
"""Co-firing features kept per feature, by Jaccard similarity."""
N_NEIGHBOURS: Final = 20
"""Nearest decoder rows kept per feature."""
N_LOGITS: Final = 20
"""Tokens kept per feature with the largest and with the smallest logit effects."""

FIRINGS: Final = "by_feature/firings.zarr"

APPENDED_PARTS: Final = ("rows", "by_token", "media")
"""Folders that an index which grows appends to."""
DERIVED_PARTS: Final = ("by_feature", "statistics", "tables")
"""Folders that are made anew when an index grows."""

ROW_COLUMNS: Final = {"token_id": "int32", "sequence": "int64", "position": "int32", "flags": "uint8"}
SPOKEN: Final = {"role": ROLES, "kind": CONTENT_KINDS, "modality": MODALITIES, "state": STATES}
"""What the rows of chats, of texts with media and of denoising are grouped by, and the names of the codes."""


def listed_as(group: str) -> str:
    """The manifest's name for the list of a group's values: languages, roles, modalities."""
    return f"{group[:-1]}ies" if group.endswith("y") else f"{group}s"


def dtype_of(suffix: str) -> np.dtype:
    """The dtype in memory of a flat array's file suffix."""
    return np.dtype("uint16" if suffix == "bfloat16" else suffix).newbyteorder("<")


def is_appended(name: str) -> bool:
    """Whether the file of this name is one that grows in its place."""
    return name.split("/", 1)[0] in APPENDED_PARTS


def grown_folder(n_rows: int) -> str:
    """The folder of what is derived anew when an index has grown to so many rows."""
    return f"grown-{n_rows}"


def place_of(folder: Path, name: str, derived: str = "") -> Path:
    """Where the file of an index that has this name ("tables/features.parquet") lies; `derived` as in the manifest."""
    return folder / name if is_appended(name) or not derived else folder / derived / name


def file_of(folder: Path, name: str, dtype: str, derived: str = "") -> Path:
    """Where the flat array `name` ("by_token/value") lies."""
    return place_of(folder, f"{name}.{dtype}", derived)


def feature_dtype(d_sae: int) -> str:
    """dtype of stored feature ids."""
    return "uint16" if d_sae <= 2**16 else "uint32"


def row_dtype(n_rows: int) -> str:
    """dtype of stored row ids."""
    return "uint32" if n_rows <= 2**32 else "uint64"
