"""The logit lens: what the model would say next if it stopped after each layer.

1. Run the model on a text and keep the residual stream x_l after each layer l, at each position.
2. Read each x_l as if it were the last one, with the model's own final norm and unembedding (soft-capped where the
   model does that):

       p_l = softmax(logits_l),   logits_l = unembed(final_norm(x_l))

   After the last layer these are the model's own logits.
3. Keep of each distribution its likeliest tokens, its entropy, its divergence KL(p_final ‖ p_l) from what the model
   says in the end, and the probability and rank of the tokens that are followed.

Logits are made for a few rows at a time and let go: a vocabulary of 262,144 over 18 layers and 500 tokens would take
9 GB at once. What is held is the residual stream, layers × positions × d_model.

With an SAE there are two readings, and both leave BOS as it is, which SAEs are not trained on:

- "read": the model runs as it is. At the SAE's layer the reconstruction is read in the residual's place; all other
  layers are the plain model's. It shows what of the layer's prediction the SAE keeps.
- "splice": the reconstruction takes the activation's place while the model runs. The layers before the SAE are the
  plain model's; those from the SAE on are of the changed run. It shows what becomes of the prediction downstream.

In both, `kl` is against the plain model's final distribution.

Source: nostalgebraist 2020, "interpreting GPT: the logit lens" (LessWrong).
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from scope.errors import InvalidInputError, OutOfRangeError, UnknownNameError
from scope.models.dictionaries import as_read, require_same_output, resolve_dictionaries
from scope.models.losses import CHUNK_BYTES, residual_logits
from scope.models.streams import merged_streams

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["LogitLens", "SaeReading", "logit_lens"]

SaeReading = Literal["read", "splice"]
COPIES = 5
"""Matrices of the logits' size that a chunk of rows needs at once."""


class LogitLens(NamedTuple):
    """What `logit_lens` found. Arrays run over layers, then positions."""

    layers: tuple[int, ...]
    """The layer after which each row was read."""
    hook_names: tuple[str, ...]
    """The hook that each row was read from."""
    tokens: tuple[str, ...]
    """Display strings of the whole text, BOS included."""
    token_ids: np.ndarray
    """int64 `(seq,)`."""
    positions: np.ndarray
    """int64 `(n,)`: the positions that were read."""
    top_ids: np.ndarray
    """int64 `(layers, n, k)`: the likeliest next tokens."""
    top_tokens: np.ndarray
    """str `(layers, n, k)`: what they read."""
    top_probabilities: np.ndarray
    """float32 `(layers, n, k)`."""
    entropy: np.ndarray
    """float32 `(layers, n)`, in nats: -Σ p log p."""
    kl: np.ndarray
    """float32 `(layers, n)`, in nats: KL(p_final ‖ p_layer), p_final being the plain model's."""
    followed_ids: tuple[int, ...]
    """Tokens that were followed."""
    followed_tokens: tuple[str, ...]
    """What they read."""
    probability: np.ndarray
    """float32 `(layers, n, followed)`."""
    rank: np.ndarray
    """int64 `(layers, n, followed)`: 1 for the likeliest token."""
    sae_layer: int | None
    """The layer at which an SAE's reconstruction stands in the residual's place."""
    sae_mode: SaeReading | None

    def cells(self) -> "pd.DataFrame":
        """One row per layer and position: layer, position, token, top_token, top_id, probability, entropy, kl."""
        import pandas as pd

        layer, position, token = self._axes()
        return pd.DataFrame(
            {
                "layer": layer,
                "position": position,
                "token": token,
                "top_token": self.top_tokens[..., 0].ravel(),
                "top_id": self.top_ids[..., 0].ravel(),
                "probability": self.top_probabilities[..., 0].ravel(),
                "entropy": self.entropy.ravel(),
                "kl": self.kl.ravel(),
            }
        )

    def top(self, layer: int, position: int) -> "pd.DataFrame":
        """The likeliest next tokens of one cell: token_id, token, probability.

        Raises:
            OutOfRangeError: the layer or the position was not read.
        """
        import pandas as pd

        row, column = self._place(layer, position)
        return pd.DataFrame(
            {
                "token_id": self.top_ids[row, column],
                "token": self.top_tokens[row, column],
                "probability": self.top_probabilities[row, column],
            }
        )

    def followed(self) -> "pd.DataFrame":
        """One row per followed token, layer and position: layer, position, token, followed, followed_id, probability,
        rank."""
        import pandas as pd

        layer, position, token = self._axes()
        n = len(layer)
        return pd.DataFrame(
            {
                "layer": np.tile(layer, len(self.followed_ids)),
                "position": np.tile(position, len(self.followed_ids)),
                "token": np.tile(token, len(self.followed_ids)),
                "followed": np.repeat(np.array(self.followed_tokens, dtype=object), n),
                "followed_id": np.repeat(np.array(self.followed_ids, dtype=np.int64), n),
                "probability": np.moveaxis(self.probability, -1, 0).ravel(),
                "rank": np.moveaxis(self.rank, -1, 0).ravel(),
            }
        )

    def _axes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        words = np.array(self.tokens, dtype=object)[self.positions]
        n_layers, n = len(self.layers), len(self.positions)
        return np.repeat(self.layers, n), np.tile(self.positions, n_layers), np.tile(words, n_layers)

    def _place(self, layer: int, position: int) -> tuple[int, int]:
        columns = np.flatnonzero(self.positions == position)
        if layer not in self.layers or not len(columns):
            raise OutOfRangeError(
                f"Layer {layer}, position {position} was not read; layers {self.layers[0]} to {self.layers[-1]}, "
                f"positions {self.positions[0]} to {self.positions[-1]} were."
            )
        return self.layers.index(layer), int(columns[0])

    def _repr_html_(self) -> str:
        from scope.attribution.lens_html import lens_html

        return lens_html(self)


