"""Graphs as files: circuit-tracer's JSON (its `frontend/graph_models.py`, schema version 1), which Neuronpedia reads.

    metadata  slug, scan, transcoder_list, prompt_tokens, prompt, node_threshold, schema_version
    qParams   pinnedIds, supernodes, linkType, clickedId, sg_pos
    nodes     node_id, feature, layer, ctx_idx, feature_type, token_prob, is_target_logit, influence, activation, …
    links     source, target (node ids), weight

Node ids say what a node is: LAYER_FEATURE_POSITION for a feature, LAYER_-1_POSITION for an error node,
E_TOKEN_POSITION for an embedding, LAYER_-2_POSITION for what a layer's own table wrote, LAYER_-3_POSITION for what the
first intervention of a graph puts behind the MLP of that layer (-4 the second, and so on; E for LAYER in front of them
all); a logit has the number of layers plus one for its layer. A feature's field `feature` is the Cantor pairing of its
layer and number, as Neuronpedia expects. What the schema has no field for (`SCOPE`), the interventions among it, lies
under a name of our own, which other readers leave out.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from activations.manifest import write_atomically
from scope.errors import InvalidInputError, ScopeError
from scope.interventions.spec import InterventionSpec
from scope.interventions.words import spec_words

if TYPE_CHECKING:
    from scope.attribution.graph import CircuitGraph

__all__ = [
    "Supernode",
    "graph_content",
    "graph_facts",
    "load_graph",
    "node_ids",
    "require_place_for_graph",
    "save_graph",
]

SCOPE = "scope"
TYPES = {
    "feature": "cross layer transcoder",
    "error": "mlp reconstruction error",
    "embedding": "embedding",
    "table": "per-layer embedding",
    "intervention": "intervention",
    "logit": "logit",
}
FIRST_EDIT = -3
"""Stands for the first intervention in the place of a feature."""
OWN_COLUMNS = ("total_in", "bias", "value")


def _number(value: Any) -> float | None:
    return None if value is None or value != value else float(value)


def _cantor(x: int, y: int) -> int:
    return (x + y) * (x + y + 1) // 2 + y


def _node(row: Any, n_layers: int, token_ids: tuple[int, ...], likeliest: int) -> dict[str, Any]:
    layer, feature, position = str(row.layer), int(row.feature), int(row.position)
    number, js_id, clerp = feature, "", ""
    if row.kind == "feature":
        js_id, number = f"{layer}_{feature}-0", _cantor(row.layer, feature)
    elif row.kind == "error":
        js_id = f"{layer}_-1-{position}"
    elif row.kind == "table":
        js_id = f"{layer}_-2-{position}"
    elif row.kind == "intervention":
        layer = "E" if row.layer < 0 else layer
        js_id, clerp = f"{layer}_{FIRST_EDIT - feature}-{position}", row.label
    elif row.kind == "embedding":
        layer, feature, number = "E", token_ids[position], position
        js_id = f"E_{feature}-{position}"
    else:
        layer = str(n_layers + 1)
        js_id, clerp = f"L_{feature}-{position}", f'Output "{row.label}" (p={row.probability:.3f})'
    return {
        "node_id": _node_id(row, n_layers, token_ids),
        "feature": number,
        "layer": layer,
        "ctx_idx": position,
        "feature_type": TYPES[row.kind],
        "token_prob": _number(row.probability) or 0.0,
        "is_target_logit": row.kind == "logit" and row.node == likeliest,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": js_id,
        "clerp": clerp,
        "influence": _number(row.influence),
        "activation": _number(row.activation),
        SCOPE: {"label": row.label, **{name: _number(getattr(row, name)) for name in OWN_COLUMNS}},
    }


class Supernode(NamedTuple):
    """Nodes of a graph that someone has put together under a name."""

    name: str
    nodes: tuple[str, ...]
    """Node ids as in the file."""


def node_ids(graph: "CircuitGraph") -> list[str]:
    """The id of each node as it stands in the file: LAYER_FEATURE_POSITION and its kin."""
    return [_node_id(row, graph.n_layers, graph.token_ids) for row in graph.nodes.itertuples()]


def _node_id(row: Any, n_layers: int, token_ids: tuple[int, ...]) -> str:
    layer, feature = str(row.layer), int(row.feature)
    if row.kind == "embedding":
        layer, feature = "E", token_ids[row.position]
    elif row.kind == "table":
        feature = -2
    elif row.kind == "intervention":
        layer, feature = "E" if row.layer < 0 else layer, FIRST_EDIT - feature
    elif row.kind == "logit":
        layer = str(n_layers + 1)
    return f"{layer}_{feature}_{int(row.position)}"


def graph_content(
    graph: "CircuitGraph",
    slug: str,
    node_share: float | None = None,
    *,
    supernodes: Sequence[Supernode] = (),
    pinned: Sequence[str] = (),
) -> dict[str, Any]:
    """A graph as the JSON object that `save_graph` writes.

    Args:
        graph: best a pruned one: circuit-tracer's page draws every node.
        slug: what the graph is called.
        node_share: what it was pruned with, for the record.
        supernodes: nodes put together; ids that the graph does not hold are left out.
        pinned: ids of nodes to pin.
    """
    logits = graph.nodes[graph.nodes["kind"] == "logit"]
    likeliest = int(logits["node"].iloc[int(logits["probability"].argmax())])
    nodes = [_node(row, graph.n_layers, graph.token_ids, likeliest) for row in graph.nodes.itertuples()]
    ids = [node["node_id"] for node in nodes]
    there = set(ids)
    groups = [(group.name, [id for id in group.nodes if id in there]) for group in supernodes]
    pins = [id for id in pinned if id in there]
    return {
        "metadata": {
            "slug": slug,
            "scan": graph.model_name,
            "transcoder_list": list(graph.transcoders),
            "prompt_tokens": list(graph.tokens),
            "prompt": graph.prompt,
            "node_threshold": node_share,
            "schema_version": 1,
            SCOPE: {
                "token_ids": list(graph.token_ids),
                "n_layers": graph.n_layers,
                "n_active": graph.n_active,
                "model": graph.model_name,
                **({} if graph.spec is None else {"interventions": graph.spec.to_dict()}),
            },
        },
        "qParams": {
            "pinnedIds": pins,
            "supernodes": [[name, *members] for name, members in groups if members],
            "linkType": "both",
            "clickedId": pins[0] if pins else "",
            "sg_pos": "",
        },
        "nodes": nodes,
        "links": [
            {"source": ids[s], "target": ids[t], "weight": float(w)}
            for s, t, w in zip(graph.source, graph.target, graph.weight, strict=True)
        ],
    }


def require_place_for_graph(path: str | Path) -> None:
    """Make the folder of a graph's file, before it is computed.

    Raises:
        InvalidInputError: no file can be written there.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fits = os.access(path.parent, os.W_OK) and not path.is_dir()
    except OSError:
        fits = False
    if not fits:
        raise InvalidInputError(
            f"The graph cannot be written to {path}; give a file in a folder that can be written to."
        )


