"""The base of every dictionary: its configuration, its provenance, and the math that architectures share.

An architecture is one file beside this one. It defines

1. a config, a frozen subclass of `SAEConfig` with the architecture's own fields, and how the trainer's target L0
   becomes such a config (`for_training`);
2. a class, a subclass of `SAE` that implements `encode` (and `encode_sparse` where it can do better than the default);
3. its training behaviour, `training_loss`;

and decorates the class with `scope.saes.registry.register`. Reading and writing files is `scope.saes.formats`.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from html import escape
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from scope.errors import InvalidInputError, MismatchError
from scope.kernels import sparse

__all__ = ["SAE", "SAEConfig", "SAEMetadata", "SparseFeatures", "TrainingContext", "TrainingLoss"]

C = TypeVar("C", bound="SAEConfig")
DTYPES = ("float32", "float64", "bfloat16", "float16")


class SparseFeatures(NamedTuple):
    """The features that fire on each row, in no particular order."""

    ids: Int[Tensor, "*batch k"]
    """Feature ids. Where fewer than k features fire, the rest are ids of features whose value is 0."""
    values: Float[Tensor, "*batch k"]
    """Feature activations, 0 or more."""


@dataclass(frozen=True)
class SAEMetadata:
    """Where an SAE comes from and what it reads. Everything is None where it is not known."""

    model_name: str | None = None
    """Name of the model as it is shown."""
    model_revision: str | None = None
    """Revision of the model, where it has one."""
    weight_hash: str | None = None
    """Digest of the model's weights (hex)."""
    tokenizer_hash: str | None = None
    """Digest of the model's tokenizer (hex)."""
    hook_name: str | None = None
    """The hook whose activations the SAE reads."""
    dataset_path: str | None = None
    """The text it was trained on."""
    context_size: int | None = None
    """Tokens in the longest window, BOS included."""
    prepend_bos: bool | None = None
    """Whether windows start with BOS."""
    store_fingerprint: str | None = None
    """Fingerprint of the activation store that it was trained on (hex)."""
    training: Mapping[str, Any] | None = None
    """The training configuration."""
    scope_version: str | None = None
    """The release of this package that trained it."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """What other tools recorded, under their own names."""

    def to_dict(self) -> dict[str, Any]:
        """What is known, as one flat JSON-able mapping."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "extra"}
        return {**self.extra, **{name: value for name, value in own.items() if value is not None}}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "SAEMetadata":
        """The inverse of `to_dict`; unknown names go to `extra`."""
        names = {f.name for f in fields(cls)} - {"extra"}
        return cls(
            **{name: value for name, value in content.items() if name in names},
            extra={name: value for name, value in content.items() if name not in names},
        )


@dataclass(frozen=True, kw_only=True)
class SAEConfig:
    """What all architectures are configured by."""

    architecture: ClassVar[str] = ""

    d_in: int
    """Width of the activations that the SAE reads."""
    d_sae: int
    """Number of features."""
    dtype: str = "float32"
    """dtype of the weights."""
    apply_b_dec_to_input: bool = True
    """Whether the encoder subtracts `b_dec` from its input."""
    reshape_activations: Literal["none", "hook_z"] = "none"
    """"hook_z": the input has two feature dimensions, heads and d_head, whose product is `d_in`."""
    metadata: SAEMetadata = field(default_factory=SAEMetadata)
    """Where the SAE comes from and what it reads."""

    def __post_init__(self) -> None:
        if self.d_in < 1 or self.d_sae < 1:
            raise InvalidInputError(
                f"d_in is {self.d_in} and d_sae {self.d_sae}; an SAE needs at least 1 of each: "
                "its input's width and its number of features."
            )
        if self.dtype not in DTYPES:
            raise InvalidInputError(f"dtype is {self.dtype!r}; expected one of {', '.join(DTYPES)}.")
        if self.reshape_activations not in ("none", "hook_z"):
            raise InvalidInputError(
                f"reshape_activations is {self.reshape_activations!r}; expected 'none' or 'hook_z'."
            )

    @property
    def hook_name(self) -> str | None:
        """The hook whose activations the SAE reads."""
        return self.metadata.hook_name

    @classmethod
    def for_training(cls: type[C], *, d_in: int, d_sae: int, k: int, **common: Any) -> C:
        """The configuration that aims at `k` firing features a row; `common` are fields of `SAEConfig`."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """All fields and the architecture, JSON-able."""
        content = {f.name: getattr(self, f.name) for f in fields(self)}
        return {"architecture": self.architecture, **content, "metadata": self.metadata.to_dict()}

    @classmethod
    def from_dict(cls: type[C], content: Mapping[str, Any]) -> C:
        """The inverse of `to_dict`; names that are no field are ignored."""
        own = {f.name: content[f.name] for f in fields(cls) if f.name in content and f.name != "metadata"}
        return cls(**own, metadata=SAEMetadata.from_dict(content.get("metadata") or {}))


class TrainingContext(NamedTuple):
    """What a training step tells the loss."""

    dead: Bool[Tensor, " d_sae"] | None
    """Features that count as dead at this step; None where there are none."""
    auxk_coefficient: float
    """Weight of the loss that revives dead features."""
    k_aux: int
    """How many dead features that loss uses on each row, at most."""


class TrainingLoss(NamedTuple):
    """What a training step learns from the loss."""

    total: Float[Tensor, ""]
    """The scalar to differentiate: the mean over rows of the reconstruction's squared error, plus the other parts."""
    squared_error: Float[Tensor, ""]
    """That mean of ‖x - x_hat‖² alone, detached."""
    features: SparseFeatures
    """What fired, detached."""
    parts: dict[str, Float[Tensor, ""]]
    """The weighted terms that were added to the squared error, detached, by name."""


