"""`scope bench attribute`: time and peak memory of a circuit graph against the length of the prompt.

1. *Model*: on a CPU Gemma 3 270M, on a GPU a llama of the size of Gemma 2 2B (26 layers, d_model 2,304) with random
   weights in bfloat16: a graph's cost depends on shapes alone. Weights are drawn on the device.
2. *Dictionaries*: a TopK transcoder for every layer, random weights, so that exactly k features fire on each token.
3. For each length the whole of it: reading the prompt, expanding, influence, pruning. Peak memory is the card's, or the
   process's on a CPU.

circuit-tracer is not run beside it: its releases (0.5) pin transformers below 5, so that the two cannot be installed
together. The edges are held equal to Jacobians by autograd through the model itself in tests.
"""

import gc
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from scope.attribution.dictionaries import mlp_dictionaries
from scope.attribution.graph import build_graph
from scope.attribution.graph_needs import graph_needs
from scope.attribution.graph_settings import GraphSettings
from scope.attribution.pruning import prune
from scope.bench.machine import describe_machine
from scope.bench.random_model import random_llama
from scope.bench.settings import AttributeBench
from scope.models import LanguageModel
from scope.models.loading import pick_device
from scope.saes import registry
from scope.saes.base import SAE, SAEMetadata

__all__ = ["bench_attribute"]

GIGABYTE = 1e9
LLAMA: dict[str, Any] = {"n_layers": 26, "d_model": 2304, "n_heads": 8, "n_key_value_heads": 4, "head_dim": 256}


def bench_attribute(config: AttributeBench, say: Callable[[str], None]) -> dict[str, Any]:
    """Run the benchmark.

    Args:
        config: what to run.
        say: is told what is measured next.

    Returns:
        Figures, JSON-able: `graphs`, one for each length: tokens, active_features, features, edges, seconds,
        peak_gigabytes (of all), peak_beside_model_gigabytes (on a GPU: without model and dictionaries, to be held
        against estimated_gigabytes, which leaves them out too), kept_nodes; and of the `model` the gigabytes of its
        weights and of the dictionaries'.
    """
    device = pick_device(config.device)
    lengths = config.lengths or ((64,) if device.type == "cpu" else (1024, 6000))
    settings = GraphSettings(
        max_features=config.max_features or (1024 if device.type == "cpu" else 7500),
        batch_size=config.batch_size,
        logit_share=1.0,
    )
    say("Making the model and its dictionaries")
    with tempfile.TemporaryDirectory(prefix="scope-bench-") as folder:
        model = _model(device, Path(folder))
        transcoders = [_transcoder(model, layer, config) for layer in range(model.n_layers)]
        generator = torch.Generator().manual_seed(0)
        graphs = []
        for length in lengths:
            say(f"A graph of {length:,} tokens")
            tokens = torch.randint(3, model.d_vocab, (length,), generator=generator).to(device)
            tokens[0] = model.bos_token_id if model.bos_token_id is not None else 0
            graphs.append(_measured(model, tokens, transcoders, settings))
        return {"machine": describe_machine(device), "model": _shape(model, transcoders, config), "graphs": graphs}


def _measured(model: Any, tokens: Any, transcoders: list[SAE], settings: GraphSettings) -> dict[str, Any]:
    cuda = model.device.type == "cuda"
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    loaded = torch.cuda.memory_allocated() if cuda else None
    started = time.perf_counter()
    graph = build_graph(model, tokens, transcoders, settings)
    built = time.perf_counter() - started
    pruned = prune(graph)
    if cuda:
        torch.cuda.synchronize()
    dictionaries, l0 = mlp_dictionaries(model, transcoders), graph.n_active / len(tokens)
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "tokens": len(tokens),
        "active_features": graph.n_active,
        "features": int((graph.nodes["kind"] == "feature").sum()),
        "edges": len(graph.weight),
        "kept_nodes": len(pruned.nodes),
        "build_seconds": built,
        "seconds": time.perf_counter() - started,
        "peak_gigabytes": peak / GIGABYTE,
        "peak_beside_model_gigabytes": None if loaded is None else (peak - loaded) / GIGABYTE,
        "estimated_gigabytes": graph_needs(model, len(tokens), dictionaries, l0).total(settings) / GIGABYTE,
    }


def _model(device: torch.device, folder: Path) -> Any:
    if device.type == "cpu":
        return LanguageModel.load("gemma-3-270m", device="cpu", dtype="float32")
    return random_llama(folder, device, torch.bfloat16, **LLAMA)


def _transcoder(model: Any, layer: int, config: AttributeBench) -> SAE:
    metadata = SAEMetadata(hook_name=f"blocks.{layer}.ln2.hook_out", hook_name_out=f"blocks.{layer}.hook_mlp_out")
    cfg = registry.config_of("transcoder").for_training(
        d_in=model.d_model,
        d_out=model.d_model,
        d_sae=config.d_sae,
        k=config.k,
        activation="topk",
        metadata=metadata,
    )
    generator = torch.Generator(model.device).manual_seed(layer)
    return registry.get("transcoder")(cfg, generator=generator, device=model.device).to(dtype=model.dtype)


def _shape(model: Any, transcoders: list[SAE], config: AttributeBench) -> dict[str, Any]:
    held = sum(
        weight.numel() * weight.element_size() for part in (model.hf, *transcoders) for weight in part.parameters()
    )
    return {
        "name": model.name,
        "n_layers": model.n_layers,
        "d_model": model.d_model,
        "dtype": str(model.dtype).removeprefix("torch."),
        "d_sae": config.d_sae,
        "k": config.k,
        "gigabytes": held / GIGABYTE,
    }
