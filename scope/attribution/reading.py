"""A prompt read once: everything that the edges of a graph are made of.

The prompt runs once with attention patterns and norm denominators recorded (`scope.attribution.freezing`). Of every MLP
with a dictionary its features that fire are kept, and as error what the dictionary misses of what it wrote: all of it
on BOS, which no dictionary is trained on. What biases write is kept apart, as it is there whatever fires.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from scope.attribution.dictionaries import MlpDictionaries, mlp_dictionaries
from scope.attribution.freezing import freeze
from scope.attribution.frozen import FrozenModel
from scope.attribution.graph_edits import GraphEdits
from scope.attribution.graph_settings import GraphSettings
from scope.attribution.linear_edits import LinearEdit
from scope.models.edits import EditContext
from scope.models.losses import CHUNK_BYTES

__all__ = ["Constant", "Firing", "Prompt", "read", "read_prompt"]


class Firing(NamedTuple):
    """The features of one layer that fire."""

    position: Int[Tensor, " n"]
    feature: Int[Tensor, " n"]
    activation: Float[Tensor, " n"]


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt, read once: everything that edges are made of."""

    frozen: FrozenModel
    dictionaries: MlpDictionaries
    firing: Mapping[int, Firing]
    errors: Mapping[int, Float[Tensor, "seq d_model"]]
    first_feature: Mapping[int, int]
    """Number of a layer's first feature source; sources are embeddings, errors by layer, tables by layer (where the
    model has them), what interventions put there, features by layer."""
    attention_biases: list[Float[Tensor, "seq d_model"]]
    mlp_biases: Mapping[int, Float[Tensor, " d_model"]]
    """Per layer that a dictionary writes, what it writes whatever fires."""
    logit_ids: Int[Tensor, " n"]
    logit_probabilities: Float[Tensor, " n"]
    logit_values: Float[Tensor, " n"]
    mean_unembedding: Float[Tensor, " d_model"]
    reads: Mapping[int, Float[Tensor, "seq d_model"]]
    """What the MLPs of layers with a linear part (`frozen.skips`) read."""
    factors: Mapping[int, Float[Tensor, " firing"]]
    """Per layer whose features interventions change how far each firing feature's activation follows what it reads: 1,
    or what scales it, or 0 where it is held."""
    constants: tuple["Constant", ...] = ()
    """What interventions put there, in the order in which the model comes by."""

    @property
    def n_sources(self) -> int:
        return self.n_fixed + sum(len(firing.feature) for firing in self.firing.values())

    @property
    def n_fixed(self) -> int:
        """Embeddings, errors, tables and what interventions put there."""
        return _n_fixed(self.frozen) + sum(len(one.positions) for one in self.constants)

    def first_table(self, layer: int) -> int:
        """Number of a layer's first table source."""
        return self.frozen.n_tokens * (1 + len(self.frozen.layers) + layer)


class Constant(NamedTuple):
    """What one intervention puts at its hook."""

    edit: LinearEdit
    first: int
    """Number of its first source."""
    positions: Int[Tensor, " n"]
    """Where it is anything, ascending: a source each."""


def _constants(frozen: FrozenModel) -> tuple[Constant, ...]:
    found, number, rank = [], _n_fixed(frozen), frozen.model.hook_table.rank
    for hook in sorted(frozen.edits, key=rank):
        for edit in frozen.edits[hook]:
            positions = edit.constant.any(-1).nonzero()[:, 0]
            found.append(Constant(edit, number, positions))
            number += len(positions)
    return tuple(found)


def _n_fixed(frozen: FrozenModel) -> int:
    return frozen.n_tokens * (1 + len(frozen.layers) + sum(layer.per_layer is not None for layer in frozen.layers))


def read_prompt(
    model: Any, tokens: Int[Tensor, " seq"], transcoders: Sequence[Any], edits: GraphEdits | None = None
) -> Prompt:
    """A prompt read once: the frozen model, firing features, errors, biases."""
    with torch.no_grad():
        return read(model, tokens, mlp_dictionaries(model, transcoders), GraphSettings(), [], edits)


