"""Attention explained: which heads carry an edge of a circuit graph, and which write what a node reads.

`edge_heads` splits an edge by the last head on its way (OV). With g the target's gradient along the residual stream
alone, and v_l what the source has made of the stream in front of layer l, by whatever way:

    edge s -> t = g . (what s wrote, at the target's position)  +  Σ_{l, h} g . head_{l, h}(v_l)

`node_heads` splits a node's value, its pre-activation or centred logit, in the same way: v_l is then all that was
written in front of layer l.

Of a graph under interventions, what these let through is on the way; what they put there on the way to a node is the
residual stream's, or the head's that it is put in.

What layers scale the stream by counts on the way, as do the mixing of AltUp's streams and Laurel (Gemma 3n), and a
layer that takes its values from an earlier one reads what that one reads. Of the sources, an embedding also writes
through the projections of per-layer embeddings.

A head reads its values at every position it attends to; `key` is the one that most of its weight comes from, the place
to ask `scope.attribution.query_key.qk_pairs` about.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from scope.attribution.along_stream import along_the_stream
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

Where = Literal["mlp_out", "ple_out"]
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
    until = int(end["layer"])
    written = _written(read, start, until)
    way = along_the_stream(frozen, _gradient(read, end)[None], at, until)
    alone = 0.0
    found: dict[int, Tensor] = {}
    start_at, here = torch.tensor([place], device=model.device), slice(place, place + 1)
    for first, where, what in written:
        if at == place:
            gradient = way.embedding if first < 0 else getattr(way, where)[first]
            alone += float(gradient[0] @ what)
        if where == "mlp_out":
            what = frozen.let_through(f"blocks.{first}.hook_mlp_out", what[None], here)[0]
        normed: dict[int, Tensor] = {}
        for index, stream in frozen.push_forward(first, start_at, what[None], until, where):
            layer = frozen.layers[index]
            normed[index] = layer.ln1(stream[0, : at + 1], slice(0, at + 1))
            # What an earlier layer read before anything was written is not changed by it.
            values = normed.get(layer.values_from, torch.zeros_like(normed[index]))
            own = _by_key(frozen, index, values, at, way.attn_out[index][0])
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
    way = along_the_stream(frozen, _gradient(read, end)[None], at, until)
    norms = {index: f"blocks.{index}.ln1.hook_out" for index in way.attn_out}
    mlp_in = {index: f"blocks.{index}.hook_mlp_in" for index in way.mlp_out if index in frozen.skips}
    hooks, standing = [*norms.values(), *mlp_in.values()], None if edits is None else edits.for_run()
    seen = model.run(frozen.tokens, hooks=hooks, logits=False, edits=standing).activations
    alone = float(way.embedding[0] @ frozen.embedding[at]) + float(way.put[0])
    for index, (gradient,) in way.mlp_out.items():
        written = frozen.layers[index].mlp_out[at]
        if index in mlp_in:  # what the stream itself becomes there is in the gradient
            normed = frozen.layers[index].ln2(seen[mlp_in[index]][at : at + 1].float(), slice(at, at + 1))
            written = written - (normed @ frozen.skips[index].T)[0]
        alone += float(gradient @ written)
        per_layer = frozen.layers[index].per_layer
        if per_layer is not None:
            alone += float(way.ple_out[index][0] @ (per_layer.table[at] + per_layer.projection[at]))
    found = {}
    for index, (gradient,) in way.attn_out.items():
        alone += float(gradient @ read.attention_biases[index][at])
        owner = frozen.layers[index].values_from
        normed = frozen.layers[owner].ln1.without_bias(seen[norms[owner]][: at + 1].float())
        found[index] = _by_key(frozen, index, normed, at, gradient)
        for edit, at_heads in _at_heads(frozen, index, at, gradient)[1]:
            found[index][:, at] += (at_heads * edit.constant[at]).unflatten(0, (len(found[index]), -1)).sum(-1)
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


def _written(read: Prompt, start: "pd.Series[Any]", until: int) -> list[tuple[int, Where, Tensor]]:
    """What a source writes in front of a layer: (layer, what of it writes, what it writes)."""
    frozen, place, layer = read.frozen, int(start["position"]), int(start["layer"])
    if start["kind"] == "embedding":
        tables = enumerate(one.per_layer for one in frozen.layers[:until])
        found: list[tuple[int, Where, Tensor]] = [(layer, "mlp_out", frozen.embedding[place])]
        return found + [(index, "ple_out", one.projection[place]) for index, one in tables if one is not None]
    if start["kind"] == "table":
        per_layer = frozen.layers[layer].per_layer
        assert per_layer is not None
        return [(layer, "ple_out", per_layer.table[place])]
    if start["kind"] == "error":
        return [(layer, "mlp_out", read.errors[layer][place])]
    ids, value = torch.tensor([int(start["feature"])]), float(start["activation"])
    return [
        (index, "mlp_out", value * read.dictionaries.decoder(layer, ids, index)[0].to(frozen.tokens.device))
        for index in read.dictionaries.written_from(layer)
        if index < until
    ]


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
    frozen: FrozenModel, index: int, normed: Float[Tensor, "keys d_model"], at: int, gradient: Float[Tensor, " d_model"]
) -> Float[Tensor, "n_heads keys"]:
    """What each head of a layer, by way of each key, writes along a gradient at a position, biases left out; from what
    the first norm gave, without its bias, of the layer that its values are of."""
    attention, here = frozen.layers[index].attention, slice(at, at + 1)
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
