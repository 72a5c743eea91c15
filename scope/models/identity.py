"""What a model is: the identity that stores remember, and the description that people read."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from activations.source import ModelIdentity
from scope.models.conversion import MANIFEST
from scope.models.hashing import remembered, tokenizer_digest, weight_digest
from scope.models.parameters import count_parameters

if TYPE_CHECKING:
    from scope.models.language_model import LanguageModel

__all__ = ["describe", "identify", "tokenizer_hash"]


def identify(model: "LanguageModel") -> ModelIdentity:
    """Name, revision and digests of a model."""
    return ModelIdentity(
        model=model.name,
        revision=model.files.revision,
        weight_hash=_weight_hash(model),
        tokenizer_hash=tokenizer_hash(model.files.folder, model.tokenizer),
        bos_token_id=model.bos_token_id,
        compute_dtype=str(model.dtype).removeprefix("torch.") + (", compiled" if model.compiled_layers else ""),
        load_name=model.files.load_name,
    )


def _weight_hash(model: "LanguageModel") -> str:
    manifest = model.files.folder / MANIFEST
    if manifest.is_file():
        return json.loads(manifest.read_text())["weight_hash"]
    files = sorted(model.files.folder.glob("*.safetensors"))
    return remembered("weights", files, lambda: weight_digest(files))


def tokenizer_hash(folder: Path, tokenizer: Any) -> str:
    """Digest of the tokenizer that a model's folder has."""
    patterns = ("tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json")
    files = sorted({path for pattern in patterns for path in folder.glob(pattern)})

    def compute() -> str:
        return tokenizer_digest(tokenizer.backend_tokenizer.to_str(), {"bos": tokenizer.bos_token_id})

    return remembered("tokenizer", files, compute)


def describe(model: "LanguageModel") -> dict[str, Any]:
    """A JSON-able description."""
    layout, identity = model.layout, model.identity
    paths = [point.path for point in model.hook_table]
    return {
        "name": model.name,
        "load_name": model.files.load_name,
        "revision": model.files.revision,
        "architecture": type(model.hf).__name__,
        "parameters": sum(parameter.numel() for parameter in model.hf.parameters()),
        "parameter_use": count_parameters(model).to_dict(),
        "n_layers": layout.n_layers,
        "d_model": layout.d_model,
        "d_mlp": layout.d_mlp,
        "d_vocab": layout.d_vocab,
        "n_heads": layout.n_heads,
        "n_key_value_heads": layout.n_key_value_heads,
        "d_head": layout.d_head,
        "max_context_size": layout.max_context_size,
        "bos_token_id": identity.bos_token_id,
        "dtype": identity.compute_dtype,
        "device": str(model.device),
        "weight_hash": identity.weight_hash,
        "tokenizer_hash": identity.tokenizer_hash,
        "hooks": {"fast": paths.count("fast"), "bridge": paths.count("bridge")},
    }
