"""A map of an SAE's features in two dimensions: UMAP of the decoder rows, stored in the index.

UMAP (McInnes, Healy, Melville 2018, arXiv 1802.03426) puts features near each other whose decoder rows have a large
cosine; distances between far ones, and directions, mean nothing. The map follows from the decoder and a seed alone.
"""

import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np

from activations.ledger import WriterLock
from scope.errors import InvalidInputError, MismatchError, ScopeError
from scope.features.digests import digest_file, read_digests, write_digests
from scope.features.index import FeatureIndex
from scope.features.layout import place_of

__all__ = ["NEIGHBOURS", "UMAP_TABLE", "add_umap", "decoder_umap", "require_umap"]

UMAP_TABLE = "tables/umap.parquet"
NEIGHBOURS = 15
MINIMUM = 4
"""Features from which on there is something to lay out."""


def require_umap() -> None:
    """Raise InvalidInputError where umap-learn is not installed."""
    if importlib.util.find_spec("umap") is None:
        raise InvalidInputError(
            "The map of the decoder is made by umap-learn, which is not installed. Install it with: "
            'pip install "scope-workbench[umap]"'
        )


def decoder_umap(W_dec: np.ndarray, seed: int = 0) -> np.ndarray:
    """Places of features in two dimensions, float32 `(d_sae, 2)`: UMAP by cosine, `NEIGHBOURS` neighbours.

    Args:
        W_dec: decoder rows, `(d_sae, d_out)`; a row of zeros lies where its noise puts it.
        seed: of the layout; the same seed gives the same map on the same machine.
    Raises:
        InvalidInputError: umap-learn is not installed, or there are too few features.
    """
    require_umap()
    if len(W_dec) < MINIMUM:
        raise InvalidInputError(f"There are {len(W_dec)} features; a map needs {MINIMUM} or more.")
    import umap

    norms = np.linalg.norm(W_dec, axis=1, keepdims=True)
    rows = W_dec / np.where(norms > 0, norms, 1)
    # A cosine needs a direction.
    rows = np.where(norms > 0, rows, np.random.default_rng(seed).normal(size=rows.shape) / np.sqrt(rows.shape[1]))
    few = len(rows) <= 2 * NEIGHBOURS
    mapper = umap.UMAP(
        n_components=2,
        metric="cosine",
        n_neighbors=min(NEIGHBOURS, len(rows) - 1),
        init="random" if few else "spectral",
        random_state=seed,
        n_jobs=1,
    )
    return np.asarray(mapper.fit_transform(rows.astype(np.float32)), np.float32)


def add_umap(path: str | Path, sae: Any, seed: int = 0) -> FeatureIndex:
    """Make the map of an index's SAE and store it in the index, `tables/umap.parquet`: feature, umap_x, umap_y.

    An index that has one already is left as it is.

    Args:
        path: the index.
        sae: its SAE; the index has no decoder.
        seed: of the layout.
    Raises:
        MismatchError: it is another SAE.
        InvalidInputError: umap-learn is not installed.
        LockedError: another process is building the index.
    """
    import pandas as pd

    index = FeatureIndex.open(path)
    if sae.fingerprint != index.sae_info["fingerprint"]:
        raise MismatchError(
            f"{index.path} is of the SAE {str(index.sae_info['fingerprint'])[:12]}; the one given is "
            f"{sae.fingerprint[:12]}."
        )
    derived = str(index.manifest.get("derived", ""))
    if UMAP_TABLE in read_digests(index.path, derived):
        return index
    places = decoder_umap(sae.W_dec.detach().float().cpu().numpy(), seed)
    table = pd.DataFrame({"feature": np.arange(len(places)), "umap_x": places[:, 0], "umap_y": places[:, 1]})
    build = index.path / "build"
    build.mkdir(exist_ok=True)
    try:
        with WriterLock(build):
            _store(index.path, derived, table)
    finally:
        _remove_if_empty(build)
    return FeatureIndex.open(path)


def _store(path: Path, derived: str, table: Any) -> None:
    """Write the table, then record it: what the record does not name is not part of the index."""
    manifest = FeatureIndex.open(path).manifest
    if str(manifest.get("derived", "")) != derived:
        raise ScopeError(f"{path} has grown meanwhile. Run the same again.")
    place = place_of(path, UMAP_TABLE, derived)
    part = place.with_suffix(".part")
    table.to_parquet(part, index=False, compression="zstd")
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    os.replace(part, place)
    write_digests(path, {**read_digests(path, derived), UMAP_TABLE: digest_file(place)}, derived)


def _remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:  # a build that is half done
        return
