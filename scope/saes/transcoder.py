"""Transcoders: dictionaries that read one hook and write another, such as an MLP's input and its output."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from scope.errors import InvalidInputError
from scope.saes.activation import Activation
from scope.saes.base import SAE, Port, Ports
from scope.saes.choice import ACTIVATIONS, ChosenActivationConfig
from scope.saes.registry import register

__all__ = ["SkipTranscoder", "SkipTranscoderConfig", "Transcoder", "TranscoderConfig"]


@dataclass(frozen=True, kw_only=True)
class TranscoderConfig(ChosenActivationConfig):
    """Configuration of a `Transcoder`."""

    architecture: ClassVar[str] = "transcoder"

    d_out: int
    """Width of the activations that the transcoder writes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.d_out < 1:
            raise InvalidInputError(f"d_out is {self.d_out}; expected the width of the hook that is written.")

    @property
    def output_width(self) -> int:
        return self.d_out

    @property
    def ports(self) -> Ports:
        metadata = self.metadata
        return Ports((Port(metadata.hook_name, self.d_in),), (Port(metadata.hook_name_out, self.d_out),))

    @property
    def stored_architecture(self) -> str:
        """SAELens's names where it has the activation function; it must not take another for a ReLU."""
        return self.architecture if self.activation == "relu" else f"{self.activation}_{self.architecture}"

    @classmethod
    def shape_of(cls, ports: Ports) -> dict[str, Any]:
        if (len(ports.inputs), len(ports.outputs)) != (1, 1):
            raise InvalidInputError(
                f"The architecture {cls.architecture} reads one hook and writes one; got {len(ports.inputs)} to read "
                f"and {len(ports.outputs)} to write. Give one hook, and one as hook_out."
            )
        return {"d_in": ports.inputs[0].width, "d_out": ports.outputs[0].width}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Any:
        """As for all; files of SAELens name the activation function in the architecture alone."""
        prefix = str(content.get("architecture", "")).removesuffix(cls.architecture).rstrip("_")
        return super().from_dict({"activation": prefix or "relu", **content})


@register(TranscoderConfig, stored_as=[f"{name}_transcoder" for name in ACTIVATIONS if name != "relu"])
class Transcoder(SAE):
    """The transcoder of Dunefsky et al. 2024, "Transcoders find interpretable LLM feature circuits" (2406.11944), 3.1.

        f = act(x W_enc + b_enc)      y_hat = f W_dec + b_dec      loss = mean over rows of ‖y - y_hat‖² + penalty

    with x an MLP's input and y its output (of the same token), and act one of `ACTIVATIONS`; the paper's is ReLU with
    an L1 penalty.
    """

    cfg: TranscoderConfig

    @property
    def activation(self) -> Activation:
        return ACTIVATIONS[self.cfg.activation]


@dataclass(frozen=True, kw_only=True)
class SkipTranscoderConfig(TranscoderConfig):
    """Configuration of a `SkipTranscoder`."""

    architecture: ClassVar[str] = "skip_transcoder"


@register(SkipTranscoderConfig, stored_as=[f"{name}_skip_transcoder" for name in ACTIVATIONS if name != "relu"])
class SkipTranscoder(Transcoder):
    """The skip transcoder of Paulo et al. 2025, "Transcoders beat sparse autoencoders" (arXiv 2501.18823), 3.

        f = act(x W_enc + b_enc)      y_hat = f W_dec + x W_skipᵀ + b_dec

    W_skip, `(d_out, d_in)`, takes up the part of the map that is linear, so that the features need not. It starts at 0.
    `decode` gives the features' part and the bias alone; `forward` and `reconstruct` add the linear part.
    """

    cfg: SkipTranscoderConfig

    def __init__(self, cfg: SkipTranscoderConfig, *, device: torch.device | str = "cpu", **options: Any) -> None:
        super().__init__(cfg, device=device, **options)
        self.W_skip = nn.Parameter(torch.zeros(cfg.d_out, cfg.d_in, dtype=self.dtype, device=device))

    def _with_skip(self, decoded: Tensor, rows: Tensor) -> Tensor:
        return decoded + rows @ self.W_skip.T

    def scale_skip(self, scale_in: Tensor, scale_out: Tensor) -> None:
        self.W_skip.mul_(scale_in / scale_out[:, None])
