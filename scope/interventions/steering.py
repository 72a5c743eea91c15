"""`steer`: what a model writes under interventions, beside what it writes by itself, and the price of it.

A feature i at strength s adds s W_dec[i] / ‖W_dec[i]‖ to what the SAE writes to, on every token but BOS, during the
whole generation. Beside it runs a random direction of the same norm, as a control: much of what a strong push does, any
push of that size does.

1. Each condition (plain, steered, random) writes token by token, in turns; whoever listens hears of each token.
2. The plain model then reads what each has written: KL(condition ‖ plain) at each new token, and how odd it finds them.
3. The next-token probabilities right after the prompt are put beside each other.

Sources: Turner et al. 2023, "Steering Language Models With Activation Engineering" (arXiv 2308.10248, section 3), for
adding; Templeton et al. 2024, "Scaling Monosemanticity", for features as what is added.
"""

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from scope.errors import InvalidInputError, OutOfRangeError
from scope.interventions.activations import add_direction
from scope.interventions.edit import Edit, combine
from scope.interventions.resolving import Control
from scope.models.dictionaries import hook_of
from scope.models.generation import NewToken, collect
from scope.models.losses import unembed

if TYPE_CHECKING:
    import pandas as pd

    from scope.models.edits import EditFunction
    from scope.models.generation import Generation

__all__ = ["Continuation", "Listener", "Steering", "steer", "steer_with", "steering_direction", "steering_edit"]

N_CHANGES = 10
CHUNK = 16
"""Tokens whose distributions are compared at once: with a vocabulary of 262,144 each takes a megabyte."""
LARGEST_LOSS = 700.0
"""Whose exp is still finite."""
Listener = Callable[[int, Mapping[str, str]], None]
"""Told how many tokens there are, and per condition the text so far; what it raises ends the work."""


class Continuation(NamedTuple):
    """How the model went on under one condition."""

    generation: "Generation"
    kl: float
    """KL(condition ‖ plain) of the next token right after the prompt, in nats."""
    mean_kl: float
    """The same, mean over the new tokens: each given the text that this condition wrote before it."""
    perplexity: float
    """exp of the plain model's mean loss on the new tokens: how odd it finds them."""
    token_kls: tuple[float, ...]
    """KL(condition ‖ plain) at each new token, in nats: how far the distribution that it was taken from was moved."""


class Steering(NamedTuple):
    """Plain, steered and randomly pushed continuations of one prompt."""

    plain: Continuation
    steered: Continuation
    random: Continuation | None
    """Pushed along a random direction of the same norm; None where no such control exists."""
    changes: "pd.DataFrame"
    """token, token_id, plain, steered, random (probabilities right after the prompt), change: the largest changes
    first. `random` is NaN without a control."""
    norm: float
    """Of what is added; NaN where something else is done."""


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
    listen: Listener | None = None,
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
        listen: hears of each new token.

    Raises:
        InvalidInputError, OutOfRangeError, UnknownNameError, MismatchError: before anything is computed.
    """
    direction = steering_direction(sae, strengths)
    noise = torch.randn(direction.shape, generator=torch.Generator().manual_seed(seed)).to(direction)
    noise = noise * (direction.norm() / noise.norm())
    edits, beside = (combine(steering_edit(sae, pushed)) for pushed in (direction, noise))
    control = Control(beside, float(direction.norm()))
    return steer_with(model, edits, control, prompt, max_new_tokens, temperature=temperature, seed=seed, listen=listen)


def steer_with(
    model: Any,
    edits: "Mapping[str, EditFunction]",
    control: Control | None,
    prompt: Any,
    max_new_tokens: int = 40,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    listen: Listener | None = None,
) -> Steering:
    """As `steer`, under any interventions.

    Args:
        model: a `scope.models.LanguageModel`.
        edits: such as `spec.resolve(model, sae)` gives.
        control: such as `scope.interventions.control` gives, or None.
        prompt: a text, chat messages or token ids.
        max_new_tokens: as for `model.generate`.
        temperature: as for `model.generate`.
        seed: of the sampling.
        listen: hears of each new token.

    Raises:
        InvalidInputError, OutOfRangeError, UnknownNameError, MismatchError: before anything is computed.
    """
    tokens = model.prompt_tokens(prompt)
    conditions: dict[str, Any] = {"plain": None, "steered": edits}
    if control is not None:
        conditions["random"] = control.edits
    written = _write(model, tokens, conditions, max_new_tokens, temperature, seed, listen)
    found = {name: _weighed(model, tokens, new, changed=name != "plain") for name, new in written.items()}
    first = {name: new[0].logits.softmax(-1) for name, new in written.items()}
    return Steering(
        found["plain"],
        found["steered"],
        found.get("random"),
        _changes(model, first),
        norm=float("nan") if control is None else control.norm,
    )


def _write(
    model: Any,
    tokens: Tensor,
    conditions: Mapping[str, Any],
    max_new_tokens: int,
    temperature: float,
    seed: int,
    listen: Listener | None,
) -> dict[str, list[NewToken]]:
    """Every condition a token, then every condition the next."""
    streams = {
        name: model.stream(tokens, max_new_tokens, edits, temperature, seed) for name, edits in conditions.items()
    }
    written: dict[str, list[NewToken]] = {name: [] for name in streams}
    going = dict(streams)
    while going:
        for name, stream in list(going.items()):
            new = next(stream, None)
            if new is None:
                del going[name]
                continue
            written[name].append(new)
            if listen:
                texts = {name: "".join(token.text for token in some) for name, some in written.items()}
                listen(max(map(len, written.values())), texts)
    return written


@torch.no_grad()
def _weighed(model: Any, tokens: Tensor, new: list[NewToken], changed: bool) -> Continuation:
    """What a condition wrote, and what the plain model makes of it; the plain one's own text it has just read."""
    generation = collect(model, tokens, iter(new))
    kls, losses = [0.0] * len(new), [-token.log_probability for token in new]
    if changed:
        final = model.run(generation.tokens, hooks=["ln_final.hook_out"], logits=False).activations["ln_final.hook_out"]
        rows = final[len(tokens) - 1 : -1]
        kls, losses = [], []
        for start in range(0, len(rows), CHUNK):
            part = new[start : start + CHUNK]
            with model.lock:
                plain = unembed(model, rows[start : start + CHUNK]).float().cpu().log_softmax(-1)
            own = torch.stack([token.logits for token in part]).log_softmax(-1)
            kls += (own.exp() * (own - plain)).sum(-1).clamp_min(0.0).tolist()
            chosen = torch.tensor([token.token_id for token in part])
            losses += (-plain.gather(1, chosen[:, None])[:, 0]).tolist()
    perplexity = math.exp(min(sum(losses) / len(losses), LARGEST_LOSS))
    return Continuation(generation, kls[0], sum(kls) / len(kls), perplexity, tuple(kls))


def _changes(model: Any, first: Mapping[str, Tensor]) -> "pd.DataFrame":
    import pandas as pd

    plain, steered = first["plain"], first["steered"]
    ids = (steered - plain).abs().topk(min(N_CHANGES, len(plain))).indices
    random = first.get("random")
    return pd.DataFrame(
        {
            "token": model.vocabulary_strings(ids.tolist()),
            "token_id": ids.tolist(),
            "plain": plain[ids].tolist(),
            "steered": steered[ids].tolist(),
            "random": [float("nan")] * len(ids) if random is None else random[ids].tolist(),
            "change": (steered - plain)[ids].tolist(),
        }
    )
