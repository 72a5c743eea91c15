"""A model writes: `stream` gives one token after the other, `Generation` is all of them.

1. The prompt runs once, and its keys and values are kept.
2. Each step runs the newest token alone, with the edits in force, and takes the likeliest token or draws one.
3. Where attention is to stay as it is without the edits, the model without them runs beside, with a cache of its own.

An edit that does not work token by token has to see the whole text: then nothing is kept, and each step runs all of
it. Both ways give the same text.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from scope.errors import InvalidInputError
from scope.models.attention import attention_of_the_plain_run
from scope.models.edits import (
    EditContext,
    EditFunction,
    apply_edits,
    by_token,
    freezes_attention,
    resolve_edits,
)

if TYPE_CHECKING:
    from scope.models.language_model import LanguageModel

__all__ = ["Generation", "NewToken", "collect", "stream"]


class NewToken(NamedTuple):
    """A token that the model has just written."""

    position: int
    """Its place in the text, counted from the start of the prompt."""
    token_id: int
    text: str
    """What it adds to the text: "" for a special token, or while a character is not complete."""
    log_probability: float
    """Of this token, as the model with its edits had it, in nats."""
    logits: Float[Tensor, " d_vocab"]
    """What it was chosen by, float32, on the CPU."""


class Generation(NamedTuple):
    """A prompt and how the model went on."""

    tokens: Int[Tensor, " seq"]
    """The prompt's tokens and the new ones."""
    n_prompt: int
    """How many of them are the prompt's."""
    text: str
    """The new text."""


def collect(model: "LanguageModel", tokens: Int[Tensor, " seq"], new: Iterator[NewToken]) -> Generation:
    """The whole text of a stream."""
    ids = [token.token_id for token in new]
    every = torch.cat([tokens, torch.tensor(ids, dtype=tokens.dtype, device=tokens.device)])
    return Generation(every, len(tokens), _text(model, ids))


def stream(
    model: "LanguageModel",
    tokens: Int[Tensor, " seq"],
    max_new_tokens: int,
    edits: Mapping[str, EditFunction] | None,
    temperature: float,
    seed: int | None,
    cache: bool,
) -> Iterator[NewToken]:
    """See `LanguageModel.stream`; everything that can be wrong is raised here, before the first token is asked for."""
    if temperature < 0 or max_new_tokens < 1:
        raise InvalidInputError(
            f"temperature is {temperature} and max_new_tokens {max_new_tokens}; expected at least 0 and 1."
        )
    n_tokens = len(tokens) + max_new_tokens
    if n_tokens > model.max_context_size:
        raise InvalidInputError(
            f"The prompt has {len(tokens):,} tokens; {max_new_tokens} more do not fit the context of "
            f"{model.max_context_size:,}."
        )
    changes = resolve_edits(model.hook_table, edits, n_tokens)
    steps = _Steps(model, changes, len(tokens), freezes_attention(edits), cache)
    return _written(model, tokens, max_new_tokens, steps, temperature, seed)


class _Steps:
    """The logits after the last token of a text that grows by a token at each call."""

    def __init__(
        self, model: "LanguageModel", changes: dict[str, list[EditFunction]], n_prompt: int, freeze: bool, cache: bool
    ) -> None:
        self.model, self.n_prompt, self.freeze = model, n_prompt, freeze
        self.names = sorted(changes, key=model.hook_table.rank)
        self.changes = changes
        fast = all(model.hook_table[name].path == "fast" for name in changes)
        cached = cache and fast and all(by_token(there) for there in changes.values())
        self.cache = _new_cache(model) if cached else None
        self.plain_cache = _new_cache(model) if cached and freeze else None
        self.seen = 0

    @torch.no_grad()
    def logits(self, tokens: Int[Tensor, " seq"]) -> Float[Tensor, " d_vocab"]:
        model, table = self.model, self.model.hook_table
        start = self.seen if self.cache is not None else 0
        new = tokens[None, start:]
        bos = model.bos_mask(new) if start == 0 else torch.zeros_like(new, dtype=torch.bool)
        contexts = {name: EditContext(name, new, bos, start, self.n_prompt) for name in self.names}
        handlers = {
            table[name]: partial(apply_edits, self.changes[name], context=contexts[name]) for name in self.names
        }
        with ExitStack() as held:
            held.enter_context(model.lock)
            held.enter_context(model.standing.taken_in())
            if self.freeze:
                held.enter_context(attention_of_the_plain_run(model, new, self.plain_cache))
            output = model.forward(new, handlers, "last", self.cache)
        self.seen = len(tokens)
        assert output is not None
        return output[0, -1].float().cpu()


def _written(
    model: "LanguageModel",
    tokens: Int[Tensor, " seq"],
    max_new_tokens: int,
    steps: _Steps,
    temperature: float,
    seed: int | None,
) -> Iterator[NewToken]:
    generator = torch.Generator().manual_seed(seed) if seed is not None else None
    ends = stop_ids(model)
    n_prompt, ids, said = len(tokens), [], ""
    for step in range(max_new_tokens):
        scores = steps.logits(tokens)
        if temperature == 0:
            new = scores.argmax()
        else:
            new = torch.multinomial((scores / temperature).softmax(-1), 1, generator=generator)[0]
        ids.append(int(new))
        tokens = torch.cat([tokens, new[None].to(tokens.device)])
        last = ids[-1] in ends or step == max_new_tokens - 1
        text = _text(model, ids)
        complete = text if last else text.rstrip("\ufffd")
        chosen = float(scores[new] - scores.logsumexp(-1))
        yield NewToken(n_prompt + step, ids[-1], complete[len(said) :], chosen, scores)
        said = complete
        if last:
            return


def stop_ids(model: "LanguageModel") -> frozenset[int]:
    """Ids of the tokens that end a text."""
    ends = [model.tokenizer.eos_token_id, model.hf.generation_config.eos_token_id]
    return frozenset(id for end in ends for id in (end if isinstance(end, list) else [end]) if id is not None)


def _text(model: "LanguageModel", ids: list[int]) -> str:
    return str(model.tokenizer.decode(ids, skip_special_tokens=True))


def _new_cache(model: "LanguageModel") -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.hf.config)