@torch.no_grad()
def logit_lens(
    model: Any,
    prompt: Any,
    *,
    layers: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    k: int = 10,
    follow: Sequence[int | str] = (),
    sae: Any = None,
    sae_mode: SaeReading = "read",
    progress: Callable[[int, int], None] | None = None,
) -> LogitLens:
    """Read the residual stream after each layer as next-token distributions.

    Args:
        model: a `scope.models.LanguageModel`.
        prompt: a text (BOS is put in front), chat messages, or token ids, as for `model.run`.
        layers: after which layers to read; all by default.
        positions: at which tokens to read; all by default.
        k: how many of the likeliest tokens to keep.
        follow: tokens whose probability and rank are wanted, as ids or as texts of one token each.
        sae: an SAE whose reconstruction is to stand in the residual's place.
        sae_mode: "read" at its own layer only, or "splice" it into the run; see the module's text.
        progress: told (steps done, steps in all) before each step; what it raises ends the work.
    Raises:
        InvalidInputError: the prompt is empty or too long; a text to follow is no single token; "read" is asked of an
            SAE that does not read the residual stream after a layer; a transcoder is to be spliced in.
        OutOfRangeError: there is no such layer, position or token.
        MismatchError: the SAE has another width than the hook.
    """
    ids = model.prompt_tokens(prompt)
    chosen = _within(layers, model.n_layers, "layer")
    places = _within(positions, len(ids), "position")
    followed = [_followed(model, token) for token in follow]
    if not 1 <= k <= model.d_vocab:
        raise OutOfRangeError(f"k is {k}; expected 1 to {model.d_vocab:,}.")
    after = "hook_streams_post" if model.layout.n_streams > 1 else "hook_resid_post"
    hooks = {layer: f"blocks.{layer}.{after}" for layer in chosen}
    sae_layer = None
    if sae is not None:
        sae_layer = _check_sae(model, sae, sae_mode, hooks)
    streams, final = _streams(model, ids, list(hooks.values()), places, sae, sae_mode, sae_layer, chosen)
    read = _Reader(model, streams, final, k, followed).read(progress)
    unique, where = np.unique(read["top_ids"], return_inverse=True)
    strings = np.array(model.vocabulary_strings(unique.tolist()), dtype=object)
    return LogitLens(
        layers=tuple(chosen),
        hook_names=tuple(hooks.values()),
        tokens=tuple(text.display for text in model.token_strings(ids)),
        token_ids=ids.cpu().numpy().astype(np.int64),
        positions=np.array(places, dtype=np.int64),
        top_tokens=strings[where].reshape(read["top_ids"].shape),
        followed_ids=tuple(followed),
        followed_tokens=tuple(model.vocabulary_strings(followed)),
        sae_layer=sae_layer,
        sae_mode=None if sae is None else sae_mode,
        **read,
    )


def _within(asked: Sequence[int] | None, n: int, what: str) -> list[int]:
    if asked is None:
        return list(range(n))
    wanted = [int(one) for one in asked]
    wrong = [one for one in wanted if not 0 <= one < n]
    if wrong or not wanted:
        got = f"no {what}s were given" if not wanted else f"there is no {what} {wrong[0]}"
        raise OutOfRangeError(f"{got[0].upper()}{got[1:]}; expected 0 to {n - 1:,}.")
    return wanted


def _followed(model: Any, token: int | str) -> int:
    if isinstance(token, str):
        (ids,) = model.encode_documents([token])
        if len(ids) != 1:
            pieces = ", ".join(repr(piece) for piece in model.vocabulary_strings(ids.tolist()))
            raise InvalidInputError(f"{token!r} is {len(ids)} tokens ({pieces}); give one token to follow.")
        return int(ids[0])
    if not 0 <= int(token) < model.d_vocab:
        raise OutOfRangeError(f"There is no token {token}: the vocabulary has 0 to {model.d_vocab - 1:,}.")
    return int(token)


