"""From the last residual stream to logits, logit effects and losses, in bounded memory.

A vocabulary of 262,144 makes a megabyte of float32 logits per token, so everything here works in chunks of rows.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from scope.errors import MismatchError
from scope.models.attention import attention_of_the_plain_run
from scope.models.edits import EditContext, EditFunction, apply_edits, freezes_attention, resolve_edits
from scope.models.rows import WindowBatch, check_windows, pack_windows
from scope.models.taps import tapped

if TYPE_CHECKING:
    from scope.models.language_model import LanguageModel

__all__ = [
    "cross_entropy",
    "final_norm_gain",
    "final_norm_scale",
    "likeliest_tokens",
    "logit_effects",
    "residual_logits",
    "unembed",
]

CHUNK_BYTES = 2**28
"""Logits that are held at once."""


def unembed(model: "LanguageModel", hidden: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_vocab"]:
    """Logits of the final norm's output, soft-capped where the model does that (Gemma 2)."""
    logits = model.hf.get_submodule(model.layout.head)(hidden)
    cap = model.layout.final_logit_softcapping
    return logits if cap is None else cap * torch.tanh(logits / cap)


def residual_logits(model: "LanguageModel", residual: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_vocab"]:
    """Logits that the final norm and the unembedding make of the residual stream. Of the stream after the last layer
    these are the model's own."""
    norm = model.hf.get_submodule(model.layout.module(model.layout.family.final_norm))
    return unembed(model, norm(residual.to(model.device, model.dtype)))


@torch.no_grad()
def likeliest_tokens(
    model: "LanguageModel",
    residual: Float[Tensor, "n d_model"],
    k: int,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Int[Tensor, "n k"], Float[Tensor, "n k"]]:
    """Ids and probabilities of the `k` likeliest next tokens after each row of the last residual stream, a few rows'
    logits at a time.

    Args:
        residual: the stream that goes into the final norm.
        k: how many.
        progress: told (rows done, rows in all) before each step; what it raises ends the work.
    """
    ids = torch.empty((len(residual), k), dtype=torch.int64)
    probabilities = torch.empty((len(residual), k))
    rows = max(1, CHUNK_BYTES // (8 * model.d_vocab))
    for start in range(0, len(residual), rows):
        if progress:
            progress(start, len(residual))
        with model.lock:  # no other run's hooks on the final norm
            logits = residual_logits(model, residual[start : start + rows]).float()
        best = logits.topk(k, dim=-1)
        ids[start : start + rows] = best.indices.cpu()
        probabilities[start : start + rows] = (best.values - logits.logsumexp(-1, keepdim=True)).exp().cpu()
    return ids, probabilities


def final_norm_gain(model: "LanguageModel") -> Float[Tensor, " d_model"]:
    """What the final norm multiplies each dimension by: its weight, or 1 + weight for Gemma's norm."""
    norm = model.hf.get_submodule(model.layout.module(model.layout.family.final_norm))
    return 1.0 + norm.weight if model.layout.family.gain_offset else norm.weight


def final_norm_scale(model: "LanguageModel", residual: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows"]:
    """What the final norm divides a row of the residual stream by, float32: sqrt(mean(x^2) + eps), where a LayerNorm
    takes the mean from x first."""
    norm = model.hf.get_submodule(model.layout.module(model.layout.family.final_norm))
    eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
    x = residual.float()
    if model.layout.family.centred_norm:
        x = x - x.mean(-1, keepdim=True)
    return (x.square().mean(-1) + eps).sqrt()


def logit_effects(model: "LanguageModel", directions: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_vocab"]:
    """The direct effect of directions in the last residual stream on each token's logit, up to the norm's scale:

        effect = (direction * gain) @ W_U.T, minus its mean over the vocabulary

    Where the final norm subtracts the mean (LayerNorm), the direction's mean is subtracted first, as the norm does.

    Args:
        directions: such as decoder rows.

    Returns:
        float32, on the model's device. `n` rows of `d_vocab` entries: ask for few directions at a time.

    Raises:
        MismatchError: the directions have another width than the residual stream.
    """
    if directions.ndim != 2 or directions.shape[1] != model.d_model:
        raise MismatchError(f"directions have shape {tuple(directions.shape)}; expected (n, {model.d_model}).")
    with torch.no_grad():
        scaled = directions.to(model.device, torch.float32)
        if model.layout.family.centred_norm:
            scaled = scaled - scaled.mean(-1, keepdim=True)
        scaled = scaled * final_norm_gain(model).float()
        W_U = model.W_U
        effects = torch.empty((len(directions), model.d_vocab), device=model.device)
        rows = max(1, CHUNK_BYTES // (4 * model.d_model))
        for start in range(0, model.d_vocab, rows):
            torch.matmul(scaled, W_U[start : start + rows].float().T, out=effects[:, start : start + rows])
        return effects.sub_(effects.mean(-1, keepdim=True))


def cross_entropy(
    model: "LanguageModel",
    windows: Sequence[np.ndarray],
    edits: Mapping[str, EditFunction] | None,
    batch_size: int,
    progress: Callable[[int, int | None], None] | None,
) -> list[Float[np.ndarray, " n"]]:
    """-log p(next token) at each position of each window but the last, in nats, float32.

    Args:
        windows: token ids of each window (BOS included), at least two tokens.
        edits: functions that change activations on the way, as for `run`.
        batch_size: tokens to run at once, padding included.
        progress: told (windows done, windows in all).

    Returns:
        Per window an array one shorter than the window: entry t is the loss of predicting token t + 1.

    Raises:
        InvalidInputError: a window is too short or longer than the model's context, or an edit is at a hook that only
            the bridge sees.
        OutOfRangeError: a token id that the vocabulary does not have.
        UnknownNameError: an edit names a hook that does not exist.
    """
    check_windows(windows, 2, model.max_context_size, model.d_vocab)
    shortest = min((len(window) for window in windows), default=0)
    changes = resolve_edits(model.hook_table, edits, shortest, bridge=False)
    names = sorted(changes, key=model.hook_table.rank)
    losses: list[np.ndarray] = [np.empty(0, np.float32)] * len(windows)
    done = 0
    for indices in pack_windows(windows, batch_size):
        batch = WindowBatch([windows[i] for i in indices], [0] * len(indices), model.device)
        bos = model.bos_mask(batch.tokens)
        handlers = {
            model.hook_table[name]: partial(apply_edits, changes[name], context=EditContext(name, batch.tokens, bos))
            for name in names
        }
        held = attention_of_the_plain_run(model, batch.tokens) if freezes_attention(edits) else nullcontext()
        with torch.no_grad(), model.lock, held, tapped(model.hf, handlers, stop=False):
            hidden = model.hidden_states(batch.tokens)
            nats = _token_losses(model, hidden[:, :-1], batch.tokens[:, 1:]).cpu().numpy()
        for row, index in enumerate(indices):
            losses[index] = nats[row, : len(windows[index]) - 1]
        done += len(indices)
        if progress:
            progress(done, len(windows))
    return losses


def _token_losses(
    model: "LanguageModel", hidden: Float[Tensor, "batch seq d_model"], targets: Int[Tensor, "batch seq"]
) -> Float[Tensor, "batch seq"]:
    flat, wanted = hidden.flatten(0, 1), targets.flatten()
    nats = torch.empty(len(wanted), device=flat.device)
    rows = max(1, CHUNK_BYTES // (4 * model.d_vocab))
    for start in range(0, len(wanted), rows):
        logits = unembed(model, flat[start : start + rows]).float()
        chosen = logits.gather(1, wanted[start : start + rows, None])[:, 0]
        nats[start : start + rows] = logits.logsumexp(-1) - chosen
    return nats.view(targets.shape)
