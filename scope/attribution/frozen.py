"""The model on one prompt with attention patterns and norm denominators held fixed: linear in the residual stream.

With them fixed, everything between what a layer's MLP writes and what a later layer's MLP reads is a linear map
(Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; Ameisen et al. 2025, "Circuit Tracing",
section 3, whose local replacement model this is the linear part of):

    mid_l  = pre_l + P_l(W_O A_l W_V N1_l(pre_l))        A_l the attention pattern, N a norm divided by its actual
    post_l = mid_l + mlp_out_l                            denominator, P the norm behind attention where there is one
    pre_{l+1} = post_l

An MLP reads mid_l, or pre_l where attention and MLP stand beside each other (Pythia).

`FrozenModel.pull_back` runs this map backwards: from a direction at what a layer reads (or at the logits) to the
gradient at what every layer before it writes, and at the embeddings. A target's edges are the inner products of those
gradients with what was written there. No MLP is on the way: what MLPs do is what features and error nodes stand for.

Where a layer has an embedding table of its own (`scope.models.per_layer`), its gate is held fixed too, so that what it
writes is linear in the token's row and in the main embedding: two sources that no layer before it is on the way of. A
norm on values, values that later layers share, and the scalar at a layer's end belong to the map. So does what Gemma 3n
makes of its stack of residual streams (`scope.attribution.frozen_streams`): above, pre_l is then what a layer reads of
the stack, and what it writes goes back into all streams.

1. `scope.attribution.freezing.freeze` runs the prompt once and records queries, keys, the denominators of norms and
   what every layer wrote.
2. The pattern of a layer is made from queries and keys when it is needed, in chunks of queries, and kept where it is
   small: nothing of size tokens x tokens is kept for a long prompt.
3. `pull_back` takes many directions at once, each from its own position, and never looks at later positions.

Interventions that are in force are part of the map, each an affine one at its hook (`scope.attribution.linear_edits`).
"""

from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from scope.attribution.frozen_attention import FrozenAttention, attended
from scope.attribution.frozen_norm import FrozenNorm
from scope.attribution.frozen_streams import FrozenStream, StreamEnds
from scope.attribution.linear_edits import LinearEdit
from scope.models.attention import own_attention
from scope.models.per_layer import PerLayerWrites

__all__ = [
    "FrozenAttention",
    "FrozenLayer",
    "FrozenModel",
    "Pulled",
    "attention_as_frozen",
    "tensor_cores",
]


@dataclass(frozen=True, eq=False)
class FrozenLayer:
    """The linear part of one layer, and what its MLP wrote."""

    ln1: FrozenNorm
    attention: FrozenAttention
    ln1_post: FrozenNorm | None
    ln2: FrozenNorm
    mlp_out: Float[Tensor, "seq d_model"]
    """What the layer's MLP added to the residual stream, in front of interventions on it."""
    values_from: int
    """The layer whose keys and values it attends to: its own, or the earlier one that it shares them with."""
    per_layer: PerLayerWrites | None = None
    """What the layer's own embedding table and the projection of the main embedding wrote."""
    scale: float = 1.0
    """What the residual stream is multiplied by at the layer's end."""
    stream: FrozenStream = field(default_factory=FrozenStream)
    """How it reads and writes the residual stream."""


class Pulled(NamedTuple):
    """Gradients of some directions at one place of the residual stream."""

    layer: int
    """-1 for the embeddings."""
    where: Literal["ple_out", "mlp_out", "attn_out", "embedding", "edit"]
    """What was written there; "edit" for what an intervention puts there."""
    gradient: Float[Tensor, "n rows d"]
    """On the first `rows` positions; of an intervention as wide as its hook."""
    edit: LinearEdit | None = None


