"""Export: a store's activations and tokens as files that other tools read, with where they come from beside them.

    OUT/export.json             the store's identity and spec, the hooks, every file with its rows and xxh3-128
    OUT/sequences.parquet       the windows; documents.parquet the documents, both as the store's tables
    OUT/windows.parquet         all tokens of the windows, where the store's rows are only some of them or it has media
    OUT/media.parquet           its images and sounds, with the content of their files
    OUT/data/train-00000-of-00007.safetensors | .parquet             some rows: all columns of them
    OUT/data/<column>/00000-of-00007.npy                             some rows of one column

Columns are the store's: `token_id, sequence, position, flags`, those of chats and media where it has them, per hook
its name and `norm/<name>`.

1. Check everything; nothing is written before all of it is found good.
2. Write into the folder `OUT.partial`, file by file, each of bounded size; rows are read verified and converted a piece
   at a time, so that memory does not grow with the store.
3. Write `export.json` and rename the folder: an export that was interrupted is never at OUT. The next one begins anew.

bfloat16 stays bfloat16 in safetensors. npy and Arrow have none: there it becomes float32, which is exact, or, in npy
with `dtype="bfloat16"`, its bits in uint16.
"""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import xxhash

from activations.disk import sync_folder
from activations.errors import InvalidInputError, NonFiniteError, OccupiedError, UnknownNameError
from activations.export_files import WRITERS, Column, Write
from activations.layout import MEDIA, PLAN, TABLES, WINDOWS
from activations.source import RowFlag, float32_to_bf16
from activations.spec import DTYPE_BYTES, StorageDtype
from activations.store import ActivationStore

__all__ = ["ExportFormat", "ExportReport", "export_store"]

ExportFormat = Literal["safetensors", "npy", "hf-dataset"]

DEFAULT_FILE_BYTES = 2**28
VERSION = 1
MARK = "export.partial"
"""A file that says of a folder that it is an export under way, and may be begun anew."""


class ExportReport(NamedTuple):
    """What an export wrote."""

    folder: Path
    rows: int
    files: int
    """Files that hold rows."""
    bytes: int
    """Their size in all."""


