"""What identifies a store: `CaptureSpec` and its fingerprint."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Literal

from activations.errors import InvalidInputError, MismatchError

__all__ = [
    "BALANCES",
    "MAX_GROUP_BYTES",
    "CaptureSpec",
    "StorageDtype",
    "fingerprint_of",
    "require_sizes",
    "rows_per_group_for",
]

StorageDtype = Literal["bfloat16", "float16", "float32"]
BALANCES = ("none", "modality")
"""What the rows of a pass may be balanced over (`activations.shuffle`)."""
DTYPE_BYTES: dict[str, int] = {"bfloat16": 2, "float16": 2, "float32": 4}
MAX_ROWS_PER_GROUP = 65_536
MAX_SHARD_BYTES = 128 * 2**20
MAX_GROUP_BYTES = 512 * 2**20
"""Of a row group's shards together: a few row groups are in memory at once, however many hooks there are."""
MIN_GROUP_WINDOWS = 4
"""Windows that a row group holds in any case: what a window has in earlier groups is computed again."""


def fingerprint_of(content: object) -> str:
    """The SHA-256 (hex) of a JSON-able object in canonical form."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def rows_per_group_for(row_bytes: Sequence[int], context_size: int) -> int:
    """The largest power of two R <= 65,536 of which every hook's shard has at most 128 MiB, and all together 512 MiB or
    four windows.

    Args:
        row_bytes: bytes of a row, by hook.
        context_size: tokens in a window.
    """
    together = max(MAX_GROUP_BYTES // sum(row_bytes), MIN_GROUP_WINDOWS * context_size)
    fitting = min(MAX_ROWS_PER_GROUP, MAX_SHARD_BYTES // max(row_bytes), together)
    return 1 << (max(1, fitting).bit_length() - 1)


def require_sizes(context_size: int | None, dtype: str | None, rows_per_group: int | None) -> None:
    """Raise `InvalidInputError` if one of these cannot be a store's; None is always good."""
    if context_size is not None and context_size < 2:
        raise InvalidInputError(f"context_size is {context_size}; a window needs at least 2 tokens.")
    if dtype is not None and dtype not in DTYPE_BYTES:
        raise InvalidInputError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPE_BYTES)}.")
    rows = 1 if rows_per_group is None else rows_per_group
    if not 1 <= rows <= MAX_ROWS_PER_GROUP or rows & (rows - 1):
        raise InvalidInputError(f"rows_per_group is {rows}; expected a power of two from 1 to {MAX_ROWS_PER_GROUP:,}.")


@dataclass(frozen=True)
class CaptureSpec:
    """What every row of a store has in common. A resume or an append with another spec is refused."""

    model: str
    """Name of the model as it is shown."""
    revision: str | None
    """Revision of the model, where it has one."""
    weight_hash: str
    """Digest of the model's weights (hex)."""
    tokenizer_hash: str
    """Digest of the tokenizer (hex)."""
    context_size: int
    """Tokens in the longest window, BOS included."""
    bos_token_id: int | None
    """The token that every window starts with; None where the tokenizer has no BOS."""
    compute_dtype: str
    """dtype in which the model ran."""
    dtype: StorageDtype
    """dtype in which activations are stored."""
    rows_per_group: int
    """R: rows in a row group, a power of two up to 65,536."""

    def __post_init__(self) -> None:
        require_sizes(self.context_size, self.dtype, self.rows_per_group)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over all fields."""
        return fingerprint_of(asdict(self))

    def require_equal(self, other: "CaptureSpec", where: str) -> None:
        """Raise `MismatchError` naming each field in which `other` differs from this spec.

        Args:
            other: the spec of what is to be added.
            where: the store that has this spec, for the message.
        """
        differing = [
            f"{field.name} is {getattr(other, field.name)!r}, the store has {getattr(self, field.name)!r}"
            for field in fields(self)
            if getattr(self, field.name) != getattr(other, field.name)
        ]
        if differing:
            raise MismatchError(
                f"{where} was captured with another specification: {'; '.join(differing)}. "
                "Use the same settings to resume, or give another output folder."
            )
