"""`verify`: whether a graph's edges are true of the model that it explains, nothing frozen.

A graph is exact about a local replacement model. Of the model itself it is a hypothesis, tested here by intervention:

1. Each feature node is set to 0 and to twice its value: a_s d_s is taken from, or added to, what the MLP of its layer
   wrote at its position (of a cross-layer transcoder's feature: what all MLPs wrote whose outputs it writes).
   Everything after it reacts: attention, norms and MLPs.
2. Measured is the change of every node of the graph behind it: pre-activations of features, centred logits.
3. Predicted is the total effect in the signed graph. With D[t, s] = edge s -> t / a_s, a change δ of feature s changes
   the nodes by (I - D)⁻¹ e_s δ: its edge, and every path through other nodes.
4. Reported are the slope of measured on predicted (through the origin), their correlation, and how often their signs
   agree, over all pairs.

Of a graph under a standing intervention, all of it is done to the model under that.

Beside it stand two controls. `random`: in the place of feature s another feature of the same layer is written, one
that the graph does not hold, as strongly; the prediction for s should then fail. `attention_frozen`: the same test as
the real one with attention patterns held, which is nearer to how the graph was made and no evidence by itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float

from scope.attribution.dictionaries import mlp_dictionaries
from scope.attribution.freezing import freeze
from scope.attribution.frozen import attention_as_frozen
from scope.attribution.graph_edits import edits_of
from scope.attribution.graph_fit import tokens_of
from scope.attribution.graph_runs import FACTORS, FeatureNode, GraphRuns
from scope.errors import InvalidInputError

if TYPE_CHECKING:
    import pandas as pd

    from scope.attribution.graph import CircuitGraph
    from scope.interventions.resolving import SaesByName

__all__ = ["Agreement", "Verification", "total_effects", "verify"]

Progress = Callable[[int, int | None], None]


class Agreement(NamedTuple):
    """Measured against predicted, over pairs of an intervention and a node behind it."""

    slope: float
    """Of measured on predicted, through the origin: 1 where the graph is right."""
    correlation: float
    """Pearson's."""
    sign_agreement: float
    """Share of pairs whose signs agree."""
    n: int
    """Pairs."""

    @classmethod
    def of(cls, predicted: np.ndarray, measured: np.ndarray) -> "Agreement":
        """Agreement of two arrays; not a number where nothing is predicted."""
        moved = predicted != 0
        predicted, measured = predicted[moved].astype(np.float64), measured[moved].astype(np.float64)
        if len(predicted) < 2 or not predicted.std() or not measured.std():
            return cls(float("nan"), float("nan"), float("nan"), len(predicted))
        return cls(
            float(predicted @ measured / (predicted @ predicted)),
            float(np.corrcoef(predicted, measured)[0, 1]),
            float((np.sign(predicted) == np.sign(measured)).mean()),
            len(predicted),
        )


@dataclass(frozen=True, eq=False)
class Verification:
    """What interventions say about a graph."""

    model: Agreement
    """In the model, nothing frozen."""
    random: Agreement
    """The same predictions, other features written."""
    attention_frozen: Agreement
    """In the model with attention patterns held."""
    pairs: "pd.DataFrame"
    """source, target, factor, predicted, measured, measured_random, measured_frozen."""

    def by_source(self) -> "pd.DataFrame":
        """source, slope, correlation, sign_agreement, n: agreement in the model, feature by feature."""
        import pandas as pd

        rows = [
            {"source": source, **Agreement.of(own["predicted"].to_numpy(), own["measured"].to_numpy())._asdict()}
            for source, own in self.pairs.groupby("source")
        ]
        return pd.DataFrame(rows, columns=["source", *Agreement._fields])

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: the model's figures, and those of the controls under their names."""
        return {
            **self.model._asdict(),
            "random": self.random._asdict(),
            "attention_frozen": self.attention_frozen._asdict(),
        }