def _check_sae(model: Any, sae: Any, mode: str, hooks: dict[int, str]) -> int | None:
    """The layer after which the SAE reads the residual stream; None where it reads something else."""
    if mode not in ("read", "splice"):
        raise UnknownNameError("way to put the SAE in", mode, ["read", "splice"])
    (name,) = resolve_dictionaries(model.hook_table, {"sae": sae}, splice=True)
    several = model.layout.n_streams > 1
    for layer in range(0 if several else model.n_layers):
        after = [f"blocks.{layer}.hook_resid_post"]
        after += [f"blocks.{layer + 1}.hook_resid_pre"] if layer + 1 < model.n_layers else []
        for place in after:
            if model.hook_table[place].name == name:
                if layer in hooks:
                    hooks[layer] = place  # what is recorded there is what goes on from there
                return layer
    if mode == "read":
        raise InvalidInputError(
            f"The SAE reads {name}, which is not the residual stream after a layer: there is nothing to read in its "
            'place. Ask for sae_mode="splice", which puts it into the run.'
        )
    return None


def _streams(
    model: Any,
    ids: Tensor,
    hooks: list[str],
    places: list[int],
    sae: Any,
    mode: str,
    sae_layer: int | None,
    layers: list[int],
) -> tuple[Float[Tensor, "layers n d_model"], Float[Tensor, "n d_model"]]:
    """The residual stream after the layers that are read, and the plain model's after the last one."""
    last = model.layout.final_residual
    spliced = sae is not None and mode == "splice"
    plain = model.run(ids, hooks=list(dict.fromkeys([last] if spliced else [*hooks, last])), logits=False)
    run = model.run(ids, hooks=hooks, saes=[sae], splice="without_error", logits=False) if spliced else plain
    streams = torch.stack([run.activations[hook][places] for hook in hooks])
    if model.layout.n_streams > 1:
        streams = merged_streams(model, streams)
    if sae is not None and not spliced and sae_layer in layers:
        row = layers.index(sae_layer)
        streams[row] = _reconstruction(model, sae, ids, run.activations[hooks[row]])[places]
    return streams, plain.activations[last][places]


def _reconstruction(
    model: Any, sae: Any, ids: Tensor, value: Float[Tensor, "seq d_model"]
) -> Float[Tensor, "seq d_model"]:
    require_same_output(sae)
    x = as_read(sae, value[None])
    reconstruction = torch.where(model.bos_mask(ids[None])[..., None].to(x.device), x, sae.decode(sae.encode(x)))
    return reconstruction[0].to(value.device, value.dtype)


class _Reader:
    """Steps 2 and 3, a few rows at a time."""

    def __init__(self, model: Any, streams: Tensor, final: Tensor, k: int, followed: list[int]) -> None:
        self.model, self.streams, self.final, self.k = model, streams, final, k
        self.followed = torch.tensor(followed, dtype=torch.int64, device=final.device)

    def read(self, progress: Callable[[int, int], None] | None) -> dict[str, np.ndarray]:
        n_layers, n = self.streams.shape[:2]
        rows = max(1, CHUNK_BYTES // (4 * COPIES * self.model.d_vocab))
        starts = range(0, n, rows)
        found: dict[str, np.ndarray] = {
            "top_ids": np.empty((n_layers, n, self.k), np.int64),
            "top_probabilities": np.empty((n_layers, n, self.k), np.float32),
            "entropy": np.empty((n_layers, n), np.float32),
            "kl": np.empty((n_layers, n), np.float32),
            "probability": np.empty((n_layers, n, len(self.followed)), np.float32),
            "rank": np.empty((n_layers, n, len(self.followed)), np.int64),
        }
        for chunk, start in enumerate(starts):
            part = slice(start, start + rows)
            with self.model.lock:  # no other run's hooks on the final norm
                final = residual_logits(self.model, self.final[part]).float()
            expected = final - final.logsumexp(-1, keepdim=True)  # as in `_cell`, so that the last layer's KL is 0
            weights = expected.exp()
            own = _dot(weights, expected)
            for layer in range(n_layers):
                if progress:
                    progress(chunk * n_layers + layer, len(starts) * n_layers)
                for name, values in self._cell(self.streams[layer, part], weights, own).items():
                    found[name][layer, part] = values.cpu().numpy()
        return found

    def _cell(self, residual: Tensor, weights: Tensor, own: Tensor) -> dict[str, Tensor]:
        with self.model.lock:
            logits = residual_logits(self.model, residual).float()
        chosen = logits[:, self.followed]
        rank = torch.ones_like(chosen, dtype=torch.int64)
        for place, value in enumerate(chosen.unbind(1)):
            rank[:, place] += (logits > value[:, None]).sum(-1)
        top = logits.topk(self.k, dim=-1)
        total = logits.logsumexp(-1, keepdim=True)
        logits = logits - total
        return {
            "top_ids": top.indices,
            "top_probabilities": (top.values - total).exp(),
            "kl": (own - _dot(weights, logits)).clamp_min_(0),
            "entropy": -_dot(logits.exp(), logits),
            "probability": (chosen - total).exp(),
            "rank": rank,
        }


def _dot(a: Float[Tensor, "n d_vocab"], b: Float[Tensor, "n d_vocab"]) -> Float[Tensor, " n"]:
    """Row by row, without a product of the matrices' size."""
    return torch.bmm(a[:, None], b[:, :, None])[:, 0, 0]