def save_graph(graph: "CircuitGraph", path: str | Path, node_share: float | None = None) -> None:
    """Write a graph; a file that was there is replaced as a whole.

    Args:
        graph: best a pruned one: circuit-tracer's page draws every node.
        path: the file.
        node_share: what it was pruned with, for the record.
    """
    path = Path(path)
    require_place_for_graph(path)
    content = graph_content(graph, path.stem, node_share)
    write_atomically(path, json.dumps(content, ensure_ascii=False).encode())


def graph_facts(path: str | Path) -> dict[str, Any]:
    """What a graph's file says of itself: fingerprint (SHA-256 of its bytes, hex), prompt, model, transcoders (paths),
    tokens, features, nodes and edges (counts), supernodes (as in qParams), interventions (in words, "" where there are
    none).

    Raises:
        InvalidInputError: the file is no such graph.
    """
    path = Path(path)
    try:
        stat = path.stat()
    except OSError as error:
        raise InvalidInputError(f"There is no graph at {path}.") from error
    return _facts(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=4096)
def _facts(path: Path, mtime_ns: int, size: int) -> dict[str, Any]:
    # The time and size are there for the cache: a file that was written anew is read anew.
    graph = load_graph(path)
    content = path.read_bytes()
    groups = (json.loads(content).get("qParams") or {}).get("supernodes") or []
    return {
        "fingerprint": hashlib.sha256(content).hexdigest(),
        "prompt": graph.prompt or "".join(graph.tokens),
        "model": graph.model_name,
        "transcoders": list(graph.transcoders),
        "tokens": len(graph.tokens),
        "features": int((graph.nodes["kind"] == "feature").sum()),
        "nodes": len(graph.nodes),
        "edges": len(graph.weight),
        "supernodes": [Supernode(str(group[0]), tuple(map(str, group[1:]))) for group in groups if group],
        "interventions": "" if graph.spec is None else spec_words(graph.spec),
    }


