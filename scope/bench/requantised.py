"""`scope bench requantise`: a GGUF file quantised otherwise, so that `scope quantisation` has files of which one knows
how coarse they are.

1. The source is a GGUF file, or the one that a packaged model carries. What its tensors stand for is the reference; a
   file that was quantised already gives the second quantisation's error alone.
2. Every matrix of a layer is dequantised and quantised to `kind` (`gguf.quants`, in numpy). Token embeddings and
   unembedding are kept finer, at Q8_0 where `kind` is coarser than that, as in the files that people use; vectors stay
   as they are, and so do matrices whose rows are no whole number of blocks.
3. All metadata is copied, the tokenizer's included, so that both files hold one tokenizer.

The package gguf quantises to F32, F16, BF16, Q8_0, Q5_1, Q5_0, Q4_1, Q4_0, TQ1_0, TQ2_0 and MXFP4; it reads many more.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from scope.errors import InvalidInputError, OccupiedError, UnknownNameError

__all__ = ["requantised"]

FINER, FINER_TENSORS = "Q8_0", ("token_embd.weight", "output.weight")
FINEST = ("F32", "F16", "BF16")
"""Quantisations that are finer than that."""


def requantised(source: Path, kind: str, out: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Write a GGUF file again in another quantisation.

    Args:
        source: a GGUF file.
        kind: such as Q8_0.
        out: the file to make, `.gguf`.
        say: told what is done.

    Returns:
        source, kind, out, `bytes`, and by quantisation the number of `tensors` in the new file.

    Raises:
        UnknownNameError: there is no such quantisation, or gguf cannot quantise to it.
        InvalidInputError: `out` does not end in .gguf, or the source is no GGUF file.
        OccupiedError: `out` exists.
    """
    import gguf

    kinds = _writable()
    if kind not in kinds:
        raise UnknownNameError("quantisation", kind, kinds)
    if out.suffix != ".gguf":
        raise InvalidInputError(f"{out} does not end in .gguf, by which a model's file is known.")
    if out.exists():
        raise OccupiedError(f"{out} exists. Give a file that does not exist yet.")
    try:
        reader: Any = gguf.GGUFReader(source)
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"{source} cannot be read as a GGUF file: {error}") from error
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f"{out.name}.partial")
    architecture = reader.get_field(gguf.Keys.General.ARCHITECTURE).contents()
    writer: Any = gguf.GGUFWriter(temporary, architecture, use_temp_file=False)
    for field in reader.fields.values():
        if field.name != gguf.Keys.General.ARCHITECTURE and not field.name.startswith("GGUF."):
            several = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=several)
    counts: dict[str, int] = {}
    for tensor in reader.tensors:
        data, made = _quantised(tensor, kind)
        counts[made.name] = counts.get(made.name, 0) + 1
        writer.add_tensor(tensor.name, data, raw_dtype=made)
    say(f"{len(reader.tensors)} tensors quantised")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(temporary, out)
    return {"source": str(source), "kind": kind, "out": str(out), "bytes": out.stat().st_size, "tensors": counts}


def _quantised(tensor: Any, kind: str) -> tuple[np.ndarray, Any]:
    """A tensor's bytes in the new file, and their quantisation."""
    import gguf
    from gguf.quants import dequantize, quantize

    kept_finer = tensor.name in FINER_TENSORS and kind not in FINEST
    wanted = gguf.GGMLQuantizationType[FINER if kept_finer else kind]
    block, _ = gguf.GGML_QUANT_SIZES[wanted]
    shape = [int(size) for size in reversed(tensor.shape)]
    if len(shape) < 2 or shape[-1] % block:
        return np.asarray(tensor.data), tensor.tensor_type
    values = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32).reshape(shape)
    return quantize(values, wanted), wanted


def _writable() -> list[str]:
    """The quantisations that gguf can make."""
    import gguf
    from gguf.quants import quantize

    found = []
    for kind in gguf.GGMLQuantizationType:
        try:
            quantize(np.zeros((1, 256), np.float32), kind)
        except (NotImplementedError, KeyError):
            continue
        found.append(kind.name)
    return found
