"""Files to download: a feature or a whole SAE in Neuronpedia's format, grids as CSV and parquet, labels.

    /export/INDEX/feature/ID/neuronpedia.json     one feature, as a row of Neuronpedia's with its examples, and the
                                                  histogram of its logit effects where its page has computed it
    /export/INDEX/feature/ID/activations.csv      every firing of it with token and document (or .parquet)
    /export/INDEX/features.csv?…                  the feature browser's list, its address's query (or .parquet)
    /export/INDEX/labels.csv                      what is said of features (or .parquet, .jsonl)
    /export/INDEX/neuronpedia.zip?features=…      the SAE, or a list's features, as the folder that Neuronpedia imports

Names in an address are ids from the workspace's registry and numbers; no path comes from a request. What is made is
sent while it is made. Downloads are attachments, so that no browser shows what is in them as a page.
"""

import io
import json
import zipfile
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from flask import Flask, Response, request

from dashboards.context import Context
from dashboards.feature_jobs import known_effects
from dashboards.listing import FeatureQuery, grid_table, listing
from dashboards.queries import feature_id
from scope.errors import InvalidInputError, ScopeError, UnknownNameError

if TYPE_CHECKING:
    import pandas as pd

    from scope.features.index import FeatureIndex

__all__ = ["register"]

MAX_FIRINGS = 1_000_000
"""Firings of one feature in a file, the strongest first."""
PART_FIRINGS = 20_000
MAX_DIGITS = 19
GRIDS = {"csv": "text/csv; charset=utf-8", "parquet": "application/vnd.apache.parquet"}
LINES = {"jsonl": "application/jsonl; charset=utf-8"}


def register(server: Flask, context: Context) -> None:
    """Add the routes to a Flask application."""

    @server.get("/export/<index>/feature/<feature>/neuronpedia.json")
    def feature_json(index: str, feature: str) -> Response:
        """One feature in Neuronpedia's format."""

        def made() -> Response:
            from scope.features.neuronpedia_export import feature_json

            opened, id = _feature(context, index, feature)
            made = feature_json(opened, id, effects=known_effects(context, opened.id, id))
            content = json.dumps(made, ensure_ascii=False, indent=1)
            return _attached(content, "application/json", f"{opened.id}-feature-{id}.json")

        return _or_trouble(made)

    @server.get("/export/<index>/feature/<feature>/activations.<kind>")
    def activations(index: str, feature: str, kind: str) -> Response:
        """Every firing of one feature."""

        def made() -> Response:
            _check_kind(kind, GRIDS)
            opened, id = _feature(context, index, feature)
            name = f"{opened.id}-feature-{id}-activations.{kind}"
            if kind == "csv":
                return _attached(_firings_csv(opened, id), GRIDS[kind], name)
            return _grid(opened.activations([id], MAX_FIRINGS), kind, name)

        return _or_trouble(made)

    @server.get("/export/<index>/features.<kind>")
    def features(index: str, kind: str) -> Response:
        """The feature browser's list."""

        def made() -> Response:
            _check_kind(kind, GRIDS)
            opened = context.index(index)
            return _grid(grid_table(opened, FeatureQuery.of(request.args)), kind, f"{opened.id}-features.{kind}")

        return _or_trouble(made)

    @server.get("/export/<index>/labels.<kind>")
    def labels(index: str, kind: str) -> Response:
        """What is said of an SAE's features."""

        def made() -> Response:
            _check_kind(kind, GRIDS | LINES)
            opened = context.index(index)
            table = opened.labels.table()
            table.insert(0, "sae", opened.labels.sae)
            name = f"{opened.id}-labels.{kind}"
            if kind == "jsonl":
                lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in table.to_dict("records"))
                return _attached((line.encode() for line in lines), LINES[kind], name)
            return _grid(table, kind, name)

        return _or_trouble(made)

    @server.get("/export/<index>/neuronpedia.zip")
    def neuronpedia(index: str) -> Response:
        """A whole SAE, or the features of the browser's list, as the folder that Neuronpedia imports."""

        def made() -> Response:
            opened = context.index(index)
            chosen = listing(opened, FeatureQuery.of(request.args)).ids.tolist() if request.args else None
            return _attached(_zipped(opened, chosen), "application/zip", f"{opened.id}-neuronpedia.zip")

        return _or_trouble(made)


def _feature(context: Context, index: str, feature: str) -> "tuple[FeatureIndex, int]":
    opened = context.index(index)
    return opened, feature_id(opened, feature[:MAX_DIGITS])


def _check_kind(kind: str, known: dict[str, str]) -> None:
    if kind not in known:
        raise UnknownNameError("kind of file", kind, known)


def _grid(table: "pd.DataFrame", kind: str, name: str) -> Response:
    from scope.features.grids import csv_parts, parquet_bytes

    return _attached(csv_parts(table) if kind == "csv" else parquet_bytes(table), GRIDS[kind], name)


def _firings_csv(index: "FeatureIndex", feature: int) -> Iterator[bytes]:
    """The firings of a feature as CSV, a part at a time: some features have millions."""
    from scope.features.grids import csv_parts

    total = min(int(index.table.iloc[feature]["n_firings"]), MAX_FIRINGS)
    for start in range(0, max(total, 1), PART_FIRINGS):
        parts = csv_parts(index.activations([feature], min(PART_FIRINGS, total - start), start))
        yield from parts if start == 0 else _without_head(parts)


def _without_head(parts: Iterator[bytes]) -> Iterator[bytes]:
    """CSV that goes on with an earlier one: no byte order mark, no line of names."""
    next(parts)
    yield next(parts).split(b"\r\n", 1)[1]
    yield from parts


def _zipped(index: "FeatureIndex", features: list[int] | None) -> Iterator[bytes]:
    """The files of an export, zipped while they are made."""
    from scope.features.neuronpedia_export import neuronpedia_files

    sink = _Sink()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as archive:
        for name, content in neuronpedia_files(index, features):
            archive.writestr(name, content)
            yield sink.take()
    yield sink.take()


class _Sink(io.RawIOBase):
    """A file to write to that cannot be rewound: what was written is taken away again and again."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        self._parts.append(bytes(content))
        return len(self._parts[-1])

    def take(self) -> bytes:
        taken, self._parts = b"".join(self._parts), []
        return taken


def _attached(content: Any, mimetype: str, name: str) -> Response:
    response = Response(content, content_type=mimetype)
    response.headers["Content-Disposition"] = f'attachment; filename="{name}"'
    response.headers["Cache-Control"] = "no-store"
    return response


def _or_trouble(make: Callable[[], Response]) -> Response:
    """What was asked for, or in words why there is none."""
    try:
        return make()
    except UnknownNameError as problem:
        return _trouble(problem, 404)
    except InvalidInputError as problem:
        return _trouble(problem, 400)
    except ScopeError as problem:
        return _trouble(problem, 500)


def _trouble(problem: ScopeError, status: int) -> Response:
    return Response(str(problem), status, content_type="text/plain; charset=utf-8")
