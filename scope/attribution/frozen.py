"""The model on one prompt with attention patterns and norm denominators held fixed: linear in the residual stream.

With them fixed, everything between what a layer's MLP writes and what a later layer's MLP reads is a linear map
(Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; Ameisen et al. 2025, "Circuit Tracing",
section 3, whose local replacement model this is the linear part of):

    mid_l  = pre_l + P_l(W_O A_l W_V N1_l(pre_l))        A_l the attention pattern, N a norm divided by its actual
    post_l = mid_l + mlp_out_l                            denominator, P the norm behind attention where there is one
    pre_{l+1} = post_l

`FrozenModel.pull_back` runs this map backwards: from a direction at what a layer reads (or at the logits) to the
gradient at what every layer before it writes, and at the embeddings. A target's edges are the inner products of those
gradients with what was written there. No MLP is on the way: what MLPs do is what features and error nodes stand for.

Where a layer has an embedding table of its own (Gemma 4 E2B and E4B; `scope.models.per_layer`), its gate is held fixed
too, so that what it writes is linear in the token's row and in the main embedding: two sources that no layer before it
is on the way of. A norm on values, values that later layers share, and the scalar at a layer's end belong to the map.

1. `freeze` runs the prompt once. An attention function of our own records rotated queries and keys; handlers record
   the denominators of norms and what every layer wrote.
2. The pattern of a layer is made from queries and keys when it is needed, in chunks of queries, and kept where it is
   small: nothing of size tokens x tokens is kept for a long prompt.
3. `pull_back` takes many directions at once, each from its own position, and never looks at later positions.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from scope.attribution.frozen_attention import FrozenAttention, attended, recording
from scope.errors import InvalidInputError
from scope.models.attention import own_attention
from scope.models.hooks import HookPoint
from scope.models.losses import final_norm_gain
from scope.models.per_layer import PerLayerWrites, layer_scale, write_hooks, write_parts
from scope.models.taps import tapped

__all__ = ["FrozenAttention", "FrozenLayer", "FrozenModel", "FrozenNorm", "Pulled", "attention_as_frozen", "freeze"]

PATTERN_BYTES = 2**28
"""Attention patterns of all layers together that are kept; more are made anew each time."""


@dataclass(frozen=True, eq=False)
class FrozenNorm:
    """x -> gain (x - mean x) / denominator, the mean only for a LayerNorm, the denominator as it was."""

    gain: Float[Tensor, " d_model"]
    denominator: Float[Tensor, " seq"]
    centred: bool
    bias: Float[Tensor, " d_model"] | None

    def __call__(self, x: Float[Tensor, "*batch n d_model"], rows: slice) -> Float[Tensor, "*batch n d_model"]:
        """The norm of the rows of some positions, without its bias."""
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        return x * self.gain / self.denominator[rows, None]

    def backward(self, gradient: Float[Tensor, "*batch n d_model"], rows: slice) -> Float[Tensor, "*batch n d_model"]:
        """The gradient at the norm's input."""
        gradient = gradient * self.gain / self.denominator[rows, None]
        return gradient - gradient.mean(-1, keepdim=True) if self.centred else gradient


@dataclass(frozen=True, eq=False)
class FrozenLayer:
    """The linear part of one layer, and what its MLP wrote."""

    ln1: FrozenNorm
    attention: FrozenAttention
    ln1_post: FrozenNorm | None
    ln2: FrozenNorm
    mlp_out: Float[Tensor, "seq d_model"]
    """What the layer's MLP added to the residual stream."""
    values_from: int
    """The layer whose keys and values it attends to: its own, or the earlier one that it shares them with."""
    per_layer: PerLayerWrites | None = None
    """What the layer's own embedding table and the projection of the main embedding wrote."""
    scale: float = 1.0
    """What the residual stream is multiplied by at the layer's end."""


class Pulled(NamedTuple):
    """Gradients of some directions at one place of the residual stream."""

    layer: int
    """-1 for the embeddings."""
    where: Literal["ple_out", "mlp_out", "attn_out", "embedding"]
    """What was written there."""
    gradient: Float[Tensor, "n rows d_model"]
    """On the first `rows` positions."""


