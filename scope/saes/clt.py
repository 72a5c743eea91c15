"""Cross-layer transcoders: each feature reads one layer and writes the outputs of that layer and all later ones."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from scope.errors import InvalidInputError
from scope.saes.activation import Activation
from scope.saes.base import SAE, Port, Ports
from scope.saes.choice import ACTIVATIONS, ChosenActivationConfig
from scope.saes.registry import register

__all__ = ["CLTConfig", "CrossLayerTranscoder"]


@dataclass(frozen=True, kw_only=True)
class CLTConfig(ChosenActivationConfig):
    """Configuration of a `CrossLayerTranscoder`. `d_in` is the inputs' width of all layers together."""

    architecture: ClassVar[str] = "clt"

    n_layers: int
    """Number of layers; `d_sae` is that of all layers together."""
    d_out: int
    """Width of the outputs of all layers together."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("d_in", "d_out", "d_sae"):
            if self.n_layers < 2 or getattr(self, name) % self.n_layers:
                raise InvalidInputError(
                    f"n_layers is {self.n_layers} and {name} {getattr(self, name):,}; expected two or more layers of "
                    f"equal width, so that {name} is a multiple of n_layers."
                )

    @property
    def encoder_width(self) -> int:
        return self.d_in // self.n_layers

    @property
    def output_width(self) -> int:
        return self.d_out

    @property
    def ports(self) -> Ports:
        names = self.metadata.hook_names or (None,) * self.n_layers
        names_out = self.metadata.hook_names_out or (None,) * self.n_layers
        return Ports(
            tuple(Port(name, self.d_in // self.n_layers) for name in names),
            tuple(Port(name, self.d_out // self.n_layers) for name in names_out),
        )

    @classmethod
    def shape_of(cls, ports: Ports) -> dict[str, Any]:
        n_in, n_out = len(ports.inputs), len(ports.outputs)
        if n_in < 2 or n_in != n_out:
            raise InvalidInputError(
                f"The architecture clt reads one hook and writes one in each of two or more layers; got {n_in} to read "
                f"and {n_out} to write. Give as many hooks as hook_outs, in the order of the layers."
            )
        for side in ports:
            if len({port.width for port in side}) > 1:
                raise InvalidInputError(f"The layers of a clt have one width; got {[port.width for port in side]}.")
        return {
            "n_layers": n_in,
            "d_in": sum(port.width for port in ports.inputs),
            "d_out": sum(port.width for port in ports.outputs),
        }


@register(CLTConfig)
class CrossLayerTranscoder(SAE):
    """The cross-layer transcoder of Ameisen, Lindsey et al. 2025, "Circuit tracing", section 2.1.

        f_l = act(x_l W_enc,l + b_enc,l)      y_hat_m = sum over l ≤ m of f_l W_dec,l→m + b_dec,m

        loss = mean over rows of the sum over m of ‖y_m - y_hat_m‖² + penalty

    with x_l the residual stream before layer l's MLP and y_m the output of layer m's MLP. The paper's activation
    function is JumpReLU with the tanh penalty. A row holds all layers side by side, and features are ordered by layer:
    W_enc is `(width of a layer, d_sae)`, W_dec `(d_sae, width of all outputs)`, 0 where a feature would write an
    earlier layer; no gradient reaches these zeros. k counts the features of all layers together.
    """

    cfg: CLTConfig

    @property
    def activation(self) -> Activation:
        return ACTIVATIONS[self.cfg.activation]

    @property
    def has_one_encoder(self) -> bool:
        return False

    def layer_of(self, ids: Int[Tensor, "*n"]) -> Int[Tensor, "*n"]:
        """The layer that each feature reads."""
        return ids // (self.d_sae // self.cfg.n_layers)

    def project(
        self, centred: Float[Tensor, "*batch d_in"], ids: Int[Tensor, " n"] | None = None
    ) -> Float[Tensor, "*batch n"]:
        layers, W = self.cfg.n_layers, self.W_enc.T
        by_layer = centred.unflatten(-1, (layers, -1))
        if ids is not None:  # ascending, as they come from `nonzero`
            own = self.layer_of(ids)
            parts = [functional.linear(by_layer[..., i, :], W[ids[own == i]]) for i in range(layers)]
            return torch.cat(parts, dim=-1)
        return torch.einsum("...lw,lnw->...ln", by_layer, W.unflatten(0, (layers, -1))).flatten(-2)

    def pre_activations(self, centred: Float[Tensor, "*batch d_in"], bias: Tensor) -> Float[Tensor, "*batch d_sae"]:
        return self.project(centred) + bias

    def decoder(self) -> Float[Tensor, "d_sae d_out"]:
        masked: Tensor = _WithoutGradientBelow.apply(self.W_dec, self.cfg.n_layers)
        return masked

    def _random_decoder(self, generator: torch.Generator | None) -> Tensor:
        device = None if generator is None else generator.device
        rows = torch.randn(self.cfg.d_sae, self.d_out, generator=generator, dtype=torch.float32, device=device)
        return functional.normalize(_zero_earlier(rows, self.cfg.n_layers), dim=-1)

    def scale_encoder(self, factors: Float[Tensor, " d_in"]) -> None:
        by_layer = factors.view(self.cfg.n_layers, -1)
        self.W_enc.mul_(by_layer.repeat_interleave(self.d_sae // self.cfg.n_layers, dim=0).T)

    def restart_features(self, ids: Tensor, inputs: Tensor, targets: Tensor, encoder_norm: float) -> None:
        own = inputs.unflatten(-1, (self.cfg.n_layers, -1))[torch.arange(len(ids)), self.layer_of(ids)]
        with torch.no_grad():
            self.W_enc[:, ids] = encoder_norm * functional.normalize(own, dim=-1).T
            self.W_dec[ids] = targets
            _zero_earlier(self.W_dec, self.cfg.n_layers)
            self.W_dec[ids] = functional.normalize(self.W_dec[ids], dim=-1)


def _zero_earlier(rows: Tensor, n_layers: int) -> Tensor:
    """Zero, in place, what features write to layers before their own."""
    blocks = rows.view(n_layers, len(rows) // n_layers, n_layers, -1)
    for layer in range(1, n_layers):
        blocks[layer, :, :layer] = 0
    return rows


class _WithoutGradientBelow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, W, n_layers):  # type: ignore[no-untyped-def]
        ctx.n_layers = n_layers
        return W.view_as(W)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return _zero_earlier(grad.clone(), ctx.n_layers), None
