"""`plain`: values as JSON has them."""

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

import numpy as np

__all__ = ["plain"]


def plain(value: Any) -> Any:
    """The same with numbers of numpy as Python's, and null for what is no number or infinite, which JSON does not have;
    inside of mappings and sequences too, whose keys become text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not isfinite(value) else value
