"""`logit_components`: a logit as a sum over everything that was written to the residual stream where it is read.

The residual stream into the final norm is a sum: the embedding, what each head of each layer's attention wrote, what
each MLP wrote, and biases; in models with per-layer embeddings also what each layer's table and its projection of the
main embedding wrote. With the norm's denominator s held at what it is, a logit is a sum too (Elhage et al. 2021, "A
Mathematical Framework for Transformer Circuits", section "Decomposing and attributing logits"):

    logit = Σ_c  c · g + bias        g = gain (W_U[token] - W_U[against], or - mean W_U) / s

A norm behind attention (Gemma) is held in the same way, so that its heads add up too; scalars that layers end with
(Gemma 4) count with all that was written before them, and so does what mixes AltUp's streams, with Laurel's branch
beside attention (Gemma 3n): g is then another for each that writes (`scope.attribution.along_stream`). Dictionaries
split what they write further: a transcoder or an SAE of an MLP's output splits the MLP into features, b_dec and an
error; an SAE of the residual stream takes the place of everything before it. What the terms miss of the model's own
number, by rounding, is the last row.

It is the direct path alone: what a component does by way of later heads and MLPs is counted as theirs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from scope.attribution.along_stream import StreamGradients, along_the_stream
from scope.attribution.baselines import hooks_of, node_values
from scope.attribution.dictionaries import mlp_dictionaries
from scope.attribution.freezing import freeze
from scope.attribution.frozen import FrozenModel
from scope.attribution.targets import place_of, single_token
from scope.errors import InvalidInputError
from scope.saes.clt import CrossLayerTranscoder

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["LogitComponents", "logit_components"]

COLUMNS = ("component", "layer", "head", "feature", "strength", "effect")


@dataclass(frozen=True, eq=False)
class LogitComponents:
    """A logit, or a difference of two, as a sum."""

    target: str
    position: int
    value: float
    """The model's own number, before any soft-capping: the sum of all effects."""
    table: "pd.DataFrame"
    """component ("embedding", "attention", "mlp", "table", "projection", "feature", "error", "bias", "rounding"), layer
    (-1 where it has none), head (of attention, else -1), feature (else -1), strength (a feature's firing strength, else
    NaN), effect: by absolute effect, the largest first."""

    def by_component(self) -> "pd.DataFrame":
        """component, layer, effect: heads, features and biases summed; in the order of the layers."""
        summed = self.table.groupby(["layer", "component"])[["effect"]].sum().reset_index()
        return summed[["component", "layer", "effect"]]

    def heads(self) -> "pd.DataFrame":
        """Attention's rows alone: layer, head, effect."""
        rows = self.table[self.table["component"] == "attention"]
        return rows[["layer", "head", "effect"]].reset_index(drop=True)

    def _repr_html_(self) -> str:
        from html import escape

        return f"<b>{escape(self.target)}</b> = {self.value:.4g}" + self.table.head(20).to_html(escape=True)


