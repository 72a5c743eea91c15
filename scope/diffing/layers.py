"""How far two models are apart on a text: their residual streams layer by layer, and what they predict.

Both run on the same windows, some rows at a time and nothing on disk. On each row but BOS and special ones

    change  = ‖x_tuned - x_base‖ / ‖x_base‖      at each layer, and the cosine between the two

and on each row that has a next token in its window, with p the base model's and q the other's next-token distribution,

    ce_base, ce_tuned   -log p, -log q of the token that follows, in nats
    kl                  KL(p ‖ q), in nats
    top1                whether both have the same likeliest token

All are means over rows, of all of them and by source. A row counts for as much as any other, so that a sink, whose
norm is a hundred times the others', does not decide. Intervals resample documents. Where the residual stream is a stack
(Gemma 3n's AltUp), that of a layer is its active stream, and predictions come from what the final norm reads.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from activations.source import RowFlag
from activations.text import TextSource
from scope.diffing.pair import LEFT_OUT, ModelPair
from scope.diffing.reference import LayerBatch
from scope.diffing.settings import ComparisonConfig
from scope.errors import InvalidInputError
from scope.kernels.tensors import as_tensor
from scope.models.live import LiveActivations
from scope.models.losses import CHUNK_BYTES, residual_logits
from scope.training.tally import bootstrap

__all__ = ["PREDICTIONS", "LayerChanges", "layer_changes"]

ROWS = 512
"""Rows of each model that are held together, at every layer."""
PREDICTIONS = ("ce_base", "ce_tuned", "kl", "top1")
ALL = "all"


@dataclass(frozen=True, eq=False)
class LayerChanges:
    """How far two models are apart."""

    layers: pd.DataFrame
    """hook, layer, source ("all" or a source), change, change_low, change_high, cosine, n_rows."""
    predictions: pd.DataFrame
    """source, ce_base, ce_tuned, ce_change (tuned - base) with _low and _high, kl, top1 with _low and _high,
    n_tokens, n_documents."""

    def to_dict(self) -> dict[str, Any]:
        """Both tables, JSON-able."""
        return {"layers": self.layers.to_dict("records"), "predictions": self.predictions.to_dict("records")}


def layer_changes(
    pair: ModelPair,
    text: TextSource,
    config: ComparisonConfig,
    progress: Callable[[int, int | None], None] | None = None,
    kept: list[LayerBatch] | None = None,
) -> LayerChanges:
    """Compare two models layer by layer on the first `layer_tokens` rows of a text.

    Args:
        pair: the models; both have the same width.
        text: where documents come from.
        config: tokens and windows.
        progress: called with (rows done, rows in all).
        kept: of a `ReferencePass`: empty, it takes up the base model's rows; else the base model is not run.

    Raises:
        MismatchError: the models have different widths.
        InvalidInputError: the text is chats, which each model would write in its own way.
    """
    if text.is_chats:
        raise InvalidInputError("Models are compared on plain text: each would write chats in its own way.")
    hooks, final = pair.require_equal_stacks(), pair.base.layout.final_residual
    computed = tuple(dict.fromkeys([*hooks, final]))
    sources = [
        LiveActivations(
            model,
            text,
            computed,
            context_size=min(config.context_size, model.max_context_size),
            dtype="float32",
            max_tokens=config.layer_tokens,
            rows_per_group=ROWS,
        )
        for model in pair
    ]
    table = _Tokens(sources[0])
    sums = _Sums(table, hooks)
    streams = [_rows_of(source, computed) for source in sources]
    for (rows, base), (_, tuned) in zip(kept or _kept(streams[0], kept), streams[1], strict=True):
        sums.add_layers(rows, base, tuned)
        sums.add_predictions(pair, rows, base[final], tuned[final])
        if progress:
            progress(int(rows[-1]) + 1, len(table.token_id))
    return LayerChanges(sums.layers(config.seed), sums.predictions(config.seed))


def _rows_of(source: LiveActivations, hooks: tuple[str, ...]) -> Iterator[LayerBatch]:
    for part in source.batches(hooks, ROWS):
        yield part.rows, {hook: as_tensor(part.activations[hook], "float32") for hook in hooks}


def _kept(stream: Iterator[LayerBatch], kept: list[LayerBatch] | None) -> Iterator[LayerBatch]:
    for batch in stream:
        yield batch
        if kept is not None:
            kept.append(batch)


class _Tokens:
    """What each row is: some bytes a row."""

    def __init__(self, source: LiveActivations) -> None:
        plans = list(source.plans())
        joined = {name: np.concatenate([plan.columns[name] for plan in plans]) for name in plans[0].columns}
        self.token_id, self.sequence = joined["token_id"].astype(np.int64), joined["sequence"]
        self.counted = (joined["flags"] & np.uint8(LEFT_OUT)) == 0
        self.has_next = np.append(self.sequence[1:] == self.sequence[:-1], False)
        special = (joined["flags"] & np.uint8(RowFlag.SPECIAL)) != 0
        self.has_next[:-1] &= ~special[1:]
        documents = np.concatenate([np.asarray(plan.sequences["document"], np.int64) for plan in plans])
        self.document = documents[self.sequence]
        self.sources = np.array([str(name) for plan in plans for name in plan.documents["source"]])


class _Sums:
    """Sums by document."""

    def __init__(self, table: _Tokens, hooks: tuple[str, ...]) -> None:
        self.table, self.hooks = table, hooks
        n = len(table.sources)
        self.by_layer = np.zeros((len(hooks), n, 3))
        self.by_prediction = np.zeros((n, 1 + len(PREDICTIONS)))

    def add_layers(self, rows: np.ndarray, base: dict[str, Tensor], tuned: dict[str, Tensor]) -> None:
        keep = self.table.counted[rows]
        documents = self.table.document[rows][keep]
        kept = torch.from_numpy(keep)
        for number, hook in enumerate(self.hooks):
            x, y = base[hook][kept].double(), tuned[hook][kept].double()
            norm = x.norm(dim=-1).clamp_min(1e-30)
            change = (y - x).norm(dim=-1) / norm
            cosine = (x * y).sum(dim=-1) / (norm * y.norm(dim=-1).clamp_min(1e-30))
            values = torch.stack([torch.ones_like(change), change, cosine], dim=1).numpy()
            np.add.at(self.by_layer[number], documents, values)

    @torch.inference_mode()
    def add_predictions(self, pair: ModelPair, rows: np.ndarray, base: Tensor, tuned: Tensor) -> None:
        places = np.flatnonzero(self.table.has_next[rows])
        step = max(1, CHUNK_BYTES // (16 * pair.base.d_vocab))
        for start in range(0, len(places), step):
            part = places[start : start + step]
            following = torch.from_numpy(self.table.token_id[rows[part] + 1])[:, None]
            log_p, log_q = (
                residual_logits(model, values[torch.from_numpy(part)]).float().log_softmax(-1).cpu()
                for model, values in zip(pair, (base, tuned), strict=True)
            )
            values = torch.stack(
                [
                    torch.ones(len(part)),
                    -log_p.gather(1, following)[:, 0],
                    -log_q.gather(1, following)[:, 0],
                    (log_p.exp() * (log_p - log_q)).sum(dim=-1),
                    (log_p.argmax(-1) == log_q.argmax(-1)).float(),
                ],
                dim=1,
            )
            np.add.at(self.by_prediction, self.table.document[rows[part]], values.double().numpy())

    def _parts(self, counts: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """All documents with a row, then those of each source."""
        there = counts > 0
        yield ALL, there
        for source in sorted(set(self.table.sources[there])):
            yield source, there & (self.table.sources == source)

    def layers(self, seed: int) -> pd.DataFrame:
        found = []
        for layer, hook in enumerate(self.hooks):
            for source, chosen in self._parts(self.by_layer[layer, :, 0]):
                sums = self.by_layer[layer, chosen]
                n, change, cosine = sums.sum(axis=0)
                low, high = bootstrap(lambda drawn: drawn[:, 1] / drawn[:, 0], sums, seed)
                found.append(
                    {
                        "hook": hook, "layer": layer, "source": source, "change": change / n, "change_low": low,
                        "change_high": high, "cosine": cosine / n, "n_rows": int(n),
                    }
                )  # fmt: skip
        return pd.DataFrame(found)

    def predictions(self, seed: int) -> pd.DataFrame:
        found = []
        for source, chosen in self._parts(self.by_prediction[:, 0]):
            sums = self.by_prediction[chosen]
            n, *means = sums.sum(axis=0)
            row = {"source": source, **dict(zip(PREDICTIONS, (value / n for value in means), strict=True))}
            row["ce_change"] = row["ce_tuned"] - row["ce_base"]
            for name, statistic in (
                ("ce_change", lambda drawn: (drawn[:, 2] - drawn[:, 1]) / drawn[:, 0]),
                ("top1", lambda drawn: drawn[:, 4] / drawn[:, 0]),
            ):
                row[f"{name}_low"], row[f"{name}_high"] = bootstrap(statistic, sums, seed)
            found.append({**row, "n_tokens": int(n), "n_documents": int(chosen.sum())})
        return pd.DataFrame(found)
