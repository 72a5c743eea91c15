"""How fast peers capture: TransformerBridge and SAELens, as their documentation says to run them.

The only importer of sae_lens for benchmarks; nothing of theirs is imported before it is run.
"""

import contextlib
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from scope.models import LanguageModel

__all__ = ["Stop", "bridge_rate", "rate_of", "saelens_rate", "token_batch", "until_stopped"]

PEER_SECONDS = 2.0
SAELENS_BUFFER_GB = {"cpu": 0.02, "cuda": 1.0}
WARM_UP = 2


class Stop(Exception):  # noqa: N818  # leaves a forward pass, never an error
    """The last layer that is needed has run."""


def token_batch(model: "LanguageModel", n_tokens: int, context_size: int) -> Tensor:
    """Random token ids `(n_windows, context_size)` of about `n_tokens` tokens in full windows."""
    generator = torch.Generator().manual_seed(0)
    size = (max(1, n_tokens // context_size), min(context_size, n_tokens))
    return torch.randint(3, min(model.d_vocab, 49_000), size, generator=generator).to(model.device)


def until_stopped(module: nn.Module, tokens: Tensor) -> None:
    """A forward pass that a hook ends by raising `Stop`."""
    with torch.inference_mode(), contextlib.suppress(Stop):
        module(input_ids=tokens, use_cache=False)


def rate_of(run: Callable[[], object], n_tokens: int, device: torch.device, tokens: int, seconds: float) -> float:
    """Tokens per second of `run`, which takes `n_tokens` tokens each time: over at least `tokens` tokens and
    `seconds`, after a warm-up."""
    for _ in range(WARM_UP):
        run()
    _synchronise(device)
    started = time.perf_counter()
    done = 0
    while done < tokens or time.perf_counter() - started < seconds:
        run()
        done += n_tokens
        if tokens == 0:  # else the queue of a GPU fills with more than was asked for
            _synchronise(device)
    _synchronise(device)
    return done / (time.perf_counter() - started)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bridge_rate(model: "LanguageModel", hook: str, n_tokens: int, context_size: int) -> float:
    """Tokens per second of `run_with_cache(names_filter=hook, stop_at_layer=...)`; nothing leaves the device."""
    layer = int(hook.split(".")[1])
    tokens = token_batch(model, n_tokens, context_size)

    def run() -> Any:
        with torch.inference_mode():
            return model.bridge.run_with_cache(
                tokens, names_filter=[f"blocks.{layer}.hook_out"], stop_at_layer=layer + 1
            )

    return rate_of(run, tokens.numel(), model.device, 0, PEER_SECONDS)


def saelens_rate(model: "LanguageModel", layer: int, n_tokens: int, context_size: int, folder: Path) -> float:
    """Tokens per second of SAELens's `CacheActivationsRunner` on a data set of token ids, to disk, without shuffling.

    The model comes from the same files in the same dtype, through `AutoModelForCausalLM`; loading it is not timed.
    Activations are stored in float16 on a GPU, in float32 on a CPU, the dtypes that it takes.
    """
    from datasets import Dataset
    from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig

    batch = 32 if model.device.type == "cuda" else 8
    n_windows = max(batch, n_tokens // context_size // batch * batch)
    ids = np.random.default_rng(0).integers(3, min(model.d_vocab, 49_000), (n_windows + batch, context_size))
    out = folder / "saelens"
    shutil.rmtree(out, ignore_errors=True)
    config = CacheActivationsRunnerConfig(
        dataset_path="tokens",
        model_name=str(model.files.folder),
        model_batch_size=batch,
        hook_name=model.layout.layer(layer),
        d_in=model.d_model,
        training_tokens=n_windows * context_size,
        context_size=context_size,
        model_class_name="AutoModelForCausalLM",
        new_cached_activations_path=str(out),
        shuffle=False,
        dtype="float16" if model.device.type == "cuda" else "float32",
        device=model.device.type,
        buffer_size_gb=SAELENS_BUFFER_GB[model.device.type],
        prepend_bos=False,
        streaming=False,
        model_from_pretrained_kwargs={"torch_dtype": model.dtype},
    )
    runner = CacheActivationsRunner(config, override_dataset=Dataset.from_dict({"input_ids": ids.tolist()}))
    started = time.perf_counter()
    runner.run()
    seconds = time.perf_counter() - started
    shutil.rmtree(out, ignore_errors=True)
    return n_windows * context_size / seconds
