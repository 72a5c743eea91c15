"""How a layer reads and writes the residual stream of a frozen prompt: one stream, or AltUp's stack of them.

Nearly every model has one residual stream h, and a layer adds to it. Gemma 3n has a stack of them (Baykal et al. 2023,
"Alternating Updates for Efficient Transformers"), of which a layer reads one, the active stream a, and a branch of low
rank beside attention (Menghani et al. 2024, "LAuReL: Learned Augmented Residual Layer"):

    pred_s  = Σ_r P[r, s] h_r                       s, r: streams; P a matrix for each token
    normed  = N1(pred_a)
    mid     = (pred_a + attention(normed) + normed + N(R L normed)) / √2
    end     = mid + mlp_out
    h'_s    = pred_s + c_s (end - pred_a)           c_s a number for each token
    h'_s   += ple_out                               s > 0

    h_s = W_s e  |e| / |W_s e|    in front of the first layer, e the embedding
    x   = mean over s of U_s h_s  |h_0| / |U_s h_s|    into the final norm, U_0 = 1 as W_0

P and c follow from what the stack holds, by way of a router. With them held at what they are on the prompt, as norms'
denominators are (these lengths too), all of it is linear.

`FrozenStream` and `StreamEnds` are the one stream, on which nothing happens; `FrozenAltUp` and `AltUpEnds` the stack.
What they call a stack is (*batch, n, d_model), and (*batch, n, n_streams, d_model) with AltUp. Tensors that are given
may be changed in place and come back.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from scope.attribution.frozen_norm import FrozenNorm, norm_denominator

__all__ = ["AltUpEnds", "AltUpRecord", "FrozenAltUp", "FrozenStream", "StreamEnds", "altup_recorded"]

SMALLEST = 1e-5
"""Of a mean square by which a stream is divided, as in the model."""


class FrozenStream:
    """One residual stream: a layer reads it and adds to it."""

    def active(self, stack: Tensor) -> Tensor:
        """The stream that the hooks `hook_resid_pre` and `hook_resid_post` are of."""
        return stack

    def with_active(self, stack: Tensor, value: Tensor) -> Tensor:
        """The stack with another active stream."""
        return value

    def into_layer(self, stack: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """The stack as the layer's end finds it, and what the layer's first norm reads."""
        return stack, stack

    def behind_attention(self, read: Tensor, written: Tensor, normed: Tensor, rows: slice) -> Tensor:
        """`hook_resid_mid`, of what the layer read, what attention wrote, and the output of the first norm."""
        return read + written

    def out_of_layer(self, stack: Tensor, read: Tensor, end: Tensor, rows: slice) -> Tensor:
        """The stack behind the layer, of what `into_layer` gave and what stands behind the MLP."""
        return end

    def of_table(self, written: Tensor) -> Tensor:
        """The stack that a per-layer embedding's write comes to."""
        return written

    def at_table(self, gradient: Tensor) -> Tensor:
        """From the gradient at the stack behind a layer to that at what its per-layer embedding wrote."""
        return gradient

    def at_end(self, gradient: Tensor, rows: slice) -> tuple[Tensor | None, Tensor]:
        """From the gradient at the stack behind a layer to that at what stands behind its MLP, the second of two; the
        first is what goes past the layer, for `in_front`, and None where nothing does."""
        return None, gradient

    def at_attention(self, gradient: Tensor) -> Tensor:
        """From the gradient at `hook_resid_mid` to that at what attention wrote, which is that at what it was added
        to."""
        return gradient

    def beside_attention(self, gradient: Tensor, rows: slice) -> Tensor | None:
        """From the gradient at what attention wrote to that at the first norm's output, by a branch beside attention;
        None where there is no branch."""
        return None

    def in_front(self, past: Tensor | None, at_read: Tensor, rows: slice) -> Tensor:
        """The gradient at the stack in front of the layer, from what goes past it and that at what it read."""
        return at_read


class StreamEnds:
    """Where the stream begins and ends: at the embedding, and at what the final norm reads."""

    def zeros(self, like: Float[Tensor, "n d_model"], rows: int) -> Tensor:
        """An empty stack on so many positions for each of n."""
        return like.new_zeros(len(like), rows, like.shape[-1])

    def enter(self, embedding: Tensor, rows: slice) -> Tensor:
        """The stack that an embedding becomes."""
        return embedding

    def at_embedding(self, gradient: Tensor, rows: slice) -> Tensor:
        """From the gradient at the stack in front of the first layer to that at the embedding."""
        return gradient

    def at_last(self, gradient: Float[Tensor, "n d_model"], positions: Tensor) -> Tensor:
        """From gradients at what the final norm reads at some positions, one each, to those at the stack there."""
        return gradient


