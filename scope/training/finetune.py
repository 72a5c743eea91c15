"""`finetune_kl`: a trained SAE, spliced into its model, learns to leave the model's predictions as they are.

The squared error counts what the model ignores as much as what it uses. Following Braun et al. 2024, "Identifying
functionally important features with end-to-end sparse dictionary learning" (arXiv 2405.12241), and Karvonen 2025,
"Revisiting end-to-end SAE training: a short finetune is sufficient" (arXiv 2503.17272):

1. Windows of documents that are not held out are drawn at random and run twice, plainly and with the SAE in the place
   of what it reconstructs (BOS passes through).
2. The loss is KL(plain ‖ spliced), scaled to weigh as much as the reconstruction's fvu, plus `mse_weight` times that
   fvu, which keeps the features about what they were.
3. Adam moves all weights of the SAE but thresholds, so that the number of features that fire stays about the same.
   Biases are in the model's own units and move by as much more as its rows are larger than sqrt(d_in).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from activations.store import ActivationStore
from scope._version import __version__
from scope.errors import InvalidInputError, NonFiniteError
from scope.interventions import splice_edits
from scope.interventions.edit import Edit
from scope.models import LanguageModel
from scope.models.divergence import kl_divergence
from scope.models.edits import EditContext
from scope.saes import formats
from scope.saes.base import SAE
from scope.saes.formats.saelens import require_free
from scope.training.schedules import learning_rate_share
from scope.training.settings import FinetuneConfig

__all__ = ["FinetuneReport", "finetune_kl"]


@dataclass(frozen=True)
class FinetuneReport:
    """A finished fine-tuning. Its figures are of training tokens; `evaluate` measures on held-out ones."""

    sae: SAE
    """The SAE as it is now; the one that was given is unchanged."""
    path: Path | None
    """Where it was saved."""
    tokens: int
    """Tokens trained on."""
    kl_before: float
    """Mean KL over the first tenth of the steps, in nats."""
    kl_after: float
    """Mean KL over the last tenth of the steps."""
    log: tuple[dict[str, float], ...]
    """For each step: tokens, kl, fvu, learning_rate."""

    def to_dict(self) -> dict[str, Any]:
        """The figures, JSON-able."""
        return {
            "path": str(self.path) if self.path else None,
            "tokens": self.tokens,
            "kl_before": self.kl_before,
            "kl_after": self.kl_after,
        }

    def summary(self) -> str:
        """A line for a person."""
        where = f" -> {self.path}" if self.path else ""
        return f"Fine-tuned on {self.tokens:,} tokens: KL {self.kl_before:.4f} -> {self.kl_after:.4f} nats{where}"


def finetune_kl(
    sae: SAE,
    model: LanguageModel,
    store: ActivationStore,
    config: FinetuneConfig,
    out: str | Path | None = None,
    *,
    progress: Callable[[int, int | None], None] | None = None,
) -> FinetuneReport:
    """Fine-tune a trained SAE, or a transcoder, on the model's predictions. It runs in one go, without checkpoints.

    Args:
        sae: takes raw activations; unchanged.
        model: the model it reads, in whose place nothing is changed.
        store: where the windows come from; its activations are not read.
        config: the settings.
        out: the folder to make; None keeps the SAE in memory only.
        progress: called with (tokens done, tokens in all).

    Raises:
        InvalidInputError: the SAE cannot be spliced in (a crosscoder), or the store has no windows to train on.
        NonFiniteError: the loss became NaN or Inf.
        OccupiedError: `out` holds something already.
    """
    if out is not None:
        require_free(Path(out))
    tuned = deepcopy(sae).to(model.device, torch.float32)
    splice_edits(tuned)  # refuses what cannot be spliced in, before anything runs
    windows = _windows(store, config)
    moved = {name: p for name, p in tuned.named_parameters() if name != "threshold"}
    scale = _scale_of(sae)
    biases = [p for p in moved.values() if p.ndim == 1]
    groups = [
        {"params": [p for p in moved.values() if p.ndim > 1], "unit": 1.0},
        {"params": biases, "unit": 1 / scale},
    ]
    optimiser = torch.optim.Adam(groups, lr=config.lr, betas=(0.9, 0.95))
    log: list[dict[str, float]] = []
    done = 0
    tuned.requires_grad_(False)
    for parameter in moved.values():
        parameter.requires_grad_(True)
    with _frozen(model):
        while done < config.tokens:
            kl, fvu, n_tokens = _step(tuned, model, next(windows), config)
            share = learning_rate_share(done, config.tokens, config.warmup, 1 - config.warmup)
            for group in optimiser.param_groups:
                group["lr"] = config.lr * share * group["unit"]
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            done += n_tokens
            log.append({"tokens": done, "kl": kl, "fvu": fvu, "learning_rate": config.lr * share})
            if progress:
                progress(min(done, config.tokens), config.tokens)
    return _report(tuned, sae, config, log, None if out is None else Path(out))


def _step(
    tuned: SAE, model: LanguageModel, windows: list[np.ndarray], config: FinetuneConfig
) -> tuple[float, float, int]:
    """Gradients of one batch; its KL, fvu and tokens."""
    errors: list[Tensor] = []
    written = {port.hook for port in tuned.cfg.ports.outputs or tuned.cfg.ports.inputs}
    edits = {hook: _Measured(edit, errors) if hook in written else edit for hook, edit in splice_edits(tuned).items()}
    found = kl_divergence(model, windows, edits)
    fvu = torch.stack(errors).mean()
    balance = (fvu / found.kl.clamp_min(1e-8)).detach() if config.mse_weight else 1.0
    loss = balance * found.slope + config.mse_weight * fvu
    if not bool(torch.isfinite(loss)):
        raise NonFiniteError("The loss of the fine-tuning is not finite. Lower the learning rate.")
    loss.backward()
    return float(found.kl.detach()), float(fvu.detach()), found.n_tokens


class _Measured:
    """An edit that notes the fvu of what it puts in place, over the rows that are not BOS."""

    def __init__(self, edit: Edit, errors: list[Tensor]) -> None:
        self.edit, self.errors = edit, errors
        self.check = edit.check

    def __call__(self, value: Tensor, context: EditContext) -> Tensor:
        new = self.edit(value, context)
        rows, before = ((~context.bos)[..., None] * part.flatten(2).float() for part in (new, value))
        centred = before - before.sum((0, 1)) / (~context.bos).sum()
        variance = ((~context.bos)[..., None] * centred).square().sum().detach()
        self.errors.append((rows - before.detach()).square().sum() / variance)
        return new


def _windows(store: ActivationStore, config: FinetuneConfig) -> Iterator[list[np.ndarray]]:
    """Batches of windows of documents that are not held out, for ever, each pass in another order."""
    documents = store.documents()
    trained = documents[~documents["held_out"].astype(bool)]["document"]
    sequences = store.sequences()
    sequences = sequences[sequences["document"].isin(trained) & (sequences["n_rows"] > 1)]
    if sequences.empty:
        raise InvalidInputError("The store has no windows to train on: all its documents are held out.")
    places = sequences[["start_row", "n_rows"]].to_numpy(dtype=np.int64)
    return _batches(store, places, config)


def _batches(store: ActivationStore, places: np.ndarray, config: FinetuneConfig) -> Iterator[list[np.ndarray]]:
    number = 0
    while True:
        held: list[np.ndarray] = []
        for start, length in np.random.default_rng([config.seed, number]).permutation(places):
            held.append(store.rows(int(start), int(start + length)).token_id.astype(np.int32))
            if sum(map(len, held)) >= config.batch_tokens:
                yield held
                held = []
        if held:
            yield held
        number += 1


def _scale_of(sae: SAE) -> float:
    """The factor that raw rows were multiplied by in training; 1 where it is not known."""
    training: Mapping[str, Any] = sae.cfg.metadata.training or {}
    scale = training.get("norm_scale") or 1.0
    return float(scale) if not isinstance(scale, list | tuple) else fmean(scale)


@contextmanager
def _frozen(model: LanguageModel) -> Iterator[None]:
    """Within it the model's weights need no gradients."""
    needing = [parameter for parameter in model.hf.parameters() if parameter.requires_grad]
    for parameter in needing:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in needing:
            parameter.requires_grad_(True)


def _report(
    tuned: SAE, sae: SAE, config: FinetuneConfig, log: list[dict[str, float]], out: Path | None
) -> FinetuneReport:
    tuned = tuned.to("cpu", sae.dtype).requires_grad_(True)
    metadata = sae.cfg.metadata
    training = {**(metadata.training or {}), "finetune_kl": asdict(config)}
    tuned.cfg = replace(sae.cfg, metadata=replace(metadata, training=training, scope_version=__version__))
    tenth = max(1, len(log) // 10)
    report = FinetuneReport(
        sae=tuned,
        path=out,
        tokens=int(log[-1]["tokens"]),
        kl_before=fmean(line["kl"] for line in log[:tenth]),
        kl_after=fmean(line["kl"] for line in log[-tenth:]),
        log=tuple(log),
    )
    if out is not None:
        formats.save(tuned, out, finetune=report.to_dict(), parent_sae=sae.fingerprint)
    return report
