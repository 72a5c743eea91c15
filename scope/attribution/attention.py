"""Attention explained: which heads carry an edge of a circuit graph, and which write what a node reads.

`edge_heads` splits an edge by the last head on its way (OV). With g the target's gradient along the residual stream
alone, and v_l what the source has made of the stream in front of layer l, by whatever way:

    edge s -> t = g . (what s wrote, at the target's position)  +  Σ_{l, h} g . head_{l, h}(v_l)

`node_heads` splits a node's value, its pre-activation or centred logit, in the same way: v_l is then all that was
written in front of layer l.

Of a graph under interventions, what these let through is on the way; what they put there on the way to a node is the
residual stream's, or the head's that it is put in.

What layers scale the stream by counts on the way, and a layer that takes its values from an earlier one reads the
stream in front of that one. Of the sources, an embedding also writes through the projections of per-layer embeddings.

A head reads its values at every position it attends to; `key` is the one that most of its weight comes from, the place
to ask `scope.attribution.query_key.qk_pairs` about.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from scope.attribution.dictionaries import mlp_dictionaries
from scope.attribution.frozen import FrozenModel
from scope.attribution.graph import CircuitGraph
from scope.attribution.graph_edits import GraphEdits, edits_of
from scope.attribution.graph_fit import tokens_of
from scope.attribution.linear_edits import LinearEdit
from scope.attribution.reading import Prompt, read_prompt
from scope.errors import InvalidInputError, OutOfRangeError

if TYPE_CHECKING:
    import pandas as pd

    from scope.interventions.resolving import SaesByName

__all__ = ["edge_heads", "node_heads"]

STREAM = (-1, -1)
"""Layer and head of what went along the residual stream alone."""


@torch.no_grad()
def edge_heads(
    graph: CircuitGraph,
    model: Any,
    transcoders: Sequence[Any],
    source: int,
    target: int,
    *,
    saes: "SaesByName" = None,
) -> "pd.DataFrame":
    """Which heads carry one edge.

    Args:
        graph: the graph.
        model: its model.
        transcoders: those that it was made with.
        source: the node that the edge comes from: an embedding, an error, a table or a feature.
        target: the node that it goes to: a feature or a logit.
        saes: those whose features the graph's interventions are on, as for `build_graph`.

    Returns:
        Columns layer, head, key, weight: by absolute weight, the largest first; layer, head and key are -1 for the
        residual stream alone. The weights add up to the edge's.

    Raises:
        OutOfRangeError: there is no such node.
        InvalidInputError: an edge cannot go from or to such nodes.
    """
    start, end = (_node(graph, number) for number in (source, target))
    if start["kind"] in ("logit", "intervention") or end["kind"] not in ("feature", "logit"):
        raise InvalidInputError(
            f"Heads are told of edges from embeddings, errors, tables and features to features and logits; this would "
            f"be one from a node of kind {start['kind']} to one of kind {end['kind']}."
        )
    read, _ = _read(graph, model, transcoders, saes)
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
    way = _along_the_stream(frozen, _gradient(read, end), at, layer, until)
    if start["kind"] in ("error", "feature"):  # what interventions on an MLP's output let through
        here = slice(place, place + 1)
        written = {
            index: frozen.let_through(f"blocks.{index}.hook_mlp_out", what[None], here)[0]
            for index, what in written.items()
        }
    alone = sum(float(way.behind[index] @ what) for index, what in written.items()) if at == place else 0.0
    found: dict[int, Tensor] = {}
    start_at = torch.tensor([place], device=model.device)
    for first, what in written.items():
        streams: dict[int, Tensor] = {}
        for index, stream in frozen.push_forward(first, start_at, what[None], until):
            streams[index] = stream[0]
            # What an earlier layer read before anything was written is not changed by it.
            values = streams.get(frozen.layers[index].values_from, torch.zeros_like(stream[0]))
            own = _by_key(frozen, index, values, at, way.written[index])
            found[index] = found[index] + own if index in found else own
    return _table(alone, found)


@torch.no_grad()
def node_heads(
    graph: CircuitGraph, model: Any, transcoders: Sequence[Any], node: int, *, saes: "SaesByName" = None
) -> "pd.DataFrame":
    """Which heads write what a node reads.

    Args:
        graph: the graph.
        model: its model.
        transcoders: those that it was made with.
        node: a feature or a logit.
        saes: as for `edge_heads`.

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
    read, edits = _read(graph, model, transcoders, saes)
    frozen = read.frozen
    at, until = int(end["position"]), int(end["layer"])
    way = _along_the_stream(frozen, _gradient(read, end), at, -1, until)
    streams = {index: f"blocks.{index}.hook_resid_pre" for index in way.written}
    mlp_in = {index: f"blocks.{index}.hook_mlp_in" for index in way.mlp_out if index in frozen.skips}
    hooks, standing = [*streams.values(), *mlp_in.values()], None if edits is None else edits.for_run()
    seen = model.run(frozen.tokens, hooks=hooks, logits=False, edits=standing).activations
    alone = float(way.behind[-1] @ frozen.embedding[at]) + way.put
    for index, gradient in way.mlp_out.items():
        written = frozen.layers[index].mlp_out[at]
        if index in mlp_in:  # what the stream itself becomes there is in the gradient
            normed = frozen.layers[index].ln2(seen[mlp_in[index]][at : at + 1].float(), slice(at, at + 1))
            written = written - (normed @ frozen.skips[index].T)[0]
        alone += float(gradient @ written)
        per_layer = frozen.layers[index].per_layer
        if per_layer is not None:
            alone += float(way.behind[index] @ (per_layer.table[at] + per_layer.projection[at]))
    for index in streams:
        alone += float(way.written[index] @ read.attention_biases[index][at])
    found = {
        index: _by_key(frozen, index, seen[streams[frozen.layers[index].values_from]].float(), at, way.written[index])
        for index in streams
    }
    for index in streams:
        for edit, gradient in _at_heads(frozen, index, at, way.written[index])[1]:
            found[index][:, at] += (gradient * edit.constant[at]).unflatten(0, (len(found[index]), -1)).sum(-1)
    return _table(alone, found)


