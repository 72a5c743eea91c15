"""Passes that transformers is told hold no packed sequences.

Without a mask and a cache transformers compares the positions of each batch to find several texts in one row
(`transformers.masking_utils.find_packed_sequence_indices`), and the host waits for the device to answer. That stops it
from preparing the next batch while this one is computed. Windows are never packed, so within `unpacked` the answer is
known.
"""

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["unpacked"]

_here = threading.local()


@contextmanager
def unpacked() -> Iterator[None]:
    """Within it, in this thread, transformers takes each row of a batch for one text."""
    _install()
    before = getattr(_here, "unpacked", False)
    _here.unpacked = True
    try:
        yield
    finally:
        _here.unpacked = before


@functools.cache
def _install() -> None:
    from transformers import masking_utils

    look: Any = getattr(masking_utils, "find_packed_sequence_indices", None)
    if look is None:  # a release that does not look
        return

    @functools.wraps(look)
    def find(position_ids: Any) -> Any:
        return None if getattr(_here, "unpacked", False) else look(position_ids)

    masking_utils.find_packed_sequence_indices = find
