"""Settings of the benchmarks. Light to import: the CLI makes its options from them."""

from dataclasses import dataclass
from pathlib import Path

from scope.errors import InvalidInputError

__all__ = ["CaptureBench"]


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
