"""What the loop takes from a source: its hooks, its provenance, and a stream of shuffled batches."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from activations.shuffle import Selection, ShuffledBatches
from activations.source import ActivationSource, RowFlag
from scope.errors import InvalidInputError, UnknownNameError
from scope.kernels.tensors import as_tensor
from scope.saes.base import Port, Ports, SAEMetadata
from scope.training.config import TrainConfig

__all__ = [
    "EXCLUDED",
    "Batch",
    "BatchStream",
    "as_hooks",
    "hook_metadata",
    "ports_of",
    "provenance_of",
    "resolve_hook",
    "shuffled_batches",
    "side_by_side",
    "width_of",
]

EXCLUDED = RowFlag.BOS | RowFlag.SPECIAL | RowFlag.HELD_OUT
"""Rows that are never trained on."""


class Batch(NamedTuple):
    """Some rows to train on."""

    rows: np.ndarray
    """Row ids, int64."""
    values: Any
    """Activations `(batch, *feature_shape)` in the source's dtype; by hook, where several hooks were asked for."""

    def part(self, rows: slice) -> "Batch":
        """Some of its rows."""
        if isinstance(self.values, Mapping):
            return Batch(self.rows[rows], {hook: values[rows] for hook, values in self.values.items()})
        return Batch(self.rows[rows], self.values[rows])


BatchStream = Callable[[int], Iterator[Batch]]
"""Batches from a given step on; the same step always gives the same batch."""


def resolve_hook(source: ActivationSource, hook: str) -> str:
    """The source's own name of a hook; raises `UnknownNameError` that lists the hooks there are."""
    if hook in source.hooks:
        return hook
    resolve = getattr(source, "resolve_hook", None)
    if resolve is not None:
        return str(resolve(hook))
    raise UnknownNameError("hook", hook, source.hooks, hint=f"The source has: {', '.join(source.hooks)}.")


def width_of(source: ActivationSource, hook: str) -> tuple[int, Literal["none", "hook_z"]]:
    """Width of a row at a hook, and how an SAE's input is reshaped to it."""
    shape = source.hook_shape(hook)
    if len(shape) == 1:
        return shape[0], "none"
    if len(shape) == 2 and hook.endswith("hook_z"):
        return shape[0] * shape[1], "hook_z"
    raise InvalidInputError(
        f"A row of {hook} has the shape {tuple(shape)}. SAEs are trained on hooks with one feature dimension, "
        "and on attn.hook_z with its heads."
    )


def as_hooks(hooks: str | Sequence[str] | None) -> tuple[str, ...]:
    """One hook name, several or none as a tuple."""
    return (hooks,) if isinstance(hooks, str) else tuple(hooks or ())


def ports_of(
    source: ActivationSource, hooks: str | Sequence[str], hooks_out: str | Sequence[str] | None = None
) -> tuple[Ports, Literal["none", "hook_z"]]:
    """Hooks by the source's own names with their widths, and how a single input is reshaped.

    Raises:
        UnknownNameError: the source has no such hook.
        InvalidInputError: a hook is named twice, or its rows have a shape that no dictionary reads.
    """
    sides, reshapes = [], []
    for names in (as_hooks(hooks), as_hooks(hooks_out)):
        resolved = [resolve_hook(source, name) for name in names]
        for name in resolved:
            if resolved.count(name) > 1:
                raise InvalidInputError(f"The hook {name} is given twice.")
        widths = [width_of(source, name) for name in resolved]
        reshapes += [reshape for _, reshape in widths]
        sides.append(tuple(Port(name, width) for name, (width, _) in zip(resolved, widths, strict=True)))
    return Ports(*sides), reshapes[0] if len(reshapes) == 1 else "none"


def hook_metadata(ports: Ports) -> dict[str, Any]:
    """The fields of `SAEMetadata` that name hooks."""
    named: dict[str, Any] = {}
    for side, suffix in ((ports.inputs, ""), (ports.outputs, "_out")):
        names = tuple(port.hook for port in side)
        if len(names) == 1:
            named[f"hook_name{suffix}"] = names[0]
        elif names:
            named[f"hook_names{suffix}"] = names
    return named


def side_by_side(values: Mapping[str, Tensor], ports: Sequence[Port]) -> Tensor:
    """The rows of some hooks, flattened and one beside the other: `(batch, sum of widths)`."""
    parts = [values[str(port.hook)].flatten(1) for port in ports]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def provenance_of(source: ActivationSource, ports: Ports, given: Mapping[str, Any]) -> SAEMetadata:
    """What the source knows of itself, and what was `given`, which has precedence."""
    known: dict[str, Any] = hook_metadata(ports)
    spec = getattr(source, "spec", None)
    if spec is not None:
        known |= {
            "model_name": spec.model,
            "model_revision": spec.revision,
            "weight_hash": spec.weight_hash,
            "tokenizer_hash": spec.tokenizer_hash,
            "context_size": spec.context_size,
            "prepend_bos": spec.bos_token_id is not None,
        }
    text = getattr(source, "text_names", None)  # a live source's: a store is found again by its fingerprint
    if text is not None:
        known["dataset_path"] = ", ".join(text)
    fingerprint = getattr(source, "fingerprint", None)
    if fingerprint is not None:
        known["store_fingerprint"] = str(fingerprint)
    names = {field.name for field in fields(SAEMetadata)}
    unknown = sorted(set(given) - names)
    if unknown:
        raise UnknownNameError("provenance field", unknown[0], names)
    return SAEMetadata(**{**known, **given})


def shuffled_batches(source: ActivationSource, hook: str | Sequence[str], config: TrainConfig) -> BatchStream:
    """Shuffled batches of the rows that are trained on, pass after pass, as many as the run has steps.

    Args:
        source: where rows come from.
        hook: a hook, or several, whose rows stay aligned; a row that is an outlier at any of them is left out.
        config: the settings.

    Raises:
        InvalidInputError: the source has fewer such rows than a batch takes.
    """

    def batches(start: int) -> ShuffledBatches:
        return ShuffledBatches(
            source,
            hook,
            config.batch_size,
            config.seed,
            tokens=config.steps * config.batch_size,
            select=Selection(
                exclude_flags=EXCLUDED,
                max_norm_ratio=config.max_norm_ratio or None,
                balance=config.balance,  # type: ignore[arg-type]  # checked there
            ),
            memory_bytes=config.shuffle_bytes,
            start=start,
        )

    n_rows = batches(0).n_rows
    if n_rows is not None and n_rows < config.batch_size:
        raise InvalidInputError(
            f"There are {n_rows:,} rows of {', '.join(as_hooks(hook))} to train on (without BOS, special tokens, "
            f"held-out documents and outlier norms), fewer than a batch of {config.batch_size:,}. Capture more text or "
            "lower the batch size."
        )

    def stream(step: int) -> Iterator[Batch]:
        for rows, values in batches(step):
            if isinstance(values, Mapping):
                yield Batch(rows, {name: _as_it_lies(part, source) for name, part in values.items()})
            else:
                yield Batch(rows, _as_it_lies(values, source))

    return stream


def _as_it_lies(values: Any, source: ActivationSource) -> Tensor:
    """Rows as a tensor. Those of a live source stay where they are: the trainer may be on the same GPU."""
    return values if isinstance(values, Tensor) else as_tensor(values, source.dtype)
