"""What the browser fetches in bulk, outside of callbacks: the points of a scatter plot, which of them a filter keeps,
a document a part at a time.

Points travel as little-endian arrays in base64: at most `MAX_POINTS` of them, so an answer stays under 1.5 MB however
wide the dictionary is. Past that a sample is drawn, always the same one, and the answer says so.
"""

import base64
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from flask import Flask, Response, jsonify, request

from dashboards.columns import COLUMNS, Column
from dashboards.context import Context
from dashboards.documents import document_part
from dashboards.listing import FeatureQuery, listing
from dashboards.queries import feature_id, feature_name, table_row
from scope.errors import InvalidInputError, ScopeError, UnknownNameError

if TYPE_CHECKING:
    from scope.features.index import FeatureIndex

__all__ = ["MAX_POINTS", "kept_bits", "points", "register"]

MAX_POINTS = 2**16
N_GROUPS = 8
"""Colours of a categorical column: the seven commonest values, the rest together."""


def register(server: Flask, context: Context) -> None:
    """Add the routes to a Flask application."""

    @server.get("/api/points")
    def scatter_points() -> tuple[Response, int]:
        """The points of two statistics: `index`, `x`, `y`, `colour`."""
        return _answer(lambda: points(_index(context), *(request.args.get(name, "") for name in ("x", "y", "colour"))))

    @server.get("/api/kept")
    def kept() -> tuple[Response, int]:
        """Which features pass the grid's filters: `index` and the query of its address. A filter that cannot be read
        keeps none; the grid says why."""
        try:
            return jsonify(kept_bits(_index(context), FeatureQuery.of(request.args))), 200
        except ScopeError as problem:
            return jsonify({"bits": "", "n": 0, "problem": str(problem)}), 200

    @server.get("/api/name")
    def name() -> tuple[Response, int]:
        """What a feature is called: `index`, `feature`."""

        def answer() -> dict[str, Any]:
            index = _index(context)
            row = table_row(index, feature_id(index, request.args.get("feature", "")))
            return {"name": feature_name(row), "n_firings": int(row["n_firings"])}

        return _answer(answer)

    @server.get("/api/document")
    def document() -> tuple[Response, int]:
        """A part of a document: `index`, `feature`, `document`, and `start`, `before` or `around` (a row)."""

        def answer() -> dict[str, Any]:
            index = _index(context)
            feature = feature_id(index, request.args.get("feature", ""))
            asked = {name: _whole(name) for name in ("start", "before", "around")}
            part = document_part(index, feature, _whole("document") or 0, **asked)
            runs = [{"r": run.start_row, "p": run.position, "t": run.tokens, "v": run.values} for run in part.runs]
            return {
                "origin": part.origin,
                "n_tokens": part.n_tokens,
                "start": part.start,
                "stop": part.stop,
                "runs": runs,
            }

        return _answer(answer)


def _answer(work: Callable[[], dict[str, Any]]) -> tuple[Response, int]:
    try:
        return jsonify(work()), 200
    except ScopeError as problem:
        return jsonify({"error": str(problem)}), 400


def _index(context: Context) -> "FeatureIndex":
    return context.index(request.args.get("index", ""))


def _whole(name: str) -> int | None:
    text = request.args.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise InvalidInputError(f"{name} is a whole number, not {text!r}.")
    return int(text)


def points(index: "FeatureIndex", x: str, y: str, colour: str = "") -> dict[str, Any]:
    """The scatter plot of two columns as JSON: `feature`, `x`, `y` (base64), their axes, and colours.

    Raises:
        UnknownNameError: the index has no such column.
    """
    horizontal, vertical = _axis(index, x), _axis(index, y)
    xs, ys = (column.scaled(column.values(index)) for column in (horizontal, vertical))
    drawable = np.flatnonzero(np.isfinite(xs) & np.isfinite(ys))
    shown = drawable
    if len(shown) > MAX_POINTS:
        shown = np.sort(np.random.default_rng(0).choice(shown, MAX_POINTS, replace=False))
    return {
        "feature": _packed(shown, "<u4"),
        "x": _packed(xs[shown], "<f4"),
        "y": _packed(ys[shown], "<f4"),
        "n": len(shown),
        "n_drawable": len(drawable),
        "d_sae": index.d_sae,
        "axes": [{"title": column.axis, "log": column.log} for column in (horizontal, vertical)],
        **(_colours(index, colour, shown) if colour else {}),
    }


def _axis(index: "FeatureIndex", name: str) -> Column:
    column = COLUMNS.get(name)
    if column is None or column.kind == "text" or not column.on(index):
        raise UnknownNameError("statistic", name, [one.name for one in COLUMNS.values() if one.kind != "text"])
    return column


def _colours(index: "FeatureIndex", name: str, shown: np.ndarray) -> dict[str, Any]:
    column = COLUMNS.get(name)
    if column is None or not column.on(index):
        raise UnknownNameError("statistic", name, list(COLUMNS))
    values = column.values(index)
    if column.kind != "text":
        scaled = column.scaled(values)[shown]
        finite = scaled[np.isfinite(scaled)]
        ends = [float(finite.min()), float(finite.max())] if len(finite) else [0.0, 1.0]
        return {"colour": {"title": column.axis, "log": column.log, "ends": ends, "values": _packed(scaled, "<f4")}}
    texts = np.array([str(value or "none") for value in values.tolist()], dtype=object)
    names, counts = np.unique(texts.astype(str), return_counts=True)
    order = np.argsort(-counts, kind="stable")
    groups = [str(names[place]) for place in order]
    named = groups if len(groups) <= N_GROUPS else groups[: N_GROUPS - 1]
    code_of = {group: code for code, group in enumerate(named)}
    codes = np.array([code_of.get(text, len(named)) for text in texts[shown].tolist()], np.uint8)
    legend = named if len(named) == len(groups) else [*named, "other"]
    return {"colour": {"title": column.title, "groups": legend, "codes": _packed(codes, "<u1")}}


def kept_bits(index: "FeatureIndex", query: FeatureQuery) -> dict[str, Any]:
    """One bit per feature, the first feature the lowest bit of the first byte: whether the query keeps it."""
    passes = np.zeros(index.d_sae, bool)
    passes[listing(index, query).ids] = True
    bits = base64.b64encode(np.packbits(passes, bitorder="little").tobytes()).decode()
    return {"bits": bits, "n": int(passes.sum())}


def _packed(values: np.ndarray, dtype: str) -> str:
    return base64.b64encode(np.ascontiguousarray(values, dtype).tobytes()).decode()
