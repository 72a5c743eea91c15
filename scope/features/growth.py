"""An index that grows: what it holds is one more sorted run beside the segments of the new rows.

Nothing of the old rows is encoded again. Their token lists stay where they are and are appended to; their feature
lists are read, merged with the new ones and written anew beside the old, which is what a merge of so many firings
costs, whatever the SAE. Readers see the old index until the manifest is replaced (`layout`).
"""

import shutil
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from activations.manifest import read_manifest
from activations.spec import fingerprint_of
from scope.errors import IntegrityError, OccupiedError
from scope.features.layout import DERIVED_PARTS, FIRINGS, FORMAT, place_of, row_dtype
from scope.features.lists import ListReader
from scope.features.merge import ListRun
from scope.features.reader import IndexReader
from scope.features.segments import Grown
from scope.features.weights import WeightTable

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["GrowingIndex", "clear_leftovers", "identity_of"]


def identity_of(manifest: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the fingerprint of a complete index is made of; None where the manifest does not say."""
    try:
        store, sae = manifest["parents"]
        identity = {
            "sae": sae,
            "store": store,
            "hook": manifest["hook_name"],
            "n_rows": manifest["n_rows"],
            "excluded_flags": manifest["excluded_flags"],
            "model": manifest["model"]["weight_hash"] if manifest["has_strings"] else None,
        }
    except (KeyError, TypeError, ValueError):
        return None
    return identity if fingerprint_of(identity) == manifest["fingerprint"] else None


class GrowingIndex:
    """What a complete index gives to the one that it grows into.

    Raises:
        OccupiedError: it was built by a release whose indexes could not grow.
    """

    def __init__(self, path: Path) -> None:
        self._reader = IndexReader(path)
        if "statistics/special_strength" not in self._reader.manifest["arrays"]:
            raise OccupiedError(
                f"{path} was built by an earlier release, whose indexes do not grow. Give another folder, or delete "
                "this one."
            )

    @property
    def n_rows(self) -> int:
        return self._reader.n_rows

    @property
    def fingerprint(self) -> str:
        return str(self._reader.manifest["fingerprint"])

    @property
    def grown(self) -> Grown:
        """Where its segments go on."""
        reader = self._reader
        special = reader.array("statistics/special_strength").all()
        return Grown(reader.n_rows, int(reader.manifest["n_firings"]), special)

    @property
    def columns(self) -> frozenset[str]:
        """The columns of its rows."""
        arrays = self._reader.manifest["arrays"]
        return frozenset(name.partition("/")[2] for name in arrays if name.startswith("rows/"))

    @property
    def run(self) -> ListRun:
        """Its feature lists."""
        reader = self._reader
        folder = place_of(reader.path, FIRINGS, reader.derived)
        return ListRun(
            ListReader(folder / "row", row_dtype(reader.n_rows)),
            ListReader(folder / "value", "uint16"),
            reader.array("by_feature/indptr").all().astype(np.int64),
            self.table["min_value"].to_numpy(np.float32),
            self.table["max_value"].to_numpy(np.float32),
        )

    @cached_property
    def table(self) -> "pd.DataFrame":
        """Its feature table."""
        return self._reader.table("features")

    @property
    def weight_facts(self) -> WeightTable:
        """What it says of the weights."""
        return WeightTable(self.table, self._reader.vocabulary.token_ids)

    def check(self) -> None:
        """Read every byte that it holds; raises IntegrityError."""
        faults = self._reader.verify()
        if faults:
            raise IntegrityError(
                f"{self._reader.path / faults[0].object} is damaged ({faults[0].problem}), so the index cannot grow. "
                f"Delete {self._reader.path} and build it again."
            )

    def take_over_tables(self, derived: str) -> None:
        """Copy the tables that depend on the SAE alone (`umap`)."""
        path = self._reader.path
        own = place_of(path, "tables/umap.parquet", self._reader.derived)
        if own.is_file():
            shutil.copyfile(own, place_of(path, "tables/umap.parquet", derived))


def clear_leftovers(out: Path) -> None:
    """Remove what only the build needed, and what an index that has grown held before; the manifest is there."""
    shutil.rmtree(out / "build", ignore_errors=True)
    derived = str(read_manifest(out, FORMAT).get("derived", ""))
    for folder in (out, out / derived):
        for name in ("manifest.json", "digests.json"):
            for part in folder.glob(f"{name}.tmp-*"):  # of a writer that was killed while it replaced the file
                part.unlink(missing_ok=True)
    for folder in out.glob("grown-*"):
        if folder.name != derived:
            shutil.rmtree(folder, ignore_errors=True)
    if derived:
        for name in DERIVED_PARTS:
            shutil.rmtree(out / name, ignore_errors=True)
        (out / "digests.json").unlink(missing_ok=True)