def _node(graph: CircuitGraph, number: int) -> "pd.Series[Any]":
    if not 0 <= number < len(graph.nodes):
        raise OutOfRangeError(f"There is no node {number}: the graph has nodes 0 to {len(graph.nodes) - 1}.")
    return graph.nodes.iloc[number]


def _read(
    graph: CircuitGraph, model: Any, transcoders: Sequence[Any], saes: "SaesByName"
) -> tuple[Prompt, GraphEdits | None]:
    dictionaries = mlp_dictionaries(model, transcoders)
    tokens = tokens_of(graph, model, dictionaries)
    edits = edits_of(graph, model, dictionaries, saes)
    return read_prompt(model, tokens, transcoders, edits), edits


def _gradient(read: Prompt, target: "pd.Series[Any]") -> Float[Tensor, " d_model"]:
    """A target's gradient at the residual stream, in front of its layer's MLP or of the final norm."""
    model = read.frozen.model
    at = torch.tensor([int(target["position"])], device=model.device)
    if target["kind"] == "logit":
        row = model.W_U[int(target["feature"])].float() - model.W_U.mean(0, dtype=torch.float32)
        return read.frozen.at_logits(row[None], at)[0]
    layer = int(target["layer"])
    feature = torch.tensor([int(target["feature"])])
    column = read.dictionaries.encoder(layer, feature).to(model.device)
    gradient: Tensor = read.frozen.at_mlp_input(layer, column, at)[0]
    if layer not in read.factors:
        return gradient
    firing = read.firing[layer]
    here = (firing.position == at) & (firing.feature == feature.to(at.device))
    return gradient * read.factors[layer][here].sum()