class SAE(nn.Module):
    """A sparse dictionary: activations in, sparse features, and a reconstruction. Math only; no files.

    The decoder is shared by all architectures: x_hat = f W_dec + b_dec.

    Attributes:
        W_enc: `(d_in, d_sae)`, the features as the encoder reads them. Its memory is laid out by feature, that is
            `W_enc.T` is contiguous: a gradient that touches few features touches few rows.
        W_dec: `(d_sae, d_in)`, the features as the decoder writes them.
        b_enc: `(d_sae,)`.
        b_dec: `(d_in,)`.

    Args:
        cfg: the configuration.
        generator: source of randomness for the initial weights.
        device: where the weights lie.
        initialise: False leaves the weights as they come, for someone who fills them next.
    """

    def __init__(
        self,
        cfg: SAEConfig,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
        initialise: bool = True,
    ) -> None:
        super().__init__()
        self.cfg = cfg
        dtype = getattr(torch, cfg.dtype)
        self.W_enc = nn.Parameter(torch.empty(cfg.d_sae, cfg.d_in, dtype=dtype, device=device).T)
        self.W_dec = nn.Parameter(torch.empty(cfg.d_sae, cfg.d_in, dtype=dtype, device=device))
        self.b_enc = nn.Parameter(torch.empty(cfg.d_sae, dtype=dtype, device=device))
        self.b_dec = nn.Parameter(torch.empty(cfg.d_in, dtype=dtype, device=device))
        if initialise:
            self.initialise(generator)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None = None) -> None:
        """Random unit rows in the decoder, the encoder its transpose, biases zero (Gao et al. 2024, appendix A.1)."""
        rows = torch.randn(self.d_sae, self.d_in, generator=generator, dtype=torch.float32)
        self.W_dec.copy_(rows / rows.norm(dim=-1, keepdim=True))
        self.W_enc.copy_(self.W_dec.T)
        self.b_enc.zero_()
        self.b_dec.zero_()

    @property
    def d_in(self) -> int:
        return self.cfg.d_in

    @property
    def d_sae(self) -> int:
        return self.cfg.d_sae

    @property
    def hook_name(self) -> str | None:
        return self.cfg.hook_name

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
        raise NotImplementedError

    def encode_sparse(self, x: Float[Tensor, "*batch width"]) -> SparseFeatures:
        """The features that fire, as ids and values, as wide as the row with the most of them.

        Raises:
            MismatchError: `x` has another width than `d_in`.
        """
        dense = self.encode(x)
        width = max(1, int((dense > 0).sum(dim=-1).max())) if dense.numel() else 1
        values, ids = torch.topk(dense, width, dim=-1, sorted=False)
        return SparseFeatures(ids, values)

    def decode(self, f: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch d_in"]:
        """x_hat = f W_dec + b_dec.

        Raises:
            MismatchError: `f` has another width than `d_sae`.
        """
        if f.ndim < 1 or f.shape[-1] != self.d_sae:
            raise MismatchError(f"The features have shape {tuple(f.shape)}; expected a width of d_sae, {self.d_sae:,}.")
        return f.to(self.dtype) @ self.W_dec + self.b_dec

    def decode_sparse(self, features: SparseFeatures) -> Float[Tensor, "*batch d_in"]:
        """`decode` of the features given as ids and values."""
        ids, values = features
        flat = sparse.decode(values.reshape(-1, values.shape[-1]), ids.reshape(-1, ids.shape[-1]), self.W_dec)
        return (flat + self.b_dec).reshape(*ids.shape[:-1], self.d_in)

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """The reconstruction of `x`, in its shape."""
        return self.decode(self.encode(x)).reshape(x.shape)

    @property
    def decoder_norms(self) -> Float[Tensor, " d_sae"]:
        """‖W_dec row‖ of each feature, float32."""
        return self.W_dec.detach().float().norm(dim=-1)

    def strengths(self, values: Float[Tensor, "*batch k"], ids: Int[Tensor, "*batch k"]) -> Float[Tensor, "*batch k"]:
        """Firing strengths in the model's own units: value x ‖W_dec row‖, float32."""
        return values.detach().float() * self.decoder_norms[ids.long()]

    def training_loss(self, x: Float[Tensor, "batch d_in"], context: TrainingContext) -> TrainingLoss:
        """The loss of one training step and what else the trainer needs to know of it."""
        raise NotImplementedError

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
            digest.update(tensor.view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def extra_repr(self) -> str:
        where = f", hook_name={self.hook_name!r}" if self.hook_name else ""
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
