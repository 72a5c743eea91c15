"""What the circuit page fetches in bulk, and the file that it saves.

/api/circuit?graph=ID&nodes=0.8&edges=0.98     what the page draws
/api/circuit/examples?graph=ID&node=NODE       the top examples of a node's feature
/export/circuit/ID.json?nodes=…&hide=…&pin=…   what is shown, in circuit-tracer's JSON
"""

import json
from collections.abc import Callable
from typing import Any

from flask import Flask, Response, jsonify, request

from dashboards.circuits import circuits, thresholds_of
from dashboards.context import Context
from scope.errors import ScopeError

__all__ = ["register"]


def register(server: Flask, context: Context) -> None:
    """Add the routes to a Flask application."""

    @server.get("/api/circuit")
    def circuit() -> tuple[Response, int]:
        """A graph at the thresholds of the query."""
        return _answer(lambda: circuits(context).payload(_graph(), thresholds_of(request.args)))

    @server.get("/api/circuit/examples")
    def circuit_examples() -> tuple[Response, int]:
        """The top examples of a node's feature."""
        return _answer(lambda: circuits(context).examples(_graph(), request.args.get("node", "")))

    @server.get("/export/circuit/<graph>.json")
    def circuit_export(graph: str) -> tuple[Response, int]:
        """What is shown of a graph, as a file."""
        hidden = [name for name in request.args.get("hide", "").split(",") if name]
        pinned = [name for name in request.args.get("pin", "").split(",") if name]
        try:
            known = circuits(context)
            content = known.export(graph, thresholds_of(request.args), hidden, pinned)
            name = known.entry(graph).id
        except ScopeError as problem:
            return jsonify({"error": str(problem)}), 400
        answer = Response(json.dumps(content, ensure_ascii=False), mimetype="application/json")
        answer.headers["Content-Disposition"] = f'attachment; filename="{name}.json"'
        return answer, 200


def _graph() -> str:
    return request.args.get("graph", "")


def _answer(work: Callable[[], dict[str, Any]]) -> tuple[Response, int]:
    try:
        return jsonify(work()), 200
    except ScopeError as problem:
        return jsonify({"error": str(problem)}), 400
