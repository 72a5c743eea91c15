"""`steer`: what a model writes when some features are pushed, beside what it writes by itself, and the price of it.

A feature i at strength s adds s W_dec[i] / ‖W_dec[i]‖ to what the SAE writes to, on every token but BOS, during the
whole generation. Beside it runs a random direction of the same norm, as a control: much of what a strong push does, any
push of that size does.

Sources: Turner et al. 2023, "Steering Language Models With Activation Engineering" (arXiv 2308.10248, section 3), for
adding; Templeton et al. 2024, "Scaling Monosemanticity", for features as what is added.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from scope.errors import InvalidInputError, OutOfRangeError
from scope.interventions.activations import add_direction
from scope.interventions.edit import Edit, combine
from scope.models.dictionaries import hook_of

if TYPE_CHECKING:
    import pandas as pd

    from scope.models.generation import Generation

__all__ = ["Continuation", "Steering", "steer", "steering_direction", "steering_edit"]

N_CHANGES = 10


class Continuation(NamedTuple):
    """How the model went on under one condition."""

    generation: "Generation"
    kl: float
    """KL(steered ‖ plain) of the next token right after the prompt, in nats."""
    perplexity: float
    """exp of the plain model's mean loss on the new tokens: how odd it finds them. NaN where there are none."""


class Steering(NamedTuple):
    """Plain, steered and randomly pushed continuations of one prompt."""

    plain: Continuation
    steered: Continuation
    random: Continuation
    """Pushed along a random direction of the same norm."""
    changes: "pd.DataFrame"
    """token, token_id, plain, steered (probabilities right after the prompt), change: the largest changes first."""
    norm: float
    """Of what is added."""


def steering_direction(sae: Any, strengths: Mapping[int, float]) -> Float[Tensor, " d_out"]:
    """Σ s W_dec[i] / ‖W_dec[i]‖, float32.

    Raises:
        InvalidInputError: no features.
        OutOfRangeError: the SAE has no such feature.
    """
    if not strengths:
        raise InvalidInputError("No feature was given; steering pushes at least one.")
    for feature in strengths:
        if not 0 <= feature < sae.d_sae:
            raise OutOfRangeError(f"Feature {feature} is out of range: the SAE has features 0 to {sae.d_sae - 1:,}.")
    rows = sae.W_dec.detach()[list(strengths)].float()
    sizes = torch.tensor(list(strengths.values()), dtype=torch.float32, device=rows.device)
    return sizes @ torch.nn.functional.normalize(rows, dim=-1)


def steering_edit(sae: Any, direction: Float[Tensor, " d_out"]) -> Edit:
    """The edit that adds a direction to what an SAE writes to, on every token but BOS."""
    ports = sae.cfg.ports
    hook = ports.outputs[0].hook if ports.outputs else hook_of(sae)
    return add_direction(str(hook), direction, keep_bos=True)


def steer(
    model: Any,
    sae: Any,
    strengths: Mapping[int, float],
    prompt: Any,
    max_new_tokens: int = 40,
    *,
    temperature: float = 0.0,
    seed: int = 0,
) -> Steering:
    """Let a model go on from a prompt with some features pushed, and without.

    Args:
        model: a `scope.models.LanguageModel`.
        sae: the features' dictionary.
        strengths: firing strength to add, by feature; negative ones suppress.
        prompt: a text, chat messages or token ids.
        max_new_tokens: as for `model.generate`.
        temperature: as for `model.generate`.
        seed: of the sampling, and of the random direction.

    Raises:
        InvalidInputError, OutOfRangeError, UnknownNameError, MismatchError: before anything is computed.
    """
    direction = steering_direction(sae, strengths)
    noise = torch.randn(direction.shape, generator=torch.Generator().manual_seed(seed)).to(direction)
    noise = noise * (direction.norm() / noise.norm())
    tokens = model.prompt_tokens(prompt)
    plain_logits = _last_logits(model, tokens, None)
    found = []
    for edits in (None, *(combine(steering_edit(sae, pushed)) for pushed in (direction, noise))):
        logits = plain_logits if edits is None else _last_logits(model, tokens, edits)
        generation = model.generate(tokens, max_new_tokens, edits, temperature, seed)
        found.append((Continuation(generation, _kl(logits, plain_logits), _perplexity(model, generation)), logits))
    (plain, _), (steered, steered_logits), (random, _) = found
    return Steering(plain, steered, random, _changes(model, plain_logits, steered_logits), float(direction.norm()))


def _last_logits(model: Any, tokens: Tensor, edits: Any) -> Float[Tensor, " d_vocab"]:
    return model.run(tokens, edits=edits, logits="last").logits[-1].float()


def _kl(logits: Tensor, plain: Tensor) -> float:
    own, other = logits.log_softmax(-1), plain.log_softmax(-1)
    return float((own.exp() * (own - other)).sum().clamp_min(0.0))


def _perplexity(model: Any, generation: "Generation") -> float:
    if len(generation.tokens) <= generation.n_prompt:
        return float("nan")
    (losses,) = model.cross_entropy([generation.tokens.cpu().numpy()])
    return math.exp(float(losses[max(generation.n_prompt - 1, 0) :].mean()))


def _changes(model: Any, plain: Tensor, steered: Tensor) -> "pd.DataFrame":
    import pandas as pd

    before, after = plain.softmax(-1), steered.softmax(-1)
    ids = (after - before).abs().topk(min(N_CHANGES, len(before))).indices
    return pd.DataFrame(
        {
            "token": model.vocabulary_strings(ids.tolist()),
            "token_id": ids.tolist(),
            "plain": before[ids].tolist(),
            "steered": after[ids].tolist(),
            "change": (after - before)[ids].tolist(),
        }
    )
