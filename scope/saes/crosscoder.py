"""Crosscoders: one dictionary for several hooks, or for one hook of several models."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from scope.errors import InvalidInputError
from scope.saes.activation import Activation
from scope.saes.base import SAE, Port, Ports
from scope.saes.choice import ACTIVATIONS, ChosenActivationConfig
from scope.saes.registry import register

__all__ = ["Crosscoder", "CrosscoderConfig"]


@dataclass(frozen=True, kw_only=True)
class CrosscoderConfig(ChosenActivationConfig):
    """Configuration of a `Crosscoder`. `d_in` is the sum of `widths`."""

    architecture: ClassVar[str] = "crosscoder"

    widths: tuple[int, ...]
    """Width of each hook, in the order of `metadata.hook_names`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.widths) < 2 or sum(self.widths) != self.d_in:
            raise InvalidInputError(
                f"widths are {', '.join(map(str, self.widths))} and d_in is {self.d_in}; expected two or more widths "
                "that add up to d_in."
            )

    @property
    def ports(self) -> Ports:
        names = self.metadata.hook_names or (None,) * len(self.widths)
        return Ports(tuple(Port(name, width) for name, width in zip(names, self.widths, strict=True)), ())

    @classmethod
    def shape_of(cls, ports: Ports) -> dict[str, Any]:
        if len(ports.inputs) < 2 or ports.outputs:
            raise InvalidInputError(
                f"The architecture crosscoder reads two or more hooks and reconstructs them all; got "
                f"{len(ports.inputs)} to read and {len(ports.outputs)} to write. Give several hooks, and no hook_out."
            )
        widths = tuple(port.width for port in ports.inputs)
        return {"d_in": sum(widths), "widths": widths}


@register(CrosscoderConfig)
class Crosscoder(SAE):
    """The crosscoder of Lindsey et al. 2024, "Sparse crosscoders for cross-layer features and model diffing", 2.

        f = act(sum over l of x_l W_enc,l + b_enc)      x_hat_l = f W_dec,l + b_dec,l

        loss = mean over rows of the sum over l of ‖x_l - x_hat_l‖² + penalty

    where l runs over the hooks. x is the hooks' rows side by side, and so are the weights: W_enc `(sum of widths,
    d_sae)`, W_dec `(d_sae, sum of widths)`. With ReLU the penalty is the paper's, coefficient x sum over i of f_i sum
    over l of ‖W_dec,l,i‖. Rows of W_dec have norm 1 over all hooks together: how it divides among them is learned.
    """

    cfg: CrosscoderConfig

    @property
    def activation(self) -> Activation:
        return ACTIVATIONS[self.cfg.activation]

    @torch.no_grad()
    def decoder_norms_by_hook(self) -> Float[Tensor, "d_sae hooks"]:
        """‖W_dec row‖ at each hook, float32: where a feature is written."""
        return torch.stack([part.float().norm(dim=-1) for part in self.W_dec.split(self.cfg.widths, dim=-1)], dim=-1)
