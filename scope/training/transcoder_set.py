"""A transcoder for every layer of a model: what the set is worth together.

`evaluate_transcoders` measures on held-out documents, BOS left as it is:

1. each transcoder alone, on what its MLP reads and writes in the model as it is: fvu, l0 and the rest of
   `scope.training.metrics`;
2. all of them spliced in at once, each fed by what the ones before it have made (the replacement model of Ameisen et
   al. 2025, "Circuit Tracing", section 3), against the model as it is, over next tokens:

       kl               mean of KL(model ‖ replacement), in nats
       top1_agreement   share of tokens after which both hold the same next token for the likeliest
       ce, delta_ce     cross-entropy of the model, and what the replacement adds to it

   and beside it the same with every MLP's output at its mean, which is what transcoders that learnt nothing would do.

A circuit graph explains the replacement model; what it says of the model is no better than these figures.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from activations.manifest import write_atomically
from activations.store import ActivationStore
from scope.errors import InvalidInputError
from scope.interventions import set_, splice_edits
from scope.models.edits import EditContext, EditFunction, apply_edits, resolve_edits
from scope.models.live import LiveActivations
from scope.models.losses import CHUNK_BYTES, unembed
from scope.models.rows import WindowBatch, check_windows, pack_windows
from scope.models.taps import tapped
from scope.saes.base import SAE
from scope.training.by_layer import layer_of
from scope.training.cross_entropy import sparing_special
from scope.training.evaluate import LIVE_ROWS, Quality, held_out_part, held_out_windows
from scope.training.metrics import ReconstructionMetrics, mean_activation, reconstruction_metrics
from scope.training.tally import Interval, bootstrap

if TYPE_CHECKING:
    import pandas as pd

    from scope.models.language_model import LanguageModel

__all__ = [
    "CARD_NAME",
    "Replacement",
    "SetQuality",
    "evaluate_transcoders",
]

CARD_NAME = "card.json"
COPIES = 5
"""Matrices of the logits' size that a stretch of tokens needs at once."""
Progress = Callable[[int, int | None], None]


class Replacement(NamedTuple):
    """A model in which all MLPs are replaced, against the model itself; see the module's docstring."""

    kl: float
    kl_interval: Interval
    top1_agreement: float
    top1_interval: Interval
    ce: float
    delta_ce: float


class SetQuality(NamedTuple):
    """What a set of transcoders is worth."""

    layers: "dict[int, ReconstructionMetrics]"
    spliced: Replacement
    """With all transcoders in at once."""
    mean: Replacement
    """With every MLP's output at its mean instead."""
    ce: float
    """Of the model as it is, in nats."""
    n_tokens: int
    """Tokens predicted."""
    described: Mapping[str, Any]
    """What they are: architecture, settings, model, text."""

    def table(self) -> "pd.DataFrame":
        """layer, fvu, fvu_all, l0, dead_share, cosine, n_rows."""
        import pandas as pd

        names = ("fvu", "fvu_all", "l0", "dead_share", "cosine", "n_rows")
        rows = [{"layer": layer, **{n: getattr(found, n) for n in names}} for layer, found in self.layers.items()]
        return pd.DataFrame(rows)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            **self.described,
            "layers": [{"layer": layer, **found.to_dict()} for layer, found in self.layers.items()],
            "replacement": self.spliced._asdict(),
            "mean_replacement": self.mean._asdict(),
            "ce": self.ce,
            "n_tokens": self.n_tokens,
        }

    def summary(self) -> str:
        """A few lines for a person."""
        one, other = self.spliced, self.mean
        rows = self.table().to_string(index=False, float_format=lambda number: f"{number:.4g}")
        return (
            f"{rows}\n"
            f"All {len(self.layers)} spliced in at once, on {self.n_tokens:,} held-out tokens: KL {one.kl:.3f} "
            f"[{one.kl_interval[0]:.3f}, {one.kl_interval[1]:.3f}] nats, the same likeliest token after "
            f"{one.top1_agreement:.1%}, cross-entropy {self.ce:.3f} + {one.delta_ce:.3f}\n"
            f"  beside it, every MLP at its mean: KL {other.kl:.3f}, {other.top1_agreement:.1%}, + {other.delta_ce:.3f}"
        )

    def _repr_html_(self) -> str:
        return f"<pre>{escape(self.summary())}</pre>"

    def save(self, folder: Path) -> None:
        """Write `card.json`, and a `README.md` that says the same to a person, into the set's folder."""
        write_atomically(folder / CARD_NAME, (json.dumps(self.to_dict(), indent=2) + "\n").encode())
        write_atomically(folder / "README.md", self.readme(folder.name).encode())

    def readme(self, name: str) -> str:
        """The card as text."""
        given, one, other = self.described, self.spliced, self.mean
        lines = [
            f"# {name}: transcoders of {given.get('model') or 'a model'}",
            "",
            f"One dictionary for each of {len(self.layers)} MLPs, from what it reads (`ln2.hook_out`) to what it adds "
            "to the residual stream (`hook_mlp_out`). Made for circuit graphs: `scope graph --transcoders FOLDER`.",
            "",
            *(f"- {key.replace('_', ' ')}: {value}" for key, value in given.items() if value is not None),
            "",
            "## How good they are",
            "",
            f"On held-out documents, BOS left out. Cross-entropy of the model itself: {self.ce:.3f} nats, on "
            f"{self.n_tokens:,} tokens.",
            "",
            "| all MLPs replaced by | KL to the model (nats) | same likeliest token | cross-entropy added |",
            "|---|---|---|---|",
            f"| the transcoders | {one.kl:.3f} [{one.kl_interval[0]:.3f}, {one.kl_interval[1]:.3f}] | "
            f"{one.top1_agreement:.1%} | {one.delta_ce:.3f} |",
            f"| their mean outputs | {other.kl:.3f} [{other.kl_interval[0]:.3f}, {other.kl_interval[1]:.3f}] | "
            f"{other.top1_agreement:.1%} | {other.delta_ce:.3f} |",
            "",
            "| layer | FVU | FVU with sinks | L0 | silent features | rows |",
            "|---|---|---|---|---|---|",
            *(
                f"| {layer} | {found.fvu:.4f} | {found.fvu_all:.4f} | {found.l0:.1f} | {found.dead_share:.1%} | "
                f"{found.n_rows:,} |"
                for layer, found in self.layers.items()
            ),
            "",
            "FVU is over rows of at most ten times the median norm; silent features did not fire on the rows looked "
            "at. A circuit graph explains the model with these in the place of its MLPs, errors as constants: read it "
            "with the first table in mind.",
            "",
        ]
        return "\n".join(lines)


