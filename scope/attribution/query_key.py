"""`qk_pairs`: why a head looked from one position at another, as pairs of what was written at the two.

Norms held at their denominators, query and key are linear in their residual streams, and those are sums of what was
written before: embeddings, features, error nodes, attention layers, biases, and where the model has them what per-layer
tables wrote. With R the rotation of a position:

    score = scaling (R_q W_Q x_q) . (R_k W_K x_k) = Σ_{i, j} w_ij(k)
    w_ij(k) = scaling (R_q W_Q x_q^i) . (R_k W_K x_k^j)

(Kamath et al. 2025, "Tracing Attention Computation Through Feature Interactions"). The softmax does not see what all
keys have in common. So each pair is set against what the same pair comes to at the other keys that the query can see:

    relative_ij = w_ij(k) - mean over other keys k' of w_ij(k')

where a feature that does not fire at k' counts 0 there, and those that fire at other keys but not at this one are one
node for each layer, "elsewhere". The relative weights add up to the score minus its mean over the other keys. Scores
are before soft-capping.

Where layers scale the stream (Gemma 4), what was written before them counts with their scales; where they mix several
streams (AltUp, Gemma 3n), as these are mixed on the way (`scope.attribution.along_stream`). A layer that takes its keys
from an earlier one has a key side of that layer: what was written before it, through its norms.

1. The prompt is read once (`scope.attribution.reading.read_prompt`), and what every attention layer wrote.
2. The head's projection with its rotation is pulled back through the layer's norm and along the residual stream to
   everything that writes to it: at the query, and at each key.
3. Pairs at this key, and the sum over the other keys, node by node.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from scope.attribution.along_stream import along_the_stream
from scope.attribution.frozen_norm import FrozenNorm
from scope.attribution.reading import Prompt, read_prompt
from scope.errors import OutOfRangeError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["PAIR_KINDS", "PairNode", "QkPairs", "qk_pairs"]

PAIR_KINDS = ("embedding", "table", "feature", "elsewhere", "attention", "error", "skip", "bias")
Progress = Callable[[int, int | None], None]


class PairNode(NamedTuple):
    """Something that was written to the residual stream at a query or a key."""

    kind: str
    """One of `PAIR_KINDS`: "attention" is what a layer's attention wrote, "skip" a skip transcoder's linear part,
    "table" what a layer's per-layer table wrote (what the projection of the main embedding wrote there counts to the
    "embedding"), "elsewhere" the features of a layer that fire at other keys only."""
    layer: int = -1
    feature: int = -1

    def __str__(self) -> str:
        if self.kind == "feature":
            return f"L{self.layer} feature {self.feature}"
        if self.kind == "elsewhere":
            return f"L{self.layer} features of other keys"
        return self.kind if self.layer < 0 else f"L{self.layer} {self.kind}"


class QkPairs(NamedTuple):
    """The score of one head for one query and one key, as a sum over pairs of nodes."""

    table: "pd.DataFrame"
    """query_kind, query_layer, query_feature, key_kind, key_layer, key_feature (see `PairNode`; layer and feature are
    -1 where there is none), weight, relative: by absolute relative weight, the largest first."""
    kinds: "pd.DataFrame"
    """query_kind, key_kind, relative: all pairs summed by their kinds, in the same order."""
    score: float
    """Before softmax, soft-capping and mask: the sum of all weights."""
    relative: float
    """The score minus its mean over the other keys that the query can see: the sum of all relative weights. The score
    itself where there is no other key."""
    n_others: int
    """Other keys that the query can see."""
    attention: tuple[float, ...]
    """How much the head attends to each position up to the query."""


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
    *,
    progress: Progress | None = None,
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
        progress: called with (other keys done, how many there are).

    Raises:
        OutOfRangeError: there is no such layer, head or position, or the key lies behind the query.
        InvalidInputError: the model's attention cannot be frozen.
    """
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
    frozen = read.frozen.layers[layer]
    owner = frozen.values_from
    own = {"q": f"blocks.{layer}.attn.hook_q", "k": f"blocks.{owner}.attn.hook_k"}
    outputs = [f"blocks.{i}.hook_attn_out" for i in range(layer)]
    rotation, seen = _rotation(model, tokens, layer, [*own.values(), *outputs])
    kv_head = head // frozen.attention.group
    attention_out = [seen[name].float() for name in outputs]
    query_side = _Side(model, layer, "q", head, seen[own["q"]], rotation)
    key_side = _Side(model, owner, "k", kv_head, seen[own["k"]], rotation)
    written = _Written(read, attention_out, owner)
    query_nodes, queries = _Written(read, attention_out, layer).at(query, query_side)
    key_nodes, keys = written.at(key, key_side)
    others = [place for place in _visible(frozen.attention.mask, query) if place != key]
    key_nodes, mean = _mean_of_others(written, key_side, key_nodes, others, progress or (lambda done, total: None))
    keys = torch.cat([keys, keys.new_zeros(len(key_nodes) - len(keys), keys.shape[1])])
    scaling = frozen.attention.scaling
    weights = scaling * queries @ keys.T
    relative = weights - scaling * queries @ mean.T
    attention = frozen.attention.pattern(slice(query, query + 1))[head, 0].tolist()
    return QkPairs(
        _table(query_nodes, key_nodes, weights, relative, top),
        _by_kind(query_nodes, key_nodes, relative),
        float(weights.sum()),
        float(relative.sum()),
        len(others),
        tuple(attention),
    )


