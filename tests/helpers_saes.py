"""SAEs of every architecture with weights that are not special, and checks that all of them must pass."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from scope.saes import registry
from scope.saes.base import SAE, TrainingContext

CONTEXT = TrainingContext(dead=None, auxk_coefficient=0.0, k_aux=8, sparsity_coefficient=0.3)


def shaken(sae: SAE, seed: int = 0, size: float = 0.2) -> SAE:
    """The SAE with noise on all parameters, and thresholds well above 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator).to(parameter))
            if name == "threshold":
                parameter.abs_().add_(0.3)
        if "threshold" in dict(sae.named_buffers()):
            sae.threshold.fill_(0.4)
    return sae


def make(architecture: str, d_in: int = 12, d_sae: int = 40, k: int = 5, seed: int = 0, **options: Any) -> SAE:
    """An SAE of a one-hook architecture."""
    cfg = registry.config_of(architecture).for_training(d_in=d_in, d_sae=d_sae, k=k, **options)
    return shaken(registry.get(architecture)(cfg, generator=torch.Generator().manual_seed(seed)), seed)


def slopes(function: Callable[[], Tensor], parameter: Tensor, seed: int = 0, n: int = 3) -> list[tuple[float, float]]:
    """(autograd's, finite differences') derivative along random directions of one parameter."""
    generator = torch.Generator().manual_seed(seed)
    (gradient,) = torch.autograd.grad(function(), parameter)
    found = []
    for _ in range(n):
        direction = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * 1e-6 * direction)
                values.append(float(function()))
                parameter.sub_(sign * 1e-6 * direction)
        found.append((float((gradient * direction).sum()), (values[0] - values[1]) / 2e-6))
    return found
