"""How many parameters a model has, how many a token uses, and where they lie.

Each distinct parameter is counted once: an unembedding that is the embedding itself (tied) is one table.

- *lookup tables* are embeddings that a token reads one row of: the main one, positions, and per-layer embeddings;
- *experts* are the weights of a mixture, of which a token uses `experts_per_token` out of `n_experts` a layer;
- *towers* are parts for other modalities, which text does not use;
- *active per token* is what one token of text takes part in: everything outside of tables, experts and towers, one row
  of each table, its experts, and the whole unembedding, as every logit is computed;
- *effective* is everything but per-layer tables and towers: what has to lie on the accelerator where the tables lie on
  the host (`LanguageModel.load(..., embeddings="host")`), as "E" in the names of Gemma 3n and Gemma 4.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from scope.models.architectures import Layout, experts_of

if TYPE_CHECKING:
    from scope.models.language_model import LanguageModel

__all__ = ["ParameterCount", "Place", "count_parameters"]

PER_LAYER_TABLE = "embed_tokens_per_layer"


@dataclass(frozen=True)
class Place:
    """What lies on one device."""

    parameters: int
    bytes: int
    lookup_tables: int
    """Those of the parameters that are lookup tables."""


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters; see the module for what each is."""

    total: int
    active_per_token: int
    effective: int
    lookup_tables: dict[str, int]
    """Per embedding module its parameters."""
    tied_unembedding: bool
    """Whether the main embedding is the unembedding too."""
    experts: int
    n_experts: int
    """In a layer; 0 where the model has none."""
    experts_per_token: int
    towers: int
    devices: dict[str, Place]
    """Per device what lies there, such as "cuda:0" and "cpu"."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)

    def _repr_html_(self) -> str:
        from html import escape

        return f"<pre>{escape(parameter_text(self))}</pre>"


def count_parameters(model: "LanguageModel") -> ParameterCount:
    """Count the parameters of a model; looks at shapes alone."""
    hf, layout = model.hf, model.layout
    named = _named(hf, layout)
    modules = dict(hf.named_modules())
    head = layout.head + ".weight"
    tables = {f"{path}.weight": path for path in _tables(modules, layout)}
    tied = not any(name == head for name in named)
    total = active = effective = experts = towers = 0
    found: dict[str, int] = {}
    devices: dict[str, list[int]] = {}
    n_experts, chosen = experts_of(model.config.get_text_config())
    for name, parameter in named.items():
        size = parameter.numel()
        total += size
        per_layer = False
        if name in tables:
            found[tables[name]] = size
            per_layer = tables[name].endswith(PER_LAYER_TABLE)
            whole = tied and name == f"{layout.module(layout.family.embed)}.weight"
            active += size if whole else parameter.shape[-1]
        elif name != head and not name.startswith(f"{layout.backbone}."):
            towers += size
            size = 0
        elif _is_expert(name, parameter):
            experts += size
            active += size * chosen // max(1, n_experts)
        else:
            active += size
        effective += 0 if per_layer else size
        _add(devices, parameter, name in tables)
    return ParameterCount(
        total,
        active,
        effective,
        found,
        tied,
        experts,
        n_experts if experts else 0,
        chosen if experts else 0,
        towers,
        {device: Place(*numbers) for device, numbers in sorted(devices.items())},
    )


def _named(hf: nn.Module, layout: Layout) -> dict[str, nn.Parameter]:
    """Each parameter once; one that two stacks share under its name in the backbone."""
    names: dict[int, str] = {}
    every = dict(hf.named_parameters(remove_duplicate=False))
    for name, parameter in every.items():
        known = names.setdefault(id(parameter), name)
        if name.startswith(f"{layout.backbone}.") and not known.startswith(f"{layout.backbone}."):
            names[id(parameter)] = name
    return {name: every[name] for name in names.values()}


def _add(devices: dict[str, list[int]], parameter: Tensor, is_table: bool) -> None:
    there = devices.setdefault(str(parameter.device), [0, 0, 0])
    there[0] += parameter.numel()
    there[1] += parameter.numel() * parameter.element_size()
    there[2] += parameter.numel() if is_table else 0


def _tables(modules: dict[str, nn.Module], layout: Layout) -> Iterator[str]:
    for path, module in modules.items():
        if isinstance(module, nn.Embedding) and path.startswith(f"{layout.backbone}."):
            yield path


def _is_expert(name: str, parameter: torch.Tensor) -> bool:
    return ".experts." in name and parameter.ndim == 3


def parameter_text(count: ParameterCount) -> str:
    """A few lines for people."""
    lines = [f"{count.total:,} parameters, {count.active_per_token:,} active per token"]
    for path, size in count.lookup_tables.items():
        tied = count.tied_unembedding and not path.endswith(PER_LAYER_TABLE)
        lines.append(f"  table {path}: {size:,}{' (also the unembedding)' if tied else ''}")
    if count.experts:
        lines.append(f"  experts: {count.experts:,}, {count.experts_per_token} of {count.n_experts} for each token")
    if count.towers:
        lines.append(f"  other modalities: {count.towers:,}")
    lines += [f"  on {device}: {place.parameters:,}, {place.bytes:,} bytes" for device, place in count.devices.items()]
    return "\n".join(lines)