@torch.no_grad()
def evaluate_transcoders(
    transcoders: Sequence[SAE],
    source: ActivationStore | LiveActivations,
    model: "LanguageModel",
    *,
    tokens: int = 4096,
    seed: int = 0,
    folders: Mapping[int, Path] | None = None,
    progress: Progress | None = None,
) -> SetQuality:
    """Measure a set of transcoders, each alone and all spliced in at once.

    Args:
        transcoders: of different layers, each of which reads one hook and writes one.
        source: a store that holds these hooks, or a live source of them.
        model: the source's model.
        tokens: held-out tokens for KL, agreement and cross-entropy, at least.
        seed: of the draw of windows and of the intervals.
        folders: by layer, where its figures are to be left (`evaluation.json`).
        progress: called with (steps done, steps in all).

    Raises:
        InvalidInputError: there is none, one is no transcoder, two are of one layer, or no document is held out.
        UnknownNameError, MismatchError: the source lacks a hook, or it has another width.
    """
    by_layer = _by_layer(transcoders)
    tell, steps = progress or (lambda done, total: None), len(by_layer) + 2
    measured = held_out_part(source, tokens)
    windows, documents = held_out_windows(source, tokens, seed)
    tell(1, steps)
    layers = {}
    for number, (layer, sae) in enumerate(by_layer.items()):
        layers[layer] = reconstruction_metrics(sae, measured, seed=seed)
        if folders and layer in folders:
            Quality(layers[layer], None).save(folders[layer])
        tell(2 + number, steps)
    edits: dict[str, EditFunction] = {}
    for sae in by_layer.values():
        edits |= sparing_special(splice_edits(sae), model.special_token_ids)
    written = [str(sae.cfg.ports.outputs[0].hook) for sae in by_layer.values()]
    if isinstance(source, LiveActivations):
        means = _means(source, written)
    else:
        means = {hook: mean_activation(source, hook) for hook in written}
    flat = {hook: set_(hook, mean.to(model.device), keep_bos=True) for hook, mean in means.items()}
    flat = sparing_special(flat, model.special_token_ids)
    spliced, mean, ce = _replacements(model, windows, documents, [edits, flat], seed)
    tell(steps, steps)
    return SetQuality(layers, spliced, mean, ce, sum(len(w) - 1 for w in windows), _described(by_layer, source))


def _by_layer(transcoders: Sequence[SAE]) -> dict[int, SAE]:
    found: dict[int, SAE] = {}
    for sae in transcoders:
        ports = sae.cfg.ports
        hooks = [port.hook for side in ports for port in side]
        layer = layer_of(hooks[0] or "") if len(ports.inputs) == len(ports.outputs) == 1 else None
        if layer is None or layer != layer_of(hooks[1] or ""):
            raise InvalidInputError(
                f"A set is of transcoders that read and write one layer each; got one with the hooks {hooks}."
            )
        if layer in found:
            raise InvalidInputError(f"Two transcoders are of layer {layer}; give one a layer.")
        found[layer] = sae
    if not found:
        raise InvalidInputError("No transcoders were given.")
    return dict(sorted(found.items()))