def read(
    model: Any,
    tokens: Int[Tensor, " seq"],
    dictionaries: MlpDictionaries,
    settings: GraphSettings,
    wanted: list[int],
    edits: GraphEdits | None = None,
) -> Prompt:
    """A prompt read once, with the next tokens that are wanted, or the likeliest where none are."""
    hooks = {layer: f"blocks.{layer}.ln2.hook_out" for layer in dictionaries.layers}
    frozen, seen = freeze(model, tokens, list(hooks.values()), edits)
    context = EditContext("", tokens[None], model.bos_mask(tokens[None]))
    reads = {layer: seen[hook] for layer, hook in hooks.items()}
    errors = {layer: frozen_layer.mlp_out for layer, frozen_layer in enumerate(frozen.layers)}
    firing, skips, mlp_biases, factors = {}, {}, {}, {}
    for layer in dictionaries.layers:
        mlp_biases[layer] = dictionaries.b_dec(layer).to(tokens.device)
        errors[layer] = errors[layer] - mlp_biases[layer]
        skip = dictionaries.skip(layer)
        if skip is not None:
            skips[layer] = skip.to(tokens.device)
            errors[layer] = errors[layer] - reads[layer] @ skips[layer].T
            norm_bias = frozen.layers[layer].ln2.bias
            if norm_bias is not None:
                mlp_biases[layer] = mlp_biases[layer] + skips[layer] @ norm_bias
    has_bos = bool(model.bos_mask(tokens[None])[0, 0])
    together = {} if dictionaries.clt is None else dictionaries.encode(reads)
    for layer in dictionaries.layers:
        features = together[layer] if together else dictionaries.encode_layer(layer, reads[layer])
        if edits is not None:
            features = edits.changed(layer, features[None], context)[0]
        if has_bos:
            features[0] = 0.0
        for written in dictionaries.written_from(layer):
            errors[written] = errors[written] - dictionaries.decode(layer, features, written)
        position, feature = features.nonzero(as_tuple=True)
        firing[layer] = Firing(position, feature, features[position, feature])
        if edits is not None and edits.own(layer):
            factors[layer] = edits.factors(layer, position, feature, context)
    constants = _constants(frozen)
    first, number = {}, _n_fixed(frozen) + sum(len(one.positions) for one in constants)
    for layer, there in firing.items():
        first[layer] = number
        number += len(there.feature)
    frozen = FrozenModel(**{**vars(frozen), "skips": skips})
    ids, probabilities, values, mean = _logits(model, frozen, settings, wanted)
    attention_biases = frozen.attention_constants()
    return Prompt(
        frozen,
        dictionaries,
        firing,
        errors,
        first,
        attention_biases,
        mlp_biases,
        ids,
        probabilities,
        values,
        mean,
        {layer: reads[layer] for layer in skips},
        factors,
        constants,
    )


def _logits(
    model: Any, frozen: FrozenModel, settings: GraphSettings, wanted: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ids, probabilities and centred logits of the tokens to explain, and the mean row of W_U."""
    hidden = frozen.final_norm(frozen.final[-1:], slice(frozen.n_tokens - 1, frozen.n_tokens))[0]
    if frozen.final_norm.bias is not None:
        hidden = hidden + frozen.final_norm.bias
    rows = max(1, CHUNK_BYTES // (4 * model.d_model))
    logits = torch.cat([hidden @ part.float().T for part in model.W_U.split(rows)], dim=-1)
    head = model.hf.get_submodule(model.layout.head)
    if getattr(head, "bias", None) is not None:
        logits = logits + head.bias.float()
    cap = model.layout.final_logit_softcapping
    probabilities = (logits if cap is None else cap * torch.tanh(logits / cap)).softmax(-1)
    if wanted:
        ids = torch.tensor(wanted, device=logits.device)
    else:
        share, ids = probabilities.topk(min(settings.max_logits, len(logits)))
        enough = int((share.cumsum(0) < settings.logit_share).sum()) + 1
        ids = ids[:enough]
    mean = model.W_U.mean(0, dtype=torch.float32)
    return ids, probabilities[ids], logits[ids] - logits.mean(), mean
