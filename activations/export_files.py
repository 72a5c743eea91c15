"""The files of an export: columns, and how some of their rows are written in each format (`activations.export`).

Rows are read and written a piece at a time, so that memory does not depend on the size of a file.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["WRITERS", "Column", "Write"]

PIECE_BYTES = 2**24
"""Activations that are in memory at once, about."""
SAFETENSORS_NAMES = {
    "bfloat16": "BF16",
    "float16": "F16",
    "float32": "F32",
    "int32": "I32",
    "int64": "I64",
    "uint8": "U8",
}


@dataclass(frozen=True)
class Column:
    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[int, int], np.ndarray]
    """Rows `[start, stop)`; bfloat16 as uint16 bits."""

    @property
    def numpy_dtype(self) -> np.dtype:
        return np.dtype(np.uint16 if self.dtype == "bfloat16" else self.dtype)

    @property
    def row_bytes(self) -> int:
        return int(np.prod(self.shape)) * self.numpy_dtype.itemsize

    def pieces(self, start: int, stop: int) -> Iterator[np.ndarray]:
        step = max(1, PIECE_BYTES // self.row_bytes)
        for first in range(start, stop, step):
            yield self.read(first, min(stop, first + step))


def _write_safetensors(folder: Path, numbered: str, columns: Sequence[Column], start: int, stop: int) -> Iterator[Path]:
    """One file in the safetensors format: the header's length (uint64), the header (JSON), the tensors end to end."""
    header: dict[str, Any] = {"__metadata__": {"rows": f"{start}-{stop}"}}
    offset = 0
    in_order = sorted(columns, key=lambda column: -column.numpy_dtype.itemsize)  # so that every tensor is aligned
    for column in in_order:
        end = offset + (stop - start) * column.row_bytes
        shape = [stop - start, *column.shape]
        header[column.name] = {"dtype": SAFETENSORS_NAMES[column.dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    path = folder / f"train-{numbered}.safetensors"
    with open(path, "wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        for column in in_order:
            for piece in column.pieces(start, stop):
                file.write(np.ascontiguousarray(piece, column.numpy_dtype).data)
    yield path


def _write_npy(folder: Path, numbered: str, columns: Sequence[Column], start: int, stop: int) -> Iterator[Path]:
    for column in columns:
        path = folder / column.name / f"{numbered}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        described = {
            "descr": np.lib.format.dtype_to_descr(column.numpy_dtype),
            "fortran_order": False,
            "shape": (stop - start, *column.shape),
        }
        with open(path, "wb") as file:
            np.lib.format.write_array_header_1_0(file, described)
            for piece in column.pieces(start, stop):
                file.write(np.ascontiguousarray(piece, column.numpy_dtype).data)
        yield path


def _write_parquet(folder: Path, numbered: str, columns: Sequence[Column], start: int, stop: int) -> Iterator[Path]:
    import pyarrow
    from pyarrow import parquet

    path = folder / f"train-{numbered}.parquet"
    step = max(1, PIECE_BYTES // sum(column.row_bytes for column in columns))
    schema = pyarrow.schema([(column.name, _arrow(column.read(start, start)).type) for column in columns])
    with parquet.ParquetWriter(path, schema, compression="zstd", use_dictionary=False) as writer:
        for first in range(start, stop, step):
            last = min(stop, first + step)
            arrays = [_arrow(column.read(first, last)) for column in columns]
            writer.write_table(pyarrow.Table.from_arrays(arrays, schema=schema))
    yield path


def _arrow(values: np.ndarray) -> Any:
    """An arrow array, one element a row: fixed-size lists, nested, for rows of several dimensions."""
    import pyarrow

    array = pyarrow.array(np.ascontiguousarray(values).reshape(-1))
    for size in reversed(values.shape[1:]):
        array = pyarrow.FixedSizeListArray.from_arrays(array, size)
    return array


Write = Callable[[Path, str, Sequence[Column], int, int], Iterator[Path]]
"""Writes some rows of all columns (folder, number of the file, columns, start, stop) and yields the files."""

WRITERS: Mapping[str, Write] = {
    "safetensors": _write_safetensors,
    "npy": _write_npy,
    "hf-dataset": _write_parquet,
}
