"""Targets: the scalars that attributions are made to.

A `Target` is one number of a run of the model: a logit, a difference of logits, a log-probability, a loss, a feature at
a token, or a hook's projection on a direction. It says at which hook it is read, and computes itself from the
activation there, so that a pass ends as early as it can and gradients flow from the number itself.

    logit(" Mary")                       relative to the mean over the vocabulary, after the last token
    logit_difference(" Mary", " John")   the usual measure of a behaviour: what both have in common drops out
    log_probability(" Mary")
    loss()                               mean next-token cross-entropy of the prompt, in nats
    feature(sae, 123, position=4)        the feature's pre-activation, times ‖W_dec row‖
    projection("blocks.8.hook_resid_post", direction)
    router_logit(model, 3, 17)           what the router of layer 3 gives expert 17

Positions count from 0, the start of the prompt with its BOS; -1 is the last token, and no other is negative.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from scope.errors import InvalidInputError, MismatchError, OutOfRangeError
from scope.models.dictionaries import hook_of
from scope.models.experts import require_experts

__all__ = [
    "FINAL",
    "Target",
    "feature",
    "log_probability",
    "logit",
    "logit_difference",
    "loss",
    "place_of",
    "projection",
    "router_logit",
    "single_token",
]

FINAL = "ln_final.hook_out"
"""The hook that targets of logits are read at: what the unembedding reads."""

Token = int | str


@runtime_checkable
class Target(Protocol):
    """A scalar of a run."""

    @property
    def name(self) -> str:
        """In words, such as "logit of ' Mary'"."""
        ...

    @property
    def hook(self) -> str:
        """Where it is read."""
        ...

    def check(self, model: Any, tokens: Int[Tensor, " seq"]) -> None:
        """Raise what `value` would raise, before the model runs."""
        ...

    def value(self, model: Any, state: Float[Tensor, "seq width"], tokens: Int[Tensor, " seq"]) -> Float[Tensor, ""]:
        """The number, float32, from the activation at `hook` on the prompt's tokens."""
        ...


def place_of(position: int, n_tokens: int) -> int:
    """A position of a prompt as an index.

    Raises:
        OutOfRangeError: the prompt has no such position.
    """
    if position == -1:
        return n_tokens - 1
    if not 0 <= position < n_tokens:
        raise OutOfRangeError(
            f"Position {position} is out of range: the prompt has {n_tokens} tokens, 0 to {n_tokens - 1} (-1 is the "
            "last)."
        )
    return position


def single_token(model: Any, token: Token) -> int:
    """The id of a token given by its id or its text.

    Raises:
        OutOfRangeError: there is no such id.
        InvalidInputError: the text is no single token of the vocabulary; the message says which tokens it is.
    """
    if isinstance(token, str):
        ids = model.tokenize(token, prepend_bos=False).tolist()
        if len(ids) != 1:
            parts = [repr(part) for part in model.vocabulary_strings(ids)]
            spaced = " " + token.strip()
            advice = f"Give the first of them: {parts[0]}." if parts else "Give a token of the vocabulary."
            if len(model.tokenize(spaced, prepend_bos=False)) == 1:
                advice = f"With a space in front it is one: {spaced!r}."
            raise InvalidInputError(
                f"{token!r} is {len(ids)} tokens ({', '.join(parts) or 'none'}); a target is one token. {advice}"
            )
        return int(ids[0])
    if not 0 <= token < model.d_vocab:
        raise OutOfRangeError(f"There is no token {token}: the vocabulary has 0 to {model.d_vocab - 1:,}.")
    return int(token)


@dataclass(frozen=True)
class _Logits:
    """A weighted sum of logits after one position: Σ weight (logit of token)."""

    name: str
    tokens: tuple[Token, ...]
    weights: tuple[float, ...]
    position: int
    centred: bool
    """Subtract the mean logit over the vocabulary, once."""
    hook: str = FINAL

    def check(self, model: Any, tokens: Int[Tensor, " seq"]) -> None:
        place_of(self.position, len(tokens))
        for token in self.tokens:
            single_token(model, token)

    def value(self, model: Any, state: Float[Tensor, "seq width"], tokens: Int[Tensor, " seq"]) -> Float[Tensor, ""]:
        from scope.models.losses import unembed

        row = state[place_of(self.position, len(tokens))]
        ids = [single_token(model, token) for token in self.tokens]
        weights = torch.tensor(self.weights, device=row.device)
        if not self.centred and model.layout.final_logit_softcapping is None:
            return weights @ (model.W_U[ids].float() @ row.float() + _biases(model, ids))
        logits = unembed(model, row[None])[0].float()
        return weights @ logits[ids] - (logits.mean() if self.centred else 0.0)


def _biases(model: Any, ids: list[int]) -> Tensor | float:
    bias = getattr(model.hf.get_submodule(model.layout.head), "bias", None)
    return 0.0 if bias is None else bias[ids].float()


def logit(token: Token, position: int = -1) -> Target:
    """The logit of a next token relative to the mean over the vocabulary.

    Args:
        token: an id, or a text that is one token.
        position: after which token of the prompt.
    """
    return _Logits(f"logit of {token!r}", (token,), (1.0,), position, centred=True)


def logit_difference(token: Token, against: Token, position: int = -1) -> Target:
    """The logit of one next token minus that of another."""
    return _Logits(f"logit of {token!r} minus {against!r}", (token, against), (1.0, -1.0), position, centred=False)


