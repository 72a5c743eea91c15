"""`scope bench embeddings`: what lookup tables on the host save in memory and cost in time.

1. *Model*: a Gemma 4 with per-layer embeddings and random weights; its per-layer table alone is a gigabyte or more.
   Cost depends on shapes alone.
2. The model is drawn on the device and runs there, all of it; then its per-layer table goes to the host, and it runs
   again. Each runs the same tokens, `rounds` times; the best round counts. Outputs are compared bit by bit.
3. *Memory* is what the device holds with each, as its allocator says. On a CPU the device is the host: nothing is saved
   there, and the figure of interest is what the detour costs (copies within one memory) and what a look-up takes.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from scope.bench.machine import describe_machine
from scope.bench.random_model import random_weights
from scope.bench.settings import EmbeddingsBench
from scope.models.loading import pick_device, pick_dtype
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
    say("Making the model")

    def allocated() -> int:
        return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0

    held = -allocated()
    model = random_weights(lambda: _gemma(config), device, dtype)
    held += allocated()
    held_with: dict[EmbeddingPlace, int | None] = {}
    runs: dict[EmbeddingPlace, dict[str, Any]] = {}
    outputs: dict[EmbeddingPlace, Tensor] = {}
    where: tuple[EmbeddingPlace, ...] = ("device", "host")
    for embeddings in where:
        say(f"Tables on the {'host' if embeddings == 'host' else device}")
        held -= allocated()
        place(model, device, embeddings)
        held += allocated()
        held_with[embeddings] = held if device.type == "cuda" else None
        runs[embeddings], outputs[embeddings] = _measured(config, model, device, tokens)
    on_device, on_host = runs["device"], runs["host"]
    both = held_with["device"], held_with["host"]
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
        "device_bytes": {"tables on the device": both[0], "tables on the host": both[1]},
        "saved_bytes": None if both[0] is None or both[1] is None else both[0] - both[1],
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
    config: EmbeddingsBench, model: Any, device: torch.device, tokens: Tensor
) -> tuple[dict[str, Any], Tensor]:
    """Figures of one placement, and the last hidden states, on the host."""
    table = model.get_submodule(TABLE)

    def timed(run: Callable[[], Any]) -> float:
        best = float("inf")
        for _ in range(config.rounds):
            started = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = min(best, time.perf_counter() - started)
        return best

    out = model.model(input_ids=tokens, use_cache=False).last_hidden_state.cpu()  # also warms up
    figures = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "table_bytes": table.weight.numel() * table.weight.element_size(),
        "seconds": timed(lambda: model.model(input_ids=tokens, use_cache=False)),
        "lookup_seconds": timed(lambda: table(tokens)),
    }
    return figures, out


def _gemma(config: EmbeddingsBench) -> Any:
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
    return Gemma4ForCausalLM(shape)