@dataclass(frozen=True, eq=False)
class FrozenAltUp(FrozenStream):
    """AltUp and Laurel of one layer, with the router's coefficients and the norm's denominators as they were."""

    active_index: int
    """Which stream is the active one."""
    predict: Float[Tensor, "seq n_streams n_streams"]
    """P."""
    correct: Float[Tensor, "seq n_streams"]
    """c."""
    laurel_left: Float[Tensor, "rank d_model"]
    laurel_right: Float[Tensor, "d_model rank"]
    laurel_norm: FrozenNorm

    def active(self, stack: Tensor) -> Tensor:
        return stack[..., self.active_index, :]

    def with_active(self, stack: Tensor, value: Tensor) -> Tensor:
        stack[..., self.active_index, :] = value
        return stack

    def into_layer(self, stack: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        predicted = torch.einsum("trs,...trd->...tsd", self.predict[rows], stack)
        return predicted, predicted[..., self.active_index, :].clone()

    def behind_attention(self, read: Tensor, written: Tensor, normed: Tensor, rows: slice) -> Tensor:
        low = self.laurel_norm(normed @ self.laurel_left.T @ self.laurel_right.T, rows)
        return (read + written + normed + low) * 0.5**0.5

    def out_of_layer(self, stack: Tensor, read: Tensor, end: Tensor, rows: slice) -> Tensor:
        return stack + self.correct[rows, :, None] * (end - read)[..., None, :]

    def of_table(self, written: Tensor) -> Tensor:
        n = self.correct.shape[1]
        return torch.stack([torch.zeros_like(written), *[written] * (n - 1)], dim=-2)

    def at_table(self, gradient: Tensor) -> Tensor:
        return gradient[..., 1:, :].sum(-2)

    def at_end(self, gradient: Tensor, rows: slice) -> tuple[Tensor | None, Tensor]:
        end = torch.einsum("ts,...tsd->...td", self.correct[rows], gradient)
        gradient[..., self.active_index, :] -= end
        return gradient, end

    def at_attention(self, gradient: Tensor) -> Tensor:
        return gradient * 0.5**0.5

    def beside_attention(self, gradient: Tensor, rows: slice) -> Tensor:
        low = self.laurel_norm.backward(gradient, rows)
        return gradient + low @ self.laurel_right @ self.laurel_left

    def in_front(self, past: Tensor | None, at_read: Tensor, rows: slice) -> Tensor:
        assert past is not None
        past[..., self.active_index, :] += at_read
        return torch.einsum("trs,...tsd->...trd", self.predict[rows], past)


@dataclass(frozen=True, eq=False)
class AltUpEnds(StreamEnds):
    """How AltUp's stack is made of the embedding, and what the final norm reads of it."""

    into: tuple[Float[Tensor, "d_model d_model"], ...]
    """W_s of the streams behind the first."""
    into_lengths: Float[Tensor, "seq n_others"]
    """|e| / |W_s e|."""
    last: tuple[Float[Tensor, "d_model d_model"], ...]
    """U_s of the streams behind the first."""
    last_lengths: Float[Tensor, "seq n_others"]
    """|h_0| / |U_s h_s|."""

    def zeros(self, like: Float[Tensor, "n d_model"], rows: int) -> Tensor:
        return like.new_zeros(len(like), rows, 1 + len(self.into), like.shape[-1])

    def enter(self, embedding: Tensor, rows: slice) -> Tensor:
        others = [embedding @ W.T * self.into_lengths[rows, s, None] for s, W in enumerate(self.into)]
        return torch.stack([embedding, *others], dim=-2)

    def at_embedding(self, gradient: Tensor, rows: slice) -> Tensor:
        found = gradient[..., 0, :].clone()
        for s, W in enumerate(self.into):
            found += (gradient[..., s + 1, :] * self.into_lengths[rows, s, None]) @ W
        return found

    def at_last(self, gradient: Float[Tensor, "n d_model"], positions: Tensor) -> Tensor:
        lengths = self.last_lengths[positions]
        others = [(gradient * lengths[:, s, None]) @ U for s, U in enumerate(self.last)]
        return torch.stack([gradient, *others], dim=-2) / (1 + len(self.last))


class AltUpRecord:
    """What AltUp's and Laurel's own modules said in one run of a prompt: a few numbers for each token."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.denominators: dict[str, Float[Tensor, " seq"]] = {}
        """By path of norm."""
        self.squares: dict[str, Float[Tensor, " seq"]] = {}
        """By path of a matrix that makes a stream: the mean square of what it made."""
        self.routed: dict[str, list[Float[Tensor, "seq n_streams"]]] = {}
        """By path of router: what it gave, in front of a layer and behind its MLP."""

    def norm_denominator(self, layer: int) -> Float[Tensor, " seq"]:
        """Of a layer's first norm, which reads what AltUp predicts of the active stream."""
        return self.denominators[self.model.layout.layer(layer, self.model.layout.family.ln1)]

    def stream(self, layer: int) -> FrozenAltUp:
        """One layer's way with the stack."""
        layout, hf = self.model.layout, self.model.hf
        altup = hf.get_submodule(layout.layer(layer, "altup"))
        laurel = hf.get_submodule(layout.layer(layer, "laurel"))
        n = layout.n_streams
        before, after = (torch.tanh(one.float()) for one in self.routed[layout.layer(layer, "altup.modality_router")])
        coefficients = (before @ altup.prediction_coefs.weight.float().T).unflatten(-1, (n, n)).mT
        norm = laurel.post_laurel_norm
        denominator = self.denominators[layout.layer(layer, "laurel.post_laurel_norm")]
        return FrozenAltUp(
            layout.active_stream,
            coefficients + torch.eye(n, device=coefficients.device),
            after @ altup.correction_coefs.weight.float().T + 1.0,
            laurel.linear_left.weight.detach().float(),
            laurel.linear_right.weight.detach().float(),
            FrozenNorm(norm.weight.detach().float(), denominator, False, None),
        )

    def ends(self, embedding: Float[Tensor, "seq d_model"], stack: Float[Tensor, "seq n_streams d_model"]) -> AltUpEnds:
        """Both ends of the stack.

        Args:
            embedding: as the model went on with it.
            stack: what stood behind the last layer.
        """
        into, into_lengths = self._end("altup_projections", embedding)
        last, last_lengths = self._end("altup_unembed_projections", stack[:, 0])
        return AltUpEnds(into, into_lengths, last, last_lengths)

    def _end(self, name: str, first: Float[Tensor, "seq d_model"]) -> tuple[tuple[Tensor, ...], Tensor]:
        path = self.model.layout.module(name)
        modules = self.model.hf.get_submodule(path)
        length = first.float().square().mean(-1).sqrt()
        others = [length / self.squares[f"{path}.{s}"].clamp_min(SMALLEST).sqrt() for s in range(len(modules))]
        return tuple(one.weight.detach().float() for one in modules), torch.stack(others, dim=-1)


@contextmanager
def altup_recorded(model: Any) -> Iterator[AltUpRecord | None]:
    """Within it what one run of a prompt makes of its stack is recorded; None for a model of one stream."""
    layout = model.layout
    if layout.n_streams == 1:
        yield None
        return
    record = AltUpRecord(model)
    layers = range(layout.n_layers)
    norms = [layout.layer(i, path) for i in layers for path in (layout.family.ln1, "laurel.post_laurel_norm")]
    routers = [layout.layer(i, "altup.modality_router") for i in layers]
    ends = [layout.module(name) for name in ("altup_projections", "altup_unembed_projections")]
    matrices = [f"{end}.{s}" for end in ends for s in range(layout.n_streams - 1)]

    def keep(path: str) -> Any:
        def hook(module: Any, args: tuple[Any, ...], output: Tensor) -> None:
            if path in norms:
                record.denominators[path] = norm_denominator(args[0][0], False, module.eps)
            elif path in routers:
                record.routed.setdefault(path, []).append(output[0])
            else:
                record.squares[path] = output[0].float().square().mean(-1)

        return hook

    paths = [*norms, *routers, *matrices]
    handles = [model.hf.get_submodule(path).register_forward_hook(keep(path)) for path in paths]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()
