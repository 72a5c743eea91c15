"""`scope bench embeddings`: what lookup tables on the host save in memory and cost in time.

1. *Model*: a Gemma 4 with per-layer embeddings and random weights; its per-layer table alone is a gigabyte or more.
   Cost depends on shapes alone.
2. The model is made twice from one seed: all of it on the device, and with the per-layer table on the host. Each runs
   the same tokens, `rounds` times; the best round counts. Outputs are compared bit by bit.
3. *Memory* is what the device holds with each, as its allocator says. On a CPU the device is the host: nothing is saved
   there, and the figure of interest is what the detour costs (copies within one memory) and what a look-up takes.
"""

import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from scope.bench.machine import describe_machine
from scope.bench.settings import EmbeddingsBench
from scope.models.loading import pick_device, pick_dtype, quiet_transformers
from scope.models.placement import EmbeddingPlace, place

__all__ = ["bench_embeddings"]

D_PER_LAYER = 256
TABLE = "model.embed_tokens_per_layer"


def bench_embeddings(config: EmbeddingsBench, say: Callable[[str], None]) -> dict[str, Any]:
    """Run the benchmark.

    Args:
        config: what to run.
        say: is told what is measured next.

    Returns:
        Figures, JSON-able.
    """
    device = pick_device(config.device)
    dtype = pick_dtype("auto", device)
    shape = (config.batch, config.tokens)
    tokens = torch.randint(0, config.d_vocab, shape, generator=torch.Generator().manual_seed(1)).to(device)
    runs: dict[EmbeddingPlace, dict[str, Any]] = {}
    outputs: dict[EmbeddingPlace, Tensor] = {}
    where: tuple[EmbeddingPlace, ...] = ("device", "host")
    for embeddings in where:
        say(f"Tables on the {'host' if embeddings == 'host' else device}")
        runs[embeddings], outputs[embeddings] = _measured(config, device, dtype, embeddings, tokens)
        gc.collect()
    on_device, on_host = runs["device"], runs["host"]
    held = on_device["device_bytes"], on_host["device_bytes"]
    n_tokens = tokens.numel()
    return {
        "machine": describe_machine(device),
        "model": {
            "parameters": on_device["parameters"],
            "table_bytes": on_device["table_bytes"],
            "n_layers": config.n_layers,
            "d_model": config.d_model,
            "dtype": str(dtype).removeprefix("torch."),
        },
        "tokens": n_tokens,
        "equal_outputs": torch.equal(outputs["device"], outputs["host"]),
        "device_bytes": {"tables on the device": held[0], "tables on the host": held[1]},
        "saved_bytes": None if held[0] is None or held[1] is None else held[0] - held[1],
        "tokens_per_second": {
            "tables on the device": n_tokens / on_device["seconds"],
            "tables on the host": n_tokens / on_host["seconds"],
        },
        "slowdown": on_host["seconds"] / on_device["seconds"],
        "lookup_share_of_time": {
            "tables on the device": on_device["lookup_seconds"] / on_device["seconds"],
            "tables on the host": on_host["lookup_seconds"] / on_host["seconds"],
        },
    }


@torch.inference_mode()
def _measured(
    config: EmbeddingsBench, device: torch.device, dtype: torch.dtype, embeddings: EmbeddingPlace, tokens: Tensor
) -> tuple[dict[str, Any], Tensor]:
    """Figures of one placement, and the last hidden states, on the host."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device) if cuda else 0
    model = place(_random_model(config, dtype), device, embeddings).eval()
    held = torch.cuda.memory_allocated(device) - before if cuda else None
    table = model.get_submodule(TABLE)

    def timed(run: Callable[[], Any]) -> float:
        best = float("inf")
        for _ in range(config.rounds):
            started = time.perf_counter()
            run()
            if cuda:
                torch.cuda.synchronize(device)
            best = min(best, time.perf_counter() - started)
        return best

    out = model.model(input_ids=tokens, use_cache=False).last_hidden_state.cpu()  # also warms up
    figures = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "table_bytes": table.weight.numel() * table.weight.element_size(),
        "device_bytes": held,
        "seconds": timed(lambda: model.model(input_ids=tokens, use_cache=False)),
        "lookup_seconds": timed(lambda: table(tokens)),
    }
    return figures, out


def _random_model(config: EmbeddingsBench, dtype: torch.dtype) -> Any:
    """On the host, the same weights each time."""
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    n_heads = max(1, config.d_model // D_PER_LAYER)
    shape = Gemma4TextConfig(
        vocab_size=config.d_vocab,
        hidden_size=config.d_model,
        intermediate_size=4 * config.d_model,
        num_hidden_layers=config.n_layers,
        num_attention_heads=n_heads,
        num_key_value_heads=1,
        head_dim=D_PER_LAYER,
        global_head_dim=D_PER_LAYER,
        vocab_size_per_layer_input=config.d_vocab,
        hidden_size_per_layer_input=D_PER_LAYER,
        layer_types=["sliding_attention"] * (config.n_layers - 1) + ["full_attention"],
    )
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            model = Gemma4ForCausalLM(shape)
        finally:
            torch.set_default_dtype(before)
    return model.requires_grad_(False)