def total_effects(graph: "CircuitGraph") -> Float[np.ndarray, "n_nodes n_nodes"]:
    """float64 (I - D)⁻¹ - I, D[t, s] = edge s -> t / value of s: what a unit of each feature changes each node by.

    Columns of nodes that are no features are 0. For a pruned graph: it is dense.
    """
    n = len(graph.nodes)
    activation = graph.nodes["activation"].to_numpy(dtype="float64")
    is_feature = (graph.nodes["kind"] == "feature").to_numpy()
    direct = np.zeros((n, n))
    kept = is_feature[graph.source]
    source, target = graph.source[kept], graph.target[kept]
    direct[target, source] = graph.weight[kept] / activation[source]
    return np.linalg.inv(np.eye(n) - direct) - np.eye(n)


@torch.no_grad()
def verify(
    graph: "CircuitGraph",
    model: Any,
    transcoders: Sequence[Any],
    *,
    saes: "SaesByName" = None,
    batch_size: int = 16,
    max_features: int = 256,
    seed: int = 0,
    progress: Progress | None = None,
) -> Verification:
    """Set every feature of a graph to 0 and to twice its value, and compare what follows with what the graph says.

    Args:
        graph: a pruned graph.
        model: the model that it explains.
        transcoders: those that it was made with.
        saes: those whose features the graph's interventions are on, as for `build_graph`.
        batch_size: runs at once.
        max_features: of more than so many feature nodes, those with the most influence are tested.
        seed: of the random control.
        progress: called with (runs done, runs in all).

    Raises:
        InvalidInputError: the graph has no feature nodes.
        MismatchError: it is of another model or other transcoders.
    """
    import pandas as pd

    features = _features(graph, max_features)
    if not features:
        raise InvalidInputError("The graph has no feature nodes; there is nothing to verify. Prune less of it.")
    dictionaries = mlp_dictionaries(model, transcoders)
    tokens = tokens_of(graph, model, dictionaries)
    edits = edits_of(graph, model, dictionaries, saes)
    bench = GraphRuns(graph, model, dictionaries, tokens, edits)
    effects = total_effects(graph)
    frozen, _ = freeze(model, tokens, edits=edits)
    rng = np.random.default_rng(seed)
    runs = [(node, factor) for node in features for factor in FACTORS]
    tell = progress or (lambda done, total: None)
    found = []
    clean, clean_frozen = bench.measure([], bench.attention()), bench.measure([], attention_as_frozen(frozen))
    for start in range(0, len(runs), batch_size):
        batch = runs[start : start + batch_size]
        sizes = [(factor - 1) * node.activation for node, factor in batch]
        own = [bench.write(node, node.feature, size) for (node, _), size in zip(batch, sizes, strict=True)]
        other = [bench.write(node, bench.other(node, rng), size) for (node, _), size in zip(batch, sizes, strict=True)]
        measured = bench.measure(own, bench.attention()) - clean
        control = bench.measure(other, bench.attention()) - clean
        fixed = bench.measure(own, attention_as_frozen(frozen)) - clean_frozen
        for number, ((node, factor), size) in enumerate(zip(batch, sizes, strict=True)):
            predicted = effects[bench.nodes, node.node] * size
            behind = bench.is_behind(node)
            found.append(
                pd.DataFrame(
                    {
                        "source": node.node,
                        "target": bench.nodes[behind],
                        "factor": factor,
                        "predicted": predicted[behind],
                        "measured": measured[number][behind],
                        "measured_random": control[number][behind],
                        "measured_frozen": fixed[number][behind],
                    }
                )
            )
        tell(start + len(batch), len(runs))
    pairs = pd.concat(found, ignore_index=True)
    predicted = pairs["predicted"].to_numpy()
    plain, random, held = (
        Agreement.of(predicted, pairs[name].to_numpy()) for name in ("measured", "measured_random", "measured_frozen")
    )
    return Verification(plain, random, held, pairs)


def _features(graph: "CircuitGraph", n: int) -> list[FeatureNode]:
    """The feature nodes with the most influence, in the graph's order."""
    table = graph.nodes[graph.nodes["kind"] == "feature"].nlargest(n, "influence").sort_values("node")
    columns = [table[name].tolist() for name in FeatureNode._fields]
    return [FeatureNode(*values) for values in zip(*columns, strict=True)]
