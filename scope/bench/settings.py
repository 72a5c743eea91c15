"""Settings of the benchmarks. Light to import: the CLI makes its options from them."""

from dataclasses import asdict, dataclass
from pathlib import Path

from scope.errors import InvalidInputError, UnknownNameError

__all__ = [
    "AttributeBench",
    "CaptureBench",
    "EmbeddingsBench",
    "IndexBench",
    "IndexBuildBench",
    "ParallelBench",
    "QualityBench",
    "TrainBench",
    "TunedCopy",
]

COMPARABLE = ("topk", "batchtopk")
"""Architectures whose L0 is k in both trainers."""


@dataclass(frozen=True)
class CaptureBench:
    """Settings of the benchmark; what is None follows from the device."""

    model: str | None = None
    """The model. None: gemma-3-270m on a CPU, on a GPU a llama of 1.7B parameters with random weights."""
    hook: str | None = None
    """The hook. None: `hook_resid_post` of the middle layer (block 8 of Gemma 3 270M's 18, block 12 of 24)."""
    device: str | None = None
    """Such as cpu or cuda. None: the best there is."""
    tokens: int | None = None
    """Tokens to capture in a round. None: 8,192 on a CPU, 4,000,000 on a GPU."""
    context_size: int | None = None
    """Tokens in the longest window. None: 256 on a CPU, 1,024 on a GPU."""
    compile: bool = False
    """Whether our capture and the floor run compiled layers."""
    rounds: int = 2
    """How often each takes its turn; the best counts."""
    batch_size: int | None = None
    """Tokens that our capture runs at once. None: its default."""
    folder: Path | None = None
    """Where stores are written and deleted again; the disk that is measured. None: the folder for temporary files."""
    with_peers: bool = True
    """Whether to run TransformerBridge and SAELens."""

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise InvalidInputError(f"rounds is {self.rounds}; expected at least 1.")
        if self.tokens is not None and self.tokens < 1024:
            raise InvalidInputError(
                f"tokens is {self.tokens:,}; expected at least 1,024, so that there is work to time."
            )


@dataclass(frozen=True)
class EmbeddingsBench:
    """Settings of the benchmark of lookup tables on the host."""

    device: str | None = None
    """Such as cpu or cuda. None: the best there is."""
    n_layers: int = 8
    """Layers of the model; each has a table of `d_vocab` rows of 256. Eight of them in bfloat16 are 1.07 GB."""
    d_model: int = 1024
    """Width of the residual stream."""
    d_vocab: int = 262_144
    """Rows of each table."""
    batch: int = 4
    """Windows that run at once."""
    tokens: int = 256
    """Tokens of a window."""
    rounds: int = 3
    """How often each runs; the best counts."""

    def __post_init__(self) -> None:
        for name in ("n_layers", "d_model", "d_vocab", "batch", "tokens", "rounds"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"{name} is {getattr(self, name):,}; expected at least 1.")


