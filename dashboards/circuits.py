"""Circuit graphs as the circuit page shows them: pruned to thresholds, features named, verdicts beside them. No Dash.

1. A graph of the workspace is read once; its id is that of its file's bytes, so that what is kept is never stale.
2. `Circuits.shown` prunes it to a share of the nodes' and of the edges' influence (`scope.attribution.pruning`).
3. `Circuits.payload` is that as JSON for assets/47_circuit.js: nodes by the ids of the file, edges by the numbers of
   these nodes, those with the most influence first.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dashboards.context import Context
from dashboards.dictionaries import Dictionary, dictionaries
from dashboards.queries import tokens_label
from scope.errors import InvalidInputError, UnknownNameError
from scope.sample import text_of_commands

if TYPE_CHECKING:
    import pandas as pd

    from scope.attribution.graph import CircuitGraph
    from scope.attribution.graph_json import Supernode
    from scope.attribution.verdicts import Verdicts
    from scope.attribution.verification import Verification
    from scope.features.index import FeatureIndex
    from scope.workspace import Entry

__all__ = ["Circuits", "Thresholds", "circuits", "thresholds_of"]

MAX_NODES = 500
"""A page that opens shows at most so many, by raising its threshold; whoever asks for more gets them."""
MAX_EDGES = 40_000
"""Edges that travel to the browser, those with the most influence."""
STEPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
KEPT_GRAPHS = 4
KEPT_VIEWS = 16
N_EXAMPLES = 3
WINDOW = (12, 5)
"""Tokens before and behind the one that an example is about."""


class Thresholds(NamedTuple):
    """How much of the influence is shown."""

    nodes: float
    edges: float


EVERYTHING = Thresholds(1.0, 1.0)


class Shown(NamedTuple):
    """The part of a graph that passes the thresholds."""

    graph: "CircuitGraph"
    ids: list[str]
    """Of its nodes, as in the file."""
    numbers: np.ndarray
    """int64 `(n_nodes,)`: their numbers in the whole graph."""


def thresholds_of(query: Mapping[str, Any], default: Thresholds = EVERYTHING) -> Thresholds:
    """The thresholds of an address (`nodes`, `edges`).

    Raises:
        InvalidInputError: one is not above 0 and at most 1.
    """
    found = []
    for name, value in zip(("nodes", "edges"), default, strict=True):
        text = str(query.get(name) or value)
        try:
            share = float(text)
        except ValueError:
            share = float("nan")
        if not 0 < share <= 1:
            raise InvalidInputError(f"The share of influence of {name} is {text[:40]!r}; expected above 0 up to 1.")
        found.append(round(share, 4))
    return Thresholds(*found)


class Circuits:
    """The circuit graphs of a workspace; safe to use from several threads."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._graphs: OrderedDict[str, tuple[CircuitGraph, list[str]]] = OrderedDict()
        self._views: OrderedDict[tuple[str, Thresholds], Shown] = OrderedDict()
        self._verified: dict[Path, tuple[int, Verification, Verdicts]] = {}

    # --- graphs ---------------------------------------------------------------------------------------------------

    def entries(self) -> "list[Entry]":
        """The graphs that can be read, by name."""
        return [entry for entry in self._context.workspace.graphs() if entry.problem is None]

    def entry(self, id: str) -> "Entry":
        """The graph with this id or name.

        Raises:
            UnknownNameError: there is none.
        """
        return self._context.workspace.find(id, "circuit-graph")

    def graph(self, id: str) -> "CircuitGraph":
        """The whole graph, as its file holds it."""
        return self._opened(id)[0]

    def number(self, id: str, node: str) -> int:
        """The number of a node in the whole graph, by its id.

        Raises:
            UnknownNameError: there is no such node.
        """
        ids = self._opened(id)[1]
        if node not in ids:
            raise UnknownNameError("node", node[:60], ids)
        return ids.index(node)

    def _opened(self, id: str) -> "tuple[CircuitGraph, list[str]]":
        from scope.attribution.graph_json import node_ids

        entry = self.entry(id)
        known = self._graphs.get(entry.id)
        if known is None:
            graph = self._context.workspace.graph(entry.id)
            known = self._graphs[entry.id] = (graph, node_ids(graph))
            _forget(self._graphs, KEPT_GRAPHS)
        return known

    # --- what is shown of one -------------------------------------------------------------------------------------

    def default(self, id: str) -> Thresholds:
        """The largest thresholds at which a graph has at most `MAX_NODES` nodes."""
        for step in STEPS:
            wanted = Thresholds(step, 1.0)
            if len(self.shown(id, wanted).ids) <= MAX_NODES:
                return wanted
        return Thresholds(STEPS[-1], 1.0)

    def shown(self, id: str, wanted: Thresholds) -> Shown:
        """The part of a graph that passes the thresholds."""
        from scope.attribution.graph_json import node_ids
        from scope.attribution.pruning import prune

        whole, ids = self._opened(id)
        key = (self.entry(id).id, wanted)
        known = self._views.get(key)
        if known is None:
            graph = prune(whole, wanted.nodes, wanted.edges)
            place = {name: number for number, name in enumerate(ids)}
            own = node_ids(graph)
            known = self._views[key] = Shown(graph, own, np.array([place[name] for name in own], np.int64))
            _forget(self._views, KEPT_VIEWS)
        return known

    def payload(self, id: str, wanted: Thresholds) -> dict[str, Any]:
        """What the page draws, JSON-able."""
        entry, whole = self.entry(id), self.graph(id)
        shown = self.shown(id, wanted)
        graph = shown.graph
        order = _by_influence(graph)[:MAX_EDGES]
        nodes, edges = _verdicts_of(self.verdicts(id), self.edge_verdicts(id), shown, order)
        table, used = graph.nodes, self.used(graph)
        indexes = self._indexes(used)
        return {
            "id": entry.id,
            "tokens": list(graph.tokens),
            "n_layers": graph.n_layers,
            "thresholds": wanted._asdict(),
            "whole": {"nodes": len(whole.nodes), "edges": len(whole.weight)},
            "n_edges": len(graph.weight),
            "indexes": {layer: index.id for layer, index in indexes.items()},
            "writes": {layer: one.written_from(layer) for layer, one in used.items() if one.across},
            "nodes": {
                "id": shown.ids,
                **{name: table[name].tolist() for name in ("kind", "layer", "position", "feature", "label")},
                "name": self._names(used, indexes, _features_of(table)),
                **{name: _numbers(table[name]) for name in ("activation", "influence", "probability")},
                "holds": nodes,
            },
            "edges": {
                "source": graph.source[order].tolist(),
                "target": graph.target[order].tolist(),
                "weight": [float(f"{weight:.5g}") for weight in graph.weight[order].tolist()],
                "holds": edges,
            },
            "supernodes": [[group.name, *group.nodes] for group in self.supernodes(id)],
        }

    def export(self, id: str, wanted: Thresholds, hidden: Iterable[str], pinned: Sequence[str]) -> dict[str, Any]:
        """What is shown, as circuit-tracer's JSON: hidden nodes left out, supernodes in qParams."""
        from scope.attribution.graph_json import graph_content
        from scope.attribution.pruning import only_nodes

        shown, left_out = self.shown(id, wanted), set(hidden)
        keep = np.array([name not in left_out for name in shown.ids], bool)
        if not (keep & (shown.graph.nodes["kind"] == "logit").to_numpy()).any():
            raise InvalidInputError("All logits are hidden; a graph's file needs one. Show one and export again.")
        graph = only_nodes(shown.graph, keep)
        return graph_content(
            graph, self.entry(id).name, wanted.nodes, supernodes=self.supernodes(id), pinned=list(pinned)
        )

    # --- supernodes -----------------------------------------------------------------------------------------------

    def supernodes(self, id: str) -> "list[Supernode]":
        """Those of the workspace, or where it has none those of the graph's file."""
        from scope.attribution.supernodes import Supernodes

        entry = self.entry(id)
        own = Supernodes(entry.manifest["fingerprint"], self._context.workspace.database).read()
        return list(entry.manifest["supernodes"]) if own is None else own

    def group(self, id: str, groups: Iterable[Sequence[str]]) -> None:
        """Put supernodes, name and node ids each, in the place of those there are.

        Raises:
            UnknownNameError: the graph has no such node.
            InvalidInputError: they cannot be kept as they are.
        """
        from scope.attribution.graph_json import Supernode
        from scope.attribution.supernodes import Supernodes

        known = set(self._opened(id)[1])
        wanted = [Supernode(str(group[0]), tuple(map(str, group[1:]))) for group in groups if group]
        for name in (node for group in wanted for node in group.nodes):
            if name not in known:
                raise UnknownNameError("node", name[:60], known)
        Supernodes(self.entry(id).manifest["fingerprint"], self._context.workspace.database).write(wanted)

    # --- verification ---------------------------------------------------------------------------------------------

    def verification(self, id: str) -> "Verification | None":
        """What verifying a graph has measured, where someone has."""
        known = self._measured(self._context.workspace.verification_path(id))
        return None if known is None else known[0]

    def verdicts(self, id: str) -> "Verdicts | None":
        """What holds of a graph, where it was verified."""
        known = self._measured(self._context.workspace.verification_path(id))
        return None if known is None else known[1]

    def edge_tests(self, id: str) -> "Verification | None":
        """What path patching has measured of a graph's edges, as far as they were tested."""
        known = self._measured(self._context.workspace.edge_tests_path(id))
        return None if known is None else known[0]

    def edge_verdicts(self, id: str) -> "Verdicts | None":
        """Which of the edges that were tested one by one hold."""
        known = self._measured(self._context.workspace.edge_tests_path(id))
        return None if known is None else known[1]

    def _measured(self, path: Path) -> "tuple[Verification, Verdicts] | None":
        from scope.attribution.verdicts import load_verification, verdicts

        if not path.is_file():
            return None
        at = path.stat().st_mtime_ns
        known = self._verified.get(path)
        if known is None or known[0] != at:
            found = load_verification(path)
            if found is None:
                return None
            known = self._verified[path] = (at, found, verdicts(found))
        return known[1:]

    # --- dictionaries ---------------------------------------------------------------------------------------------

    def used(self, graph: "CircuitGraph") -> dict[int, Dictionary]:
        """By layer that features read, the transcoders of the workspace that a graph was made with: those at the paths
        that it names, or of the same name, where a path leads nowhere any more because the workspace was moved. A
        cross-layer transcoder stands at each of its layers."""
        wanted = {Path(path).resolve() for path in graph.transcoders}
        moved = {path.name for path in wanted if not path.exists()}
        known = dictionaries(self._context)
        here = [one for one in known if one.entry.path.resolve() in wanted or one.entry.name in moved]
        return {layer: one for one in here for layer in one.layers}

    def missing(self, graph: "CircuitGraph") -> list[str]:
        """The paths of the transcoders of a graph that the workspace does not have."""
        used = {one.entry.path.resolve() for one in self.used(graph).values()}
        names = {path.name for path in used}
        return [
            path
            for path in graph.transcoders
            if Path(path).resolve() not in used and (Path(path).exists() or Path(path).name not in names)
        ]

    def indexes(self, graph: "CircuitGraph") -> "dict[int, Entry]":
        """By layer, the index of its transcoder's features. Of a cross-layer transcoder there is none."""
        return self._indexes(self.used(graph))

    def _indexes(self, used: "Mapping[int, Dictionary]") -> "dict[int, Entry]":
        by_sae = {str(entry.manifest.get("sae", {}).get("fingerprint")): entry for entry in self._context.indexes()}
        prints = {layer: one.entry.manifest["fingerprint"] for layer, one in used.items() if not one.across}
        return {layer: by_sae[name] for layer, name in prints.items() if name in by_sae}

    def index_of(self, id: str, layer: int) -> "FeatureIndex | None":
        """The index of the features of one layer of a graph, where the workspace has one."""
        entry = self.indexes(self.graph(id)).get(layer)
        return None if entry is None else self._context.index(entry.id)

    def names(self, graph: "CircuitGraph", features: Iterable[tuple[int, int] | None]) -> list[str]:
        """What features, layer and number each, are called: their labels, or the tokens they fire on; "" where nothing
        is known, and for None."""
        used = self.used(graph)
        return self._names(used, self._indexes(used), features)

    def _names(
        self,
        used: "Mapping[int, Dictionary]",
        indexes: "Mapping[int, Entry]",
        features: Iterable[tuple[int, int] | None],
    ) -> list[str]:
        from scope.features.labels import FeatureLabels

        opened = {layer: self._context.index(entry.id) for layer, entry in indexes.items()}
        labels: dict[int, dict[int, str]] = {}
        for layer, one in used.items():
            own = FeatureLabels(one.entry.manifest["fingerprint"], self._context.workspace.database).table()
            labels[layer] = dict(zip(own["feature"].tolist(), own["label"].tolist(), strict=True))
        found = []
        for asked in features:
            layer, feature = asked or (-1, -1)
            name = labels[layer].get(used[layer].number(layer, feature), "") if layer in used else ""
            if asked and not name and layer in opened:
                index = opened[layer]
                known = 0 <= feature < index.d_sae
                name = tokens_label({"top_tokens": index.table["top_tokens"].iloc[int(feature)]}) if known else ""
            found.append(name)
        return found

    def examples(self, id: str, node: str) -> dict[str, Any]:
        """The top examples of a node's feature, JSON-able: index (id), scale, examples (tokens, values, centre, from);
        where there are none, why and the command that makes some ("" where there is none)."""
        row = self.graph(id).nodes.iloc[self.number(id, node)]
        layer, feature = int(row["layer"]), int(row["feature"])
        index = self.index_of(id, layer) if row["kind"] == "feature" else None
        if index is None or not 0 <= feature < index.d_sae:
            why, command = self._no_examples(id, layer) if row["kind"] == "feature" else ("", "")
            return {"index": None, "scale": 0.0, "examples": [], "why": why, "command": command}
        found = index.top_examples(feature, N_EXAMPLES, window=WINDOW)
        return {
            "index": index.id,
            "why": "" if found else "No examples: it fires nowhere in the text of its index.",
            "command": "",
            "scale": float(index.table["max_value"].iloc[feature]),
            "examples": [
                {
                    "tokens": list(example.tokens),
                    "values": [float(f"{value:.5g}") for value in example.values],
                    "centre": int(example.centre),
                    "from": " · ".join(part for part in (example.title, example.source) if part),
                }
                for example in found
            ],
        }

    def _no_examples(self, id: str, layer: int) -> tuple[str, str]:
        """Why the features of a layer have no examples, and the command that makes some."""
        one = self.used(self.graph(id)).get(layer)
        if one is None:
            return f"No examples: the graph's transcoder of layer {layer} is not in this workspace.", ""
        if one.across:
            return "No examples: features of cross-layer transcoders are not indexed.", ""
        path, out = one.entry.path, self._context.workspace.path / "indexes" / f"{one.entry.name}.index"
        wanted = ("index", path, "--model", one.model, "--data", text_of_commands(), "--out", out)
        command = "scope " + " ".join(quote(str(part)) for part in wanted)
        return f"No examples: the features of layer {layer} have no index yet.", command