def _means(source: LiveActivations, hooks: Sequence[str]) -> dict[str, Tensor]:
    """The mean rows of some hooks on the first rows of a live source, BOS and held-out documents left out."""
    from activations.source import RowFlag

    left_out = np.uint8(RowFlag.BOS | RowFlag.SPECIAL | RowFlag.HELD_OUT)
    sums: dict[str, Tensor] = {}
    n = 0
    for batch in source.batches(hooks, LIVE_ROWS):
        kept = torch.from_numpy((batch.flags & left_out) == 0)
        n += int(kept.sum())
        for hook in hooks:
            values = torch.as_tensor(batch.activations[hook])
            own = values[kept.to(values.device)].flatten(1).double().sum(0).cpu()
            sums[hook] = sums[hook] + own if hook in sums else own
        if n >= LIVE_ROWS // 2:
            break
    if not n:
        raise InvalidInputError("Every document of this text is held out; there is nothing to take means over.")
    return {hook: (total / n).float() for hook, total in sums.items()}


class _Sums:
    """What one changed model adds up to, window by window: tokens, KL, agreement, loss."""

    def __init__(self, n: int) -> None:
        self.sums = np.zeros((n, 4))

    def replacement(self, documents: Sequence[int], ce: float, seed: int) -> Replacement:
        _, codes = np.unique(np.asarray(documents), return_inverse=True)
        by_document = np.zeros((int(codes.max()) + 1, 4))
        np.add.at(by_document, codes, self.sums)
        tokens, kl, agreed, loss = self.sums.sum(0)

        def interval(column: int) -> Interval:
            return bootstrap(lambda drawn: drawn[:, column] / drawn[:, 0], by_document, seed)

        return Replacement(
            float(kl / tokens),
            interval(1),
            float(agreed / tokens),
            interval(2),
            float(loss / tokens),
            float(loss / tokens) - ce,
        )


def _replacements(
    model: "LanguageModel",
    windows: Sequence[np.ndarray],
    documents: Sequence[int],
    changes: Sequence[Mapping[str, EditFunction]],
    seed: int,
) -> tuple[Replacement, Replacement, float]:
    """Changed models against the plain one, and the plain one's cross-entropy."""
    check_windows(windows, 2, model.max_context_size, model.d_vocab)
    resolved = [resolve_edits(model.hook_table, edits, min(map(len, windows)), bridge=False) for edits in changes]
    found = [_Sums(len(windows)) for _ in changes]
    loss = np.zeros(len(windows))
    for indices in pack_windows(windows, model.default_batch_size):
        batch = WindowBatch([windows[i] for i in indices], [0] * len(indices), model.device)
        bos = model.bos_mask(batch.tokens)
        hidden = []
        for edits in ({}, *resolved):
            handlers = {
                model.hook_table[name]: _handler(edits[name], EditContext(name, batch.tokens, bos))
                for name in sorted(edits, key=model.hook_table.rank)
            }
            with model.lock, tapped(model.hf, handlers, stop=False):
                hidden.append(model.hidden_states(batch.tokens))
        for row, index in enumerate(indices):
            n = len(windows[index]) - 1
            own = [states[row, :n] for states in hidden]
            plain, further = _compared(model, own, batch.tokens[row, 1 : n + 1])
            loss[index] = plain
            for sums, values in zip(found, further, strict=True):
                sums.sums[index] = (n, *values)
    ce = float(loss.sum() / sum(len(window) - 1 for window in windows))
    spliced, mean = (sums.replacement(documents, ce, seed) for sums in found)
    return spliced, mean, ce


def _handler(edits: Sequence[EditFunction], context: EditContext) -> Callable[[Tensor], Tensor]:
    return lambda value: apply_edits(edits, value, context=context)


def _compared(
    model: "LanguageModel", hidden: Sequence[Tensor], targets: Tensor
) -> tuple[float, list[tuple[float, float, float]]]:
    """The plain model's summed loss on some tokens, and of each changed one (KL, agreements, loss)."""
    n_plain, found = 0.0, [[0.0, 0.0, 0.0] for _ in hidden[1:]]
    rows = max(1, CHUNK_BYTES // (4 * COPIES * model.d_vocab))
    for start in range(0, len(targets), rows):
        part = slice(start, start + rows)
        wanted = targets[part, None]
        plain = unembed(model, hidden[0][part]).float().log_softmax(-1)
        n_plain -= float(plain.gather(1, wanted).sum())
        best = plain.argmax(-1)
        for sums, states in zip(found, hidden[1:], strict=True):
            changed = unembed(model, states[part]).float().log_softmax(-1)
            sums[0] += float((plain.exp() * (plain - changed)).sum())
            sums[1] += float((changed.argmax(-1) == best).sum())
            sums[2] -= float(changed.gather(1, wanted).sum())
    return n_plain, [(kl, agreed, loss) for kl, agreed, loss in found]


def _described(by_layer: Mapping[int, SAE], source: Any) -> dict[str, Any]:
    first = next(iter(by_layer.values()))
    metadata, training = first.cfg.metadata, first.cfg.metadata.training or {}
    text = getattr(source, "text_names", None)
    return {
        "model": metadata.model_name,
        "architecture": first.cfg.stored_architecture,
        "d_sae": first.d_sae,
        "k": training.get("k"),
        "tokens": training.get("tokens"),
        "batch_size": training.get("batch_size"),
        "context_size": metadata.context_size,
        "text": metadata.dataset_path,
        "measured_on": ", ".join(text) if text else str(getattr(source, "path", "")),
    }
