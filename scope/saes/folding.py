"""Scales and norms folded into an SAE's weights, so that it takes and gives what it should without further settings."""

from collections.abc import Sequence

import torch
from torch import Tensor

from scope.errors import InvalidInputError
from scope.saes.base import SAE

__all__ = ["fold_decoder_norm", "fold_scales"]


@torch.no_grad()
def fold_scales(sae: SAE, inputs: Sequence[float], outputs: Sequence[float] = ()) -> None:
    """Turn an SAE of scaled rows into one that takes raw rows and gives values in the model's own units.

    With inputs s x and outputs t y, features are divided by t (by the harmonic mean of several outputs' t, so that
    their order stays), which multiplies W_enc by s/t, divides biases and thresholds by t, and leaves a single output's
    W_dec as it is.

    Args:
        sae: changed in place.
        inputs: the factor of each input, in order.
        outputs: the factor of each output; none for those of the inputs.
    """
    ports = sae.cfg.ports
    scale_in = _spread(inputs, [port.width for port in ports.inputs], sae.W_enc)
    written = list(outputs or inputs)
    scale_out = _spread(written, [port.width for port in ports.outputs or ports.inputs], sae.W_enc)
    reference = written[0] if len(set(written)) == 1 else len(written) / sum(1 / scale for scale in written)
    sae.scale_encoder(scale_in / reference)
    for name in sae.activation.in_feature_units:
        getattr(sae, name).div_(reference)
    sae.W_dec.mul_(reference / scale_out)
    sae.b_dec.div_(scale_out)
    sae.scale_skip(scale_in, scale_out)


@torch.no_grad()
def fold_decoder_norm(sae: SAE) -> None:
    """Bring every row of W_dec to norm 1 and put the norm into the encoder, which leaves the output as it is.

    It changes which pre-activations are the largest, so it is not for TopK and its kin, unless their pre-activations
    were multiplied by the norms before.
    """
    norms = sae.W_dec.norm(dim=-1)
    sae.W_enc.mul_(norms)
    for name in sae.activation.in_feature_units:
        getattr(sae, name).mul_(norms)
    sae.W_dec.div_(norms.clamp_min(torch.finfo(norms.dtype).tiny)[:, None])


def _spread(factors: Sequence[float], widths: Sequence[int], like: Tensor) -> Tensor:
    """One factor for each entry of the ports side by side."""
    if len(factors) != len(widths):
        raise InvalidInputError(f"There are {len(factors)} scales for {len(widths)} hooks.")
    return torch.cat([like.new_full((width,), factor) for factor, width in zip(factors, widths, strict=True)])
