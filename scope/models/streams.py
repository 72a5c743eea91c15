"""AltUp's stack of residual streams (Gemma 3n), and the one stream that the final norm reads.

    merged = mean of stream 0 and of W_i stream_i, each as long as stream 0 (by root mean square), i = 1 … n - 1

as the model does it behind its last layer (Baykal et al. 2023, "Alternating Updates for Efficient Transformers"). Of
the stack behind the last layer it is `ln_final.hook_in`; of earlier ones what the model would read if it ended there.
"""

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from scope.models.language_model import LanguageModel

__all__ = ["merged_streams"]

SMALLEST = 1e-5
"""Of a mean square, as in the model."""


@torch.no_grad()
def merged_streams(
    model: "LanguageModel", stack: Float[Tensor, "*rows n_streams d_model"]
) -> Float[Tensor, "*rows d_model"]:
    """What the final norm would read of a stack of streams."""
    projections = model.hf.get_submodule(model.layout.module("altup_unembed_projections"))
    size = stack[..., 0, :].square().mean(-1, keepdim=True).sqrt()
    parts = [stack[..., 0, :]]
    for number, project in enumerate(projections, start=1):
        part = project(stack[..., number, :])
        parts.append(part * size / part.square().mean(-1, keepdim=True).clamp_min(SMALLEST).sqrt())
    return torch.stack(parts).mean(0)