@dataclass(frozen=True)
class _LogProbability:
    """log softmax of the logits after one position, at one token, in nats."""

    name: str
    token: Token
    position: int
    hook: str = FINAL

    def check(self, model: Any, tokens: Int[Tensor, " seq"]) -> None:
        place_of(self.position, len(tokens))
        single_token(model, self.token)

    def value(self, model: Any, state: Float[Tensor, "seq width"], tokens: Int[Tensor, " seq"]) -> Float[Tensor, ""]:
        from scope.models.losses import unembed

        logits = unembed(model, state[place_of(self.position, len(tokens))][None])[0].float()
        return logits[single_token(model, self.token)] - logits.logsumexp(-1)


def log_probability(token: Token, position: int = -1) -> Target:
    """The log-probability of a next token, in nats."""
    return _LogProbability(f"log-probability of {token!r}", token, position)


@dataclass(frozen=True)
class _Loss:
    """Mean over the prompt's tokens but the first of -log p(token)."""

    name: str = "loss"
    hook: str = FINAL

    def check(self, model: Any, tokens: Int[Tensor, " seq"]) -> None:
        if len(tokens) < 2:
            raise InvalidInputError("The loss needs at least two tokens.")

    def value(self, model: Any, state: Float[Tensor, "seq width"], tokens: Int[Tensor, " seq"]) -> Float[Tensor, ""]:
        from scope.models.losses import unembed

        logits = unembed(model, state[:-1]).float()
        return torch.nn.functional.cross_entropy(logits, tokens[1:].to(logits.device).long())


def loss() -> Target:
    """The mean next-token cross-entropy of the whole prompt, in nats."""
    return _Loss()


@dataclass(frozen=True)
class _Feature:
    """‖W_dec row‖ (x W_enc + b)_i: the pre-activation in units of firing strength."""

    name: str
    sae: Any = field(repr=False)
    feature: int
    position: int

    @property
    def hook(self) -> str:
        return hook_of(self.sae)

    def check(self, model: Any, tokens: Int[Tensor, " seq"]) -> None:
        place_of(self.position, len(tokens))

    def value(self, model: Any, state: Float[Tensor, "seq width"], tokens: Int[Tensor, " seq"]) -> Float[Tensor, ""]:
        row = state[place_of(self.position, len(tokens))][None]
        return _strength(self.sae, row, self.feature)[0]


def _strength(sae: Any, rows: Float[Tensor, "n d_in"], feature: int) -> Float[Tensor, " n"]:
    """One feature's pre-activation on some rows, times its decoder's norm."""
    ids = torch.tensor([feature], device=sae.W_enc.device)
    x = sae.rows_of(rows.to(sae.W_enc.device))
    centred = x - sae.b_dec if sae.cfg.apply_b_dec_to_input else x
    pre = sae.project(centred, ids)[:, 0] + sae.activation.bias_of(sae)[feature]
    return (pre.float() * sae.decoder_norms[feature]).to(rows.device)


def feature(sae: Any, feature: int, position: int = -1) -> Target:
    """A feature at a token: its pre-activation times ‖W_dec row‖, which is its firing strength where it fires.

    The pre-activation is taken so that a feature that just does not fire has a gradient too.

    Raises:
        OutOfRangeError: the SAE has no such feature.
    """
    if not 0 <= feature < sae.d_sae:
        raise OutOfRangeError(f"Feature {feature} is out of range: the SAE has features 0 to {sae.d_sae - 1:,}.")
    return _Feature(f"feature {feature} of {hook_of(sae)}", sae, feature, position)


@dataclass(frozen=True, eq=False)
class _Projection:
    """direction . x, at one position."""

    name: str
    hook: str
    direction: Tensor = field(repr=False)
    position: int

    def check(self, model: Any, tokens: Int[Tensor, " seq"]) -> None:
        place_of(self.position, len(tokens))
        width = torch.Size(model.hook_shape(self.hook)).numel()
        if self.direction.numel() != width:
            raise MismatchError(f"The direction has {self.direction.numel():,} dimensions; {self.hook} has {width:,}.")

    def value(self, model: Any, state: Float[Tensor, "seq width"], tokens: Int[Tensor, " seq"]) -> Float[Tensor, ""]:
        row = state[place_of(self.position, len(tokens))].flatten().float()
        return row @ self.direction.flatten().to(row.device, torch.float32)


def projection(hook: str, direction: Float[Tensor, "*row"], position: int = -1) -> Target:
    """A hook's activation projected on a direction, which is taken as long as it is."""
    return _Projection(f"projection of {hook}", hook, torch.as_tensor(direction).detach(), position)


def router_logit(model: Any, layer: int, expert: int, position: int = -1) -> Target:
    """What the router of a layer gives an expert, relative to the mean over the experts: only differences choose.

    Raises:
        InvalidInputError: the model or the layer has no experts.
        OutOfRangeError: the layer has no such expert.
    """
    require_experts(model, layer)
    n_experts = model.layout.sizes[layer].n_experts
    if not 0 <= expert < n_experts:
        raise OutOfRangeError(f"Layer {layer} has no expert {expert}: it has 0 to {n_experts - 1}.")
    direction = torch.full((n_experts,), -1 / n_experts)
    direction[expert] += 1
    return _Projection(
        f"router logit of expert {expert} in layer {layer}", f"blocks.{layer}.moe.hook_logits", direction, position
    )
