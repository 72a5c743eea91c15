"""What lies where in a store.

NAME.zarr/
  manifest.json                     what the store is: spec, text, fingerprint
  hooks/<hook>/c.<group>.0          activations, one shard per row group
  tokens/<column>/c.<group>         per-token columns; tokens/norm/<hook> holds the rows' L2 norms
  sequences/<group>.parquet         the windows that start in a row group; documents/ likewise
  windows/<group>.parquet           where only some tokens are rows, or there are media: all tokens of these windows
  media/<group>.parquet             images and sounds of these windows, with the content of their files
  ledger/                           which row groups exist, with digests (`activations.ledger`)
  **/*.before-append                a last row group as it was, while text is appended (`activations.append`)
  journal.jsonl                     when, where and by whom
  lock                              host and pid of a writer at work
"""

from collections.abc import Mapping, Sequence
from typing import Any

from activations.arrays import ArrayLayout, ObjectRecord
from activations.chats import CHAT_COLUMNS
from activations.denoising import DENOISING_COLUMNS
from activations.ledger import GroupRecord
from activations.media import MEDIA_COLUMNS
from activations.plan import TOKEN_COLUMNS
from activations.spec import CaptureSpec, fingerprint_of

__all__ = [
    "ASIDE",
    "FORMAT",
    "MEDIA",
    "OPTIONAL_IDENTITY",
    "PLAN",
    "TABLES",
    "WINDOWS",
    "ZARR_GROUPS",
    "StoreLayout",
    "appended_from",
    "identity_fingerprint",
]

FORMAT = "activation-store"
PLAN = "tokens"
"""The ledger's capture id of the plan: token columns, sequences and documents."""
TABLES = ("sequences", "documents")
WINDOWS = "windows"
"""The table of whole windows that a store has besides whose rows are only some of the tokens, or that has media."""
MEDIA = "media"
"""The table of media, with the content of their files (`activations.media.MEDIA_TABLE`)."""
ZARR_GROUPS = ("", "hooks", "tokens", "tokens/norm")
"""Folders that are Zarr groups; each has a `zarr.json`."""
ASIDE = ".before-append"
"""Suffix of an object that holds what a last row group was before it is filled up."""

IDENTITY = ("spec", "text", "max_tokens", "hooks_at_creation")
"""Entries of the manifest that make the store's fingerprint."""
OPTIONAL_IDENTITY = ("selection", "chats", "media", "denoising")
"""Entries that do so where they are: which tokens are rows, how chats are written, how media are prepared, and how a
canvas was denoised."""


def identity_fingerprint(manifest: Mapping[str, Any]) -> str:
    """The fingerprint of a store with this manifest, fixed when it is created: hooks added later do not change it."""
    optional = [name for name in OPTIONAL_IDENTITY if manifest.get(name) is not None]
    return fingerprint_of({"format": FORMAT, **{name: manifest[name] for name in (*IDENTITY, *optional)}})


def appended_from(manifest: Mapping[str, Any]) -> int:
    """The row at which the text begins that was appended last, -1 if there is none: only from a row after it on does
    the plan speak of that text."""
    appended = manifest.get("appended", ())
    return int(appended[-1]["from_row"]) if appended else -1


class StoreLayout:
    """Names and layouts of a store's arrays and tables, which follow from its manifest.

    Args:
        spec: the store's.
        spoken: of chats, which of `CHAT_COLUMNS` their tokens have.
        has_windows: whether only some tokens are rows, so that whole windows are kept in a table.
        has_media: whether the text has media; then whole windows are kept too.
        denoised: whether rows are steps of denoising, and have `DENOISING_COLUMNS`.
    """

    def __init__(
        self,
        spec: CaptureSpec,
        spoken: Sequence[str] = (),
        has_windows: bool = False,
        has_media: bool = False,
        denoised: bool = False,
    ) -> None:
        self.spec, self.has_windows, self.has_media = spec, has_windows or has_media, has_media
        self.token_columns = TOKEN_COLUMNS | {name: CHAT_COLUMNS[name] for name in spoken}
        if has_media:
            self.token_columns |= MEDIA_COLUMNS
        if denoised:
            self.token_columns |= DENOISING_COLUMNS
        """Per-token columns and their dtypes."""
        self.tables = (*TABLES, *((WINDOWS,) if self.has_windows else ()), *((MEDIA,) if has_media else ()))

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> "StoreLayout":
        """The layout of the store with this manifest."""
        return cls(
            CaptureSpec(**manifest["spec"]),
            spoken=_spoken(manifest.get("chats")),
            has_windows=manifest.get("selection") is not None,
            has_media=manifest.get("media") is not None,
            denoised=manifest.get("denoising") is not None,
        )

    def hook(self, shape: Sequence[int]) -> ArrayLayout:
        """Layout of a hook's activations."""
        return ArrayLayout(tuple(shape), self.spec.dtype, self.spec.rows_per_group)

    @property
    def norm(self) -> ArrayLayout:
        """Layout of a hook's norms."""
        return ArrayLayout((), "float32", self.spec.rows_per_group)

    def column(self, column: str) -> ArrayLayout:
        """Layout of a token column."""
        return ArrayLayout((), self.token_columns[column], self.spec.rows_per_group, packed=True)

    @staticmethod
    def hook_array(hook: str) -> str:
        return f"hooks/{hook}"

    @staticmethod
    def norm_array(hook: str) -> str:
        return f"tokens/norm/{hook}"

    @staticmethod
    def column_array(column: str) -> str:
        return f"tokens/{column}"

    @staticmethod
    def table_object(table: str, group: int) -> str:
        """The object that lists the sequences or documents that start in a row group."""
        return f"{table}/{group:08d}.parquet"

    def plan_arrays(self) -> dict[str, ArrayLayout]:
        """Layouts of the token columns, by path below the store."""
        return {self.column_array(column): self.column(column) for column in self.token_columns}

    def arrays_of(self, declaration: Mapping[str, Any]) -> dict[str, ArrayLayout]:
        """Layouts of the arrays that a capture fills, by path below the store."""
        if "hooks" not in declaration:
            return self.plan_arrays()
        return self.hook_arrays({hook: declared["shape"] for hook, declared in declaration["hooks"].items()})

    def objects_of(self, record: GroupRecord, declaration: Mapping[str, Any]) -> dict[str, ObjectRecord]:
        """Objects of a record that are the store's; those of hooks that were dropped are not any more."""
        folders = {*self.arrays_of(declaration), *(self.tables if record.capture == PLAN else ())}
        return {name: known for name, known in record.objects.items() if name.rpartition("/")[0] in folders}

    def hook_arrays(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, ArrayLayout]:
        """Layouts of these hooks' activations and norms, by path below the store."""
        arrays = {self.hook_array(hook): self.hook(shape) for hook, shape in shapes.items()}
        return arrays | {self.norm_array(hook): self.norm for hook in shapes}


def _spoken(chats: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The columns of a store's chats, given its manifest's entry; stores of before kinds were told have roles alone."""
    if chats is None:
        return ()
    return tuple(CHAT_COLUMNS) if "kinds" in chats else ("role",)