def circuits(context: Context) -> Circuits:
    """The one `Circuits` of a dashboard."""
    return context.once("circuits", lambda: Circuits(context))


def _forget(kept: "OrderedDict[Any, Any]", n: int) -> None:
    while len(kept) > n:
        kept.popitem(last=False)


def _numbers(column: Any) -> list[float | None]:
    return [float(f"{value:.5g}") if np.isfinite(value) else None for value in column.to_numpy(dtype="float64")]


def _features_of(nodes: "pd.DataFrame") -> list[tuple[int, int] | None]:
    """Layer and number of each node's feature; None for other nodes."""
    columns = (nodes[name].tolist() for name in ("kind", "layer", "feature"))
    return [(layer, feature) if kind == "feature" else None for kind, layer, feature in zip(*columns, strict=True)]


def _by_influence(graph: "CircuitGraph") -> np.ndarray:
    """Numbers of the edges, those with the most influence on the logits first."""
    from scope.attribution.pruning import shares

    reach = graph.nodes["influence"].fillna(0.0).to_numpy() + graph.logit_weights
    return np.argsort(-shares(graph) * reach[graph.target], kind="stable")


def _verdicts_of(
    judged: "Verdicts | None", tested: "Verdicts | None", shown: Shown, order: np.ndarray
) -> tuple[list[bool | None], list[bool | None]]:
    """Whether each node that is shown, and each edge in this order, holds; None where that was not tested. An edge that
    was tested by itself counts as that has shown, others as the effect of their source on their target."""
    nodes = (
        {} if judged is None else dict(zip(*(judged.nodes[name].tolist() for name in ("source", "holds")), strict=True))
    )
    pairs: dict[tuple[int, int], bool] = {}
    for found in (judged, tested):
        if found is not None:
            ends = zip(found.pairs["source"].tolist(), found.pairs["target"].tolist(), strict=True)
            pairs.update(zip(ends, found.pairs["holds"].tolist(), strict=True))
    source, target = (shown.numbers[end[order]].tolist() for end in (shown.graph.source, shown.graph.target))
    return (
        [nodes.get(number) for number in shown.numbers.tolist()],
        [pairs.get(pair) for pair in zip(source, target, strict=True)],
    )
