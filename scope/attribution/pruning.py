"""Pruning a graph to the part that matters, and how much of the whole it explains.

`prune` keeps, in this order (Ameisen et al. 2025, "Circuit Tracing", appendix "Pruning"):

1. the nodes with the most influence on the logits, until they have `node_share` of all influence; embeddings and logits
   stay whatever they have;
2. of what is left the edges with the most influence, until they have `edge_share` of all: an edge's influence is its
   share of what comes into its target, times the target's influence (a logit's own weight added);
3. what then leads nowhere goes: features, errors and interventions without an outgoing edge, features without an
   incoming one (but those that an intervention holds).

`scores` are two numbers from 0 to 1 about a graph as it is (the same source, "Evaluating graphs"):

- replacement: of the influence that starts somewhere, the share that starts at embeddings (and what interventions put
  there) and not at error nodes;
- completeness: the share of what comes into nodes that comes from other nodes than errors, nodes weighed by influence.
"""

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from scope.errors import InvalidInputError

if TYPE_CHECKING:
    from scope.attribution.graph import CircuitGraph

__all__ = ["Scores", "only_nodes", "prune", "require_shares", "scores", "shares"]


GIVEN = ("embedding", "table", "intervention")
"""Kinds of nodes that are there whatever the model does."""


class Scores(NamedTuple):
    """How much of a prompt's next token a graph explains."""

    replacement: float
    completeness: float


def shares(graph: "CircuitGraph") -> np.ndarray:
    """float64 `(n_edges,)`: each edge's absolute weight as a share of all edges into its target in this graph."""
    size = np.abs(graph.weight.astype(np.float64))
    totals = np.bincount(graph.target, weights=size, minlength=len(graph.nodes))
    return size / np.maximum(totals[graph.target], 1e-300)


def _is_held(graph: "CircuitGraph") -> np.ndarray:
    """bool `(n_nodes,)`: which features an intervention holds at a value, so that nothing comes into them."""
    held: np.ndarray = ((graph.nodes["kind"] == "feature") & (graph.nodes["total_in"] == 0)).to_numpy()
    return held & (graph.spec is not None)


def _influence(graph: "CircuitGraph", share: np.ndarray) -> np.ndarray:
    """float64 `(n_nodes,)`: of each node on the logits, over all paths.

    An edge goes from a layer to a later one: once all later targets are done, the influence of a layer's is known. Each
    of the edges, which may be tens of millions, is looked at once.
    """
    total, own = np.zeros(len(graph.nodes)), graph.logit_weights
    layers = graph.nodes["layer"].to_numpy(dtype="int16")[graph.target]
    order = np.argsort(layers, kind="stable")  # int16: a radix sort
    ends = np.cumsum(np.bincount(layers.astype("int64") + 1, minlength=graph.n_layers + 2))
    for start, stop in reversed(list(itertools.pairwise([0, *ends.tolist()]))):
        into = order[start:stop]
        target = graph.target[into]
        reached = (total[target] + own[target]) * share[into]
        total += np.bincount(graph.source[into], weights=reached, minlength=len(graph.nodes))
    return total


def scores(graph: "CircuitGraph") -> Scores:
    """Replacement and completeness of a graph."""
    share = shares(graph)
    influence = _influence(graph, share)
    kinds = graph.nodes["kind"].to_numpy()
    embedding = influence[np.isin(kinds, GIVEN) | _is_held(graph)].sum()
    error = influence[kinds == "error"].sum()
    explained = np.bincount(graph.target, weights=share * (kinds[graph.source] != "error"), minlength=len(graph.nodes))
    has_inputs = np.bincount(graph.target, minlength=len(graph.nodes)) > 0
    weight = (influence + graph.logit_weights) * has_inputs
    return Scores(
        float(embedding / max(embedding + error, 1e-300)), float((explained * weight).sum() / max(weight.sum(), 1e-300))
    )


def require_shares(node_share: float, edge_share: float) -> None:
    """Raise `InvalidInputError` for a share that is not above 0 and at most 1."""
    for name, share in (("node_share", node_share), ("edge_share", edge_share)):
        if not 0 < share <= 1:
            raise InvalidInputError(f"{name} is {share}; expected a share above 0 and at most 1.")


def prune(graph: "CircuitGraph", node_share: float = 0.8, edge_share: float = 0.98) -> "CircuitGraph":
    """The part of a graph that most of the influence on the logits goes through.

    Args:
        graph: a graph as `build_graph` makes it.
        node_share: of all influence of nodes, how much to keep.
        edge_share: of the influence of the edges between them, how much to keep.

    Raises:
        InvalidInputError: a share is not above 0 and at most 1.
    """
    require_shares(node_share, edge_share)
    kinds = graph.nodes["kind"].to_numpy()
    fixed = (kinds == "embedding") | (kinds == "logit")
    keep = fixed | _most(_influence(graph, shares(graph)), node_share)
    graph = _subgraph(graph, keep[graph.source] & keep[graph.target])
    share = shares(graph)
    reach = _influence(graph, share) + graph.logit_weights
    graph = _subgraph(graph, _most(share * reach[graph.target], edge_share))
    is_feature, is_error = (kinds == "feature") & ~_is_held(graph), np.isin(kinds, ("error", "table", "intervention"))
    is_error |= _is_held(graph)
    while True:
        leads = np.bincount(graph.source, minlength=len(kinds)) > 0
        fed = np.bincount(graph.target, minlength=len(kinds)) > 0
        left = keep & (fixed | (is_feature & leads & fed) | (is_error & leads))
        if (left == keep).all():
            return _renumbered(graph, keep)
        keep = left
        graph = _subgraph(graph, keep[graph.source] & keep[graph.target])


def only_nodes(graph: "CircuitGraph", keep: np.ndarray) -> "CircuitGraph":
    """A graph with some of its nodes, bool `(n_nodes,)`, and the edges between them; they are numbered anew."""
    return _renumbered(_subgraph(graph, keep[graph.source] & keep[graph.target]), keep)


def _most(values: np.ndarray, share: float) -> np.ndarray:
    """Which values, the largest first, make up a share of their sum."""
    order = np.argsort(-values, kind="stable")
    sums = np.cumsum(values[order])
    enough = int(np.searchsorted(sums, share * sums[-1] * (1 - 1e-12))) + 1 if len(sums) and sums[-1] > 0 else 0
    chosen = np.zeros(len(values), bool)
    chosen[order[:enough]] = True
    return chosen


def _subgraph(graph: "CircuitGraph", edges: np.ndarray) -> "CircuitGraph":
    return replace(graph, source=graph.source[edges], target=graph.target[edges], weight=graph.weight[edges])


def _renumbered(graph: "CircuitGraph", keep: np.ndarray) -> "CircuitGraph":
    number = np.cumsum(keep) - 1
    nodes = graph.nodes[keep].reset_index(drop=True)
    nodes["node"] = np.arange(len(nodes))
    return replace(
        graph,
        nodes=nodes,
        source=number[graph.source].astype(np.int32),
        target=number[graph.target].astype(np.int32),
    )
