"""Attention held as it was: a changed run that attends where the plain run attended.

1. The plain run of the same tokens goes through an attention function of ours, which keeps each layer's weights
   softmax(q k / scale + mask).
2. In the changed run these weights take the place of its own, whatever its queries and keys are; values are live.

With a cache both runs have one each, and a step holds the weights of the new tokens alone. transformers' attention
interface is the door (`own_attention`), so that architectures without it are refused.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from scope.errors import InvalidInputError

if TYPE_CHECKING:
    from scope.models.language_model import LanguageModel

__all__ = ["AttentionFunction", "attention_of_the_plain_run", "own_attention"]

IMPLEMENTATION = "scope"
"""Under this name transformers knows the attention function of the moment."""
AttentionFunction = Callable[..., tuple[Tensor, None]]
"""As transformers calls it: (module, query, key, value, mask, **options) -> what is attended to, and no weights."""


@contextmanager
def attention_of_the_plain_run(
    model: "LanguageModel", tokens: Int[Tensor, "batch seq"], cache: Any = None
) -> Iterator[None]:
    """Run the model plainly on some tokens; within the body, a pass over the same tokens attends as that did.

    Args:
        model: the model.
        tokens: of the pass in the body.
        cache: the plain run's own keys and values of the tokens before these.

    Raises:
        InvalidInputError: the architecture's attention does not go through transformers' attention interface.
    """
    weights: dict[int, Tensor] = {}

    def record(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        weights[module.layer_idx] = _weights(query, key, attention_mask, **options)
        return _attended(weights[module.layer_idx], value), None

    def hold(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **options: Any) -> tuple[Tensor, None]:
        return _attended(weights[module.layer_idx], value), None

    with model.lock:
        with torch.no_grad(), own_attention(model, record):
            model.hidden_states(tokens, cache)
        if len(weights) != model.n_layers:
            raise InvalidInputError(
                f"The attention of {type(model.hf).__name__} cannot be held: it does not go through transformers' "
                "attention interface. Leave freeze_attention off."
            )
        with own_attention(model, hold):
            yield


def _weights(
    query: Float[Tensor, "batch n_heads n d_head"],
    key: Float[Tensor, "batch n_kv_heads seq d_head"],
    mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> Float[Tensor, "batch n_heads n seq"]:
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    keys = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = (query @ keys.mT).float() * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    n, n_keys = scores.shape[-2:]
    if mask is not None:
        return (scores + mask[..., :n_keys].float()).softmax(-1)
    places = torch.arange(n_keys - n, n_keys, device=scores.device)[:, None]
    later = torch.arange(n_keys, device=scores.device)[None] > places
    return scores.masked_fill(later, float("-inf")).softmax(-1)


def _attended(weights: Tensor, value: Float[Tensor, "batch n_kv_heads seq d_head"]) -> Tensor:
    """weights @ value, as transformers wants it: (batch, n, n_heads, d_head)."""
    values = value.repeat_interleave(weights.shape[1] // value.shape[1], 1)
    return (weights.to(value.dtype) @ values).transpose(1, 2).contiguous()


class _OfThread(threading.local):
    function: AttentionFunction | None = None


_in_force = _OfThread()


def _dispatch(module: Any, *tensors: Any, **options: Any) -> tuple[Tensor, None]:
    """transformers has one table of functions for all models; whoever runs a model has a function of their own."""
    assert _in_force.function is not None
    return _in_force.function(module, *tensors, **options)


@contextmanager
def own_attention(model: "LanguageModel", function: AttentionFunction) -> Iterator[None]:
    """Within it the model's attention is a function of ours, in this thread. Hold `model.lock` around it."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(IMPLEMENTATION, _dispatch)
    AttentionMaskInterface.register(IMPLEMENTATION, eager_mask)
    before, outer = model.hf.config._attn_implementation, _in_force.function
    _in_force.function = function
    model.hf.set_attn_implementation(IMPLEMENTATION)
    try:
        yield
    finally:
        model.hf.set_attn_implementation(before)
        _in_force.function = outer
