"""Attention with its pattern held fixed, and how queries and keys of a run are recorded for it.

1. `recording` puts an attention function of our own in the place of the model's, through transformers' interface; it
   keeps each layer's rotated queries, its keys and its mask, and attends as usual.
2. `FrozenAttention` makes the pattern from them when it is needed, in chunks of queries; a small one it keeps.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from scope.models.attention import own_attention

__all__ = ["QUERY_CHUNK", "FrozenAttention", "attended", "recording"]

QUERY_CHUNK = 512


@dataclass(eq=False)
class FrozenAttention:
    """One layer's attention with its pattern fixed."""

    query: Float[Tensor, "n_heads seq d_head"]
    """As they meet the keys: normed and rotated."""
    key: Float[Tensor, "n_kv_heads seq d_head"]
    mask: Float[Tensor, "seq seq"] | None
    """What is added to the scores; None for causal attention without a window."""
    scaling: float
    softcap: float | None
    W_V: Float[Tensor, "n_kv_heads d_head d_model"]
    value_bias: Float[Tensor, "n_kv_heads d_head"] | None
    W_O: Float[Tensor, "n_heads d_model d_head"]
    output_bias: Float[Tensor, " d_model"] | None
    keep: bool = False
    """Whether the pattern is kept once made."""
    value_denominator: Float[Tensor, "n_kv_heads seq"] | None = None
    """What each head's values are divided by, where a norm is on them."""
    _pattern: Tensor | None = None

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return len(self.query) // len(self.key)

    def scores(self, rows: slice) -> Float[Tensor, "n_heads n seq"]:
        """Pre-softmax scores of some queries with every key up to the last of them, mask included, float32."""
        return _scores(self.query, self.key, self.mask, self.scaling, self.softcap, rows)

    def pattern(self, rows: slice) -> Float[Tensor, "n_heads n seq"]:
        """Attention from some positions to every one up to the last of them."""
        if self._pattern is not None:
            return self._pattern[:, rows, : rows.stop]
        made = self.scores(rows).softmax(-1)
        if self.keep and rows.start == 0 and rows.stop == self.query.shape[1]:
            self._pattern = made
        return made

    def read(self, normed: Float[Tensor, "*batch seq d_model"], rows: slice) -> Float[Tensor, "*batch n width"]:
        """What each head reads at some positions, side by side, without biases: W_O's input."""
        found = []
        for head in range(len(self.query)):
            values = normed[..., : rows.stop, :] @ self.W_V[head // self.group].T
            if self.value_denominator is not None:
                values = values / self.value_denominator[head // self.group, : rows.stop, None]
            found.append(self.pattern(rows)[head].to(values.dtype) @ values)
        return torch.cat(found, dim=-1)

    def heads(
        self, normed: Float[Tensor, "*batch seq d_model"], rows: slice
    ) -> Float[Tensor, "n_heads *batch n d_model"]:
        """What each head writes at some positions (before a norm behind attention), without biases."""
        each = self.read(normed, rows).unflatten(-1, (len(self.query), -1)).movedim(-2, 0)
        return torch.stack([heads @ W_O.T for heads, W_O in zip(each, self.W_O, strict=True)])

    def out_of_heads(self, heads: Float[Tensor, "*batch n width"]) -> Float[Tensor, "*batch n d_model"]:
        """What W_O makes of what the heads read, side by side, without its bias."""
        return heads @ self.W_O.transpose(1, 2).flatten(0, 1)

    def into_heads(self, gradient: Float[Tensor, "batch n d_model"]) -> Float[Tensor, "batch n width"]:
        """From the gradient at W_O's output to that at its input, all heads side by side."""
        return gradient @ self.W_O.transpose(1, 2).flatten(0, 1).T

    def backward(self, gradient: Float[Tensor, "batch n width"]) -> Float[Tensor, "batch n d_model"]:
        """From the gradient at W_O's input on the first n positions to that at W_V's input there."""
        n = gradient.shape[1]
        batch = len(gradient)
        into_heads = gradient.unflatten(-1, (len(self.query), -1)).permute(2, 0, 1, 3)
        at_values = into_heads.new_zeros(len(self.key), n, batch * into_heads.shape[-1])
        if self.keep and self._pattern is None:
            self.pattern(slice(0, self.query.shape[1]))
        for start in range(0, n, QUERY_CHUNK):
            rows = slice(start, min(n, start + QUERY_CHUNK))
            # Queries of all heads that share keys: (kv, group q, k) and (kv, group q, b e).
            pattern = self.pattern(rows).to(gradient.dtype).reshape(len(self.key), -1, rows.stop)
            heads = into_heads[:, :, rows].transpose(1, 2).reshape(len(self.key), -1, at_values.shape[-1])
            at_values[:, : rows.stop].baddbmm_(pattern.mT, heads)
        if self.value_denominator is not None:
            at_values /= self.value_denominator[:, :n, None]
        values = at_values.view(len(self.key), n, batch, -1)
        return torch.einsum("hkbe,hed->bkd", values, self.W_V)


def _scores(
    query: Tensor, key: Tensor, mask: Tensor | None, scaling: float, softcap: float | None, rows: slice
) -> Float[Tensor, "n_heads n seq"]:
    end = rows.stop
    scores = (query[:, rows] @ key[:, :end].repeat_interleave(len(query) // len(key), 0).mT).float() * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        return scores + mask[rows, :end].float()
    places = torch.arange(rows.start, end, device=scores.device)
    later = torch.arange(end, device=scores.device)[None] > places[:, None]
    return scores.masked_fill(later, float("-inf"))


@contextmanager
def recording(model: Any, into: dict[int, dict[str, Any]]) -> Iterator[None]:
    """Within it the model's attention keeps its queries, keys and masks in `into`, by layer."""
    masks: dict[int, Tensor] = {}

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        scaling, softcap = options.get("scaling"), options.get("softcap")
        mask = None
        if attention_mask is not None:
            mask = masks.setdefault(id(attention_mask), attention_mask[0, 0, :, : key.shape[2]])
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        # The mask as it came is kept too, so that no other gets its id.
        into[module.layer_idx] = {
            "query": query[0],
            "key": key[0],
            "mask": mask,
            "scaling": scaling,
            "softcap": softcap,
            "given": attention_mask,
        }
        return attended(lambda rows: _scores(query[0], key[0], mask, scaling, softcap, rows).softmax(-1), value), None

    with own_attention(model, attention):
        yield


def attended(pattern: Callable[[slice], Tensor], value: Float[Tensor, "batch n_kv_heads seq d_head"]) -> Tensor:
    """pattern @ value, as transformers wants it: (batch, seq, n_heads, d_head)."""
    n = value.shape[2]
    parts = []
    for start in range(0, n, QUERY_CHUNK):
        rows = slice(start, min(n, start + QUERY_CHUNK))
        made = pattern(rows).to(value.dtype)
        values = value[:, :, : rows.stop].repeat_interleave(len(made) // value.shape[1], 1)
        parts.append(made @ values)
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous()
