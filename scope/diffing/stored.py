"""A comparison of two models as it lies in its folder (`scope.diffing.report` says what is in it)."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from activations.manifest import read_manifest
from scope.diffing.summary import summary_of
from scope.errors import IntegrityError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["CROSSCODER", "FORMAT", "MANIFEST", "REPORT", "DiffReport", "firings_file", "sae_file"]

FORMAT = "model-diff"
MANIFEST, REPORT, CROSSCODER = "manifest.json", "report.json", "crosscoder"


def sae_file(number: int) -> str:
    """Name of the table of the features of one of the SAEs."""
    return f"sae-{number}.parquet"


def firings_file(number: int) -> str:
    """Name of the counts of firings of one of the SAEs, which another comparison takes this one for a control by."""
    return f"sae-{number}-firings.npz"


@dataclass(frozen=True, eq=False)
class DiffReport:
    """A finished comparison."""

    folder: Path
    figures: Mapping[str, Any]
    """What `report.json` holds: base, tuned, text, config, layers, predictions, saes, crosscoder, conclusions."""
    manifest: Mapping[str, Any]

    @classmethod
    def open(cls, folder: str | Path) -> "DiffReport":
        """The report in a folder.

        Raises:
            UnknownNameError, InvalidInputError: as `activations.manifest.read_manifest`.
            IntegrityError: the manifest or the report cannot be read.
        """
        folder = Path(folder)
        manifest = read_manifest(folder, FORMAT)
        try:
            return cls(folder, json.loads((folder / REPORT).read_text()), manifest)
        except (OSError, ValueError) as error:
            raise IntegrityError(
                f"{folder / REPORT} cannot be read ({error}). Delete the folder and compare again."
            ) from error

    def sae_table(self, number: int) -> "pd.DataFrame":
        """`FeatureChanges.table` of one of the SAEs."""
        import pandas as pd

        return pd.read_parquet(self.folder / sae_file(number))

    def crosscoder_table(self) -> "pd.DataFrame | None":
        """`FeatureScaling.table`; None where no crosscoder was trained."""
        import pandas as pd

        file = self.folder / f"{CROSSCODER}.parquet"
        return pd.read_parquet(file) if file.is_file() else None

    def summary(self) -> str:
        """Some lines for a person."""
        return summary_of(self.figures)

    def _repr_html_(self) -> str:
        from html import escape

        return f"<pre>{escape(self.summary())}</pre>"
