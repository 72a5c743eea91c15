"""What people wrote on an index's features (labels, stars, lists), as the pages need it: by feature, read once per
change."""

import threading
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from scope.features.index import FeatureIndex

__all__ = ["Marks", "feature_label", "marks_of"]


class Marks(NamedTuple):
    """Labels, stars and lists of one SAE's features."""

    version: int
    labels: dict[int, str]
    """By feature; features without one are left out."""
    sources: dict[int, str]
    """Where a label comes from."""
    own: frozenset[int]
    """Features whose label was written here, not imported."""
    starred: list[int]
    lists: dict[str, list[int]]


NOTHING = Marks(0, {}, {}, frozenset(), [], {})
OWN = "own"
_known: "weakref.WeakKeyDictionary[Any, Marks]" = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def marks_of(index: "FeatureIndex") -> Marks:
    """All labels, stars and lists; nothing where an index has none. Read again after each edit."""
    labels = getattr(index, "labels", None)
    if labels is None:
        return NOTHING
    version = int(labels.version)
    with _lock:
        known = _known.get(index)
    if known is not None and known.version == version:
        return known
    table = labels.table()
    named = table[table["label"].fillna("").astype(str) != ""]
    features = named["feature"].astype(int)
    sources = dict(zip(features, named["label_source"].fillna("").astype(str), strict=True))
    marks = Marks(
        version,
        dict(zip(features, named["label"].astype(str), strict=True)),
        sources,
        frozenset(feature for feature, source in sources.items() if source == OWN),
        table.loc[table["starred"].astype(bool), "feature"].astype(int).tolist(),
        {str(name): [int(feature) for feature in members] for name, members in labels.lists().items()},
    )
    with _lock:
        _known[index] = marks
    return marks


def feature_label(index: "FeatureIndex", feature: int) -> str:
    """The feature's label; "" where it has none."""
    return marks_of(index).labels.get(feature, "")
