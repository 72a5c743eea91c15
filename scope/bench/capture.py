"""`scope bench capture`: our capture against the model's own speed and against its peers, in one run.

1. *Floor*: the plain Hugging Face forward (sdpa) over full windows, stopped after the last layer needed, nothing
   kept; the fastest of several batch shapes.
2. *Ours*: `capture` of real text into a store on disk, everything counted: tokenising, the forward pass, checksums,
   writing, fsync. Loading the model is not.
3. *Peers*: TransformerBridge's `run_with_cache` with `stop_at_layer`, nothing written, and SAELens's
   `CacheActivationsRunner` to disk, on as many tokens.
4. *Four hooks* in one pass, against the smaller of the floor and what the disk's raw write bandwidth allows.
5. *Reading back* (`scope.bench.reading`).
"""

import math
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from activations.capture import capture
from activations.text import TextSource
from scope.bench import peers
from scope.bench.machine import describe_machine, raw_write_bandwidth
from scope.bench.random_model import random_llama
from scope.bench.reading import reading_figures
from scope.bench.settings import CaptureBench
from scope.models import LanguageModel
from scope.models.loading import pick_device
from scope.sample import sample_text

__all__ = ["bench_capture"]

CPU_SHAPES = (512, 1024, 2048, 4096)
CUDA_SHAPES = (8192, 32_768, 65_536)
CPU_TOKENS, CUDA_TOKENS = 8192, 4_000_000
WARM_UP_BATCHES = 4
"""Kernels, memory and compiled layers are there before anything is timed, as they are for the floor."""
FLOOR_SECONDS = 2.0
"""Each shape is timed for at least so long."""


def bench_capture(config: CaptureBench, say: Callable[[str], None]) -> dict[str, Any]:
    """Run the benchmark.

    Args:
        config: what to run.
        say: is told what is measured next.

    Returns:
        Figures, JSON-able: tokens per second of each, and `ratio_to_floor`, `ratio_to_saelens`, `ratio_to_bridge`
        (None where a peer is not run), `four_hooks_ratio_to_bound`, `read_ratio_to_disk`, `shuffled_ratio_to_read`.
    """
    device = pick_device(config.device)
    with tempfile.TemporaryDirectory(dir=config.folder, prefix="scope-bench-") as name:
        folder = Path(name)
        return _Bench(config, _model(config, folder, device, say), folder, say).run()


def _model(config: CaptureBench, folder: Path, device: torch.device, say: Callable[[str], None]) -> LanguageModel:
    if config.model is None and device.type != "cpu":
        say("Making a llama of 1.7B random parameters")
        # SAELens reads it from its files.
        return random_llama(folder / "llama", device, torch.bfloat16, save_weights=True, compile=config.compile)
    source = config.model or "gemma-3-270m"
    say(f"Loading {source}")
    return LanguageModel.load(source, device=str(device), compile=config.compile)


