"""What the weights alone say of each feature: neighbours, how encoder and decoder agree, effects on logits.

Logit effects are per unit of firing strength: the decoder row at unit norm, times the final norm's gain, times W_U,
the vocabulary mean removed. They are the direct path at a final norm of scale 1; only their order and ratios matter.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from scope.features.layout import N_LOGITS, N_NEIGHBOURS
from scope.kernels.topk import topk

__all__ = ["LogitEffects", "Neighbours", "encoder_decoder_cosine", "extreme_logits", "nearest_decoders", "unit_decoder"]

CHUNK_BYTES = 2**28
"""Size of the largest temporary matrix."""


class Neighbours(NamedTuple):
    """Each feature's nearest decoder rows, the nearest first."""

    features: np.ndarray
    """int32 `(d_sae, n)`."""
    cosines: np.ndarray
    """float32 `(d_sae, n)`."""


class LogitEffects(NamedTuple):
    """The tokens that each feature pushes most, up and down."""

    top_tokens: np.ndarray
    """int32 `(d_sae, N_LOGITS)`, the largest effect first."""
    top_effects: np.ndarray
    """float32, logit per unit of firing strength."""
    bottom_tokens: np.ndarray
    """int32 `(d_sae, N_LOGITS)`, the most negative effect first."""
    bottom_effects: np.ndarray


def unit_decoder(sae: Any) -> Float[Tensor, "d_sae d_in"]:
    """The decoder rows at unit norm, float32; a row of zeros stays one."""
    rows = sae.W_dec.detach().float()
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def encoder_decoder_cosine(sae: Any) -> np.ndarray:
    """Cosine of each feature's encoder column and decoder row, float32 `(d_sae,)`; NaN without such an encoder."""
    encoder = getattr(sae, "W_enc", None)
    if encoder is None or encoder.T.shape != sae.W_dec.shape:
        return np.full(sae.d_sae, np.nan, np.float32)
    cosine = torch.nn.functional.cosine_similarity(encoder.detach().T.float(), sae.W_dec.detach().float(), dim=1)
    return cosine.cpu().numpy()


def nearest_decoders(unit: Float[Tensor, "d_sae d_in"], progress: Callable[[int], None] | None = None) -> Neighbours:
    """The decoder rows with the largest cosine to each, itself left out."""
    d_sae = len(unit)
    n = min(N_NEIGHBOURS, d_sae - 1)
    chunk = max(1, CHUNK_BYTES // (4 * d_sae))
    features, cosines = np.empty((d_sae, n), np.int32), np.empty((d_sae, n), np.float32)
    for start in range(0, d_sae, chunk):
        rows = unit[start : start + chunk]
        similar = rows @ unit.T
        similar[torch.arange(len(rows)), torch.arange(start, start + len(rows))] = -torch.inf
        found = topk(similar, n)
        order = torch.sort(found.ids, dim=1).indices  # of equal cosines the lower id first
        ids, values = found.ids.gather(1, order), found.values.gather(1, order)
        order = torch.sort(values, dim=1, descending=True, stable=True).indices
        features[start : start + len(rows)] = ids.gather(1, order).cpu().numpy()
        cosines[start : start + len(rows)] = values.gather(1, order).cpu().numpy()
        if progress is not None:
            progress(start + len(rows))
    return Neighbours(features, cosines)


def extreme_logits(
    unit: Float[Tensor, "d_sae d_model"], model: Any, progress: Callable[[int], None] | None = None
) -> LogitEffects:
    """The tokens with the largest and the smallest logit effects of each feature."""
    d_sae, n = len(unit), min(N_LOGITS, model.d_vocab)
    chunk = max(1, CHUNK_BYTES // (4 * model.d_vocab))
    tokens = np.empty((2, d_sae, n), np.int32)
    effects = np.empty((2, d_sae, n), np.float32)
    for start in range(0, d_sae, chunk):
        effect = model.logit_effects(unit[start : start + chunk])
        stop = start + len(effect)
        for side, largest in enumerate((True, False)):
            found = effect.topk(n, dim=1, largest=largest)
            tokens[side, start:stop] = found.indices.cpu().numpy()
            effects[side, start:stop] = found.values.float().cpu().numpy()
        if progress is not None:
            progress(stop)
    return LogitEffects(tokens[0], effects[0], tokens[1], effects[1])