@torch.no_grad()
def logit_components(
    model: Any,
    prompt: Any,
    token: int | str,
    against: int | str | None = None,
    dictionaries: Sequence[Any] = (),
    position: int = -1,
) -> LogitComponents:
    """Decompose a next token's logit, exactly, over what was written where it is read.

    Args:
        model: a `scope.models.LanguageModel`.
        prompt: a text, chat messages or token ids.
        token: the next token, by its id or its text.
        against: another one, for the difference of their logits; None for the logit relative to the mean over the
            vocabulary.
        dictionaries: transcoders, SAEs of MLP outputs or one cross-layer transcoder; or one SAE of the residual stream.
        position: after which token of the prompt.

    Raises:
        InvalidInputError: a dictionary writes elsewhere, or two write one place; or an SAE of the residual stream is
            of one of several (AltUp).
        OutOfRangeError: there is no such token or position.
        MismatchError: a dictionary has another width than the model.
    """
    import pandas as pd

    tokens = model.prompt_tokens(prompt)
    at = place_of(position, len(tokens))
    ids = [single_token(model, one) for one in (token, against) if one is not None]
    parts = _Parts(model, tokens, at, dictionaries)
    other = model.W_U[ids[1]].float() if len(ids) > 1 else model.W_U.mean(0, dtype=torch.float32)
    direction = model.W_U[ids[0]].float() - other
    gradient = parts.frozen.at_logits(direction[None], torch.tensor([at], device=direction.device))
    rows = parts.rows(along_the_stream(parts.frozen, gradient, at, model.n_layers))
    norm_bias = parts.frozen.final_norm.bias
    from_norm = 0.0 if norm_bias is None else float(norm_bias @ direction)
    bias = getattr(model.hf.get_submodule(model.layout.head), "bias", None)
    from_head = 0.0
    if bias is not None:
        from_head = float(bias[ids[0]] - (bias[ids[1]] if len(ids) > 1 else bias.float().mean()))
    if norm_bias is not None or bias is not None:
        rows.append(("bias", -1, -1, -1, float("nan"), from_norm + from_head))
    norm = model.hf.get_submodule(model.layout.module(model.layout.family.final_norm))
    read = norm(parts.frozen.final[at][None].to(model.dtype))[0].float()
    value = float(read @ direction) + from_head
    rows.append(("rounding", -1, -1, -1, float("nan"), value - sum(row[-1] for row in rows)))
    name = f"logit of {token!r}" + (f" minus {against!r}" if against is not None else "")
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    table = table.sort_values("effect", key=abs, ascending=False, kind="stable", ignore_index=True)
    return LogitComponents(name, at, value, table)


Row = tuple[str, int, int, int, float, float]


