"""The base of every dictionary: the math that architectures share, and how one is trained.

An architecture is one file beside this one. It defines

1. a config, a frozen subclass of `SAEConfig` with the architecture's own fields, how its shape follows from the hooks
   (`shape_of`), and how the trainer's target L0 becomes such a config (`for_training`);
2. a class, a subclass of `SAE`, which names its activation function (`scope.saes.activation`) and overrides what is
   special about its encoder, its decoder or its loss;

and decorates the class with `scope.saes.registry.register`. Reading and writing files is `scope.saes.formats`.

`training_loss` is the same for all, in this order:

1. the activation function gives the features of the batch (`Active`), its own sparsity penalty weighs them;
2. the decoder reconstructs the target: the input itself, or what a transcoder writes;
3. AuxK lets features that have not fired for long model what the others leave over;
4. features that fire on too many rows are penalised, where that is asked for.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from html import escape
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from scope.errors import MismatchError
from scope.kernels import sparse
from scope.saes.active import Active
from scope.saes.config import Port, Ports, SAEConfig, SAEMetadata
from scope.saes.sharing import ALONE, FeatureShare, Sharing

if TYPE_CHECKING:
    from scope.saes.activation import Activation

__all__ = ["SAE", "Port", "Ports", "SAEConfig", "SAEMetadata", "SparseFeatures", "TrainingContext", "TrainingLoss"]


HOOK_FIELDS = ("hook_name", "hook_name_out", "hook_names", "hook_names_out")


class SparseFeatures(NamedTuple):
    """The features that fire on each row, in no particular order."""

    ids: Int[Tensor, "*batch k"]
    """Feature ids. Where fewer than k features fire, the rest are ids of features whose value is 0."""
    values: Float[Tensor, "*batch k"]
    """Feature activations, 0 or more."""


class TrainingContext(NamedTuple):
    """What a training step tells the loss."""

    dead: Bool[Tensor, " d_sae"] | None
    """Features that count as dead at this step; None where there are none."""
    auxk_coefficient: float
    """Weight of the loss that revives dead features."""
    k_aux: int
    """How many dead features that loss uses on each row, at most."""
    sparsity_coefficient: Float[Tensor, ""] | float = 0.0
    """Weight of the activation function's sparsity penalty."""
    k: int | None = None
    """Features a row at this step, where k is annealed; None for the configuration's own."""
    frequency_weights: Float[Tensor, " d_sae"] | None = None
    """Weight of each feature's activations in the loss, above 0 for those that fire too often; None for no penalty."""
    n_dead: int | None = None
    """Dead features of all processes; None for those of `dead`."""
    n_rows: int | None = None
    """Rows of the batch over all processes; None for those that are given."""
    sharing: Sharing = ALONE
    """Who else computes this step."""


class TrainingLoss(NamedTuple):
    """What a training step learns from the loss."""

    total: Float[Tensor, ""]
    """The scalar to differentiate: the mean over rows of the reconstruction's squared error, plus the other parts."""
    squared_error: Float[Tensor, ""]
    """That mean of ‖x - x_hat‖² alone, detached."""
    counts: Int[Tensor, " d_sae"]
    """Rows of the batch on which each feature fired."""
    parts: dict[str, Float[Tensor, ""]]
    """The weighted terms that were added to the squared error, detached, by name."""