class _Bench:
    """One run: the model, the text, and where stores go."""

    def __init__(self, config: CaptureBench, model: LanguageModel, folder: Path, say: Callable[[str], None]) -> None:
        cuda = model.device.type == "cuda"
        self.config, self.model, self.folder, self.say = config, model, folder, say
        self.tokens = config.tokens or (CUDA_TOKENS if cuda else CPU_TOKENS)
        self.context_size = config.context_size or (1024 if cuda else 256)
        self.shapes = CUDA_SHAPES if cuda else CPU_SHAPES
        self.hook = model.hook_table[config.hook or f"blocks.{_middle(model.n_layers)}.hook_resid_post"].name
        self.layer = int(self.hook.split(".")[1])
        self.text = TextSource(sample_text(), shuffle_seed=0)
        _ = model.identity  # hashing the weights is no part of a capture

    def run(self) -> dict[str, Any]:
        rates: dict[str, list[float]] = {name: [] for name in ("floor", "ours", "four_hooks", "bridge", "saelens")}
        shape = self._best_shape()
        for hooks in ([self.hook], self.four_hooks):
            self._capture_rate(hooks, "warm-up", self._warm_up_batches * self.batch_size)
        disk = 0.0
        for number in range(self.config.rounds):
            self.say(f"Round {number + 1} of {self.config.rounds}")
            rates["floor"].append(self._floor_rate(shape, self.few_tokens))
            rates["ours"].append(self._capture_rate([self.hook], "one", self.tokens))
            disk = max(disk, raw_write_bandwidth(self.folder))
            rates["four_hooks"].append(self._capture_rate(self.four_hooks, "four", self.few_tokens))
            if self.config.with_peers:
                rates["bridge"].append(peers.bridge_rate(self.model, self.hook, shape, self.context_size))
                rates["saelens"].append(
                    peers.saelens_rate(self.model, self.layer, self.few_tokens, self.context_size, self.folder)
                )
            rates["floor"].append(self._floor_rate(shape, self.few_tokens))
        best = {name: max(of_rounds) if of_rounds else None for name, of_rounds in rates.items()}
        return {
            **self._description(shape),
            **_figures(best, disk, self._row_bytes(self.four_hooks)),
            **reading_figures(self.folder, self.text, self.say),
        }

    @property
    def _warm_up_batches(self) -> int:
        """So many that compiled layers have met a window that runs alone, for which they are compiled anew."""
        return WARM_UP_BATCHES * (4 if self.config.compile else 1)

    @property
    def batch_size(self) -> int:
        return self.config.batch_size or self.model.default_batch_size

    @property
    def few_tokens(self) -> int:
        """Tokens for what takes long, or much of the disk."""
        return max(min(self.tokens, CPU_TOKENS), self.tokens // 4)

    @property
    def four_hooks(self) -> list[str]:
        """Residuals after this layer and three before it, as far apart as they can be."""
        layers = [round(self.layer * part / 3) for part in range(4)]
        return [f"blocks.{layer}.hook_resid_post" for layer in layers]

    def _row_bytes(self, hooks: Sequence[str]) -> int:
        return sum(2 * math.prod(self.model.hook_shape(hook)) for hook in hooks)

    def _best_shape(self) -> int:
        """Tokens in the batch that the plain forward runs fastest."""
        rates = {}
        for shape in self.shapes:
            try:
                rates[shape] = self._floor_rate(shape, 0)
            except torch.OutOfMemoryError:
                break
            self.say(f"Floor, {shape:,} tokens at once: {rates[shape]:,.0f} tokens/s")
        return max(rates, key=lambda shape: rates[shape])

    def _floor_rate(self, shape: int, tokens: int) -> float:
        """Tokens per second of the plain forward, over at least `tokens` tokens and `FLOOR_SECONDS`."""
        batch = peers.token_batch(self.model, shape, self.context_size)
        layer = self.model.hf.get_submodule(self.model.layout.layer(self.layer))
        backbone = self.model.hf.get_submodule(self.model.layout.backbone)

        def stop(*_: Any) -> None:
            raise peers.Stop

        compiled = self.model.compiled_layers
        handle = layer.register_forward_hook(stop)
        try:
            with compiled.in_place(()) if compiled is not None else nullcontext():
                run = partial(peers.until_stopped, backbone, batch)
                return peers.rate_of(run, batch.numel(), self.model.device, tokens, FLOOR_SECONDS)
        finally:
            handle.remove()

    def _capture_rate(self, hooks: Sequence[str], name: str, tokens: int) -> float:
        out = self.folder / f"{name}.zarr"
        shutil.rmtree(out, ignore_errors=True)
        started = time.perf_counter()
        report = capture(
            self.model,
            self.text,
            hooks,
            out,
            max_tokens=tokens,
            context_size=self.context_size,
            batch_size=self.batch_size,
        )
        rate = report.rows / (time.perf_counter() - started)
        self.say(f"Ours, {len(hooks)} hook(s): {rate:,.0f} tokens/s")
        return rate

    def _description(self, shape: int) -> dict[str, Any]:
        return {
            **describe_machine(self.model.device),
            "model": self.model.name,
            "compute_dtype": self.model.identity.compute_dtype,
            "hook": self.hook,
            "four_hooks": self.four_hooks,
            "tokens": self.tokens,
            "context_size": self.context_size,
            "floor_batch_tokens": shape,
            "batch_size": self.batch_size,
            "rounds": self.config.rounds,
        }


def _middle(n_layers: int) -> int:
    return n_layers // 2 - (n_layers < 20)


def _figures(best: dict[str, float | None], disk: float, four_row_bytes: int) -> dict[str, Any]:
    floor, ours, four = best["floor"], best["ours"], best["four_hooks"]
    assert floor is not None
    assert ours is not None
    assert four is not None
    bound = min(0.9 * floor, disk / four_row_bytes)

    def ratio(peer: float | None) -> float | None:
        return None if peer is None else ours / peer

    return {
        "tokens_per_second": best,
        "ratio_to_floor": ratio(floor),
        "ratio_to_bridge": ratio(best["bridge"]),
        "ratio_to_saelens": ratio(best["saelens"]),
        "disk_write_bytes_per_second": disk,
        "four_hooks_bound_tokens_per_second": bound,
        "four_hooks_ratio_to_bound": four / bound,
    }