class _Parts:
    """Everything that was written to the residual stream at one position."""

    def __init__(self, model: Any, tokens: Tensor, at: int, dictionaries: Sequence[Any]) -> None:
        self.model, self.at = model, at
        layers = range(model.n_layers)
        across = [sae for sae in dictionaries if isinstance(sae, CrossLayerTranscoder)]
        self.mlp: Any = mlp_dictionaries(model, dictionaries) if across else None
        self.of_mlp: dict[int, tuple[Any, str, str]] = {}
        self.of_stream: tuple[int, Any, str] | None = None
        for sae in () if across else dictionaries:
            self._place(sae)
        reads = [f"blocks.{i}.ln1.hook_out" for i in layers]
        wanted = [reads_ for _, reads_, _ in self.of_mlp.values()]
        wanted += [self.of_stream[2]] if self.of_stream else []
        wanted += [f"blocks.{i}.ln2.hook_out" for i in self.mlp.layers] if self.mlp else []
        self.frozen: FrozenModel
        self.frozen, self.seen = freeze(model, tokens, [*reads, *dict.fromkeys(wanted)])
        self.is_bos = at == 0 and bool(model.bos_mask(tokens[None])[0, 0])

    def _place(self, sae: Any) -> None:
        reads, writes = hooks_of(self.model, sae)
        block, _, place = writes.partition(".hook_")
        layer = int(block.split(".")[1]) if block.startswith("blocks.") else -1
        if place == "mlp_out":
            if layer in self.of_mlp:
                raise InvalidInputError(f"Two dictionaries write the MLP output of layer {layer}; give one.")
            self.of_mlp[layer] = (sae, reads, writes)
        elif reads == writes and place in ("resid_pre", "resid_post"):
            if self.model.layout.n_streams > 1:
                raise InvalidInputError(
                    f"{writes} is one of {self.model.layout.n_streams} residual streams (AltUp): its SAE does not "
                    "stand for all that was written before it. Give dictionaries of MLP outputs (hook_mlp_out)."
                )
            if self.of_stream is not None:
                raise InvalidInputError("Two SAEs of the residual stream were given; each stands for all before it.")
            self.of_stream = (layer + (place == "resid_post"), sae, writes)
        else:
            raise InvalidInputError(
                f"A logit is decomposed over dictionaries of MLP outputs (hook_mlp_out) or of the residual stream "
                f"(hook_resid_pre, hook_resid_post); this one writes {writes}."
            )

    def rows(self, way: StreamGradients) -> list[Row]:
        """All terms, from the logit's gradients along the residual stream."""
        frozen, at = self.frozen, self.at
        rows: list[Row] = []

        def add(component: str, layer: int, written: Tensor, gradient: Tensor, head: int = -1) -> None:
            rows.append((component, layer, head, -1, float("nan"), float(written @ gradient[0])))

        first = 0
        if self.of_stream is None:
            add("embedding", -1, frozen.embedding[at], way.embedding)
        else:
            first, sae, hook = self.of_stream
            state = self.seen[hook][at]
            rows += self._features(first - 1, sae, state, state, way.in_front[first][0])
        constants = frozen.attention_constants()
        here = slice(at, at + 1)
        across = self._across(way.mlp_out) if self.mlp is not None else {}
        for index in range(first, len(frozen.layers)):
            layer = frozen.layers[index]
            normed = self.seen[f"blocks.{layer.values_from}.ln1.hook_out"][: at + 1]
            heads = layer.attention.heads(frozen.layers[layer.values_from].ln1.without_bias(normed), here)
            if layer.ln1_post is not None:
                heads = layer.ln1_post(heads, here)
            for head, written in enumerate(heads[:, 0]):
                add("attention", index, written, way.attn_out[index], head)
            if bool(constants[index].any()):
                add("bias", index, constants[index][at], way.attn_out[index])
            if index in across:
                rows += across[index]
            elif index in self.of_mlp:
                sae, reads, _ = self.of_mlp[index]
                rows += self._features(index, sae, self.seen[reads][at], layer.mlp_out[at], way.mlp_out[index][0])
            else:
                add("mlp", index, layer.mlp_out[at], way.mlp_out[index])
            if layer.per_layer is not None:
                add("table", index, layer.per_layer.table[at], way.ple_out[index])
                add("projection", index, layer.per_layer.projection[at], way.ple_out[index])
        return rows

    def _features(
        self, layer: int, sae: Any, read: Tensor, written: Tensor, gradient: Float[Tensor, " d_model"]
    ) -> list[Row]:
        """Features, b_dec and error of a dictionary at the position."""
        nodes = node_values(sae, read[None], written[None], self.is_bos)
        ids = nodes.features[0].nonzero()[:, 0]
        values = nodes.features[0, ids]
        decoder = sae.W_dec.detach()[ids.to(sae.W_dec.device)].float().to(gradient.device)
        effects, norms = values * (decoder @ gradient), decoder.norm(dim=-1)
        b_dec = sae.b_dec.detach().float().to(gradient.device)
        return [
            *_feature_rows(layer, ids, values * norms, effects),
            ("bias", layer, -1, -1, float("nan"), float(b_dec @ gradient)),
            ("error", layer, -1, -1, float("nan"), float(nodes.errors[0] @ gradient)),
        ]

    def _across(self, gradients: Mapping[int, Float[Tensor, "1 d_model"]]) -> dict[int, list[Row]]:
        """By layer written, what a cross-layer transcoder's features, b_dec and error come to; a feature stands with
        the layer that it reads, and has a row for each layer that it writes."""
        d = self.mlp
        features = d.encode({layer: self.seen[f"blocks.{layer}.ln2.hook_out"][self.at][None] for layer in d.layers})
        found: dict[int, list[Row]] = {}
        for written in d.layers:
            gradient = gradients[written][0]
            b_dec = d.b_dec(written).to(gradient.device)
            rest = self.frozen.layers[written].mlp_out[self.at] - b_dec
            rows: list[Row] = []
            for source in d.writers_of(written):
                own = features[source][0] * (0.0 if self.is_bos else 1.0)
                ids = own.nonzero()[:, 0]
                decoder = d.decoder(source, ids, written).to(gradient.device)
                rest = rest - own[ids] @ decoder
                effects = own[ids] * (decoder @ gradient)
                rows += _feature_rows(source, ids, own[ids] * decoder.norm(dim=-1), effects)
            rows.append(("bias", written, -1, -1, float("nan"), float(b_dec @ gradient)))
            rows.append(("error", written, -1, -1, float("nan"), float(rest @ gradient)))
            found[written] = rows
        return found


def _feature_rows(layer: int, ids: Tensor, strengths: Tensor, effects: Tensor) -> list[Row]:
    return [
        ("feature", layer, -1, int(feature), strength, effect)
        for feature, strength, effect in zip(ids.tolist(), strengths.tolist(), effects.tolist(), strict=True)
    ]
