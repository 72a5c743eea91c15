"""URLs in, URLs out: the only place that knows how a view is written as an address.

A view is a path and a query; ids in it come from the workspace's registry, never paths of files.
"""

import re
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, quote, urlencode

__all__ = ["View", "feature_link", "features_link", "parse", "prompt_link", "workspace_link"]


@dataclass(frozen=True)
class View:
    """What an address asks for."""

    page: str
    """ "workspace", "features", "feature", "prompt", or "" where no page has this address."""
    path: str = "/"
    target: str = ""
    """What follows the page's name in the path: the feature id as it was written."""
    query: dict[str, str] = field(default_factory=dict)

    @property
    def index(self) -> str:
        """The id of the index; "" where the address leaves it open."""
        return self.query.get("index", "")

    def get(self, name: str, default: str = "") -> str:
        """One value of the query."""
        return self.query.get(name, default)


def parse(path: str | None, search: str | None) -> View:
    """The view of an address: `path` as in "/feature/12", `search` as in "?index=…"."""
    path = path or "/"
    query = dict(parse_qsl((search or "").lstrip("?"), keep_blank_values=True))
    if path == "/":
        return View("workspace", path, "", query)
    match = re.fullmatch(r"/(features|prompt)/?", path)
    if match:
        return View(match[1], path, "", query)
    match = re.fullmatch(r"/feature/([^/]+)/?", path)
    if match:
        return View("feature", path, match[1], query)
    return View("", path, "", query)


def _link(path: str, query: dict[str, object]) -> str:
    given = {name: str(value) for name, value in query.items() if value not in (None, "")}
    return path + (f"?{urlencode(given, quote_via=quote)}" if given else "")


def workspace_link() -> str:
    """The workspace page."""
    return "/"


def features_link(index: str, **query: object) -> str:
    """The feature browser of an index; `query` as in its address (q, show, language, source, sort)."""
    return _link("/features", {"index": index, **query})


def feature_link(index: str, feature: int, **query: object) -> str:
    """The page of one feature."""
    return _link(f"/feature/{int(feature)}", {"index": index, **query})


def prompt_link(index: str, **query: object) -> str:
    """The prompt page; `query` as in its address (text, token, feature, target, sort)."""
    return _link("/prompt", {"index": index, **query})
