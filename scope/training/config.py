"""What a training run is configured by. Light to import: the CLI makes its options from it."""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from activations.spec import BALANCES
from scope.errors import InvalidInputError, UnknownNameError

__all__ = ["CENTRES", "SWEPT", "TrainConfig"]

DEAD_BATCHES = 8
"""Batches without firing after which a feature may count as dead at the earliest."""
SWEPT = ("arch", "d_sae", "k", "lr")
"""Settings that a sweep may vary."""

ARCHITECTURE_FIELDS = ("activation", "sparsity_loss", "bandwidth", "prefixes")
"""Settings that only some architectures have; None means that nothing was given."""
DECODER_NORMS = ("unit", "free")
PARALLEL = ("data", "features")
CENTRES = ("geometric_median", "mean", "zeros")
"""Where b_dec may start."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of one training run. A token is a row of activations; every default stands here and nowhere else."""

    arch: str = "topk"
    """Architecture: standard, gated, topk, batchtopk, jumprelu or matryoshka for one hook; transcoder or
    skip_transcoder from one hook to another; crosscoder for several hooks; clt from several hooks to several."""
    activation: str | None = None
    """Activation function of a transcoder, skip_transcoder, crosscoder or clt: relu, topk, batchtopk or jumprelu. None:
    batchtopk."""
    d_sae: int
    """Number of features."""
    k: int
    """Target L0: features that fire on a row. topk and its kin hold it exactly, the others are steered to it."""
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
    scale_inputs: bool = True
    """Whether each hook's rows are scaled to an expected norm of sqrt(d_in); it is folded back into the weights."""
    b_dec_init: str = "geometric_median"
    """Where b_dec starts: the "geometric_median" of a sample of rows, their "mean", or "zeros"."""
    tied_init: bool = True
    """Whether the encoder starts as the decoder's transpose; a transcoder's, which reads another hook, never does."""
    init_encoder_scale: float = 0.5
    """The encoder starts as the decoder's transpose times this; features overlap, and at 1 they overshoot at first."""
    decoder_norm: str = "unit"
    """"unit" brings the decoder's rows to norm 1 after each step. "free" leaves them, for architectures whose sparsity
    penalty weighs each feature by its row's norm (standard, gated, and jumprelu with tanh)."""
    sparsity_coefficient: float | None = None
    """Weight of the sparsity penalty (standard, gated, jumprelu, or that activation), or where the L0 controller starts
    from. None: the activation function's own."""
    l0_controller: bool = True
    """Whether the sparsity coefficient is steered so that k features fire on a row."""
    sparsity_warmup: float = 0.05
    """Share of the run over which the sparsity coefficient rises linearly from 0."""
    sparsity_loss: str | None = None
    """Penalty of JumpReLU: "step" (L0), "quadratic" ((L0 / k - 1)²) or "tanh". None: step."""
    bandwidth: float | None = None
    """Width of the window about JumpReLU's thresholds in which they are learned. None: 0.5."""
    threshold_lr: float = 10.0
    """Learning rate of JumpReLU's thresholds, as a multiple of lr: they must follow pre-activations of all sizes."""
    prefixes: tuple[int, ...] | None = None
    """Widths of the nested dictionaries of a matryoshka, ascending, d_sae last or left out. None: d_sae / 16, / 8, / 4,
    / 2 and d_sae."""
    k_anneal: float = 0.0
    """Share of the run over which k falls linearly from k_start to k. 0: k from the start."""
    k_start: int | None = None
    """Features a row at the start of the annealing. None: 4 k, at most d_sae."""
    frequency_coefficient: float = 0.0
    """Weight of the penalty on features that fire on more than frequency_cap of the rows. 0: none, since some dense
    features are real (position, norm)."""
    frequency_cap: float = 0.1
    """Share of the rows on which a feature may fire without that penalty."""
    resample_steps: int = 0
    """Steps after which dead features start anew at badly explained rows, again and again. 0: never; AuxK does it."""
    auxk_coefficient: float = 1 / 2
    """Weight of the loss that revives dead features (AuxK). Gao et al. 2024 use 1/32 in far longer runs. 0: none.
    Both defaults are measured (scope/bench/RESULTS.md)."""
    k_aux: int | None = None
    """Dead features that AuxK uses on a row. None: the largest power of two up to d_in / 2."""
    dead_feature_tokens: int | None = None
    """Rows without firing after which a feature counts as dead. None: 1/80 of the run, at least eight batches and at
    most 10 million."""
    max_norm_ratio: float = 10.0
    """Rows whose norm is more than this many times the median are left out of training (sinks). 0: none is."""
    balance: str = "none"
    """"modality": of a store with images or sounds, train on as many rows of each modality as there are of the rarest,
    drawn anew for each pass. "none": on all rows alike."""
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
    parallel: str = "data"
    """What several processes that torchrun started divide among them: "data", the rows of each batch, or "features",
    for wide dictionaries. The result is the same; batch_size is that of all processes together."""
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
        for name in ("warmup", "decay", "sparsity_warmup", "k_anneal"):
            if not 0 <= getattr(self, name) <= 1:
                raise InvalidInputError(f"{name} is {getattr(self, name)}; expected a share of the run, from 0 to 1.")
        if self.warmup + self.decay > 1:
            raise InvalidInputError(f"warmup and decay are {self.warmup} and {self.decay}; together more than the run.")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise InvalidInputError(f"{name} is {getattr(self, name)}; expected at least 0 and less than 1.")
        for name in ("init_encoder_scale", "frequency_cap", "sparsity_coefficient", "bandwidth", "threshold_lr"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InvalidInputError(f"{name} is {value}; expected a positive number.")
        if self.k_start is not None and not self.k <= self.k_start <= self.d_sae:
            raise InvalidInputError(f"k_start is {self.k_start:,}; expected from k, {self.k:,}, to {self.d_sae:,}.")
        if self.k_start is not None and not self.k_anneal:
            raise InvalidInputError(
                "k_start is given, but k_anneal is 0: give the share of the run over which k falls."
            )
        choices_of = {"decoder_norm": DECODER_NORMS, "b_dec_init": CENTRES, "parallel": PARALLEL, "balance": BALANCES}
        for name, choices in choices_of.items():
            if getattr(self, name) not in choices:
                raise UnknownNameError(name, getattr(self, name), choices)
        for name in ("clip_grad_norm", "auxk_coefficient", "max_norm_ratio", "frequency_coefficient", "resample_steps"):
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
        return self.dead_feature_tokens or min(10_000_000, max(DEAD_BATCHES * self.batch_size, self.tokens // 80))

    def k_aux_for(self, d_in: int) -> int:
        """`k_aux`, or its default for an input of this width."""
        return self.k_aux or 1 << max(0, (d_in // 2).bit_length() - 1)

    @property
    def is_plain(self) -> bool:
        """Whether a step is the gradient, AuxK and Adam with unit decoder rows, and nothing else."""
        further = (self.k_anneal, self.frequency_coefficient, self.resample_steps)
        return not any(further) and self.decoder_norm == "unit"

    def k_start_for(self) -> int:
        """`k_start`, or its default."""
        return self.k_start or min(4 * self.k, self.d_sae)

    def architecture_options(self, config_class: type) -> dict[str, Any]:
        """The settings that are fields of the architecture's own configuration, where they were given.

        Raises:
            InvalidInputError: one was given that the architecture does not have.
        """
        known = {f.name for f in fields(config_class)}
        given = {name: getattr(self, name) for name in ARCHITECTURE_FIELDS if getattr(self, name) is not None}
        for name in given:
            if name not in known:
                raise InvalidInputError(f"{name} was given, which the architecture {self.arch} does not have.")
        return given

    def require_fits(self, penalised: bool) -> None:
        """Refuse settings that the architecture leaves without effect or sense.

        Args:
            penalised: whether its features are kept few by a sparsity penalty.

        Raises:
            InvalidInputError: names the setting and the architecture.
        """
        if penalised:
            return
        what = f"the architecture {self.arch} has no sparsity penalty: k says how many features fire"
        if self.sparsity_coefficient is not None:
            raise InvalidInputError(f"sparsity_coefficient is {self.sparsity_coefficient}, but {what}.")
        if self.decoder_norm == "free":
            raise InvalidInputError(
                f"decoder_norm is 'free', but {what}, and nothing would keep the decoder's rows from growing."
            )

    def require_divisible(self, processes: int, layers: int) -> None:
        """Refuse what cannot be divided by features.

        Args:
            processes: how many have different features.
            layers: groups of features, each of which reads another layer.

        Raises:
            InvalidInputError: names the setting.
        """
        if processes == 1:
            return
        if self.resample_steps:
            raise InvalidInputError(
                "resample_steps starts dead features anew at rows that the whole dictionary explains badly, which no "
                "process has under --parallel features. Leave it out (AuxK revives them), or use --parallel data."
            )
        if self.d_sae < processes or (layers > 1 and self.d_sae // layers % processes):
            what = f"the {self.d_sae // layers:,} features of each of {layers} layers" if layers > 1 else "d_sae"
            raise InvalidInputError(
                f"{processes} processes cannot divide {what} (d_sae is {self.d_sae:,}): give a multiple of "
                f"{processes * layers:,}, or use --parallel data."
            )

    def to_dict(self) -> dict[str, Any]:
        """All fields, JSON-able; `balance` only where it is one, so that runs from before it was known go on."""
        settings = asdict(self)
        if self.balance == "none":
            del settings["balance"]
        return settings
