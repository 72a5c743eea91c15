"""How far a changed model's predictions are from the plain one's, with gradients, in bounded memory.

1. The windows run plainly, without gradients, and changed, with them, both up to the output of the final norm.
2. A stretch of tokens at a time, both outputs become logits, and the sum of KL(plain ‖ changed) over the stretch is
   differentiated as far as the changed output; the logits are let go.
3. The gradient there goes on through the changed pass by way of a scalar, `slope`, that has the same gradient.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from scope.errors import InvalidInputError
from scope.models.edits import EditContext, EditFunction, apply_edits, freezes_attention, resolve_edits
from scope.models.losses import CHUNK_BYTES, unembed
from scope.models.rows import WindowBatch, check_windows
from scope.models.taps import tapped

if TYPE_CHECKING:
    from scope.models.language_model import LanguageModel

__all__ = ["Divergence", "kl_divergence"]

COPIES = 6
"""Matrices of the logits' size that a stretch needs at once."""


class Divergence(NamedTuple):
    """What `kl_divergence` found."""

    kl: Float[Tensor, ""]
    """Mean over tokens of KL(plain ‖ changed), in nats, detached."""
    slope: Float[Tensor, ""]
    """A scalar whose gradient with respect to what the edits depend on is that of `kl`; its value means nothing."""
    n_tokens: int


def kl_divergence(
    model: "LanguageModel", windows: Sequence[np.ndarray], edits: Mapping[str, EditFunction]
) -> Divergence:
    """KL between the plain model's next-token distributions and those after `edits`, over all tokens of some windows.

    Args:
        model: its own weights should need no gradients.
        windows: token ids of each window, run as one batch.
        edits: functions of activations, whose parameters may need gradients.

    Raises:
        UnknownNameError, InvalidInputError, OutOfRangeError: as `cross_entropy`.
    """
    check_windows(windows, 1, model.max_context_size, model.d_vocab)
    if freezes_attention(edits):
        raise InvalidInputError("kl_divergence does not hold attention; leave freeze_attention off.")
    changes = resolve_edits(model.hook_table, edits, min(map(len, windows)), bridge=False)
    batch = WindowBatch(windows, [0] * len(windows), model.device)
    bos = model.bos_mask(batch.tokens)
    handlers = {
        model.hook_table[name]: partial(apply_edits, changes[name], context=EditContext(name, batch.tokens, bos))
        for name in sorted(changes, key=model.hook_table.rank)
    }
    with torch.no_grad(), model.lock:
        plain = batch.pick(model.hidden_states(batch.tokens))
    with torch.enable_grad(), model.lock, tapped(model.hf, handlers, stop=False):
        changed = batch.pick(model.hidden_states(batch.tokens))
    total, gradient = torch.zeros((), device=changed.device), torch.empty_like(changed)
    rows = max(1, CHUNK_BYTES // (4 * COPIES * model.d_vocab))
    for start in range(0, len(changed), rows):
        part = slice(start, start + rows)
        with torch.no_grad():
            expected = unembed(model, plain[part]).float().log_softmax(-1)
        leaf = changed[part].detach().requires_grad_()
        with torch.enable_grad():
            found = unembed(model, leaf).float().log_softmax(-1)
            kl = functional.kl_div(found, expected, reduction="sum", log_target=True)
        (gradient[part],) = torch.autograd.grad(kl, leaf)
        total += kl.detach()
    slope = (changed * gradient).sum() / len(changed)
    return Divergence(total / len(changed), slope, len(changed))
