"""Attention explained: which heads carry an edge of a circuit graph, and why a head looked where it did.

`edge_heads` splits an edge by the last head on its way (OV). With g the target's gradient along the residual stream
alone, and v_l what the source has made of the stream in front of layer l, by whatever way:

    edge s -> t = g . (what s wrote, at the target's position)  +  Σ_{l, h} g . head_{l, h}(v_l)

`qk_pairs` splits the score of one head for one query and one key before the softmax. Norms held at their denominators,
query and key are linear in their residual streams, and those are sums of what was written before: embeddings, features,
error nodes, attention layers, biases. With R the rotation of a position:

    score = scaling (R_q W_Q x_q) . (R_k W_K x_k) = Σ_{i, j} scaling (R_q W_Q x_q^i) . (R_k W_K x_k^j)

(Kamath et al. 2025, "Tracing Attention Computation Through Feature Interactions"). The softmax does not see what all
keys have in common: `relative` sets each query node against the mean of all keys that the query can see as well, so
that the relative weights add up to the score minus its mean over these keys. Scores are before soft-capping.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from scope.attribution.frozen import FrozenModel, FrozenNorm
from scope.attribution.graph import CircuitGraph
from scope.attribution.reading import read_prompt
from scope.errors import InvalidInputError, OutOfRangeError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["QkPairs", "edge_heads", "qk_pairs"]


@torch.no_grad()
def edge_heads(graph: CircuitGraph, model: Any, transcoders: Sequence[Any], source: int, target: int) -> "pd.DataFrame":
    """Which heads carry one edge.

    Args:
        graph: the graph.
        model: its model.
        transcoders: those that it was made with.
        source: the node that the edge comes from: an embedding, an error or a feature.
        target: the node that it goes to: a feature or a logit.

    Returns:
        Columns layer, head, weight: by absolute weight, the largest first; layer and head are -1 for the residual
        stream alone. The weights add up to the edge's.

    Raises:
        OutOfRangeError: there is no such node.
        InvalidInputError: an edge cannot go from or to such nodes.
    """
    import pandas as pd

    for node in (source, target):
        if not 0 <= node < len(graph.nodes):
            raise OutOfRangeError(f"There is no node {node}: the graph has nodes 0 to {len(graph.nodes) - 1}.")
    start, end = (graph.nodes.iloc[node] for node in (source, target))
    if start["kind"] == "logit" or end["kind"] not in ("feature", "logit"):
        raise InvalidInputError(f"No edge goes from a node of kind {start['kind']} to one of kind {end['kind']}.")
    read = read_prompt(model, torch.tensor(graph.token_ids, device=model.device), transcoders)
    frozen = read.frozen
    frozen.require_plain_attention("The split of an edge over heads")
    place, at = int(start["position"]), int(end["position"])
    layer, until = int(start["layer"]), int(end["layer"])
    if start["kind"] == "embedding":
        written = {layer: frozen.embedding[place]}
    elif start["kind"] == "error":
        written = {layer: read.errors[layer][place]}
    else:
        ids = torch.tensor([int(start["feature"])])
        written = {
            index: float(start["activation"]) * read.dictionaries.decoder(layer, ids, index)[0].to(model.device)
            for index in read.dictionaries.written_from(layer)
            if index < until
        }
    places = torch.tensor([at], device=model.device)
    if end["kind"] == "logit":
        row = model.W_U[int(end["feature"])].float() - model.W_U.mean(0, dtype=torch.float32)
        gradient = frozen.at_logits(row[None], places)[0]
    else:
        column = read.dictionaries.encoder(until, torch.tensor([int(end["feature"])])).to(model.device)
        gradient = frozen.at_mlp_input(until, column, places)[0]
    before_mlp, behind_mlp = _along_the_stream(frozen, gradient, at, layer, until)
    weights = {
        (-1, -1): sum(float(behind_mlp[index] @ what) for index, what in written.items()) if at == place else 0.0
    }
    everywhere = slice(0, frozen.n_tokens)
    start_at = torch.tensor([place], device=model.device)
    for first, what in written.items():
        for index, stream in frozen.push_forward(first, start_at, what[None], until):
            block = frozen.layers[index]
            per_head = block.attention.heads(block.ln1(stream, everywhere), everywhere)[:, 0, at]
            if block.ln1_post is not None:
                per_head = block.ln1_post(per_head[:, None], slice(at, at + 1))[:, 0]
            for head, weight in enumerate((per_head @ before_mlp[index]).tolist()):
                weights[index, head] = weights.get((index, head), 0.0) + weight
    rows = [(*key, weight) for key, weight in weights.items()]
    table = pd.DataFrame(rows, columns=["layer", "head", "weight"])
    return table.sort_values("weight", key=abs, ascending=False, kind="stable", ignore_index=True)


def _along_the_stream(
    frozen: FrozenModel, gradient: Float[Tensor, " d_model"], at: int, layer: int, until: int
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """A target's gradient in front of and behind each layer's MLP at its own position, no attention on the way."""
    before, behind, now = {until: gradient}, {}, gradient
    for index in range(until - 1, layer - 1, -1):
        behind[index] = now
        if index in frozen.skips:
            now = now + frozen.layers[index].ln2.backward((now @ frozen.skips[index])[None], slice(at, at + 1))[0]
        before[index] = now
    return before, behind


class QkPairs(NamedTuple):
    """The score of one head for one query and one key, as a sum over pairs of nodes."""

    table: "pd.DataFrame"
    """query_node, key_node (such as "L3 feature 17", "L2 error", "L1 attention", "embedding", "bias"; "mean of all
    keys"), weight, relative: by absolute relative weight, the largest first."""
    score: float
    """Before softmax, soft-capping and mask: the sum of all weights."""
    relative: float
    """The score minus its mean over all keys that the query can see: the sum of all relative weights."""
    pattern: float
    """The attention that came of it."""


@torch.no_grad()
def qk_pairs(
    model: Any,
    prompt: Any,
    transcoders: Sequence[Any],
    layer: int,
    head: int,
    query: int,
    key: int,
    top: int | None = 50,
) -> QkPairs:
    """Why a head looked from one position at another.

    Args:
        model: a `scope.models.LanguageModel`.
        prompt: a text, chat messages or token ids.
        transcoders: from MLP inputs to outputs; layers without one count as errors.
        layer: the layer.
        head: the query head.
        query: position of the query.
        key: position of the key, at most the query's.
        top: rows of the table, at most; None for all pairs.

    Raises:
        OutOfRangeError: there is no such layer, head or position, or the key lies behind the query.
    """
    import pandas as pd

    tokens = model.prompt_tokens(prompt)
    layout = model.layout
    for name, value, end in (
        ("layer", layer, layout.n_layers),
        ("head", head, layout.n_heads),
        ("query", query, len(tokens)),
        ("key", key, query + 1),
    ):
        if not 0 <= value < end:
            raise OutOfRangeError(f"{name} is {value}; expected 0 to {end - 1}.")
    read = read_prompt(model, tokens, transcoders)
    read.frozen.require_plain_attention("The score of a head as pairs of nodes")
    block = f"blocks.{layer}."
    hooks = [f"{block}attn.hook_q", f"{block}attn.hook_k"] + [f"blocks.{i}.hook_attn_out" for i in range(layer)]
    rotation, seen = _rotation(model, tokens, layer, hooks)
    frozen = read.frozen.layers[layer]
    kv_head = head // frozen.attention.group
    sides = [
        _Side(model, layer, "q", head, seen[f"{block}attn.hook_q"], rotation),
        _Side(model, layer, "k", kv_head, seen[f"{block}attn.hook_k"], rotation),
    ]
    attention_out = [seen[f"blocks.{i}.hook_attn_out"] for i in range(layer)]
    query_names, query_parts = _written(read, attention_out, layer, query)
    key_names, key_parts = _written(read, attention_out, layer, key)
    queries = sides[0].project(_normed(frozen.ln1, query_parts, query), query)
    keys = sides[1].project(_normed(frozen.ln1, key_parts, key), key)
    query_names, queries = [*query_names, "bias"], torch.cat([queries, sides[0].bias(frozen.ln1, query)[None]])
    key_names, keys = [*key_names, "bias"], torch.cat([keys, sides[1].bias(frozen.ln1, key)[None]])
    scaling = frozen.attention.scaling
    weights = scaling * queries @ keys.T
    visible = frozen.attention.key[kv_head, : query + 1].float()
    mask = frozen.attention.mask
    if mask is not None:
        visible = visible[mask[query, : query + 1] > -1.0]
    mean_key = visible.mean(0)
    table = pd.DataFrame(
        {
            "query_node": [name for name in query_names for _ in range(len(key_names) + 1)],
            "key_node": [*key_names, "mean of all keys"] * len(query_names),
            "weight": torch.cat([weights, torch.zeros(len(weights), 1, device=weights.device)], 1).flatten().tolist(),
            "relative": torch.cat([weights, -scaling * (queries @ mean_key)[:, None]], 1).flatten().tolist(),
        }
    )
    score = float(weights.sum())
    relative = float(table["relative"].sum())
    table = table.sort_values("relative", key=abs, ascending=False, kind="stable", ignore_index=True)
    pattern = float(frozen.attention.pattern(slice(0, len(tokens)))[head, query, key])
    return QkPairs(table if top is None else table.head(top), score, relative, pattern)


def _normed(norm: FrozenNorm, parts: Float[Tensor, "n d_model"], position: int) -> Float[Tensor, "n d_model"]:
    return norm(parts[:, None], slice(position, position + 1))[:, 0]


def _written(
    read: Any, attention_out: list[Tensor], layer: int, position: int
) -> tuple[list[str], Float[Tensor, "n d_model"]]:
    """Everything that was written to the residual stream at a position in front of a layer."""
    names, parts = ["embedding"], [read.frozen.embedding[position][None]]
    rests = [frozen.mlp_out[position] for frozen in read.frozen.layers[:layer]]
    for index, firing in read.firing.items():
        if index >= layer:
            continue
        here = firing.position == position
        ids, total = firing.feature[here], None
        for written in read.dictionaries.written_from(index):
            if written < layer:
                rows = read.dictionaries.decoder(index, ids, written).to(rests[written].device)
                rows = rows * firing.activation[here, None]
                rests[written] = rests[written] - rows.sum(0)
                total = rows if total is None else total + rows
        assert total is not None
        names += [f"L{index} feature {feature}" for feature in ids.tolist()]
        parts.append(total)
    for index, rest in enumerate(rests):
        names += [f"L{index} attention", f"L{index} error"]
        parts += [attention_out[index][position][None], rest[None]]
    return names, torch.cat(parts)


class _Side:
    """The linear map from a layer's normed residual stream to one head's query or key, rotation included."""

    def __init__(self, model: Any, layer: int, which: str, head: int, seen: Tensor, rotation: Any) -> None:
        layout, family = model.layout, model.layout.family
        fused = len(family.qkv) == 1
        module = model.hf.get_submodule(layout.layer(layer, family.qkv[0 if fused else "qk".index(which)]))
        weight = module.weight.detach().float()
        weight = weight if isinstance(module, torch.nn.Linear) else weight.T
        start = (layout.n_heads * layout.d_head if fused and which == "k" else 0) + head * layout.d_head
        self.weight = weight[start : start + layout.d_head]
        self.offset = None if module.bias is None else module.bias.detach().float()[start : start + layout.d_head]
        self.rotation = rotation
        self.gain = None
        if layout.query_key_norms:
            norm = model.hf.get_submodule(layout.layer(layer, f"{family.attention}.{which}_norm"))
            eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
            own = seen[:, head].float()
            gain = norm.weight.detach().float() + (1.0 if family.gain_offset else 0.0)
            self.gain = gain / (own.square().mean(-1, keepdim=True) + eps).sqrt()

    def project(self, normed: Float[Tensor, "n d_model"], position: int) -> Float[Tensor, "n d_head"]:
        """Queries or keys of some parts of the stream at a position."""
        return self._placed(normed @ self.weight.T, position)

    def bias(self, norm: FrozenNorm, position: int) -> Float[Tensor, " d_head"]:
        """What the biases of the projection and of the norm before it come to."""
        found = torch.zeros(len(self.weight), device=self.weight.device)
        if self.offset is not None:
            found = found + self.offset
        if norm.bias is not None:
            found = found + self.weight @ norm.bias
        return self._placed(found[None], position)[0]

    def _placed(self, heads: Float[Tensor, "n d_head"], position: int) -> Float[Tensor, "n d_head"]:
        if self.gain is not None:
            heads = heads * self.gain[position]
        if self.rotation is None:
            return heads
        cos, sin = (part[position].float() for part in self.rotation)
        half = heads.shape[-1] // 2
        turned = torch.cat([-heads[:, half:], heads[:, :half]], dim=-1)
        return heads * cos + turned * sin


def _rotation(
    model: Any, tokens: Tensor, layer: int, hooks: list[str]
) -> tuple[tuple[Tensor, Tensor] | None, dict[str, Tensor]]:
    """The rotary embedding's cos and sin for one layer, (seq, d_head), and the activations of some hooks."""
    found: list[tuple[Tensor, Tensor]] = []

    def keep(module: Any, args: Any, kwargs: Any) -> None:
        cos, sin = kwargs["position_embeddings"]
        found.append((cos[0], sin[0]))

    family = model.layout.family
    handle = None
    if family.rotary:
        module = model.hf.get_submodule(model.layout.layer(layer, family.attention))
        handle = module.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        seen = model.run(tokens, hooks=hooks, logits=False).activations
    finally:
        if handle is not None:
            handle.remove()
    return (found[0] if found else None), seen