@dataclass(frozen=True)
class TrainBench:
    """Settings of the training benchmark; what is None follows from the device."""

    arch: str = "topk"
    """Architecture."""
    device: str | None = None
    """Such as cpu or cuda. None: the best there is."""
    d_in: int | None = None
    """Width of the activations. None: 640 on a CPU, 2,304 on a GPU."""
    d_sae: int | None = None
    """Number of features. None: 4,096 on a CPU, 65,536 on a GPU."""
    k: int | None = None
    """Features that fire on a row. None: 32 on a CPU, 64 on a GPU."""
    batch_size: int | None = None
    """Rows in a step. None: 2,048 on a CPU, 8,192 on a GPU."""
    steps: int | None = None
    """Steps that are timed in each round. None: 4 on a CPU, 20 on a GPU."""
    rounds: int = 3
    """How often each takes its turn; the best counts."""
    with_peers: bool = True
    """Whether to run SAELens and, on a GPU, sparsify."""
    with_compiled: bool = True
    """Whether to run SAELens compiled as well, on a GPU."""
    loss_steps: int = 0
    """Steps to train ours and SAELens's from the start on the same batches, to compare their losses. 0: none."""

    def __post_init__(self) -> None:
        for name in ("d_in", "d_sae", "k", "batch_size", "steps", "rounds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidInputError(f"{name} is {value:,}; expected at least 1.")
        if self.loss_steps < 0:
            raise InvalidInputError(f"loss_steps is {self.loss_steps:,}; expected 0 or more.")

    def shape(self, cuda: bool) -> tuple[int, int, int, int]:
        """d_in, d_sae, k and batch size on a GPU or on a CPU."""
        defaults = (2304, 65_536, 64, 8192) if cuda else (640, 4096, 32, 2048)
        given = (self.d_in, self.d_sae, self.k, self.batch_size)
        d_in, d_sae, k, batch_size = (value or default for value, default in zip(given, defaults, strict=True))
        if k > d_sae:
            raise InvalidInputError(f"k is {k:,}; expected at most d_sae, {d_sae:,}.")
        return d_in, d_sae, k, batch_size


@dataclass(frozen=True)
class QualityBench:
    """Settings of the comparison of qualities."""

    arch: str = "topk"
    """Architecture: topk or batchtopk, whose L0 is given and therefore the same."""
    hook: str | None = None
    """The hook. None: the store's first."""
    d_sae: int = 8192
    """Number of features."""
    k: int = 32
    """Features that fire on a row."""
    rows: int | None = None
    """Rows to train on, drawn at random. None: all of the store that are trained on."""
    passes: float = 4.0
    """How many times training sees each row."""
    tokens: int | None = None
    """Rows seen in a run. None: passes x rows."""
    batch_size: int = 4096
    """Rows in a step."""
    factors: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    """The grid of learning rates, as multiples of each trainer's default."""
    seeds: int = 3
    """Runs of each trainer with the learning rate chosen."""
    evaluate_tokens: int = 16_384
    """Held-out tokens for the cross-entropy, about; 0 leaves it out and needs no model."""
    device: str | None = None
    """Such as cpu or cuda. None: the best there is."""

    def __post_init__(self) -> None:
        if self.arch not in COMPARABLE:
            raise UnknownNameError("architecture with the same L0 in both trainers", self.arch, COMPARABLE)
        for name in ("d_sae", "k", "rows", "tokens", "batch_size", "seeds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidInputError(f"{name} is {value:,}; expected at least 1.")
        if self.k > self.d_sae:
            raise InvalidInputError(f"k is {self.k:,}; expected at most d_sae, {self.d_sae:,}.")
        if self.evaluate_tokens < 0:
            raise InvalidInputError(f"evaluate_tokens is {self.evaluate_tokens:,}; expected 0 or more.")
        if not self.passes > 0:
            raise InvalidInputError(f"passes is {self.passes}; expected more than 0.")
        if not self.factors or min(self.factors) <= 0:
            raise InvalidInputError(f"factors is {self.factors}; expected positive numbers.")


@dataclass(frozen=True)
class ParallelBench:
    """Settings of the benchmark of several processes; what is None follows from the device."""

    arch: str = "topk"
    """Architecture: topk, batchtopk or jumprelu."""
    device: str | None = None
    """cuda or cpu. None: the best there is."""
    d_in: int | None = None
    """Width of the activations. None: 640 on a CPU, 2,304 on a GPU."""
    d_sae: int | None = None
    """Number of features. None: 4,096 on a CPU, 65,536 on a GPU."""
    k: int | None = None
    """Features that fire on a row. None: 32 on a CPU, 64 on a GPU."""
    batch_size: int | None = None
    """Rows in a step of one process alone. None: 2,048 on a CPU, 8,192 on a GPU."""
    steps: int | None = None
    """Steps that are timed in each round. None: 4 on a CPU, 20 on a GPU."""
    rounds: int = 3
    """How often each takes its turn; the best counts."""

    def __post_init__(self) -> None:
        self._as_train()

    def shape(self, cuda: bool) -> tuple[int, int, int, int]:
        """d_in, d_sae, k and batch size on a GPU or on a CPU."""
        return self._as_train().shape(cuda)

    def _as_train(self) -> TrainBench:
        return TrainBench(**asdict(self))


@dataclass(frozen=True)
class IndexBuildBench:
    """Settings of the benchmark of building a feature index; what is None follows from the device."""

    rows: int | None = None
    """Rows of the store. None: 131,072 on a CPU, 2,097,152 on a GPU."""
    device: str | None = None
    """Such as cpu or cuda. None: the best there is."""
    d_in: int = 640
    """Width of the activations."""
    d_sae: int = 16_384
    """Number of features."""
    k: int = 32
    """Features that fire on a row."""
    folder: Path | None = None
    """Where store and index are written and deleted again. None: the folder for temporary files."""

    def __post_init__(self) -> None:
        for name in ("d_in", "d_sae", "k"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"{name} is {getattr(self, name):,}; expected at least 1.")
        if self.rows is not None and self.rows < 4096:
            raise InvalidInputError(f"rows is {self.rows:,}; expected at least 4,096, so that there is work to time.")
        if self.k > self.d_sae:
            raise InvalidInputError(f"k is {self.k:,}; expected at most d_sae, {self.d_sae:,}.")


@dataclass(frozen=True)
class IndexBench:
    """Settings of the benchmark of a feature index's queries."""

    tokens: int = 8_600_000
    """Rows of the index, BOS included."""
    d_sae: int = 16_384
    """Number of features."""
    l0: int = 32
    """Features that fire on a row."""
    queries: int = 200
    """Questions of each kind that are timed."""
    cold_queries: int = 10
    """Questions of each kind that are timed with nothing of the index in the page cache. 0: none."""
    folder: Path | None = None
    """Where the index is made, or one that an earlier run made is used again. None: a temporary folder; the index
    takes 7.5 bytes a firing, 2.1 GB at the defaults, and 4.2 GB while it is built."""
    seed: int = 0
    """Seed of the index and of the questions."""

    def __post_init__(self) -> None:
        for name in ("d_sae", "l0", "queries"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"{name} is {getattr(self, name):,}; expected at least 1.")
        if self.cold_queries < 0:
            raise InvalidInputError(f"cold_queries is {self.cold_queries:,}; expected 0 or more.")
        if self.tokens < 10_000:
            raise InvalidInputError(
                f"tokens is {self.tokens:,}; expected at least 10,000, so that there is text to ask."
            )
        if self.l0 > self.d_sae // 4:
            raise InvalidInputError(f"l0 is {self.l0:,}; expected at most a quarter of d_sae, {self.d_sae // 4:,}.")
        if self.tokens > 2**32 - 1:
            raise InvalidInputError(f"tokens is {self.tokens:,}; expected fewer than 2^32.")


@dataclass(frozen=True)
class AttributeBench:
    """Settings of the benchmark of circuit graphs; what is None follows from the device."""

    lengths: tuple[int, ...] | None = None
    """Tokens of the prompts. None: 64 on a CPU; 1,024 and 6,000 on a GPU."""
    max_features: int | None = None
    """Feature nodes that are expanded. None: 1,024 on a CPU, 7,500 on a GPU."""
    d_sae: int = 16_384
    """Features of each layer's transcoder."""
    k: int = 50
    """Features that fire on a token in each layer."""
    batch_size: int = 64
    """Targets expanded at once."""
    device: str | None = None
    """Such as cpu or cuda. None: the best there is."""

    def __post_init__(self) -> None:
        for name in ("d_sae", "k", "batch_size", "max_features"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidInputError(f"{name} is {value:,}; expected at least 1.")
        if self.lengths is not None and (not self.lengths or min(self.lengths) < 2):
            raise InvalidInputError(f"lengths is {self.lengths}; expected prompts of at least 2 tokens.")
        if self.k > self.d_sae:
            raise InvalidInputError(f"k is {self.k:,}; expected at most d_sae, {self.d_sae:,}.")


@dataclass(frozen=True)
class TunedCopy:
    """How a fine-tuned copy of a model is made."""

    source: str
    """The source of the text to train on, such as shakespeare-milton; "model" for text that the model writes itself."""
    model: str = "gemma-3-270m"
    """The model."""
    data: Path | None = None
    """The text. None: the sample that ships with the workbench."""
    steps: int = 300
    """Steps."""
    batch_size: int = 2
    """Windows in a step."""
    context_size: int = 64
    """Tokens in a window, BOS included."""
    lr: float = 3e-5
    """Peak learning rate."""
    first_layer: int = 0
    """The first layer that is trained."""
    last_layer: int | None = None
    """The last one. None: the model's last."""
    own_vocabulary: bool = True
    """Whether the softmax is over the token types of the windows and of beginnings of the text's documents alone, which
    is some times as fast on a large vocabulary."""
    windows_at_most: int = 1_000
    """Steps' worth of different windows; longer runs take them again."""
    sampled_at_once: int = 64
    """Windows that the model writes together, where it writes the text itself."""
    held_out: int = 8
    """Held-out documents of each source on whose first window the loss is measured before and after. 0: none."""
    seed: int = 0
    """Seed of the windows and their order."""
    device: str | None = None
    """Such as cpu or cuda. None: the best there is."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "windows_at_most", "sampled_at_once"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"{name} is {getattr(self, name)}; expected at least 1.")
        if self.context_size < 2:
            raise InvalidInputError(f"context_size is {self.context_size}; expected at least 2, a token and its next.")
        if self.held_out < 0:
            raise InvalidInputError(f"held_out is {self.held_out}; expected 0 or more.")
        if not self.lr > 0:
            raise InvalidInputError(f"lr is {self.lr}; expected a positive number.")
