"""Whether a graph is of a model and its transcoders. A file may be anyone's: it is asked before anything runs on it."""

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from scope.attribution.dictionaries import MlpDictionaries
from scope.errors import MismatchError

if TYPE_CHECKING:
    from scope.attribution.graph import CircuitGraph

__all__ = ["tokens_of"]


def tokens_of(graph: "CircuitGraph", model: Any, dictionaries: MlpDictionaries) -> Int[Tensor, " seq"]:
    """The tokens that a graph explains, on the model's device.

    Args:
        graph: the graph.
        model: the model that it is said to be of.
        dictionaries: those that it is said to be made with.

    Raises:
        MismatchError: the model has other layers or no such tokens, or the dictionaries no such features.
    """
    if graph.n_layers != model.n_layers:
        raise MismatchError(
            f"The graph is of a model of {graph.n_layers} layers ({graph.model_name or 'it does not say which'}); "
            f"{model.name} has {model.n_layers}. Give the graph's model."
        )
    for position, token in enumerate(graph.token_ids):
        if not 0 <= token < model.d_vocab:
            said = "The graph does not say which token" if token < 0 else f"The graph says that token {token:,}"
            raise MismatchError(
                f"{said} stands at position {position} ({graph.tokens[position]!r}); {model.name} has tokens 0 to "
                f"{model.d_vocab - 1:,}. It cannot be run again: make the graph anew."
            )
    features = graph.nodes[graph.nodes["kind"] == "feature"].groupby("layer")["feature"].max()
    for layer, largest in zip(features.index.tolist(), features.tolist(), strict=True):
        if layer not in dictionaries.layers:
            raise MismatchError(
                f"The graph has features of layer {layer}, for which no transcoder was given; those that were are of "
                f"layers {', '.join(map(str, dictionaries.layers))}. Give the transcoders that it was made with."
            )
        width = dictionaries.width(layer)
        if largest >= width:
            raise MismatchError(
                f"The graph has feature {largest:,} of layer {layer}; the transcoder there has 0 to {width - 1:,}. "
                "Give the transcoders that it was made with."
            )
    return torch.tensor(graph.token_ids, device=model.device)
