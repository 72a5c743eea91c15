"""One module per page, each with `render(context, view) -> Page` and `register(app, context)`."""

from dataclasses import dataclass
from typing import Any

__all__ = ["Page"]


@dataclass(frozen=True)
class Page:
    """A drawn view."""

    content: Any
    title: str
    """What the browser's window is called, without the dashboard's own name."""
    rail: str = ""
    """Which entry of the rail is current."""
    address: str = ""
    """The view's full address, where the one that was asked for left something open (such as the index)."""
