"""What a training run is configured by. Light to import: the CLI makes its options from it."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from scope.errors import InvalidInputError

__all__ = ["TrainConfig"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of one training run. A token is a row of activations; every default stands here and nowhere else."""

    arch: str = "topk"
    """Architecture, by its name in the registry."""
    d_sae: int
    """Number of features."""
    k: int
    """Target L0: features that fire on a row."""
    tokens: int = 1_000_000
    """Rows to train on; more than the source has means several passes, each in another order."""
    batch_size: int = 2048
    """Rows in a step."""
    lr: float | None = None
    """Peak learning rate of Adam. None: 1e-3 x sqrt(2^14 / d_sae) x sqrt(batch_size / 2048)."""
    warmup: float = 0.05
    """Share of the run over which the learning rate rises linearly from 0."""
    decay: float = 0.2
    """Share of the run, at its end, over which the learning rate falls linearly to 0."""
    beta1: float = 0.9
    """Adam's decay rate of the mean gradient."""
    beta2: float = 0.95
    """Adam's decay rate of the mean squared gradient. Rare features learn faster at 0.95 than at the usual 0.999."""
    clip_grad_norm: float = 1.0
    """Largest norm of a step's gradient, with the loss divided by the variance of the data. 0: no clipping."""
    init_encoder_scale: float = 0.5
    """The encoder starts as the decoder's transpose times this; features overlap, and at 1 they overshoot at first."""
    auxk_coefficient: float = 1 / 8
    """Weight of the loss that revives dead features (AuxK). Gao et al. 2024 use 1/32 in far longer runs. 0: none."""
    k_aux: int | None = None
    """Dead features that AuxK uses on a row. None: the largest power of two up to d_in / 2."""
    dead_feature_tokens: int | None = None
    """Rows without firing after which a feature counts as dead. None: 1/40 of the run, at most 10 million."""
    max_norm_ratio: float = 10.0
    """Rows whose norm is more than this many times the median are left out of training (sinks). 0: none is."""
    seed: int = 0
    """Seed of the initial weights and of the order of the rows."""
    shuffle_bytes: int = 2**30
    """Activations held in memory to shuffle rows; where all fit, every pass is a full shuffle."""
    checkpoint_steps: int = 500
    """Steps between checkpoints."""
    log_steps: int = 10
    """Steps between lines of the run log."""
    device: str = "cpu"
    """Where to train: "cpu", "cuda" or "cuda:1"."""
    compute_dtype: str | None = None
    """dtype of the products: "float32", or on a CUDA device "bfloat16". None: "bfloat16" on a CUDA device, for which
    the fast step is made. Weights and Adam's moments are float32 always."""

    def __post_init__(self) -> None:
        if self.d_sae < 1:
            raise InvalidInputError(f"d_sae is {self.d_sae:,}; an SAE needs at least 1 feature.")
        if not 1 <= self.k <= self.d_sae:
            raise InvalidInputError(f"k is {self.k:,}; expected at least 1 and at most d_sae, {self.d_sae:,}.")
        if self.batch_size < 1:
            raise InvalidInputError(f"batch_size is {self.batch_size:,}; expected at least 1.")
        if self.tokens < self.batch_size:
            raise InvalidInputError(
                f"tokens is {self.tokens:,}, less than a batch of {self.batch_size:,}. Train on more, or lower it."
            )
        for name in ("checkpoint_steps", "log_steps", "dead_feature_tokens", "k_aux", "shuffle_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidInputError(f"{name} is {value:,}; expected at least 1.")
        self._require_ranges()

    def _require_ranges(self) -> None:
        if self.lr is not None and not (self.lr > 0 and math.isfinite(self.lr)):
            raise InvalidInputError(f"lr is {self.lr}; expected a positive number.")
        for name in ("warmup", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise InvalidInputError(f"{name} is {getattr(self, name)}; expected a share of the run, from 0 to 1.")
        if self.warmup + self.decay > 1:
            raise InvalidInputError(f"warmup and decay are {self.warmup} and {self.decay}; together more than the run.")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise InvalidInputError(f"{name} is {getattr(self, name)}; expected at least 0 and less than 1.")
        if not self.init_encoder_scale > 0:
            raise InvalidInputError(f"init_encoder_scale is {self.init_encoder_scale}; expected a positive number.")
        for name in ("clip_grad_norm", "auxk_coefficient", "max_norm_ratio"):
            if not getattr(self, name) >= 0:
                raise InvalidInputError(f"{name} is {getattr(self, name)}; expected 0 or more.")
        if self.compute_dtype not in (None, "float32", "bfloat16"):
            raise InvalidInputError(f"compute_dtype is {self.compute_dtype!r}; expected 'float32' or 'bfloat16'.")
        if self.compute_dtype == "bfloat16" and not self.device.startswith("cuda"):
            raise InvalidInputError(f"compute_dtype 'bfloat16' needs a CUDA device; device is {self.device!r}.")

    @property
    def steps(self) -> int:
        """Steps in the run: whole batches."""
        return self.tokens // self.batch_size

    @property
    def product_dtype(self) -> str:
        """`compute_dtype`, or its default for this device."""
        return self.compute_dtype or ("bfloat16" if self.device.startswith("cuda") else "float32")

    @property
    def peak_lr(self) -> float:
        """`lr`, or its default for this width and batch size."""
        return self.lr if self.lr is not None else 1e-3 * math.sqrt(2**14 / self.d_sae * self.batch_size / 2048)

    @property
    def dead_after(self) -> int:
        """`dead_feature_tokens`, or its default for this run."""
        return self.dead_feature_tokens or min(10_000_000, max(1, self.tokens // 40))

    def k_aux_for(self, d_in: int) -> int:
        """`k_aux`, or its default for an input of this width."""
        return self.k_aux or 1 << max(0, (d_in // 2).bit_length() - 1)

    def to_dict(self) -> dict[str, Any]:
        """All fields, JSON-able."""
        return asdict(self)
