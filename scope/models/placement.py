"""Where a model's weights lie: all on its device, or the lookup tables on the host.

A token reads one row of a lookup table. A table that lies in the host's memory costs a copy of a few ids to the host
and of the rows back, and none of the accelerator's memory. Per-layer embeddings are made for that: of Gemma 3n's and
Gemma 4's parameters more than half lie in such tables. The main embedding stays with the rest where it is the
unembedding too, as logits need all of it.

1. Tables are set aside, the rest moves to its device, the tables are put back: no table is ever on the device.
2. A hook before a table's module brings ids to the host, one behind it brings rows to the device. They run inside of
   every hook that people ask for: those see rows on the device.

Rows are copied, never computed with in another precision: outputs are equal to the last bit.
"""

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from scope.errors import InvalidInputError, UnknownNameError
from scope.models.architectures import Layout, find_layout

__all__ = ["EmbeddingPlace", "host_tables", "place"]

EmbeddingPlace = Literal["device", "host"]
HOST = torch.device("cpu")


def host_tables(model: nn.Module, layout: Layout) -> list[str]:
    """Paths of the lookup tables that can lie on the host: the main embedding unless it is the unembedding, and that of
    per-layer embeddings."""
    head: Any = model.get_submodule(layout.head)
    paths = [layout.module(layout.family.embed)]
    if layout.d_per_layer:
        paths.append(layout.module("embed_tokens_per_layer"))
    tables: list[tuple[str, Any]] = [(path, model.get_submodule(path)) for path in paths]
    return [path for path, table in tables if table.weight is not head.weight]


def place(model: Any, device: torch.device, embeddings: EmbeddingPlace) -> Any:
    """Move a model to its device.

    Args:
        model: the Hugging Face model, all of it on the host or on the device.
        device: where it runs.
        embeddings: "host" leaves its lookup tables in the host's memory.

    Returns:
        The model.

    Raises:
        UnknownNameError: `embeddings` is neither "device" nor "host".
        InvalidInputError: none of the model's tables can lie on the host.
    """
    if embeddings not in ("device", "host"):
        raise UnknownNameError("place for embeddings", embeddings, ["device", "host"])
    if embeddings == "device":
        return model.to(device)
    paths = host_tables(model, find_layout(model))
    if not paths:
        raise InvalidInputError(
            f"{type(model).__name__} has one table, its embedding, which is its unembedding too: it cannot lie on the "
            'host. Leave embeddings at "device".'
        )
    aside = {}
    for path in paths:
        aside[path] = model.get_submodule(path).to(HOST)
        _put(model, path, nn.Identity())
    model.to(device)
    for path, table in aside.items():
        _put(model, path, table)
        table.register_forward_pre_hook(_ids_to_host)
        table.register_forward_hook(partial(_rows_to, device))
    return model


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _ids_to_host(table: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0].to(HOST), *args[1:])


def _rows_to(device: torch.device, table: nn.Module, args: tuple[Any, ...], rows: Tensor) -> Tensor:
    return rows.to(device)
