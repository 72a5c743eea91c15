"""What one asks of a model through an SAE of its: three readings, of the reference and of the other model alike.

1. *Splice*: the cross-entropy on some windows as it is, and with the SAE's reconstruction in the activation's place,
   BOS as it was. Their difference is `delta_ce`.
2. *Lens*: the likeliest next token at some rows, were the SAE's layer the last one (`scope.models.losses`). Only where
   the SAE reads the residual stream.
3. *Attribution*: the `N_TOP` features with the largest effects, by gradient times activation, on the logit of the token
   that follows some prompts (`scope.attribution.methods`).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from scope.attribution.methods import attribute
from scope.attribution.targets import logit
from scope.diffing.pair import PairedStores
from scope.interventions import splice_edits
from scope.models import LanguageModel
from scope.models.losses import likeliest_tokens
from scope.saes.base import SAE

__all__ = ["Readings", "Sample", "read_model", "sample_of"]

WINDOWS, PROMPTS = 8, 8
PROMPT_TOKENS = 32
LENS_ROWS = 256
N_TOP = 10


class Sample(NamedTuple):
    """On what the readings are taken: the same tokens in both models."""

    windows: list[np.ndarray]
    """Token ids of some windows of two tokens or more, BOS included."""
    residual: tuple[Float[Tensor, "n width"], Float[Tensor, "n width"]] | None
    """Rows of the SAE's hook in the base model and in the other; None where it is not the residual stream."""


class Readings(NamedTuple):
    """What one model says."""

    ce: float
    """Nats a token."""
    ce_spliced: float
    lens: Int[np.ndarray, " n"] | None
    """The likeliest next token of each row."""
    attributed: tuple[frozenset[int], ...]
    """For each prompt the features with the largest effects."""

    @property
    def delta_ce(self) -> float:
        """What splicing the SAE in costs."""
        return self.ce_spliced - self.ce


def sample_of(stores: PairedStores, hook: str, seed: int) -> Sample:
    """Windows drawn at random, and rows spread over the text.

    Args:
        stores: the two models' activations.
        hook: the SAE's.
        seed: of the windows.
    """
    sequences = stores.base.sequences()
    sequences = sequences[sequences["n_rows"] > 1]
    drawn = sequences.sample(min(WINDOWS, len(sequences)), random_state=seed)
    windows = stores.base.window_tokens(drawn["sequence"].tolist())
    if not hook.rpartition(".")[2].startswith("hook_resid"):
        return Sample(windows, None)
    step = max(1, stores.base.n_rows // LENS_ROWS)
    parts = [(part.base[part.rows % step == 0], part.tuned[part.rows % step == 0]) for part in stores.paired_rows(hook)]
    base, tuned = (torch.cat(rows) for rows in zip(*parts, strict=True))
    return Sample(windows, (base, tuned))


def read_model(
    model: LanguageModel,
    sae: SAE,
    windows: Sequence[Int[np.ndarray, " _"]],
    residual: Float[Tensor, "n width"] | None,
) -> Readings:
    """Take the readings of one model.

    Args:
        model: the model.
        sae: reconstructs one hook of it.
        windows: of `Sample`.
        residual: this model's rows of `Sample`.
    """
    losses = [
        float(np.concatenate(model.cross_entropy(windows, edits)).mean())
        for edits in (None, dict(splice_edits(sae, keep_bos=True)))
    ]
    lens = None if residual is None else likeliest_tokens(model, residual, 1)[0][:, 0].cpu().numpy()
    attributed = []
    for window in windows[:PROMPTS]:
        at = min(PROMPT_TOKENS, len(window) - 1)
        target = logit(int(window[at]))
        found = attribute(model, torch.from_numpy(window[:at].astype(np.int64)), target, sae, "gradient_x_activation")
        attributed.append(frozenset(found.features(N_TOP)["feature"].tolist()))
    return Readings(losses[0], losses[1], lens, tuple(attributed))