def _visible(mask: Tensor | None, query: int) -> list[int]:
    """The keys that a query can see."""
    if mask is None:
        return list(range(query + 1))
    seen: list[int] = (mask[query, : query + 1] > -1.0).nonzero()[:, 0].tolist()
    return seen


def _mean_of_others(
    written: "_Written", side: "_Side", nodes: list[PairNode], others: list[int], tell: Progress
) -> tuple[list[PairNode], Float[Tensor, "n d_head"]]:
    """The nodes of a key with one for each layer's features elsewhere, and the mean over other keys of what each
    comes to in the head's keys."""
    nodes = [*nodes, *(PairNode("elsewhere", layer) for layer in written.layers)]
    place = {node: row for row, node in enumerate(nodes)}
    total = torch.zeros(len(nodes), len(side.weight), device=side.weight.device)
    for number, key in enumerate(others):
        there, keys = written.at(key, side)
        rows = [place[node] if node in place else place[PairNode("elsewhere", node.layer)] for node in there]
        total.index_add_(0, torch.tensor(rows, device=total.device), keys)
        tell(number + 1, len(others))
    return nodes, total / max(1, len(others))


def _table(
    query_nodes: list[PairNode],
    key_nodes: list[PairNode],
    weights: Float[Tensor, "n_query n_key"],
    relative: Float[Tensor, "n_query n_key"],
    top: int | None,
) -> "pd.DataFrame":
    import pandas as pd

    flat = relative.flatten()
    n = len(flat) if top is None else min(top, len(flat))
    order = flat.abs().sort(descending=True, stable=True).indices[:n]
    ends = {
        side: [nodes[number] for number in numbers.tolist()]
        for side, nodes, numbers in (
            ("query", query_nodes, order // len(key_nodes)),
            ("key", key_nodes, order % len(key_nodes)),
        )
    }
    named = {
        f"{side}_{name}": [getattr(node, name) for node in nodes]
        for side, nodes in ends.items()
        for name in PairNode._fields
    }
    return pd.DataFrame({**named, "weight": weights.flatten()[order].tolist(), "relative": flat[order].tolist()})


def _by_kind(
    query_nodes: list[PairNode], key_nodes: list[PairNode], relative: Float[Tensor, "n_query n_key"]
) -> "pd.DataFrame":
    import pandas as pd

    n = len(PAIR_KINDS)
    rows, columns = (
        torch.tensor([PAIR_KINDS.index(node.kind) for node in nodes], device=relative.device)
        for nodes in (query_nodes, key_nodes)
    )
    sums = relative.new_zeros(n, n)
    sums.index_put_((rows[:, None], columns[None]), relative, accumulate=True)
    found = [
        {"query_kind": one, "key_kind": other, "relative": float(sums[i, j])}
        for i, one in enumerate(PAIR_KINDS)
        for j, other in enumerate(PAIR_KINDS)
        if one in {node.kind for node in query_nodes} and other in {node.kind for node in key_nodes}
    ]
    table = pd.DataFrame(found)
    return table.sort_values("relative", key=abs, ascending=False, kind="stable", ignore_index=True)


class _Written:
    """Everything that was written to the residual stream in front of a layer, position by position."""

    def __init__(self, read: Prompt, attention_out: list[Tensor], layer: int) -> None:
        self.read, self.attention_out, self.until = read, attention_out, layer
        self.layers = [index for index in read.firing if index < layer]
        """Of the features."""

    def at(self, position: int, side: "_Side") -> tuple[list[PairNode], Float[Tensor, "n d_head"]]:
        """The nodes of a position, biases last, and what each comes to in a head's query or key there."""
        read, frozen, d = self.read, self.read.frozen, self.read.dictionaries
        norm = frozen.layers[self.until].ln1
        directions = norm.backward(side.directions(position)[:, None], slice(position, position + 1))[:, 0]
        way = along_the_stream(frozen, directions, position, self.until, "attention", skips=False)
        nodes, features, others = [PairNode("embedding")], [], []
        embedding, bias = frozen.embedding[position] @ way.embedding.T, side.bias(norm, position)
        rests = [layer.mlp_out[position] for layer in frozen.layers[: self.until]]
        for index in self.layers:
            firing = read.firing[index]
            ends = torch.tensor([position, position + 1], device=firing.position.device)
            start, stop = torch.searchsorted(firing.position, ends).tolist()
            ids, values = firing.feature[start:stop], firing.activation[start:stop, None]
            total = torch.zeros(len(ids), len(directions), device=directions.device)
            for place in d.written_from(index):
                if place < self.until:
                    rows = values * d.decoder(index, ids, place).to(total.device)
                    rests[place] = rests[place] - rows.sum(0)
                    total += rows @ way.mlp_out[place].T
            nodes += [PairNode("feature", index, feature) for feature in ids.tolist()]
            features.append(total)
        for index, rest in enumerate(rests):
            error, own_bias = read.errors[index][position], read.mlp_biases.get(index)
            own_bias = torch.zeros_like(error) if own_bias is None else own_bias
            written = torch.stack([error, own_bias, rest - error - own_bias]) @ way.mlp_out[index].T
            nodes += [PairNode("attention", index), PairNode("error", index)]
            others += [self.attention_out[index][position] @ way.attn_out[index].T, written[0]]
            bias = bias + written[1]
            if index in frozen.skips:
                nodes.append(PairNode("skip", index))
                others.append(written[2])
            per_layer = frozen.layers[index].per_layer
            if per_layer is not None:
                nodes.append(PairNode("table", index))
                others.append(per_layer.table[position] @ way.ple_out[index].T)
                embedding = embedding + per_layer.projection[position] @ way.ple_out[index].T
        return [*nodes, PairNode("bias")], torch.cat([embedding[None], *features, torch.stack([*others, bias])])


class _Side:
    """The linear map from a layer's normed residual stream to one head's query or key, rotation included."""

    def __init__(self, model: Any, layer: int, which: str, head: int, seen: Tensor, rotation: Any) -> None:
        layout, family = model.layout, model.layout.family
        fused = len(family.qkv) == 1
        module = model.hf.get_submodule(layout.layer(layer, family.qkv[0 if fused else "qk".index(which)]))
        weight = module.weight.detach().float()
        weight = weight if isinstance(module, torch.nn.Linear) else weight.T
        d_head = layout.sizes[layer].d_head
        before = "qk".index(which) if fused else 0
        start = head * d_head + before * layout.n_heads * d_head
        if family.interleaved:
            start = (3 * head + before) * d_head
        self.weight = weight[start : start + d_head]
        self.offset = None if module.bias is None else module.bias.detach().float()[start : start + d_head]
        self.rotation = rotation
        self.gain = None
        if layout.query_key_norms:
            norm = model.hf.get_submodule(layout.layer(layer, f"{family.attention}.{which}_norm"))
            eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
            own = seen[:, head].float()
            gain = norm.weight.detach().float() + (1.0 if family.gain_offset else 0.0)
            self.gain = gain / (own.square().mean(-1, keepdim=True) + eps).sqrt()

    def directions(self, position: int) -> Float[Tensor, "d_head d_model"]:
        """From what the layer's norm gives at a position to each number of the query or key."""
        return self._placed(self.weight.T, position).T

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
        rotating, rest = heads[:, : len(cos)], heads[:, len(cos) :]
        half = len(cos) // 2
        turned = torch.cat([-rotating[:, half:], rotating[:, :half]], dim=-1)
        return torch.cat([rotating * cos + turned * sin, rest], dim=-1)


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