def export_store(
    store: ActivationStore,
    out: str | Path,
    format: ExportFormat,
    hooks: Sequence[str] = (),
    *,
    dtype: StorageDtype | None = None,
    file_bytes: int = DEFAULT_FILE_BYTES,
    progress: Callable[[int, int | None], None] | None = None,
) -> ExportReport:
    """Write a store's rows to a folder.

    Args:
        store: what is exported; rows that some of the hooks lack are left out.
        out: the folder, new or empty.
        format: "safetensors", "npy" or "hf-dataset" (parquet files that `datasets.load_dataset` opens).
        hooks: which hooks; none for all of the store.
        dtype: of the activations; None for the store's, or float32 where the format has no bfloat16.
        file_bytes: size of a file, about.
        progress: called with (rows done, rows in all) after each file.

    Raises:
        InvalidInputError: something given is wrong; nothing was written.
        IntegrityError: the store is damaged; the message names hook and rows.
        NonFiniteError: a value that is too large for float16.
    """
    out = Path(out)
    columns = _columns(store, _check(store, out, format, hooks, dtype, file_bytes), format, dtype)
    names = [column.name for column in columns]
    n_rows = min(store.rows_of(name) for name in names if name in store.hooks)
    if n_rows == 0:
        raise InvalidInputError(f"{store.path} has no committed rows of {', '.join(map(str, hooks or store.hooks))}.")
    folder = _begin(out)
    try:
        files = _write_rows(folder, WRITERS[format], columns, n_rows, file_bytes, progress)
        _write_tables(store, folder, n_rows)
        provenance = _provenance(store, format, columns, n_rows, files)
        (folder / "export.json").write_text(json.dumps(provenance, indent=1) + "\n")
        _finish(folder, out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return ExportReport(out, n_rows, len(files), sum(file["bytes"] for file in files))


def _write_rows(
    folder: Path,
    write: Write,
    columns: Sequence[Column],
    n_rows: int,
    file_bytes: int,
    progress: Callable[[int, int | None], None] | None,
) -> list[dict[str, Any]]:
    """Write all rows, and return what `export.json` says of each file."""
    per_file = max(1, file_bytes // sum(column.row_bytes for column in columns))
    n_files = -(-n_rows // per_file)
    files: list[dict[str, Any]] = []
    for number in range(n_files):
        start, stop = number * per_file, min(n_rows, (number + 1) * per_file)
        for path in write(folder / "data", f"{number:05d}-of-{n_files:05d}", columns, start, stop):
            digest, size = _settle(path)
            name = path.relative_to(folder).as_posix()
            files.append({"name": name, "rows": [start, stop], "bytes": size, "xxh3_128": digest})
        if progress is not None:
            progress(stop, n_rows)
    return files


def _check(
    store: ActivationStore, out: Path, format: str, hooks: Sequence[str], dtype: str | None, file_bytes: int
) -> list[str]:
    """The hooks that are exported, by the names that the store knows them by."""
    if format not in get_args(ExportFormat):
        raise UnknownNameError("export format", format, get_args(ExportFormat))
    if dtype is not None and dtype not in DTYPE_BYTES:
        raise InvalidInputError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPE_BYTES)}.")
    if format == "hf-dataset" and dtype == "bfloat16":
        raise InvalidInputError("Arrow has no bfloat16; export an hf-dataset as float32 (exact) or float16.")
    if file_bytes < 1:
        raise InvalidInputError(f"file_bytes is {file_bytes}; expected at least 1.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OccupiedError(f"{out} is there already. Give a folder that is new or empty.")
    given = [hooks] if isinstance(hooks, str) else list(hooks)
    chosen = [store.resolve_hook(hook) for hook in given] or list(store.hooks)
    if not chosen:
        raise InvalidInputError(f"{store.path} has no hooks to export.")
    return list(dict.fromkeys(chosen))


def _columns(store: ActivationStore, hooks: Sequence[str], format: str, dtype: str | None) -> list[Column]:
    wanted = dtype or ("float32" if store.dtype == "bfloat16" and format != "safetensors" else store.dtype)
    columns = [
        Column(name, layout.dtype, (), partial(store.column, name)) for name, layout in store.token_columns.items()
    ]
    for hook in hooks:
        columns.append(Column(hook, wanted, store.hook_shape(hook), _reader(store, hook, wanted)))
        columns.append(Column(f"norm/{hook}", "float32", (), partial(store.norms, hook)))
    return columns


def _reader(store: ActivationStore, hook: str, dtype: str) -> Callable[[int, int], np.ndarray]:
    def read(start: int, stop: int) -> np.ndarray:
        if dtype == store.dtype:
            return store.read(hook, start, stop)
        values = store.read_float32(hook, start, stop)
        if dtype == "float32":
            return values
        if dtype == "bfloat16":
            return float32_to_bf16(values)
        with np.errstate(over="ignore"):
            converted = values.astype(np.float16)
        if not np.isfinite(converted).all():
            bad = start + int(np.argmax(~np.isfinite(converted).reshape(len(converted), -1).all(axis=1)))
            raise NonFiniteError(
                f"The hook {hook} has a value too large for float16 at row {bad:,}. Export float32 or bfloat16."
            )
        return converted

    return read


def _begin(out: Path) -> Path:
    folder = out.with_name(out.name + ".partial")
    if folder.exists():
        if not (folder / MARK).is_file():
            raise OccupiedError(f"{folder} is there, and is no export that was interrupted. Move it away.")
        shutil.rmtree(folder)
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise InvalidInputError(f"{folder} cannot be made: {error}.") from error
    (folder / MARK).touch()
    (folder / "data").mkdir()
    return folder


def _finish(folder: Path, out: Path) -> None:
    _settle(folder / "export.json")
    (folder / MARK).unlink()
    for inside in (*(child for child in folder.rglob("*") if child.is_dir()), folder):
        sync_folder(inside)
    os.replace(folder, out)  # over an empty folder too
    sync_folder(out.parent)


def _settle(path: Path) -> tuple[str, int]:
    """Digest and size of a file, after it is on the disk for good."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while piece := file.read(2**22):
            digest.update(piece)
        os.fsync(file.fileno())
    return digest.hexdigest(), path.stat().st_size


def _write_tables(store: ActivationStore, folder: Path, n_rows: int) -> None:
    sequences, documents = store.sequences(), store.documents()
    sequences = sequences[sequences["start_row"] < n_rows].reset_index(drop=True)
    sequences["n_rows"] = sequences["n_rows"].clip(upper=n_rows - sequences["start_row"])
    documents = documents[documents["document"].isin(sequences["document"])].reset_index(drop=True)
    for name, table in zip(TABLES, (sequences, documents), strict=True):
        table.to_parquet(folder / f"{name}.parquet", index=False)
        _settle(folder / f"{name}.parquet")
    last = int(sequences["sequence"].iloc[-1])
    for by_window in (WINDOWS, MEDIA):
        if by_window in store.layout.tables:
            _write_by_window(store, by_window, folder / f"{by_window}.parquet", last)


def _write_by_window(store: ActivationStore, table: str, path: Path, last_sequence: int) -> None:
    from pyarrow import compute, parquet

    groups = range(store.ledger.committed_groups(PLAN))
    with parquet.ParquetWriter(path, store.table_piece(table, 0).schema, compression="zstd") as writer:
        for piece in (store.table_piece(table, group) for group in groups):
            writer.write_table(piece.filter(compute.less_equal(piece.column("sequence"), last_sequence)))
    _settle(path)


def _provenance(
    store: ActivationStore, format: str, columns: Sequence[Column], n_rows: int, files: list[dict[str, Any]]
) -> dict[str, Any]:
    known = ("id", "fingerprint", "spec", "text", "appended", "selection", "chats", "media", "created_by", "load_name")
    return {
        "format": f"activations-{format}",
        "version": VERSION,
        "store": {"id": store.id, **{name: store.manifest[name] for name in known if name in store.manifest}},
        "complete": store.complete,
        "rows": n_rows,
        "columns": {
            column.name: {
                "dtype": column.dtype,
                "stored_as": column.numpy_dtype.name if format == "npy" else column.dtype,
                "shape": list(column.shape),
            }
            for column in columns
        },
        "flags": {str(flag.name): int(flag) for flag in RowFlag},
        "files": files,
    }
