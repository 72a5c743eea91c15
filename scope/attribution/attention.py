"""Attention explained: which heads carry an edge of a circuit graph, and which write what a node reads.

`edge_heads` splits an edge by the last head on its way (OV). With g the target's gradient along the residual stream
alone, and v_l what the source has made of the stream in front of layer l, by whatever way:

    edge s -> t = g . (what s wrote, at the target's position)  +  Σ_{l, h} g . head_{l, h}(v_l)

`node_heads` splits a node's value, its pre-activation or centred logit, in the same way: v_l is then all that was
written in front of layer l.

What layers scale the stream by counts on the way, and a layer that takes its values from an earlier one reads the
stream in front of that one. Of the sources, an embedding also writes through the projections of per-layer embeddings.

A head reads its values at every position it attends to; `key` is the one that most of its weight comes from, the place
to ask `scope.attribution.query_key.qk_pairs` about.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from scope.attribution.frozen import FrozenModel
from scope.attribution.graph import CircuitGraph
from scope.attribution.reading import Prompt, read_prompt
from scope.errors import InvalidInputError, OutOfRangeError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["edge_heads", "node_heads"]

STREAM = (-1, -1)
"""Layer and head of what went along the residual stream alone."""


@torch.no_grad()
def edge_heads(graph: CircuitGraph, model: Any, transcoders: Sequence[Any], source: int, target: int) -> "pd.DataFrame":
    """Which heads carry one edge.

    Args:
        graph: the graph.
        model: its model.
        transcoders: those that it was made with.
        source: the node that the edge comes from: an embedding, an error, a table or a feature.
        target: the node that it goes to: a feature or a logit.

    Returns:
        Columns layer, head, key, weight: by absolute weight, the largest first; layer, head and key are -1 for the
        residual stream alone. The weights add up to the edge's.

    Raises:
        OutOfRangeError: there is no such node.
        InvalidInputError: an edge cannot go from or to such nodes.
    """
    start, end = (_node(graph, number) for number in (source, target))
    if start["kind"] == "logit" or end["kind"] not in ("feature", "logit"):
        raise InvalidInputError(f"No edge goes from a node of kind {start['kind']} to one of kind {end['kind']}.")
    read = _read(graph, model, transcoders)
    frozen = read.frozen
    place, at = int(start["position"]), int(end["position"])
    layer, until = int(start["layer"]), int(end["layer"])
    if start["kind"] == "embedding":
        written = {layer: frozen.embedding[place]}
        written |= {
            index: one.per_layer.projection[place]
            for index, one in enumerate(frozen.layers[:until])
            if one.per_layer is not None
        }
    elif start["kind"] == "table":
        per_layer = frozen.layers[layer].per_layer
        assert per_layer is not None
        written = {layer: per_layer.table[place]}
    elif start["kind"] == "error":
        written = {layer: read.errors[layer][place]}
    else:
        ids = torch.tensor([int(start["feature"])])
        written = {
            index: float(start["activation"]) * read.dictionaries.decoder(layer, ids, index)[0].to(model.device)
            for index in read.dictionaries.written_from(layer)
            if index < until
        }
    before_mlp, behind_mlp = _along_the_stream(frozen, _gradient(read, end), at, layer, until)
    alone = sum(float(behind_mlp[index] @ what) for index, what in written.items()) if at == place else 0.0
    found: dict[int, Tensor] = {}
    start_at = torch.tensor([place], device=model.device)
    for first, what in written.items():
        streams: dict[int, Tensor] = {}
        for index, stream in frozen.push_forward(first, start_at, what[None], until):
            streams[index] = stream[0]
            # What an earlier layer read before anything was written is not changed by it.
            values = streams.get(frozen.layers[index].values_from, torch.zeros_like(stream[0]))
            own = _by_key(frozen, index, values, at, before_mlp[index])
            found[index] = found[index] + own if index in found else own
    return _table(alone, found)


@torch.no_grad()
def node_heads(graph: CircuitGraph, model: Any, transcoders: Sequence[Any], node: int) -> "pd.DataFrame":
    """Which heads write what a node reads.

    Args:
        graph: the graph.
        model: its model.
        transcoders: those that it was made with.
        node: a feature or a logit.

    Returns:
        As of `edge_heads`. The weights add up to the node's `value`, but for what biases of the norm in front of it and
        of the unembedding add.

    Raises:
        OutOfRangeError: there is no such node.
        InvalidInputError: nothing comes into such a node.
    """
    end = _node(graph, node)
    if end["kind"] not in ("feature", "logit"):
        raise InvalidInputError(f"Nothing comes into a node of kind {end['kind']}; ask about a feature or a logit.")
    read = _read(graph, model, transcoders)
    frozen = read.frozen
    at, until = int(end["position"]), int(end["layer"])
    before_mlp, behind_mlp = _along_the_stream(frozen, _gradient(read, end), at, 0, until)
    streams = {index: f"blocks.{index}.hook_resid_pre" for index in before_mlp if index < len(frozen.layers)}
    mlp_in = {index: f"blocks.{index}.hook_mlp_in" for index in behind_mlp if index in frozen.skips}
    seen = model.run(frozen.tokens, hooks=[*streams.values(), *mlp_in.values()], logits=False).activations
    alone = float(before_mlp[0] @ frozen.embedding[at])
    for index, gradient in behind_mlp.items():
        written = frozen.layers[index].mlp_out[at]
        if index in mlp_in:  # what the stream itself becomes there is in the gradient
            normed = frozen.layers[index].ln2(seen[mlp_in[index]][at : at + 1].float(), slice(at, at + 1))
            written = written - (normed @ frozen.skips[index].T)[0]
        per_layer = frozen.layers[index].per_layer
        if per_layer is not None:
            written = written + per_layer.table[at] + per_layer.projection[at]
        alone += float(gradient @ written)
    for index in streams:
        alone += float(before_mlp[index] @ read.attention_biases[index][at])
    return _table(
        alone,
        {
            index: _by_key(
                frozen, index, seen[streams[frozen.layers[index].values_from]].float(), at, before_mlp[index]
            )
            for index in streams
        },
    )


def _node(graph: CircuitGraph, number: int) -> "pd.Series[Any]":
    if not 0 <= number < len(graph.nodes):
        raise OutOfRangeError(f"There is no node {number}: the graph has nodes 0 to {len(graph.nodes) - 1}.")
    return graph.nodes.iloc[number]


def _read(graph: CircuitGraph, model: Any, transcoders: Sequence[Any]) -> Prompt:
    return read_prompt(model, torch.tensor(graph.token_ids, device=model.device), transcoders)


def _gradient(read: Prompt, target: "pd.Series[Any]") -> Float[Tensor, " d_model"]:
    """A target's gradient at the residual stream, in front of its layer's MLP or of the final norm."""
    model = read.frozen.model
    at = torch.tensor([int(target["position"])], device=model.device)
    if target["kind"] == "logit":
        row = model.W_U[int(target["feature"])].float() - model.W_U.mean(0, dtype=torch.float32)
        return read.frozen.at_logits(row[None], at)[0]
    layer = int(target["layer"])
    column = read.dictionaries.encoder(layer, torch.tensor([int(target["feature"])])).to(model.device)
    gradient: Tensor = read.frozen.at_mlp_input(layer, column, at)[0]
    return gradient


def _along_the_stream(
    frozen: FrozenModel, gradient: Float[Tensor, " d_model"], at: int, layer: int, until: int
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """A target's gradient in front of and behind each layer's MLP at its own position, no attention on the way."""
    before, behind, now = {until: gradient}, {}, gradient
    for index in range(until - 1, layer - 1, -1):
        now = now * (frozen.layers[index].scale if index >= 0 else 1.0)
        behind[index] = now
        if index in frozen.skips:
            now = now + frozen.layers[index].ln2.backward((now @ frozen.skips[index])[None], slice(at, at + 1))[0]
        before[index] = now
    return before, behind


def _by_key(
    frozen: FrozenModel, index: int, stream: Float[Tensor, "seq d_model"], at: int, gradient: Float[Tensor, " d_model"]
) -> Float[Tensor, "n_heads n_keys"]:
    """What each head of a layer, by way of each key, writes along a gradient at a position, biases left out; from the
    stream in front of the layer that its values are of."""
    layer, here = frozen.layers[index], slice(at, at + 1)
    if layer.ln1_post is not None:
        gradient = layer.ln1_post.backward(gradient[None], here)[0]
    attention = layer.attention
    normed = frozen.layers[layer.values_from].ln1(stream[: at + 1], slice(0, at + 1))
    at_values = torch.einsum("d,hde->he", gradient, attention.W_O).unflatten(0, (-1, attention.group))
    values = torch.einsum("kd,ged->gke", normed, attention.W_V)
    if attention.value_denominator is not None:
        values = values / attention.value_denominator[:, : at + 1, None]
    along: Tensor = torch.einsum("gke,gje->gjk", values, at_values).flatten(0, 1)
    return along * attention.pattern(here)[:, 0]


def _table(alone: float, found: Mapping[int, Float[Tensor, "n_heads n_keys"]]) -> "pd.DataFrame":
    import pandas as pd

    rows = [(*STREAM, -1, alone)]
    for layer, by_key in found.items():
        keys, weights = by_key.abs().argmax(-1).tolist(), by_key.sum(-1).tolist()
        rows += [(layer, head, key, weight) for head, (key, weight) in enumerate(zip(keys, weights, strict=True))]
    table = pd.DataFrame(rows, columns=["layer", "head", "key", "weight"])
    return table.sort_values("weight", key=abs, ascending=False, kind="stable", ignore_index=True)