class _Way(NamedTuple):
    """A target's gradient along the residual stream at its own position, no attention on the way, by layer."""

    written: dict[int, Tensor]
    """At what the layer's attention writes."""
    behind: dict[int, Tensor]
    """At the stream behind the layer's MLP; -1 for the embeddings."""
    mlp_out: dict[int, Tensor]
    """At what the layer's MLP writes."""
    put: float
    """What comes from what interventions put into the stream on the way."""


def _along_the_stream(
    frozen: FrozenModel, gradient: Float[Tensor, " d_model"], at: int, layer: int, until: int
) -> _Way:
    """The way from a target in front of the MLP of `until`, or of the final norm, down to a layer."""
    written: dict[int, Tensor] = {}
    behind: dict[int, Tensor] = {}
    mlp_out: dict[int, Tensor] = {}
    put, now, here = 0.0, gradient, slice(at, at + 1)
    beside = frozen.model.layout.parallel

    def in_front(hook: str, gradient: Tensor) -> Tensor:
        nonlocal put
        for edit in reversed(frozen.edits.get(hook, ())):
            put += float(gradient @ edit.constant[at])
            gradient = edit.backward(gradient[None], here)[0]
        return gradient

    for index in range(until, layer - 1, -1):
        block = f"blocks.{index}."
        if index < until:
            now = in_front(f"{block}hook_resid_post", now)
            now = now * (frozen.layers[index].scale if index >= 0 else 1.0)
            behind[index] = now
        if index < 0:
            in_front("hook_embed", now)
        elif index < len(frozen.layers):
            behind_attention, into_mlp = now, torch.zeros_like(now)
            if index < until:
                mlp_out[index] = in_front(f"{block}hook_mlp_out", now)
                if index in frozen.skips:
                    reads = (mlp_out[index] @ frozen.skips[index])[None]
                    into_mlp = frozen.layers[index].ln2.backward(reads, here)[0]
            elif beside:  # the target reads what this layer's attention reads, and not what it writes
                behind_attention, into_mlp = into_mlp, now
            now = behind_attention if beside else behind_attention + into_mlp
            now = in_front(f"{block}hook_resid_mid", now)
            written[index] = in_front(f"{block}hook_attn_out", now)
            now = now + into_mlp if beside else now
            now = in_front(f"{block}hook_resid_pre", now)
    return _Way(written, behind, mlp_out, put)


def _at_heads(
    frozen: FrozenModel, index: int, at: int, gradient: Float[Tensor, " d_model"]
) -> tuple[Float[Tensor, " width"], list[tuple[LinearEdit, Tensor]]]:
    """From the gradient at what a layer's attention writes at a position to that at what its heads read, all side by
    side; and to that behind each intervention on it."""
    layer, here, found = frozen.layers[index], slice(at, at + 1), []
    if layer.ln1_post is not None:
        gradient = layer.ln1_post.backward(gradient[None], here)[0]
    heads = layer.attention.into_heads(gradient[None, None])[0]
    for edit in reversed(frozen.edits.get(f"blocks.{index}.attn.hook_z", ())):
        found.append((edit, heads[0]))
        heads = edit.backward(heads, here)
    return heads[0], found


def _by_key(
    frozen: FrozenModel, index: int, stream: Float[Tensor, "seq d_model"], at: int, gradient: Float[Tensor, " d_model"]
) -> Float[Tensor, "n_heads n_keys"]:
    """What each head of a layer, by way of each key, writes along a gradient at a position, biases left out; from the
    stream in front of the layer that its values are of."""
    layer, here = frozen.layers[index], slice(at, at + 1)
    attention = layer.attention
    normed = frozen.layers[layer.values_from].ln1(stream[: at + 1], slice(0, at + 1))
    heads, _ = _at_heads(frozen, index, at, gradient)
    at_values = heads.unflatten(0, (len(attention.key), attention.group, -1))
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
