"""`path_patching`: whether single edges of a graph are true of the model, with attention and norms live.

`scope.attribution.verification.verify` tests total effects, over all paths. An edge s -> t is one of them: what goes
from s to t along the residual stream and through attention, past no other MLP. Path patching (Goldowsky-Dill et al.
2023, arXiv 2304.05969) tests that one alone:

1. Every MLP is held at what it wrote on the prompt, a skip transcoder's linear part left live. Nothing of what changes
   reaches a node by way of another node.
2. The source is set to 0 and to twice its value where it is written. Attention, queries and keys included, and norms
   react.
3. Measured is the change of t's pre-activation or centred logit; predicted is -edge and +edge.

One run of a source measures all its edges. What edges leave out is what attention and norms do about the change, so an
edge that fails here is one that frozen attention and frozen norms make.

The controls are those of `verify`: another feature of the same layer written as strongly (for errors and embeddings, a
random direction of the same length), and the same runs with attention patterns held.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from scope.attribution.dictionaries import mlp_dictionaries
from scope.attribution.frozen import attention_as_frozen
from scope.attribution.graph_edits import edits_of
from scope.attribution.graph_fit import tokens_of
from scope.attribution.graph_runs import FACTORS, FeatureNode, GraphRuns, Write
from scope.attribution.reading import Prompt, read_prompt
from scope.attribution.verification import Agreement, Verification
from scope.errors import InvalidInputError, OutOfRangeError

if TYPE_CHECKING:
    import pandas as pd

    from scope.attribution.graph import CircuitGraph
    from scope.interventions.resolving import SaesByName

__all__ = ["merged", "path_patching", "strongest_sources"]

SOURCES = ("feature", "error", "embedding")
"""Kinds of nodes whose edges are tested."""
Progress = Callable[[int, int | None], None]


@torch.no_grad()
def path_patching(
    graph: "CircuitGraph",
    model: Any,
    transcoders: Sequence[Any],
    sources: Sequence[int],
    *,
    saes: "SaesByName" = None,
    batch_size: int = 16,
    seed: int = 0,
    progress: Progress | None = None,
) -> Verification:
    """Test all edges out of some nodes, each by itself.

    Args:
        graph: the graph.
        model: the model that it explains.
        transcoders: those that it was made with.
        sources: nodes: features, errors or embeddings.
        saes: those whose features the graph's interventions are on, as for `build_graph`.
        batch_size: runs at once.
        seed: of the random control.
        progress: called with (runs done, runs in all).

    Returns:
        As of `verify`, a pair for each edge and factor.

    Raises:
        OutOfRangeError: there is no such node.
        InvalidInputError: a node is of another kind, or no edge goes out of it.
        MismatchError: the graph is of another model or other transcoders.
    """
    import pandas as pd

    edges = {source: _edges(graph, source) for source in dict.fromkeys(sources)}
    dictionaries = mlp_dictionaries(model, transcoders)
    tokens = tokens_of(graph, model, dictionaries)
    edits = edits_of(graph, model, dictionaries, saes)
    read = read_prompt(model, tokens, transcoders, edits)
    runs = GraphRuns(graph, model, read.dictionaries, read.frozen.tokens, edits)
    column = {node: number for number, node in enumerate(runs.nodes.tolist())}
    held, rng, tell = runs.mlps(read), np.random.default_rng(seed), progress or (lambda done, total: None)
    asked = [(source, factor) for source in edges for factor in FACTORS]
    live, frozen = (runs.measure([], way, held) for way in (runs.attention(), attention_as_frozen(read.frozen)))
    found = []
    for start in range(0, len(asked), batch_size):
        batch = asked[start : start + batch_size]
        own, other = ([_write(runs, read, source, factor, way) for source, factor in batch] for way in (None, rng))
        measured = runs.measure(own, runs.attention(), held) - live
        control = runs.measure(other, runs.attention(), held) - live
        fixed = runs.measure(own, attention_as_frozen(read.frozen), held) - frozen
        for row, (source, factor) in enumerate(batch):
            targets, weights = edges[source]
            columns = [column[target] for target in targets.tolist()]
            found.append(
                pd.DataFrame(
                    {
                        "source": source,
                        "target": targets,
                        "factor": factor,
                        "predicted": (factor - 1) * weights,
                        "measured": measured[row, columns],
                        "measured_random": control[row, columns],
                        "measured_frozen": fixed[row, columns],
                    }
                )
            )
        tell(start + len(batch), len(asked))
    return _verification(pd.concat(found, ignore_index=True))


def strongest_sources(graph: "CircuitGraph", n: int) -> list[int]:
    """The feature nodes with the most influence that edges go out of, in the graph's order.

    Raises:
        InvalidInputError: there is none.
    """
    nodes = graph.nodes[(graph.nodes["kind"] == "feature") & graph.nodes["node"].isin(graph.source)]
    if nodes.empty:
        raise InvalidInputError("The graph has no edges out of features; there is none to test. Prune less of it.")
    found: list[int] = sorted(nodes.nlargest(n, "influence")["node"].tolist())
    return found


def merged(old: Verification | None, new: Verification) -> Verification:
    """What was measured before, and anew; sources that were tested again count as they are now."""
    import pandas as pd

    if old is None:
        return new
    before = old.pairs[~old.pairs["source"].isin(new.pairs["source"])]
    return _verification(pd.concat([before, new.pairs], ignore_index=True))


def _verification(pairs: "pd.DataFrame") -> Verification:
    predicted = pairs["predicted"].to_numpy()
    plain, random, held = (
        Agreement.of(predicted, pairs[name].to_numpy()) for name in ("measured", "measured_random", "measured_frozen")
    )
    return Verification(plain, random, held, pairs)


def _edges(graph: "CircuitGraph", source: int) -> tuple[np.ndarray, np.ndarray]:
    """Targets and weights of the edges out of a node."""
    if not 0 <= source < len(graph.nodes):
        raise OutOfRangeError(f"There is no node {source}: the graph has nodes 0 to {len(graph.nodes) - 1}.")
    kind = graph.nodes["kind"].iloc[source]
    out = graph.source == source
    if kind not in SOURCES or not out.any():
        raise InvalidInputError(
            f"Node {source} is of kind {kind} and has {int(out.sum())} edges out of it; path patching tests the edges "
            f"of {', '.join(SOURCES)} nodes."
        )
    return graph.target[out], graph.weight[out].astype(np.float64)


def _write(runs: GraphRuns, read: Prompt, source: int, factor: float, rng: np.random.Generator | None) -> Write:
    """What sets a source to a multiple of its value; with an `rng` the same of something else, as long."""
    row = runs.graph.nodes.iloc[source]
    layer, position = int(row["layer"]), int(row["position"])
    if row["kind"] == "feature":
        node = FeatureNode(source, layer, position, int(row["feature"]), float(row["activation"]))
        other = node.feature if rng is None else runs.other(node, rng)
        return runs.write(node, other, (factor - 1) * node.activation)
    own: Tensor = read.frozen.embedding[position] if row["kind"] == "embedding" else read.errors[layer][position]
    if rng is not None:
        drawn = torch.from_numpy(rng.normal(size=len(own))).to(own)
        own = drawn * own.norm() / drawn.norm()
    return [(layer, position, (factor - 1) * own)]
