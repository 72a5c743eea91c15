"""What a graph or an attribution will take of memory, before it is begun, and what would make it fit.

Estimates count the large tensors, each by its shape, beside the model and the dictionaries that are loaded already
(of graphs in `scope.attribution.graph_needs`); what is small or short-lived comes on top as `ROOM`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from scope.attribution.graph_needs import ROOM, GraphNeeds
from scope.attribution.graph_settings import GraphSettings
from scope.errors import InvalidInputError

__all__ = [
    "AttributionNeeds",
    "attribution_needs",
    "free_memory",
    "require_attribution_fits",
    "require_graph_fits",
]

GIGABYTE = 10**9
SMALLEST = {"batch_size": 1, "edges_per_target": 128, "max_features": 64}
"""How far settings are lowered in search of some that fit."""


@dataclass(frozen=True)
class AttributionNeeds:
    """What the memory of an attribution depends on."""

    n_tokens: int
    n_layers: int
    """Layers behind the first dictionary, through which gradients go."""
    d_model: int
    d_mlp: int
    d_vocab: int
    features: int
    """Features of all dictionaries together."""
    decoders: int
    """Bytes of decoders that are made anew in float32."""
    itemsize: int

    def parts(self, runs: int, grad: bool, prompts: int = 1) -> dict[str, int]:
        """Bytes, by what they are for.

        Args:
            runs: runs at once.
            grad: whether gradients are taken, for which every layer's activations are kept.
            prompts: prompts whose nodes are held at once.
        """
        layer = self.n_tokens * (9 * self.d_model + 9 * self.d_mlp // 2) * self.itemsize
        kept = runs * layer * (self.n_layers if grad else 1)
        logits = 3 * runs * self.d_vocab * 4
        nodes = prompts * 6 * 4 * self.n_tokens * self.features
        return {f"{runs} runs at once": kept + logits, "nodes": nodes, "decoders": self.decoders}


def attribution_needs(model: Any, n_tokens: int, saes: Any, whole: bool) -> AttributionNeeds:
    """What an attribution to some SAEs needs on a prompt of so many tokens.

    Args:
        model: the model.
        n_tokens: tokens of the prompt, BOS included.
        saes: the dictionaries.
        whole: whether gradients go back to the embeddings.
    """
    layout = model.layout
    parts = [str(sae.hook_name).split(".") for sae in saes]
    layers = [int(part[1]) for part in parts if part[0] == "blocks" and len(part) > 1 and part[1].isdigit()]
    first = 0 if whole or len(layers) < len(parts) else min(layers, default=0)
    copied = sum(4 * sae.d_sae * sae.d_out for sae in saes if sae.dtype != torch.float32)
    return AttributionNeeds(
        n_tokens,
        max(1, layout.n_layers - first),
        layout.d_model,
        layout.d_mlp,
        layout.d_vocab,
        sum(sae.d_sae for sae in saes),
        copied,
        model.dtype.itemsize,
    )


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a device: of a CPU the machine's, or what its control group leaves; None where unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    if device.type != "cpu":
        return None
    found = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    except OSError:
        return None
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            found.append(int(limit) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return max(0, min(found)) if found else None


def require_graph_fits(needs: GraphNeeds, settings: GraphSettings, device: torch.device) -> None:
    """Raise `InvalidInputError` where a graph takes more memory than there is, with what would make it fit."""
    budget, whose = _budget(settings.memory_gb, device)
    if budget is None or needs.total(settings) <= budget:
        return
    told = _told(f"A graph of {needs.n_tokens:,} tokens", needs.total(settings), needs.parts(settings), budget, whose)
    smaller = _fitting(needs, settings, budget)
    if smaller is None:
        least = replace(settings, **{name: min(value, getattr(settings, name)) for name, value in SMALLEST.items()})
        longest = _most(lambda n: replace(needs, n_tokens=n).total(least) <= budget, needs.n_tokens)
        advice = "No settings make it fit, however short the prompt."
        if longest:
            advice = (
                f"No settings make it fit; a prompt of at most {longest:,} tokens would, with the smallest of them."
            )
    else:
        flags = " ".join(
            f"--{name.replace('_', '-')} {getattr(smaller, name)}"
            for name in SMALLEST
            if getattr(smaller, name) != getattr(settings, name)
        )
        advice = f"It fits with {flags} (the fields of GraphSettings)."
    raise InvalidInputError(f"{told} {advice}")


def require_attribution_fits(
    needs: AttributionNeeds, runs: int, grad: bool, memory_gb: float | None, device: torch.device, prompts: int = 1
) -> None:
    """Raise `InvalidInputError` where an attribution takes more memory than there is, with what would make it fit."""
    budget, whose = _budget(memory_gb, device)

    def total(runs: int) -> int:
        return int(ROOM * sum(needs.parts(runs, grad, min(runs, prompts)).values()))

    if budget is None or total(runs) <= budget:
        return
    told = _told(
        f"An attribution on {needs.n_tokens:,} tokens", total(runs), needs.parts(runs, grad, prompts), budget, whose
    )
    most = _most(lambda n: total(n) <= budget, runs)
    if most:
        raise InvalidInputError(f"{told} It fits with --batch-size {most} (batch_size={most}).")
    raise InvalidInputError(
        f"{told} It does not fit with --batch-size 1 either: give a shorter prompt, fewer SAEs, or the method "
        f"activation_patching{'' if grad else ' on a device with more memory'}."
    )


def _budget(memory_gb: float | None, device: torch.device) -> tuple[int | None, str]:
    if memory_gb is not None:
        return int(memory_gb * GIGABYTE), "the budget (--memory-gb)"
    return free_memory(device), f"what is free on {device}"


def _told(what: str, total: int, parts: Mapping[str, int], budget: int, whose: str) -> str:
    largest = sorted(parts.items(), key=lambda part: -part[1])[:3]
    words = ", ".join(f"{name} {_gigabytes(size)}" for name, size in largest)
    return (
        f"{what} takes about {_gigabytes(total)} beside the model ({words}), more than {whose}, {_gigabytes(budget)}."
    )


def _gigabytes(size: float) -> str:
    return f"{size / GIGABYTE:,.1f} GB" if size >= GIGABYTE / 10 else f"{size / 10**6:,.1f} MB"


def _fitting(needs: GraphNeeds, settings: GraphSettings, budget: int) -> GraphSettings | None:
    """The settings nearest to the given ones that fit: fewer targets at once first, which costs nothing but time."""
    ladders = {name: _halved(getattr(settings, name), least) for name, least in SMALLEST.items()}
    for features in ladders["max_features"]:
        for edges in ladders["edges_per_target"]:
            for batch in ladders["batch_size"]:
                found = replace(settings, max_features=features, edges_per_target=edges, batch_size=batch)
                if needs.total(found) <= budget:
                    return found
    return None


def _halved(value: int, least: int) -> list[int]:
    found = [value]
    while found[-1] // 2 >= least:
        found.append(found[-1] // 2)
    return found


def _most(fits: Callable[[int], bool], below: int) -> int:
    """The largest number under `below` that fits; 0 where none does."""
    low, high = 0, below
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
