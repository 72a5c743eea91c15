"""`Feature`: one feature of an index, for reading in a notebook."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scope.features.index import FeatureIndex
    from scope.features.labels import Label

__all__ = ["Feature"]


@dataclass(frozen=True)
class Feature:
    """One feature of an index. Everything is read from the index when asked for."""

    index: "FeatureIndex"
    id: int

    @property
    def statistics(self) -> dict[str, Any]:
        """The feature's row of `FeatureIndex.table`."""
        return {str(name): value for name, value in self.index.table.iloc[self.id].items()}

    @property
    def label(self) -> "Label":
        """What is said of it: label, notes, star, lists. `index.labels.set(id, text=…)` changes it."""
        return self.index.labels.get(self.id)

    def _repr_html_(self) -> str:
        from scope.features.panels import feature_html

        return feature_html(self)