def load_graph(path: str | Path) -> "CircuitGraph":
    """Read a graph, ours or circuit-tracer's.

    Raises:
        InvalidInputError: the file is no such graph; the message says what is missing.
    """
    import pandas as pd

    from scope.attribution.graph import CircuitGraph

    path = Path(path)
    try:
        content = json.loads(path.read_text())
        metadata, given, links = dict(content["metadata"]), content["nodes"], content["links"]
        tokens = tuple(map(str, metadata["prompt_tokens"]))
        parsed = [_parsed(node) for node in given]
        if not all(0 <= node["position"] < len(tokens) for node in parsed):
            raise ValueError(f"a node stands behind the last of its {len(tokens)} tokens")
        number = {node["node_id"]: place for place, node in enumerate(given)}
        ends = [(number[link["source"]], number[link["target"]], float(link["weight"])) for link in links]
    except FileNotFoundError as error:
        raise InvalidInputError(f"There is no graph at {path}.") from error
    except (ValueError, LookupError, TypeError, OSError) as error:
        what = f"no field {error}" if isinstance(error, KeyError) else str(error)
        raise InvalidInputError(f"{path} is no circuit graph in circuit-tracer's JSON: {what}.") from error
    own = metadata.get(SCOPE, {})
    try:
        spec = None if own.get("interventions") is None else InterventionSpec.from_dict(own["interventions"])
    except ScopeError as error:
        raise InvalidInputError(f"The interventions of {path} cannot be read: {error}") from error
    layers = [node["layer"] for node in parsed if node["kind"] in ("feature", "error")]
    ends_at = [node["layer"] - 1 for node in parsed if node["kind"] == "logit"]
    n_layers = int(own.get("n_layers", max(ends_at or [max(layers, default=-1) + 1])))
    for node in parsed:
        if node["kind"] == "logit":
            node["layer"] = n_layers
    nodes = pd.DataFrame(parsed)
    nodes.insert(0, "node", range(len(nodes)))
    token_ids = own.get("token_ids")
    if token_ids is None:
        found = {node["position"]: node["token"] for node in parsed if node["kind"] == "embedding"}
        token_ids = [found.get(position, -1) for position in range(len(tokens))]
    source, target, weight = zip(*ends, strict=True) if ends else ((), (), ())
    return CircuitGraph(
        metadata.get("prompt", ""),
        tokens,
        tuple(int(token) for token in token_ids),
        nodes.drop(columns="token"),
        np.array(source, np.int32),
        np.array(target, np.int32),
        np.array(weight, np.float32),
        n_layers,
        int(own.get("n_active", sum(node["kind"] == "feature" for node in parsed))),
        own.get("model", metadata.get("scan", "")),
        tuple(metadata.get("transcoder_list", ())),
        spec,
    )


def _parsed(node: dict[str, Any]) -> dict[str, Any]:
    kinds = {name: kind for kind, name in TYPES.items()}
    kind = kinds[node["feature_type"]]
    # Layer and position from the fields of their own: of an error node, older ids had them elsewhere.
    layer, feature, own = str(node["layer"]), node["node_id"].split("_")[1], node.get(SCOPE, {})
    return {
        "kind": kind,
        "layer": -1 if layer == "E" else int(layer),
        "position": int(node["ctx_idx"]),
        "feature": -1
        if kind in ("embedding", "error", "table")
        else FIRST_EDIT - int(feature)
        if kind == "intervention"
        else int(feature),
        "activation": float("nan") if node.get("activation") is None else float(node["activation"]),
        "label": own.get("label", node.get("clerp", "")),
        "probability": float(node["token_prob"]) if kind == "logit" else float("nan"),
        "influence": float("nan") if node.get("influence") is None else float(node["influence"]),
        **{name: float("nan") if own.get(name) is None else float(own[name]) for name in OWN_COLUMNS},
        "token": int(feature) if kind == "embedding" else -1,
    }
