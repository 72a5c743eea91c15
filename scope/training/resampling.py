"""Dead features start anew at what the SAE explains worst (Bricken et al. 2023, appendix "Neuron resampling").

1. Rows of the batch are drawn with probability proportional to their squared loss, one for each dead feature.
2. The decoder row becomes the row's direction from the centre, the encoder column the same of the input, with 0.2 of
   the mean norm of the living features' columns, or with all of it where features compete for the k largest places
   (TopK and its kin); the feature's biases and thresholds take the living ones' median.
3. The trainer forgets Adam's moments of these features.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from scope.saes.base import SAE

__all__ = ["resample"]

ENCODER_SHARE = 0.2


@torch.no_grad()
def resample(
    sae: SAE,
    dead: Int[Tensor, " n"],
    x: Float[Tensor, "batch d_in"],
    target: Float[Tensor, "batch d_out"],
    generator: torch.Generator,
) -> Int[Tensor, " m"]:
    """Start dead features anew from the rows of a batch; at most as many as there are rows.

    Returns:
        The features that were started anew.
    """
    loss = (sae(x) - target).square().sum(dim=-1)
    chosen = dead[: min(len(dead), int((loss > 0).sum()))]
    if not len(chosen) or len(dead) == sae.d_sae:
        return chosen[:0]
    drawn = torch.multinomial(loss.square().double().cpu(), len(chosen), generator=generator).to(x.device)
    alive = torch.ones(sae.d_sae, dtype=torch.bool, device=x.device)
    alive[dead] = False
    share = ENCODER_SHARE if sae.activation.coefficient is not None else 1.0
    norm = share * float(sae.W_enc[:, alive].norm(dim=0).mean())
    sae.restart_features(chosen, x[drawn] - x.mean(dim=0), target[drawn] - target.mean(dim=0), norm)
    for name in sae.activation.parameters:
        parameter = getattr(sae, name)
        parameter[chosen] = parameter[alive].median()
    return chosen
