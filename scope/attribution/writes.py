"""`layer_writes`: how strongly the features of a graph write each layer, and what that does to a logit.

A feature of a cross-layer transcoder that reads layer l writes the outputs of the MLPs of l and of all later layers
(Ameisen et al. 2025, "Circuit Tracing", section 2.1), each along a row of its own, W_dec,l→m. With a its activation and
g_m the logit's gradient at what the MLP of layer m wrote at the feature's position, attention patterns and norm
denominators held:

    norm_m   = ‖W_dec,l→m‖
    effect_m = a W_dec,l→m . g_m            Σ_m effect_m = the graph's edge from the feature to the logit

A transcoder of one layer writes that layer alone.

1. The prompt is read once, and the logit's direction is pulled back to what every MLP wrote.
2. Layer by layer, the rows of all features that were asked about meet that gradient at their positions.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from scope.attribution.dictionaries import mlp_dictionaries
from scope.attribution.graph import CircuitGraph
from scope.attribution.graph_edits import edits_of
from scope.attribution.graph_fit import tokens_of
from scope.attribution.reading import read_prompt
from scope.errors import InvalidInputError, OutOfRangeError

if TYPE_CHECKING:
    import pandas as pd

    from scope.interventions.resolving import SaesByName

__all__ = ["layer_writes"]


@torch.no_grad()
def layer_writes(
    graph: CircuitGraph,
    model: Any,
    transcoders: Sequence[Any],
    nodes: Sequence[int] | None = None,
    logit: int | None = None,
    *,
    saes: "SaesByName" = None,
) -> "pd.DataFrame":
    """What features of a graph write, layer by layer.

    Args:
        graph: the graph.
        model: its model.
        transcoders: those that it was made with.
        nodes: numbers of features; None for all of the graph.
        logit: number of the logit that is looked at; None for the likeliest.
        saes: those whose features the graph's interventions are on, as for `build_graph`.

    Returns:
        Columns node, layer (that is written), norm (of the decoder row, in the model's units for a feature's activation
        of 1), written (the same for the node's activation), effect (on the logit, relative to the mean over the
        vocabulary): in the order of the nodes, then of the layers.

    Raises:
        OutOfRangeError: there is no such node.
        InvalidInputError: a node is no feature, or `logit` no logit.
        MismatchError: the graph is of another model or other transcoders.
    """
    import pandas as pd

    table = graph.nodes
    features = table.index[table["kind"] == "feature"].tolist() if nodes is None else list(nodes)
    end = int(table["probability"].fillna(-1.0).to_numpy().argmax()) if logit is None else logit
    for number, kind in ((end, "logit"), *((node, "feature") for node in features)):
        if not 0 <= number < len(table):
            raise OutOfRangeError(f"There is no node {number}: the graph has nodes 0 to {len(table) - 1}.")
        if table["kind"].iloc[number] != kind:
            raise InvalidInputError(f"Node {number} is of kind {table['kind'].iloc[number]}; expected a {kind}.")
    d = mlp_dictionaries(model, transcoders)
    tokens = tokens_of(graph, model, d)
    read = read_prompt(model, tokens, transcoders, edits_of(graph, model, d, saes))
    frozen = read.frozen
    row = model.W_U[int(table["feature"].iloc[end])].float() - read.mean_unembedding
    at = torch.tensor([int(table["position"].iloc[end])], device=model.device)
    start = torch.tensor([len(frozen.layers)], device=model.device)
    pulled = frozen.pull_back(start, at, frozen.at_logits(row[None], at))
    gradients = {one.layer: one.gradient[0].clone() for one in pulled if one.where == "mlp_out"}
    parts = []
    for reads in sorted(set(table["layer"].iloc[features].tolist())):
        group = table.iloc[[node for node in features if table["layer"].iloc[node] == reads]]
        ids = torch.from_numpy(group["feature"].to_numpy(dtype="int64").copy())
        positions = torch.from_numpy(group["position"].to_numpy(dtype="int64").copy()).to(model.device)
        activation = torch.from_numpy(group["activation"].to_numpy(dtype="float32").copy()).to(model.device)
        for written in d.written_from(reads):
            rows = d.decoder(reads, ids, written).to(model.device)
            norm = rows.norm(dim=-1)
            # A logit reads what was written up to its own position.
            here = positions < len(gradients[written])
            gradient = gradients[written][positions.clamp_max(len(gradients[written]) - 1)] * here[:, None]
            effect = activation * (rows * gradient).sum(-1)
            parts.append(
                pd.DataFrame(
                    {
                        "node": group.index.to_numpy(),
                        "layer": written,
                        "norm": norm.tolist(),
                        "written": (activation * norm).tolist(),
                        "effect": effect.tolist(),
                    }
                )
            )
    if not parts:
        raise InvalidInputError("The graph has no features; nothing writes a layer.")
    found = pd.concat(parts, ignore_index=True)
    order = {node: place for place, node in enumerate(features)}
    return found.sort_values(
        ["node", "layer"], key=lambda c: c.map(order) if c.name == "node" else c, ignore_index=True
    )