@dataclass(frozen=True, eq=False)
class FrozenModel:
    """A model on one prompt, linear but for its MLPs."""

    model: Any
    tokens: Int[Tensor, " seq"]
    embedding: Float[Tensor, "seq d_model"]
    """What the residual stream starts with, positions included; of an embedding that is edited, what is let through."""
    layers: tuple[FrozenLayer, ...]
    final_norm: FrozenNorm
    final: Float[Tensor, "seq d_model"]
    """The residual stream into the final norm."""
    skips: Mapping[int, Float[Tensor, "d_model d_model"]]
    """Per layer a linear part from what its MLP reads (`ln2`'s output) to what it writes: a skip transcoder's."""
    edits: Mapping[str, tuple[LinearEdit, ...]] = field(default_factory=dict)
    """Interventions in force, by hook name, in order."""
    ends: StreamEnds = field(default_factory=StreamEnds)
    """Where the residual stream begins and ends."""

    @property
    def n_tokens(self) -> int:
        return len(self.tokens)

    def at_mlp_input(self, layer: int, directions: Float[Tensor, "n d_model"], positions: Tensor) -> Tensor:
        """Directions at what the MLP of a layer reads, as gradients at the residual stream before its norm."""
        return self.layers[layer].ln2.backward(directions, positions)

    def at_logits(self, directions: Float[Tensor, "n d_model"], positions: Tensor) -> Float[Tensor, "n d_model"]:
        """Directions at what the unembedding reads, as gradients at the residual stream before the final norm."""
        return self.final_norm.backward(directions, positions)

    def pull_back(
        self,
        layers: Int[Tensor, " n"],
        positions: Int[Tensor, " n"],
        gradients: Float[Tensor, "n d_model"],
    ) -> Iterator[Pulled]:
        """Run directions back through the model.

        Args:
            layers: the layer of each direction; n_layers for the logits.
            positions: the position of each.
            gradients: at the residual stream that the MLP of that layer reads (`at_mlp_input`), or before the final
                norm (`at_logits`).

        Yields:
            From the last layer to the first the gradients at what its per-layer embedding wrote, where it has one, at
            what its MLP wrote, then at what its attention wrote, and last of all at the embeddings; among them, where
            they stand, at what interventions put there. A tensor that was given is overwritten when the next is asked
            for.
        """
        rows = int(positions.max()) + 1
        part, n = slice(0, rows), len(self.layers)
        now = self.ends.zeros(gradients, rows)
        runs = torch.arange(len(gradients), device=gradients.device)
        top = int(layers.max())
        shared: dict[int, Tensor] = {}
        beside = self.model.layout.parallel
        here = layers == n
        now[runs[here], positions[here]] += self.ends.at_last(gradients[here], positions[here])

        def inject(layer: int, into: Tensor, skipped: Tensor | None) -> None:
            """What reaches the stream from what the MLP of a layer reads."""
            if skipped is not None:
                self.layers[layer].ln2.add_backward(into, skipped, part)
            here = layers == layer
            if bool(here.any()):
                into[runs[here], positions[here]] += gradients[here]

        for layer in range(min(top, n - 1), -1, -1):
            block, skipped = f"blocks.{layer}.", None
            frozen = self.layers[layer]
            stream = frozen.stream
            if layer < top:
                now = yield from self._in_front_of_stream_edits(f"{block}hook_resid_post", now, stream)
                if frozen.scale != 1.0:
                    now *= frozen.scale
                if frozen.per_layer is not None:
                    yield Pulled(layer, "ple_out", stream.at_table(now))
            past, end = stream.at_end(now, part)
            del now  # where there is no stack, an edit makes another of `end`
            if layer < top:
                written = yield from self._in_front_of_edits(f"{block}hook_mlp_out", end)
                yield Pulled(layer, "mlp_out", written)
                if layer in self.skips:
                    skipped = written @ self.skips[layer]
            if not beside:
                inject(layer, end, skipped)
            end = yield from self._in_front_of_edits(f"{block}hook_resid_mid", end)
            end = stream.at_attention(end)
            written = yield from self._in_front_of_edits(f"{block}hook_attn_out", end)
            yield Pulled(layer, "attn_out", written)
            normed = stream.beside_attention(end, part)
            yield from self._through_attention(layer, end, written, shared)
            if normed is not None:
                frozen.ln1.add_backward(end, normed, part)
            if beside:
                inject(layer, end, skipped)
            now = stream.in_front(past, end, part)
            now = yield from self._in_front_of_stream_edits(f"{block}hook_resid_pre", now, stream)
        now = self.ends.at_embedding(now, part)
        yield from self._in_front_of_edits("hook_embed", now)
        yield Pulled(-1, "embedding", now)

    def _in_front_of_edits(self, hook: str, gradient: Tensor) -> Generator[Pulled, None, Tensor]:
        """From the gradient behind the interventions at a hook to that in front of them."""
        for edit in reversed(self.edits.get(hook, ())):
            yield Pulled(edit.layer, "edit", gradient, edit)
            gradient = edit.backward(gradient, slice(0, gradient.shape[1]))
        return gradient

    def _in_front_of_stream_edits(
        self, hook: str, gradient: Tensor, stream: FrozenStream
    ) -> Generator[Pulled, None, Tensor]:
        """The same at the active stream of a stack."""
        if hook not in self.edits:
            return gradient
        active = yield from self._in_front_of_edits(hook, stream.active(gradient))
        return stream.with_active(gradient, active)

    def let_through(self, hook: str, value: Float[Tensor, "*batch n d"], rows: slice) -> Float[Tensor, "*batch n d"]:
        """What the interventions at a hook let through of something at some positions."""
        for edit in self.edits.get(hook, ()):
            value = edit.forward(value, rows)
        return value

    def push_forward(
        self,
        layer: int,
        positions: Int[Tensor, " n"],
        vectors: Float[Tensor, "n d_model"],
        until: int,
        where: Literal["mlp_out", "ple_out"] = "mlp_out",
    ) -> Iterator[tuple[int, Float[Tensor, "n seq d_model"]]]:
        """What vectors that are written to the residual stream become on the way to a later layer: the transpose of
        `pull_back`.

        Args:
            layer: the layer that writes; -1 for the embeddings.
            positions: where each is written.
            vectors: what is written, as interventions on it let it through.
            until: the layer to stop before; n_layers for the logits.
            where: whether the layer's MLP writes or its per-layer embedding.

        Yields:
            (layer, what the vectors have made of what that layer's first norm reads).
        """
        written = vectors.new_zeros(len(vectors), self.n_tokens, vectors.shape[1])
        written[torch.arange(len(vectors), device=vectors.device), positions] = vectors
        rows = slice(0, self.n_tokens)
        if layer < 0:
            now = self.ends.enter(written, rows)
        else:
            stream = self.layers[layer].stream
            if where == "ple_out":
                now = stream.of_table(written)
            else:
                nothing = self.ends.zeros(vectors, self.n_tokens)
                now = stream.out_of_layer(nothing, stream.active(nothing), written, rows)
            now = self._stream_let_through(f"blocks.{layer}.hook_resid_post", now * self.layers[layer].scale, stream)
        read: dict[int, Tensor] = {}
        for index in range(layer + 1, min(until + 1, len(self.layers))):
            block, frozen = f"blocks.{index}.", self.layers[index]
            now = self._stream_let_through(f"{block}hook_resid_pre", now, frozen.stream)
            now, before = frozen.stream.into_layer(now, rows)
            yield index, before
            read[index] = frozen.ln1(before, rows)
            # What an earlier layer read before anything was written is not changed by it.
            values = read.get(frozen.values_from, torch.zeros_like(before))
            heads = self.let_through(f"{block}attn.hook_z", frozen.attention.read(values, rows), rows)
            written = frozen.attention.out_of_heads(heads)
            written = written if frozen.ln1_post is None else frozen.ln1_post(written, rows)
            written = self.let_through(f"{block}hook_attn_out", written, rows)
            end = frozen.stream.behind_attention(before, written, read[index], rows)
            end = self.let_through(f"{block}hook_resid_mid", end, rows)
            if index in self.skips and index < until:
                read_by_mlp = before if self.model.layout.parallel else end
                written = frozen.ln2(read_by_mlp, rows) @ self.skips[index].T
                end = end + self.let_through(f"{block}hook_mlp_out", written, rows)
            now = frozen.stream.out_of_layer(now, before, end, rows) * frozen.scale
            now = self._stream_let_through(f"{block}hook_resid_post", now, frozen.stream)

    def _stream_let_through(self, hook: str, stack: Tensor, stream: FrozenStream) -> Tensor:
        """What the interventions at the active stream of a stack let through."""
        if hook not in self.edits:
            return stack
        return stream.with_active(stack, self.let_through(hook, stream.active(stack), slice(0, self.n_tokens)))

    def _through_attention(
        self,
        layer: int,
        gradient: Float[Tensor, "n rows d_model"],
        written: Float[Tensor, "n rows d_model"],
        shared: dict[int, Tensor],
    ) -> Generator[Pulled, None, None]:
        """Add to `gradient` what reaches the residual stream before a layer's attention through it, and through those
        that share its values, from the gradient at what it writes. What reaches an earlier layer's stream through
        shared values waits in `shared`."""
        part = slice(0, gradient.shape[1])
        frozen = self.layers[layer]
        if frozen.ln1_post is not None:
            written = frozen.ln1_post.backward(written, part)
        heads = frozen.attention.into_heads(written)
        heads = yield from self._in_front_of_edits(f"blocks.{layer}.attn.hook_z", heads)
        reached = frozen.attention.backward(heads)
        owner = frozen.values_from
        if owner != layer:
            shared[owner] = shared[owner] + reached if owner in shared else reached
            return
        if layer in shared:
            reached = reached + shared.pop(layer)
        frozen.ln1.add_backward(gradient, reached, part)

    def attention_constants(self) -> list[Float[Tensor, "seq d_model"]]:
        """Per layer what the biases of its attention, and of the norm before it, add to the residual stream.

        A part of every target's sum beside its edges, as no node stands for it.
        """
        found = []
        rows = slice(0, self.n_tokens)
        for index, frozen in enumerate(self.layers):
            attention = frozen.attention
            values = torch.zeros(attention.W_V.shape[:2], device=frozen.mlp_out.device)
            if attention.value_bias is not None:
                values = values + attention.value_bias
            if frozen.ln1.bias is not None:
                values = values + attention.W_V @ frozen.ln1.bias
            # A pattern's rows sum to 1: a constant value comes out of every query as it went in.
            heads = values.repeat_interleave(attention.group, 0).flatten().expand(self.n_tokens, -1)
            written = attention.out_of_heads(self.let_through(f"blocks.{index}.attn.hook_z", heads, rows))
            if attention.output_bias is not None:
                written = written + attention.output_bias
            if frozen.ln1_post is not None:
                written = frozen.ln1_post(written, rows)
            found.append(written)
        return found


@contextmanager
def tensor_cores(model: Any) -> Iterator[None]:
    """Within it a GPU multiplies float32 matrices in TF32, six times as fast, if the model itself computes in half
    precision: TF32 keeps 10 bits, bfloat16 and with it all that was recorded 7. A float32 model's stay as they are."""
    if model.device.type != "cuda" or model.dtype == torch.float32:
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def attention_as_frozen(frozen: FrozenModel) -> Iterator[None]:
    """Within it the model attends as it did on the frozen prompt, whatever queries and keys it has; values are live.

    For runs of the prompt itself, or of prompts of as many tokens.
    """

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        return attended(frozen.layers[module.layer_idx].attention.pattern, value), None

    with frozen.model.lock, own_attention(frozen.model, attention):
        yield
