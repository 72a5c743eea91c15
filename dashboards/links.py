"""URLs in, URLs out: the only place that knows how a view is written as an address.

A view is a path and a query; ids in it come from the workspace's registry, never paths of files.
"""

import re
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, quote, urlencode

__all__ = [
    "View",
    "circuit_link",
    "compare_link",
    "embeddings_link",
    "experts_link",
    "feature_link",
    "features_link",
    "generation_link",
    "lens_link",
    "list_query",
    "model_link",
    "parse",
    "prompt_link",
    "steer_link",
    "training_link",
    "workspace_link",
]


@dataclass(frozen=True)
class View:
    """What an address asks for."""

    page: str
    """ "workspace", "features", "feature", "prompt", "lens", "circuit", "steer", "training", "compare", "model",
    "embeddings", "experts", "generation", or "" where no page has this address."""
    path: str = "/"
    target: str = ""
    """What follows the page's name in the path: the id of a feature or of a training, as it was written."""
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
    query = list_query((search or "").lstrip("?"))
    if path == "/":
        return View("workspace", path, "", query)
    pages = "features|prompt|lens|circuit|steer|training|compare|model|embeddings|experts|generation"
    match = re.fullmatch(rf"/({pages})/?", path)
    if match:
        return View(match[1], path, "", query)
    match = re.fullmatch(r"/(feature|training)/([^/]+)/?", path)
    if match:
        return View(match[1], path, match[2], query)
    return View("", path, "", query)


def list_query(text: str) -> dict[str, str]:
    """The query of a list of features, as the address of a feature that was reached from one carries it."""
    return dict(parse_qsl(text, keep_blank_values=True))


def _link(path: str, query: dict[str, object], index: str = "") -> str:
    """An address; its index comes first, whatever a query that was taken over says of one."""
    query = {"index": index, **{name: value for name, value in query.items() if name != "index"}} if index else query
    given = {name: str(value) for name, value in query.items() if value not in (None, "")}
    return path + (f"?{urlencode(given, quote_via=quote)}" if given else "")


def workspace_link() -> str:
    """The workspace page."""
    return "/"


def features_link(index: str, /, **query: object) -> str:
    """The feature browser of an index; `query` as in its address (q, show, language, source, sort)."""
    return _link("/features", query, index)


def feature_link(index: str, feature: int, /, **query: object) -> str:
    """The page of one feature."""
    return _link(f"/feature/{int(feature)}", query, index)


def prompt_link(index: str, /, **query: object) -> str:
    """The prompt page; `query` as in its address (text, token, feature, target, sort)."""
    return _link("/prompt", query, index)


def lens_link(index: str, /, **query: object) -> str:
    """The logit lens; `query` as in its address."""
    return _link("/lens", query, index)


def model_link(index: str, /, **query: object) -> str:
    """The page of an index's model: its parameters."""
    return _link("/model", query, index)


def embeddings_link(index: str, /, **query: object) -> str:
    """What the model's per-layer embeddings write; `query` as in its address (text, token, layer, part)."""
    return _link("/embeddings", query, index)


def experts_link(index: str, /, **query: object) -> str:
    """The model's experts; `query` as in its address (view, store, layer, expert, by, sort, feature, text, token, do,
    other, at)."""
    return _link("/experts", query, index)


def generation_link(index: str, /, **query: object) -> str:
    """One generation of a model that denoises; `query` as in its address (document, block, from, feature)."""
    return _link("/generation", query, index)


def circuit_link(graph: str = "", /, **query: object) -> str:
    """All circuit graphs, or the page of one; `query` as in its address (nodes, edges, pin, edge, head,
    hide)."""
    return _link("/circuit", {"graph": graph, **query})


def steer_link(index: str, /, **query: object) -> str:
    """The steering page; `query` as in its address (text, push, named, n, t, during, freeze)."""
    return _link("/steer", query, index)


def training_link(training: str = "", /, **query: object) -> str:
    """All trainings, or the page of one; `query` as in its address (runs, x)."""
    return _link(f"/training/{quote(training, safe='')}" if training else "/training", query)


def compare_link(**query: object) -> str:
    """The comparison of two SAEs or checkpoints, or of two models; `query` as in its address (a, b; diff)."""
    return _link("/compare", query)
