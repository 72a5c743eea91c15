"""Small answers as JSON, for what happens under the pointer: too frequent for a callback."""

from typing import Any

from flask import Flask, Response, jsonify, request

from dashboards.context import Context
from dashboards.feature_jobs import known_effects
from dashboards.queries import feature_id, token_detail
from scope.errors import InvalidInputError, ScopeError

__all__ = ["register"]


def register(server: Flask, context: Context) -> None:
    """Add the routes to a Flask application."""

    @server.get("/api/token")
    def token() -> tuple[Response, int]:
        """What fires on one row: `index`, `row`, and `feature`, which is listed whatever its rank."""
        try:
            index = context.index(request.args.get("index", ""))
            feature = request.args.get("feature")
            own = feature_id(index, feature) if feature else None
            row = _row(request.args.get("row", ""))
            detail = token_detail(index, row, feature=own, effects=known_effects(context, index.id, own))
        except ScopeError as problem:
            return jsonify({"error": str(problem)}), 400
        answer: dict[str, Any] = {"row": detail.row, "n_features": detail.n_features, "features": detail.features}
        answer["push"] = detail.push
        answer["said"] = detail.said
        return jsonify(answer), 200


def _row(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise InvalidInputError(f"A row is a whole number, not {text!r}.")
    return int(text)
