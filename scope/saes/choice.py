"""The activation functions that transcoders, crosscoders and cross-layer transcoders may have, by name."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from scope.errors import InvalidInputError, UnknownNameError
from scope.saes.activation import Activation
from scope.saes.base import SAEConfig
from scope.saes.batchtopk import BatchTopK
from scope.saes.jumprelu import JumpReLU, JumpReLUSettings
from scope.saes.standard import ReLU
from scope.saes.topk import TopK, require_k

__all__ = ["ACTIVATIONS", "ChosenActivationConfig"]

C = TypeVar("C", bound="ChosenActivationConfig")

ACTIVATIONS: Mapping[str, Activation] = {each.name: each for each in (ReLU(), TopK(), BatchTopK(), JumpReLU())}
"""relu (with an L1 penalty), topk, batchtopk and jumprelu."""


@dataclass(frozen=True, kw_only=True)
class ChosenActivationConfig(JumpReLUSettings, SAEConfig):
    """What architectures are configured by whose activation function is a choice."""

    activation: str = "batchtopk"
    """One of `ACTIVATIONS`."""
    k: int | None = None
    """Features that fire on a row, with topk and batchtopk."""
    apply_b_dec_to_input: bool = False
    """Never where the output is another hook: its bias has nothing to do with the input."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activation not in ACTIVATIONS:
            raise UnknownNameError("activation function", self.activation, ACTIVATIONS)
        self.require_sense()
        if self.activation in ("topk", "batchtopk"):
            if self.k is None:
                raise InvalidInputError(f"The activation function {self.activation} needs k, the features of a row.")
            require_k(self.k, self.d_sae)
        if self.apply_b_dec_to_input and self.ports.outputs:
            raise InvalidInputError(
                f"apply_b_dec_to_input is true, but the architecture {self.architecture} writes another hook than it "
                "reads: b_dec is the output's. Leave it out."
            )

    @classmethod
    def for_training(cls: type[C], *, d_sae: int, k: int, **common: Any) -> C:
        return cls(d_sae=d_sae, **{"k": k, "target_l0": float(k), **common})