@dataclass(frozen=True, eq=False)
class FrozenModel:
    """A model on one prompt, linear but for its MLPs."""

    model: Any
    tokens: Int[Tensor, " seq"]
    embedding: Float[Tensor, "seq d_model"]
    """What the residual stream starts with, positions included."""
    layers: tuple[FrozenLayer, ...]
    final_norm: FrozenNorm
    final: Float[Tensor, "seq d_model"]
    """The residual stream into the final norm."""
    skips: Mapping[int, Float[Tensor, "d_model d_model"]]
    """Per layer a linear part from what its MLP reads (`ln2`'s output) to what it writes: a skip transcoder's."""

    @property
    def n_tokens(self) -> int:
        return len(self.tokens)

    def require_plain_attention(self, what: str) -> None:
        """Refuse what does not know shared or normed values, or layers that scale the stream.

        Raises:
            InvalidInputError: the model has one of these (Gemma 4).
        """
        for index, layer in enumerate(self.layers):
            if layer.values_from != index or layer.attention.value_denominator is not None or layer.scale != 1:
                raise InvalidInputError(
                    f"{what} is not made for models with normed or shared values or scaled layers, such as "
                    f"{type(self.model.hf).__name__}."
                )

    def at_mlp_input(self, layer: int, directions: Float[Tensor, "n d_model"], positions: Tensor) -> Tensor:
        """Directions at what the MLP of a layer reads, as gradients at the residual stream before its norm."""
        norm = self.layers[layer].ln2
        scaled = directions * norm.gain / norm.denominator[positions, None]
        return scaled - scaled.mean(-1, keepdim=True) if norm.centred else scaled

    def at_logits(self, directions: Float[Tensor, "n d_model"], positions: Tensor) -> Float[Tensor, "n d_model"]:
        """Directions at what the unembedding reads, as gradients at the residual stream before the final norm."""
        norm = self.final_norm
        scaled = directions * norm.gain / norm.denominator[positions, None]
        return scaled - scaled.mean(-1, keepdim=True) if norm.centred else scaled

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
            gradients: at the residual stream between attention and MLP of that layer (`at_mlp_input`), or before the
                final norm (`at_logits`).

        Yields:
            From the last layer to the first the gradients at what its per-layer embedding wrote, where it has one, at
            what its MLP wrote, then at what its attention wrote, and last of all at the embeddings. A tensor that was
            given is overwritten when the next is asked for.
        """
        rows = int(positions.max()) + 1
        n = len(self.layers)
        now = gradients.new_zeros(len(gradients), rows, gradients.shape[1])
        runs = torch.arange(len(gradients), device=gradients.device)
        top = int(layers.max())
        shared: dict[int, Tensor] = {}

        def inject(layer: int) -> None:
            here = layers == layer
            if bool(here.any()):
                now[runs[here], positions[here]] += gradients[here]

        inject(n)
        for layer in range(min(top, n - 1), -1, -1):
            if layer < top:
                now *= self.layers[layer].scale
                if self.layers[layer].per_layer is not None:
                    yield Pulled(layer, "ple_out", now)
                yield Pulled(layer, "mlp_out", now)
            if layer in self.skips:
                part = slice(0, rows)
                now += self.layers[layer].ln2.backward(now @ self.skips[layer], part)
            inject(layer)
            yield Pulled(layer, "attn_out", now)
            self._through_attention(layer, now, shared)
        yield Pulled(-1, "embedding", now)

    def push_forward(
        self, layer: int, positions: Int[Tensor, " n"], vectors: Float[Tensor, "n d_model"], until: int
    ) -> Iterator[tuple[int, Float[Tensor, "n seq d_model"]]]:
        """What vectors that the MLP of a layer writes become on the way to a later one: the transpose of `pull_back`.

        Args:
            layer: the layer that writes; -1 for the embeddings.
            positions: where each is written.
            vectors: what is written.
            until: the layer to stop before; n_layers for the logits.

        Yields:
            (layer, what the vectors have made of the residual stream in front of that layer's attention).
        """
        now = vectors.new_zeros(len(vectors), self.n_tokens, vectors.shape[1])
        now[torch.arange(len(vectors), device=vectors.device), positions] = vectors
        rows = slice(0, self.n_tokens)
        if layer >= 0:
            now = now * self.layers[layer].scale
        read: dict[int, Tensor] = {}
        for index in range(layer + 1, min(until + 1, len(self.layers))):
            yield index, now
            frozen = self.layers[index]
            read[index] = frozen.ln1(now, rows)
            # What an earlier layer read before anything was written is not changed by it.
            values = read.get(frozen.values_from, torch.zeros_like(now))
            written = frozen.attention.heads(values, rows).sum(0)
            now = now + (written if frozen.ln1_post is None else frozen.ln1_post(written, rows))
            if index in self.skips and index < until:
                now = now + frozen.ln2(now, rows) @ self.skips[index].T
            now = now * frozen.scale

    def _through_attention(
        self, layer: int, gradient: Float[Tensor, "n rows d_model"], shared: dict[int, Tensor]
    ) -> None:
        """Add what reaches the residual stream before a layer's attention through it, and through those that share
        its values. What reaches an earlier layer's stream through shared values waits in `shared`."""
        part = slice(0, gradient.shape[1])
        frozen = self.layers[layer]
        written = gradient if frozen.ln1_post is None else frozen.ln1_post.backward(gradient, part)
        reached = frozen.attention.backward(written)
        owner = frozen.values_from
        if owner != layer:
            shared[owner] = shared[owner] + reached if owner in shared else reached
            return
        if layer in shared:
            reached = reached + shared.pop(layer)
        gradient += frozen.ln1.backward(reached, part)

    def attention_constants(self) -> list[Float[Tensor, "seq d_model"]]:
        """Per layer what the biases of its attention, and of the norm before it, add to the residual stream.

        A part of every target's sum beside its edges, as no node stands for it.
        """
        found = []
        rows = slice(0, self.n_tokens)
        for frozen in self.layers:
            attention = frozen.attention
            values = torch.zeros(attention.W_V.shape[:2], device=frozen.mlp_out.device)
            if attention.value_bias is not None:
                values = values + attention.value_bias
            if frozen.ln1.bias is not None:
                values = values + attention.W_V @ frozen.ln1.bias
            # A pattern's rows sum to 1: a constant value comes out of every query as it went in.
            per_head = values.repeat_interleave(attention.group, 0)
            written = torch.einsum("he,hde->d", per_head, attention.W_O).expand_as(frozen.mlp_out)
            if attention.output_bias is not None:
                written = written + attention.output_bias
            if frozen.ln1_post is not None:
                written = frozen.ln1_post(written, rows)
            found.append(written)
        return found


def freeze(
    model: Any, tokens: Int[Tensor, " seq"], extra_hooks: Sequence[str] = ()
) -> tuple[FrozenModel, dict[str, Float[Tensor, "seq width"]]]:
    """Run a prompt once and hold its attention patterns and norm denominators.

    Args:
        model: a `scope.models.LanguageModel`.
        tokens: the prompt's tokens.
        extra_hooks: further hooks whose activations are wanted, such as what transcoders read.

    Returns:
        The frozen model, and the activations of `extra_hooks`, float32.

    Raises:
        InvalidInputError: an architecture whose attention is not transformers' attention interface, or whose residual
            stream is a stack (AltUp).
    """
    layout = model.layout
    if layout.n_streams > 1:
        raise InvalidInputError(
            f"{type(model.hf).__name__} has {layout.n_streams} residual streams (AltUp), which are mixed by what they "
            "hold: there is no graph of exact linear effects. attribute() works on its hooks."
        )
    recorded: dict[int, dict[str, Any]] = {}
    seen: dict[str, Tensor] = {}
    denominators: dict[str, Tensor] = {}
    family = layout.family
    after_attention = "attn.hook_out" if family.ln1_post else None
    norms = ["hook_resid_pre", *([after_attention] if after_attention else []), "hook_mlp_in"]
    wanted = ["hook_embed", *(["hook_pos_embed"] if family.pos_embed else [])]
    wanted += [f"blocks.{i}.hook_mlp_out" for i in range(layout.n_layers)]
    last = f"blocks.{layout.n_layers - 1}.hook_resid_post"
    names = [f"blocks.{i}.{name}" for i in range(layout.n_layers) for name in norms]
    table = model.hook_table
    owners = _value_layers(model)
    value_hooks = _value_hooks(model, owners)
    per_layer = [name for i in range(layout.n_layers if layout.d_per_layer else 0) for name in write_hooks(i)]

    def handler(name: str) -> Any:
        def at(value: Tensor) -> None:
            row = value[0].flatten(1)
            if name in names or name == last:
                denominators[name] = _denominator(row, family.centred_norm, _eps(model, name))
            if name in keep:
                seen[name] = row.float().clone()

        return at

    keep = {*wanted, last, *value_hooks.values(), *per_layer, *(table[name].name for name in extra_hooks)}
    ordered = sorted({*names, *keep}, key=table.rank)
    handlers: dict[HookPoint, Any] = {table[name]: handler(name) for name in ordered}
    with torch.no_grad(), model.lock, recording(model, recorded), tapped(model.hf, handlers, stop=False):
        model.hidden_states(tokens[None])
    if len(recorded) != layout.n_layers:
        raise InvalidInputError(
            f"The attention of {type(model.hf).__name__} cannot be frozen: it does not go through transformers' "
            "attention interface."
        )
    size = 4 * layout.n_layers * layout.n_heads * len(tokens) ** 2
    layers = tuple(
        _layer(model, index, owners[index], value_hooks, recorded[index], denominators, seen, size <= PATTERN_BYTES)
        for index in range(layout.n_layers)
    )
    embedding = seen["hook_embed"] + (seen["hook_pos_embed"] if family.pos_embed else 0.0)
    norm = model.hf.get_submodule(layout.module(family.final_norm))
    final = FrozenNorm(
        final_norm_gain(model).detach().float(),
        denominators[last],
        family.centred_norm,
        None if getattr(norm, "bias", None) is None else norm.bias.detach().float(),
    )
    frozen = FrozenModel(model, tokens, embedding, layers, final, seen[last], {})
    return frozen, {name: seen[table[name].name] for name in extra_hooks}


def _eps(model: Any, name: str) -> float:
    norm = model.hf.get_submodule(model.layout.module(model.layout.family.final_norm))
    return float(norm.eps if hasattr(norm, "eps") else norm.variance_epsilon)


def _denominator(x: Float[Tensor, "*rows width"], centred: bool, eps: float) -> Float[Tensor, "*rows"]:
    x = x.float()
    if centred:
        x = x - x.mean(-1, keepdim=True)
    return (x.square().mean(-1) + eps).sqrt()


def _value_layers(model: Any) -> list[int]:
    """Per layer the one whose values it attends to: its own, or the last of its kind of attention that has any."""
    layout = model.layout
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ["attention"] * layout.n_layers
    owners: list[int] = []
    last: dict[str, int] = {}
    for index, kind in enumerate(kinds):
        if "k" in layout.sizes[index].projections:
            last[kind] = index
        owners.append(last[kind])
    return owners


def _value_hooks(model: Any, owners: Sequence[int]) -> dict[int, str]:
    """Per layer with a norm on its values the hook of what goes into that: values, or keys where these are values."""
    found = {}
    for layer in sorted(set(owners)):
        attention = model.hf.get_submodule(model.layout.layer(layer, model.layout.family.attention))
        if hasattr(attention, "v_norm"):
            letter = "v" if "v" in model.layout.sizes[layer].projections else "k"
            found[layer] = f"blocks.{layer}.attn.hook_{letter}"
    return found


def _layer(
    model: Any,
    index: int,
    owner: int,
    value_hooks: Mapping[int, str],
    recorded: dict[str, Any],
    denominators: Mapping[str, Tensor],
    seen: Any,
    keep: bool,
) -> FrozenLayer:
    layout, family = model.layout, model.layout.family
    block = f"blocks.{index}."

    def norm(relative: str, hook: str) -> FrozenNorm:
        module = model.hf.get_submodule(layout.layer(index, relative))
        gain = module.weight.detach().float() + (1.0 if family.gain_offset else 0.0)
        bias = getattr(module, "bias", None)
        return FrozenNorm(gain, denominators[block + hook], family.centred_norm, None if bias is None else bias.float())

    sizes = layout.sizes[owner]
    W_V, value_bias = _projection(model, owner, "v")
    W_O, output_bias = _projection(model, index, "o")
    value_denominator = None
    if owner in value_hooks:
        norm_of_values = model.hf.get_submodule(layout.layer(owner, family.attention)).v_norm
        values = seen[value_hooks[owner]].unflatten(-1, (sizes.n_key_value_heads, sizes.d_head))
        value_denominator = _denominator(values, False, norm_of_values.eps).T
        if value_bias is not None:
            raise InvalidInputError("A bias on values that are normed afterwards is not supported by graphs.")
    attention = FrozenAttention(
        recorded["query"],
        recorded["key"],
        recorded["mask"],
        recorded["scaling"],
        recorded["softcap"],
        W_V.unflatten(0, (sizes.n_key_value_heads, sizes.d_head)),
        None if value_bias is None else value_bias.unflatten(0, (sizes.n_key_value_heads, sizes.d_head)),
        W_O.unflatten(1, (layout.n_heads, sizes.d_head)).permute(1, 0, 2).contiguous(),
        output_bias,
        keep,
        value_denominator,
    )
    post = norm(family.ln1_post, "attn.hook_out") if family.ln1_post else None
    mlp_out = seen[f"{block}hook_mlp_out"]
    return FrozenLayer(
        norm(family.ln1, "hook_resid_pre"),
        attention,
        post,
        norm(family.ln2, "hook_mlp_in"),
        mlp_out,
        owner,
        write_parts(model, index, seen) if layout.d_per_layer else None,
        layer_scale(model, index),
    )


def _projection(model: Any, index: int, which: str) -> tuple[Tensor, Tensor | None]:
    """Weight (out, in) and bias of v or o, float32: Linear's, or GPT-2's Conv1D's, which is transposed."""
    layout, family = model.layout, model.layout.family
    fused = which == "v" and len(family.qkv) == 1
    value = 0 if fused else 2 if "v" in layout.sizes[index].projections else 1
    path = family.o if which == "o" else family.qkv[value]
    module = model.hf.get_submodule(layout.layer(index, path))
    weight = module.weight.detach().float()
    weight = weight if isinstance(module, torch.nn.Linear) else weight.T
    bias = None if module.bias is None else module.bias.detach().float()
    if fused:
        start = (layout.n_heads + layout.n_key_value_heads) * layout.d_head
        weight, bias = weight[start:], None if bias is None else bias[start:]
    return weight, bias


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
