"""From a GGUF file to safetensors, once: transformers takes half a minute over it, a reload takes seconds.

1. The converted model lies in `<cache>/models/<key>`; the key says which GGUF file, by digest.
2. A conversion works in a temporary folder beside it, under a lock, and is renamed into place when it is whole.
3. `conversion.json` lists the files with their sizes; a folder that does not match is converted again.

Weights stay float32: what Q4_K and its like stand for does not fit bfloat16 without loss.
"""

import json
import logging
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from activations.manifest import write_atomically
from scope.errors import InvalidInputError
from scope.models.hashing import cache_folder, weight_digest

__all__ = ["converted_model"]

CONVERSION_VERSION = 1
WORD_STARTS = ("▁", "Ġ")
"""What stands for the space before a word in the vocabularies of SentencePiece and of byte-level BPE."""
WORDS_TRIED = 64
MANIFEST = "conversion.json"
log = logging.getLogger(__name__)


def converted_model(key: str, find_gguf: Callable[[Path], Path]) -> Path:
    """The folder with the converted model; converts it where the cache has none.

    Args:
        key: identifies the GGUF file, by its content.
        find_gguf: gives the GGUF file; may create it in the temporary folder that it is handed.

    Raises:
        InvalidInputError: the file is no GGUF file, or one that transformers cannot read.
    """
    from filelock import FileLock

    folder = cache_folder() / "models" / f"{key}-v{CONVERSION_VERSION}"
    if _is_whole(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(folder.name + ".lock")):
        if _is_whole(folder):
            return folder
        temporary = Path(tempfile.mkdtemp(prefix=folder.name + ".tmp-", dir=folder.parent))
        try:
            made = temporary / "converted"
            _convert(find_gguf(temporary), made)
            shutil.rmtree(folder, ignore_errors=True)
            made.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _is_whole(folder: Path) -> bool:
    try:
        sizes: dict[str, int] = json.loads((folder / MANIFEST).read_text())["files"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def _require_words(tokenizer: Any, gguf: Path, version: str) -> None:
    """Refuse a tokenizer that cuts the very words of its vocabulary into pieces.

    transformers 5.17 reads Gemma's without its merges and gives a token for each character, without a word.
    """
    words = [
        token for token in tokenizer.get_vocab() if token[:1] in WORD_STARTS and re.fullmatch("[a-z]{4,12}", token[1:])
    ]
    tried = sorted(words, key=lambda token: (len(token), token))[:WORDS_TRIED]
    whole = sum(token in tokenizer.tokenize(f"a {token[1:]}") for token in tried)
    if whole < len(tried) / 2:
        raise InvalidInputError(
            f"transformers {version} misreads the tokenizer of {gguf.name}: of {len(tried)} words of its vocabulary it "
            f"gives {whole} as one token. Install another version (5.22 and 5.23 read it well)."
        )


def _convert(gguf: Path, out: Path) -> None:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from scope.models.loading import quiet_transformers

    with open(gguf, "rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise InvalidInputError(f"{gguf} is not a GGUF file: it starts with {magic!r}, expected b'GGUF'.")
    log.info("Converting %s to safetensors, once; this takes a minute.", gguf.name)
    where: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **where)
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32, **where
            )
    except Exception as error:  # whatever a broken file makes the readers stumble over
        raise InvalidInputError(f"{gguf} cannot be read as a GGUF model: {error}") from error
    _require_words(tokenizer, gguf, transformers.__version__)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with quiet_transformers():
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    content = {
        "version": CONVERSION_VERSION,
        "source": gguf.name,
        "weight_hash": weight_digest(sorted(out.glob("*.safetensors"))),
        "transformers": transformers.__version__,
        "files": {path.name: path.stat().st_size for path in sorted(out.iterdir())},
    }
    write_atomically(out / MANIFEST, json.dumps(content, indent=2).encode())