class SAE(nn.Module):
    """A sparse dictionary: activations in, sparse features, and a reconstruction. Math only; no files.

    The decoder is shared by all architectures: x_hat = f W_dec + b_dec, where x_hat is of the input itself, or of what
    a transcoder writes; several inputs or outputs stand side by side in one row.

    Attributes:
        W_enc: `(d_in, d_sae)`, the features as the encoder reads them. Its memory is laid out by feature, that is
            `W_enc.T` is contiguous: a gradient that touches few features touches few rows.
        W_dec: `(d_sae, d_out)`, the features as the decoder writes them.
        b_dec: `(d_out,)`.
        b_enc, threshold, …: `(d_sae,)`, what the activation function has for each feature.

    Args:
        cfg: the configuration.
        generator: source of randomness for the initial weights.
        device: where the weights lie.
        initialise: False leaves the weights as they come, for someone who fills them next.
        share: which features this process has, where several train one dictionary. `cfg` describes the whole;
            everything here that says d_sae then means the features that are here.
    """

    b_enc: Tensor
    threshold: Tensor
    b_gate: Tensor
    b_mag: Tensor
    r_mag: Tensor

    def __init__(
        self,
        cfg: SAEConfig,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
        initialise: bool = True,
        share: FeatureShare = FeatureShare(),  # noqa: B008  # a constant
    ) -> None:
        super().__init__()
        self.cfg, self.share = cfg, share
        dtype, d_sae = getattr(torch, cfg.dtype), share.count(cfg.d_sae)
        self.W_enc = nn.Parameter(torch.empty(d_sae, cfg.encoder_width, dtype=dtype, device=device).T)
        self.W_dec = nn.Parameter(torch.empty(d_sae, cfg.output_width, dtype=dtype, device=device))
        for name in self.activation.parameters:
            setattr(self, name, nn.Parameter(torch.empty(d_sae, dtype=dtype, device=device)))
        for name in self.activation.buffers:
            self.register_buffer(name, torch.zeros((), dtype=dtype, device=device))
        self.b_dec = nn.Parameter(torch.empty(cfg.output_width, dtype=dtype, device=device))
        if initialise:
            self.initialise(generator)

    @property
    def activation(self) -> "Activation":
        """The function from pre-activations to features."""
        raise NotImplementedError

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None = None, tied: bool = True) -> None:
        """Random unit rows in the decoder, the encoder its transpose, biases zero (Gao et al. 2024, appendix A.1).

        Args:
            generator: source of randomness.
            tied: False takes random unit columns of its own for the encoder.
        """
        self.W_dec.copy_(self.share.of(self._random_decoder(generator)))
        if tied and self._may_be_tied:
            self.W_enc.copy_(self.W_dec.T)
        else:
            self.W_enc.copy_(self.share.of(_unit_rows(self.cfg.d_sae, self.cfg.encoder_width, generator)).T)
        for name, value in self.activation.parameters.items():
            getattr(self, name).fill_(value)
        self.b_dec.zero_()

    def _random_decoder(self, generator: torch.Generator | None) -> Tensor:
        return _unit_rows(self.cfg.d_sae, self.d_out, generator)

    @property
    def _may_be_tied(self) -> bool:
        """Whether the encoder reads what the decoder writes, so that a shared start means something."""
        return not self.cfg.ports.outputs

    @torch.no_grad()
    def settle(
        self,
        inputs: Float[Tensor, "rows d_in"],
        centre: Float[Tensor, " d_out"],
        k: int,
        sharing: Sharing = ALONE,
    ) -> None:
        """Start from a sample: b_dec at the targets' centre, and the activation function where about k features fire.

        Args:
            inputs: rows as they come in training.
            centre: the centre of the targets.
            k: the target L0.
            sharing: the processes that have the other features.
        """
        self.b_dec.copy_(centre)
        if not self.cfg.apply_b_dec_to_input:
            for name in self.activation.centring:
                getattr(self, name).copy_(-self.project(inputs.mean(dim=0, keepdim=True).to(self.dtype))[0])
        self.activation.settle(self, self._centred(inputs.to(self.dtype)), k, sharing)

    @property
    def d_in(self) -> int:
        return self.cfg.d_in

    @property
    def d_out(self) -> int:
        """Width of the reconstruction."""
        return self.cfg.output_width

    @property
    def d_sae(self) -> int:
        return len(self.W_dec)

    @property
    def hook_name(self) -> str | None:
        return self.cfg.hook_name

    @property
    def hook_name_out(self) -> str | None:
        """The hook that the SAE reconstructs; None where it is several."""
        return self.cfg.metadata.hook_name_out or self.hook_name

    @property
    def dtype(self) -> torch.dtype:
        return self.W_dec.dtype

    @property
    def device(self) -> torch.device:
        return self.W_dec.device

    def encode(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*rows d_sae"]:
        """Feature activations of activations in the model's own units, dense.

        Raises:
            MismatchError: `x` has another width than `d_in`.
        """
        return self.activation.encode(self, self._centred(self.rows_of(x)))

    def encode_sparse(self, x: Float[Tensor, "*batch width"]) -> SparseFeatures:
        """The features that fire, as ids and values, as wide as the row with the most of them.

        Raises:
            MismatchError: `x` has another width than `d_in`.
        """
        found = self.activation.encode_sparse(self, self._centred(self.rows_of(x)))
        if found is not None:
            return SparseFeatures(*found)
        dense = self.encode(x)
        width = max(1, int((dense > 0).sum(dim=-1).max())) if dense.numel() else 1
        values, ids = torch.topk(dense, width, dim=-1, sorted=False)
        return SparseFeatures(ids, values)

    def decode(self, f: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch d_out"]:
        """x_hat = f W_dec + b_dec.

        Raises:
            MismatchError: `f` has another width than `d_sae`.
        """
        if f.ndim < 1 or f.shape[-1] != self.d_sae:
            raise MismatchError(f"The features have shape {tuple(f.shape)}; expected a width of d_sae, {self.d_sae:,}.")
        return f.to(self.dtype) @ self.W_dec + self.b_dec

    def decode_sparse(self, features: SparseFeatures) -> Float[Tensor, "*batch d_out"]:
        """`decode` of the features given as ids and values."""
        ids, values = features
        flat = sparse.decode(values.reshape(-1, values.shape[-1]), ids.reshape(-1, ids.shape[-1]), self.W_dec)
        return (flat + self.b_dec).reshape(*ids.shape[:-1], self.d_out)

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width_out"]:
        """The reconstruction of `x`, in its shape, or of what a transcoder writes, `(*batch, d_out)`."""
        rows = self.rows_of(x)
        return self._shaped_as(x, self._with_skip(self.decode(self.encode(x)), rows))

    def reconstruct(
        self, x: Float[Tensor, "*batch width"], features: SparseFeatures
    ) -> Float[Tensor, "*batch width_out"]:
        """As `forward`, from the features of `x` as `encode_sparse` gave them."""
        return self._shaped_as(x, self._with_skip(self.decode_sparse(features), self.rows_of(x)))

    def _with_skip(self, decoded: Tensor, rows: Tensor) -> Tensor:
        """What the decoder gave, plus what reaches the output past the features (a skip transcoder's linear part)."""
        return decoded

    def _shaped_as(self, x: Tensor, rows: Tensor) -> Tensor:
        return rows.reshape(x.shape) if self.d_out == self.d_in else rows

    @property
    def decoder_norms(self) -> Float[Tensor, " d_sae"]:
        """‖W_dec row‖ of each feature, float32."""
        return self.W_dec.detach().float().norm(dim=-1)

    def strengths(self, values: Float[Tensor, "*batch k"], ids: Int[Tensor, "*batch k"]) -> Float[Tensor, "*batch k"]:
        """Firing strengths in the model's own units: value x ‖W_dec row‖, float32."""
        return values.detach().float() * self.decoder_norms[ids.long()]

    def training_loss(
        self,
        x: Float[Tensor, "batch d_in"],
        context: TrainingContext,
        target: Float[Tensor, "batch d_out"] | None = None,
    ) -> TrainingLoss:
        """The loss of one training step and what else the trainer needs to know of it.

        Args:
            x: the rows that are read, scaled.
            context: what holds at this step.
            target: what is to be reconstructed; None for x itself.
        """
        target = x if target is None else target
        sharing = context.sharing
        centred = self._centred(x, sharing)
        active = self.activation.train(self, centred, context)
        x_hat = self._with_skip(sharing.sum_over_features(active.decode(self.decoder())) + self.b_dec, x)
        error = functional.mse_loss(x_hat, target, reduction="sum") / len(x)
        terms = {
            **self.activation.penalties(self, active, target, context),
            **self._further_terms(active, x, target, sharing),
        }
        if context.dead is not None and context.auxk_coefficient:
            terms["auxk"] = context.auxk_coefficient * self._auxk(centred, target - x_hat.detach(), context)
        if context.frequency_weights is not None:
            weighted = active.row_sums(active.values * active.of(context.frequency_weights))
            terms["frequency"] = sharing.sum_over_features(weighted).mean()
        total = error + sum(terms.values())
        parts = {name: term.detach() for name, term in terms.items()}
        return TrainingLoss(total, error.detach(), active.counts(), parts)

    def _further_terms(self, active: Active, x: Tensor, target: Tensor, sharing: Sharing) -> Mapping[str, Tensor]:
        """Terms of the loss that only this architecture has."""
        return {}

    def _auxk(self, centred: Tensor, residual: Tensor, context: TrainingContext) -> Tensor:
        """Gao et al. 2024, appendix A.2: the error that `k_aux` dead features leave of the residual, held fixed."""
        assert context.dead is not None
        dead = context.dead.nonzero().flatten()
        n_dead = len(dead) if context.n_dead is None else context.n_dead
        activations = (self.project(centred, dead) + self.activation.bias_of(self)[dead]).relu()
        smallest = context.sharing.kth_largest(activations.detach(), context.k_aux, n_dead)
        if smallest is not None:
            activations = activations * (activations >= smallest)
        # Few dead features explain little of the error; full weight would only make them noisy.
        share = min(1.0, n_dead / context.k_aux)
        explained = context.sharing.sum_over_features(activations @ self.decoder()[dead])
        return share * functional.mse_loss(explained, residual, reduction="sum") / len(residual)

    def decoder(self) -> Float[Tensor, "d_sae d_out"]:
        """W_dec as the loss uses it."""
        return self.W_dec

    def project(
        self, centred: Float[Tensor, "*batch d_in"], ids: Int[Tensor, " n"] | None = None
    ) -> Float[Tensor, "*batch n"]:
        """centred W_enc, for all features or for some: pre-activations without their bias."""
        return functional.linear(centred, self.W_enc.T if ids is None else self.W_enc.T[ids])

    def pre_activations(self, centred: Float[Tensor, "*batch d_in"], bias: Tensor) -> Float[Tensor, "*batch d_sae"]:
        """centred W_enc + bias."""
        return functional.linear(centred, self.W_enc.T, bias)

    @property
    def has_one_encoder(self) -> bool:
        """Whether every feature reads the whole input, so that the fused encoders of `scope.kernels` apply."""
        return True

    def _centred(self, x: Tensor, sharing: Sharing = ALONE) -> Tensor:
        return x - sharing.read_by_features(self.b_dec) if self.cfg.apply_b_dec_to_input else x

    def output_norms(self, W_dec: Float[Tensor, "d_sae d_out"]) -> Float[Tensor, " d_sae"]:
        """The sum over the outputs of ‖W_dec row‖ there: how much a unit of each feature writes."""
        widths = [port.width for port in self.cfg.ports.outputs or self.cfg.ports.inputs]
        if len(widths) == 1:
            return W_dec.norm(dim=-1)
        return sum((part.norm(dim=-1) for part in W_dec.split(widths, dim=-1)), W_dec.new_zeros(len(W_dec)))

    def scale_encoder(self, factors: Float[Tensor, " d_in"]) -> None:
        """Multiply what the encoder does with each entry of the input."""
        self.W_enc.mul_(factors[:, None])

    def scale_skip(self, scale_in: Float[Tensor, " d_in"], scale_out: Float[Tensor, " d_out"]) -> None:
        """Fold scales into what reaches the output past the features."""

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        """Bring every row of W_dec to norm 1."""
        self.W_dec.div_(self.W_dec.norm(dim=-1, keepdim=True))

    @torch.no_grad()
    def restart_features(
        self,
        ids: Int[Tensor, " n"],
        inputs: Float[Tensor, "n d_in"],
        targets: Float[Tensor, "n d_out"],
        encoder_norm: float,
    ) -> None:
        """Point features at given rows: decoder rows of norm 1 along `targets`, encoder columns along `inputs`."""
        self.W_dec[ids] = functional.normalize(targets, dim=-1)
        self.W_enc[:, ids] = encoder_norm * functional.normalize(inputs, dim=-1).T

    def for_inference(self) -> "SAE":
        """The SAE as it is stored and used: itself, or what it becomes when training is over."""
        return self.activation.for_inference(self)

    def rows_of(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*rows d_in"]:
        """`x` in the SAE's dtype and with one feature dimension, its width checked."""
        if self.cfg.reshape_activations == "hook_z" and x.ndim > 1 and x.shape[-1] != self.d_in:
            x = x.flatten(-2)
        if x.ndim < 1 or x.shape[-1] != self.d_in:
            raise MismatchError(
                f"The activations have shape {tuple(x.shape)}; this SAE reads a width of {self.d_in:,} "
                f"(d_in){f' at {self.hook_name}' if self.hook_name else ''}."
            )
        return x.to(self.dtype)

    def config_as_stored(self) -> SAEConfig:
        """The configuration with the dtype that the weights have now."""
        return replace(self.cfg, dtype=str(self.dtype).removeprefix("torch."))

    def weights(self) -> dict[str, Tensor]:
        """All weights by name, detached, contiguous, on the CPU."""
        return {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over the canonical configuration and the weights' bytes."""
        config = json.dumps(self.config_as_stored().to_dict(), sort_keys=True, separators=(",", ":"))
        digest = hashlib.sha256(config.encode())
        for name, tensor in sorted(self.weights().items()):
            digest.update(f"\n{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def extra_repr(self) -> str:
        named = {name: getattr(self.cfg.metadata, name) for name in HOOK_FIELDS}
        where = "".join(f", {name}={value!r}" for name, value in named.items() if value)
        return f"d_in={self.d_in}, d_sae={self.d_sae}{where}"

    def _repr_html_(self) -> str:
        config = {**self.config_as_stored().to_dict(), **self.cfg.metadata.to_dict(), "id": self.fingerprint[:12]}
        cell = "style='text-align:left'"
        rows = "".join(
            f"<tr><th {cell}>{escape(name)}</th><td {cell}>{escape(str(value))}</td></tr>"
            for name, value in config.items()
            if name not in ("metadata", "training") and value is not None
        )
        return f"<table><caption>{type(self).__name__}</caption>{rows}</table>"


def _unit_rows(n: int, width: int, generator: torch.Generator | None) -> Tensor:
    device = None if generator is None else generator.device
    rows = torch.randn(n, width, generator=generator, dtype=torch.float32, device=device)
    return rows / rows.norm(dim=-1, keepdim=True)
