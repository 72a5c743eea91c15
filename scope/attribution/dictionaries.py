"""What stands for the MLPs: a transcoder for each layer, or one cross-layer transcoder, behind one set of questions.

A feature reads the input of one layer's MLP. A transcoder's writes that layer's output; a cross-layer transcoder's
(Ameisen et al. 2025, "Circuit Tracing", section 2.1) the outputs of that layer and of all later ones:

    f_l = act(x_l W_enc,l + b_enc,l)        MLP_m = Σ_{l ≤ m} f_l W_dec,l→m + b_dec,m + error_m

Features are numbered within the layer that they read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from scope.attribution.baselines import hooks_of
from scope.errors import InvalidInputError, MismatchError
from scope.models.dictionaries import as_read
from scope.saes.clt import CrossLayerTranscoder

__all__ = ["MlpDictionaries", "MlpValues", "mlp_dictionaries", "mlp_values"]


@dataclass(frozen=True, eq=False)
class MlpDictionaries:
    """The dictionaries of a model's MLPs, by layer."""

    transcoders: Mapping[int, Any]
    """One for each layer; empty where there is a cross-layer transcoder."""
    clt: Any = None
    """A cross-layer transcoder."""
    clt_layers: tuple[int, ...] = ()
    """The layers that it reads and writes, ascending."""

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that are read, ascending."""
        return self.clt_layers or tuple(self.transcoders)

    @property
    def dictionaries(self) -> tuple[Any, ...]:
        """The dictionaries themselves."""
        return (self.clt,) if self.clt is not None else tuple(self.transcoders.values())

    @property
    def separable(self) -> bool:
        """Whether a layer's features depend on that layer's input alone: not where one top-k is taken over all."""
        return self.clt is None or self.clt.activation.name != "topk"

    def width(self, layer: int) -> int:
        """Features that read a layer."""
        if self.clt is not None:
            return int(self.clt.d_sae) // len(self.clt_layers)
        return int(self.transcoders[layer].d_sae)

    def written_from(self, layer: int) -> tuple[int, ...]:
        """The layers whose outputs the features of a layer write."""
        return (layer,) if self.clt is None else self.clt_layers[self.clt_layers.index(layer) :]

    def writers_of(self, layer: int) -> tuple[int, ...]:
        """The layers whose features write a layer's output."""
        return tuple(source for source in self.layers if layer in self.written_from(source))

    def encode(self, read: Mapping[int, Float[Tensor, "*batch d_model"]]) -> dict[int, Float[Tensor, "*batch d_sae"]]:
        """Feature activations by layer, float32, from what every MLP reads."""
        if self.clt is None:
            return {layer: self.encode_layer(layer, read[layer]) for layer in self.layers}
        rows = torch.cat([read[layer] for layer in self.clt_layers], dim=-1)
        features = self.clt.encode(_to_weights(self.clt, rows)).float().to(rows.device)
        return dict(zip(self.clt_layers, features.split(self.width(0), dim=-1), strict=True))

    def encode_layer(self, layer: int, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_sae"]:
        """Feature activations of one layer, float32.

        Raises:
            InvalidInputError: they depend on other layers' inputs too (`separable`).
        """
        if self.clt is None:
            sae = self.transcoders[layer]
            found: Tensor = sae.encode(_to_weights(sae, x)).float().to(x.device)
            return found
        if not self.separable:
            raise InvalidInputError(
                f"The features of a cross-layer transcoder with the activation {self.clt.cfg.activation} depend on all "
                "layers at once; one layer's cannot be computed alone."
            )
        others = x.new_zeros(*x.shape[:-1], x.shape[-1] * len(self.clt_layers))
        place = self.clt_layers.index(layer)
        others.unflatten(-1, (len(self.clt_layers), -1))[..., place, :] = x
        features = self.clt.encode(_to_weights(self.clt, others)).float().to(x.device)
        own: Tensor = features.split(self.width(layer), dim=-1)[place]
        return own

    def encoder(self, layer: int, ids: Int[Tensor, " n"]) -> Float[Tensor, "n d_model"]:
        """What features read: their columns of W_enc, float32."""
        sae, ids = self._of(layer, ids)
        return sae.W_enc.detach().T[ids].float()

    def decoder(self, layer: int, ids: Int[Tensor, "*n"], written: int) -> Float[Tensor, "*n d_model"]:
        """What a unit of features of `layer` writes to the output of the layer `written`, float32."""
        sae, ids = self._of(layer, ids)
        if self.clt is None:
            return sae.W_dec.detach()[ids].float()
        return sae.W_dec.detach()[:, self._part(written)][ids].float()

    def decode(self, layer: int, features: Float[Tensor, "*batch d_sae"], written: int) -> Tensor:
        """What all features of `layer` write to the output of the layer `written`, without the bias, float32."""
        if self.clt is None:
            W_dec = self.transcoders[layer].W_dec.detach()
        else:
            place, width = self.clt_layers.index(layer), self.width(layer)
            W_dec = self.clt.W_dec.detach()[place * width : (place + 1) * width, self._part(written)]
        return features @ W_dec.to(features.device, features.dtype)

    def b_dec(self, layer: int) -> Float[Tensor, " d_model"]:
        """What is written to a layer's output whatever fires, float32."""
        if self.clt is None:
            return self.transcoders[layer].b_dec.detach().float()
        return self.clt.b_dec.detach()[self._part(layer)].float()

    def b_enc(self, layer: int, ids: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """The features' own biases, float32."""
        sae, ids = self._of(layer, ids)
        return sae.activation.bias_of(sae).detach()[ids].float()

    def b_dec_read(self, layer: int) -> Float[Tensor, " d_model"] | None:
        """What is taken from a layer's input before it is read, where anything is."""
        sae = self.clt if self.clt is not None else self.transcoders[layer]
        return self.b_dec(layer) if sae.cfg.apply_b_dec_to_input else None

    def skip(self, layer: int) -> Float[Tensor, "d_model d_model"] | None:
        """The linear part from a layer's input to its output (out, in), where there is one."""
        found = None if self.clt is not None else getattr(self.transcoders[layer], "W_skip", None)
        return None if found is None else found.detach().float()

    def _of(self, layer: int, ids: Tensor) -> tuple[Any, Tensor]:
        """The dictionary of a layer's features, and their ids in it."""
        if self.clt is None:
            sae = self.transcoders[layer]
            return sae, ids.to(sae.W_dec.device)
        return self.clt, ids.to(self.clt.W_dec.device) + self.clt_layers.index(layer) * self.width(layer)

    def _part(self, layer: int) -> slice:
        """The columns of W_dec that are a layer's output."""
        width = self.clt.d_out // len(self.clt_layers)
        place = self.clt_layers.index(layer)
        return slice(place * width, (place + 1) * width)


def _to_weights(sae: Any, x: Tensor) -> Tensor:
    return as_read(sae, x[None] if x.ndim == 2 else x).view(x.shape)


class MlpValues(NamedTuple):
    """What the nodes of a prompt are, by layer, float32."""

    features: Mapping[int, Float[Tensor, "seq d_sae"]]
    """Of the layers that are read; 0 on BOS."""
    errors: Mapping[int, Float[Tensor, "seq d_model"]]
    """Of every layer: what its MLP wrote and no feature, bias or linear part stands for."""


def mlp_values(
    model: Any, dictionaries: MlpDictionaries, tokens: Int[Tensor, " seq"], seen: Mapping[str, Tensor] | None = None
) -> MlpValues:
    """The nodes of a prompt, from one run of the model, or from what was seen at the inputs and outputs of its MLPs."""
    d = dictionaries
    reads = {layer: f"blocks.{layer}.ln2.hook_out" for layer in d.layers}
    writes = {layer: f"blocks.{layer}.hook_mlp_out" for layer in range(model.n_layers)}
    if seen is None:
        seen = model.run(tokens, hooks=[*reads.values(), *writes.values()], logits=False).activations
    features = d.encode({layer: seen[hook].float() for layer, hook in reads.items()})
    if bool(model.bos_mask(tokens[None])[0, 0]):
        for values in features.values():
            values[0] = 0.0
    errors = {}
    for layer, hook in writes.items():
        rest = seen[hook].float()
        for source in d.writers_of(layer):
            rest = rest - d.decode(source, features[source], layer)
        if layer in d.layers:
            rest = rest - d.b_dec(layer).to(rest.device)
            skip = d.skip(layer)
            if skip is not None:
                rest = rest - seen[reads[layer]].float() @ skip.to(rest.device).T
        errors[layer] = rest
    return MlpValues(features, errors)


def mlp_dictionaries(model: Any, transcoders: Sequence[Any]) -> MlpDictionaries:
    """Transcoders by layer, each from `ln2.hook_out` to `hook_mlp_out`; or one cross-layer transcoder between those.

    Raises:
        InvalidInputError: there is none, two are of one layer, or one reads or writes elsewhere.
        UnknownNameError: the model lacks a hook.
        MismatchError: one has another width than the model.
    """
    across = [sae for sae in transcoders if isinstance(sae, CrossLayerTranscoder)]
    if across:
        if len(transcoders) > 1:
            raise InvalidInputError(
                f"Got {len(transcoders)} dictionaries with a cross-layer transcoder among them; it stands alone."
            )
        return MlpDictionaries({}, across[0], _layers_of(model, across[0]))
    found: dict[int, Any] = {}
    for transcoder in transcoders:
        reads, writes = hooks_of(model, transcoder)
        layer = _layer(reads, writes)
        if layer in found:
            raise InvalidInputError(f"Two transcoders are of layer {layer}; give one a layer.")
        found[layer] = transcoder
    if not found:
        raise InvalidInputError("A graph needs at least one transcoder, better one for every layer.")
    return MlpDictionaries(dict(sorted(found.items())))


def _layer(reads: str, writes: str) -> int:
    layer = int(reads.split(".")[1]) if reads.startswith("blocks.") else -1
    if (reads, writes) != (f"blocks.{layer}.ln2.hook_out", f"blocks.{layer}.hook_mlp_out"):
        raise InvalidInputError(
            f"A graph takes transcoders from an MLP's input to its output, such as blocks.3.ln2.hook_out to "
            f"blocks.3.hook_mlp_out; this one reads {reads} and writes {writes}."
        )
    return layer


def _layers_of(model: Any, clt: Any) -> tuple[int, ...]:
    ports = clt.cfg.ports
    layers = []
    for one, other in zip(*ports, strict=True):
        if one.hook is None or other.hook is None:
            raise InvalidInputError(
                "This cross-layer transcoder does not say which hooks it reads and writes; set hook_names and "
                "hook_names_out in its metadata."
            )
        for port in (one, other):
            if port.width != model.d_model:
                raise MismatchError(
                    f"The cross-layer transcoder has a width of {port.width:,} at {port.hook}; the model has "
                    f"{model.d_model:,}."
                )
        layers.append(_layer(model.resolve_hook(one.hook), model.resolve_hook(other.hook)))
    if layers != sorted(set(layers)):
        raise InvalidInputError(f"The layers of a cross-layer transcoder come in order, each once; got {layers}.")
    return tuple(layers)
