"""`scope bench quality`: what our trainer and SAELens's make of the same rows, at equal tokens and equal tuning.

1. *Rows*: those of one hook of a store that we would train on (no BOS, special, held-out or outlier rows), in memory.
   Both trainers take the same batches in the same order: pass after pass, each a permutation drawn from the seed.
2. *Tuning*: each trainer runs once, with the first seed, at every learning rate of a grid of the same size: its own
   default times the same factors. The lowest fvu on one half of the held-out documents wins.
3. *Scores*: with the learning rate so chosen one run for each seed, scored on the other half by the same functions:
   fvu over rows of at most ten times the median norm, fvu over all rows, l0; with a model delta_ce and ce_recovered.
   The dead share is that of features without a firing on the training rows, a million of them where there are so many.
4. *Answer*: means over the seeds with 95% intervals (Student's t), and the same of the differences, ours less
   SAELens's with the same seed. Ours is better where an interval of the difference lies below 0.

What else the trainers do is their own: initial weights, AuxK, clipping, Adam's decay rates. Both warm up over a
twentieth of the run and fall to 0 over the last fifth; both scale rows to an expected norm of sqrt(d_in).
"""

import gc
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from activations.shuffle import Selection, ShuffledBatches
from activations.source import ActivationBatch, RowFlag
from activations.store import ActivationStore
from scope.bench import train_peers
from scope.bench.machine import describe_machine
from scope.bench.settings import QualityBench
from scope.errors import InvalidInputError
from scope.kernels.tensors import as_tensor
from scope.saes import formats
from scope.saes.base import SAE, SAEMetadata
from scope.training.config import TrainConfig
from scope.training.cross_entropy import LossModel, SplicedLosses
from scope.training.data import EXCLUDED, resolve_hook, width_of
from scope.training.evaluate import held_out_windows
from scope.training.metrics import reconstruction_metrics
from scope.training.trainer import SAETrainer

__all__ = ["Rows", "bench_quality", "compared", "student_interval"]

SAMPLE_ROWS = 8192
COUNTED_ROWS = 2**20
TUNING_ROWS = 2**17
T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Student's t, two-sided 95%, by degrees of freedom."""
SAELENS_LR = 3e-4
"""SAELens's default learning rate."""
LOWER_IS_BETTER = ("delta_ce", "fvu", "dead_share", "fvu_all")

Train = Callable[[float, int], SAE]


class Rows:
    """An `ActivationSource` of rows in memory, for one hook."""

    dtype = "float32"

    def __init__(self, values: Tensor, hook: str) -> None:
        self.values, self.hook = values, hook
        self.hooks, self.n_rows = (hook,), len(values)

    def hook_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.values.shape[1:])

    def batches(self, hooks: Sequence[str], batch_size: int, start: int = 0) -> Iterator[ActivationBatch]:
        for at in range(start, self.n_rows, batch_size):
            part = self.values[at : at + batch_size].float()
            norms = part.norm(dim=-1).cpu().numpy()
            flags = np.zeros(len(part), np.uint8)
            rows = np.arange(at, at + len(part))
            yield ActivationBatch(rows, {self.hook: part.cpu().numpy()}, flags, {self.hook: norms})


class _Held(NamedTuple):
    """Held-out text, in two halves by document."""

    tuning: Rows
    scored: Rows
    scored_documents: frozenset[int]


def bench_quality(
    store: ActivationStore, model: LossModel | None, config: QualityBench, say: Callable[[str], None]
) -> dict[str, Any]:
    """Run the comparison.

    Args:
        store: has the hook, with held-out documents.
        model: the store's model; None leaves delta_ce out.
        config: what to run.
        say: is told what is done next.

    Returns:
        Figures, JSON-able: of "ours" and of "saelens" the runs, the chosen learning rate and by name the mean and the
        interval; the "difference"; and "better", by name whether ours is.

    Raises:
        InvalidInputError: the store has too few rows, or no held-out documents.
    """
    return _Comparison(store, model, config, say).run()


class _Comparison:
    def __init__(
        self, store: ActivationStore, model: LossModel | None, config: QualityBench, say: Callable[[str], None]
    ) -> None:
        self.config, self.say = config, say
        self.device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.hook = resolve_hook(store, config.hook or store.hooks[0])
        self.d_in = width_of(store, self.hook)[0]
        say(f"Reading the rows of {self.hook}")
        self.rows = self._training_rows(store)
        self.held = self._held_out(store)
        self.tokens = config.tokens or round(config.passes * len(self.rows))
        self.steps = self.tokens // config.batch_size
        if not self.steps >= 20 or len(self.rows) < config.batch_size:
            raise InvalidInputError(
                f"{self.tokens:,} tokens in batches of {config.batch_size:,} from {len(self.rows):,} rows are "
                f"{self.steps:,} steps; expected 20 or more, from a batch of rows at least."
            )
        self.losses = self._losses(store, model) if model is not None else None

    def run(self) -> dict[str, Any]:
        ours, theirs = self._contender("ours", self._ours), self._contender("saelens", self._saelens)
        figures = {
            **describe_machine(self.device),
            "hook": self.hook,
            "d_in": self.d_in,
            **{name: getattr(self.config, name) for name in ("arch", "d_sae", "k", "batch_size", "seeds")},
            "rows": len(self.rows),
            "tokens": self.steps * self.config.batch_size,
            "tuning_rows": self.held.tuning.n_rows,
            "scored_rows": self.held.scored.n_rows,
            "scored_tokens": self.losses.n_tokens if self.losses else 0,
        }
        return {**figures, "ours": ours, "saelens": theirs, **compared(ours["runs"], theirs["runs"])}

    def _contender(self, name: str, train: Train) -> dict[str, Any]:
        """Tune the learning rate, then a run for each seed."""
        default = self._config(None, 0).peak_lr if name == "ours" else SAELENS_LR
        tried: list[dict[str, Any]] = []
        for factor in self.config.factors:
            sae, seconds = self._timed(train, factor * default, 0)
            options = {"max_rows": TUNING_ROWS, "held_out_only": False}
            fvu = reconstruction_metrics(sae, self.held.tuning, **options).fvu  # type: ignore[arg-type]
            tried.append({"lr": factor * default, "fvu": fvu, "seconds": seconds, "sae": sae})
            self.say(f"  {name}, learning rate {factor * default:.2e}: fvu {fvu:.5f} in {seconds:.0f} s")
        best = min(tried, key=lambda one: one["fvu"])
        runs = []
        for seed in range(self.config.seeds):
            known = (best["sae"], best["seconds"]) if seed == 0 else None
            sae, seconds = known or self._timed(train, best["lr"], seed)
            runs.append({"seed": seed, "seconds": seconds, **self._score(sae)})
            told = ", ".join(
                f"{key} {runs[-1][key]:.4f}" for key in ("fvu", "delta_ce", "dead_share") if key in runs[-1]
            )
            self.say(f"  {name}, seed {seed}: {told}")
        return {
            "lr": best["lr"],
            "lr_at_edge": best in (tried[0], tried[-1]) and len(tried) > 1,
            "tuning": [{key: one[key] for key in ("lr", "fvu")} for one in tried],
            "runs": runs,
            **_means(runs),
        }

    def _timed(self, train: Train, lr: float, seed: int) -> tuple[SAE, float]:
        started = time.perf_counter()
        sae = train(lr, seed)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return sae.to(self.device), time.perf_counter() - started

    def _batches(self, seed: int) -> Iterator[Tensor]:
        generator = torch.Generator(self.device).manual_seed(seed)
        left, order = self.steps, self.rows.new_zeros(0, dtype=torch.int64)
        while left:
            while len(order) < self.config.batch_size:
                order = torch.cat([order, torch.randperm(len(self.rows), generator=generator, device=self.device)])
            chosen, order = order[: self.config.batch_size], order[self.config.batch_size :]
            left -= 1
            yield self.rows[chosen].float()

    def _config(self, lr: float | None, seed: int) -> TrainConfig:
        config = self.config
        return TrainConfig(
            arch=config.arch,
            d_sae=config.d_sae,
            k=config.k,
            tokens=self.steps * config.batch_size,
            batch_size=config.batch_size,
            lr=lr,
            seed=seed,
            device=str(self.device),
        )

    def _ours(self, lr: float, seed: int) -> SAE:
        trainer = SAETrainer(self._config(lr, seed), self.d_in, SAEMetadata(hook_name=self.hook))
        trainer.initialise(self._sample(seed))
        for batch in self._batches(seed):
            trainer.step(batch)
        return trainer.export()

    def _saelens(self, lr: float, seed: int) -> SAE:
        batch_size = self.config.batch_size
        with train_peers.without_wandb(), tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(seed)
            train_peers.saelens_fit(
                self.config.arch,
                (self.d_in, self.config.d_sae, self.config.k),
                lr,
                self._batches(seed),
                self.steps,
                self._sample(seed).split(batch_size),
                Path(folder),
            )
            return formats.load(folder, hook=self.hook)

    def _sample(self, seed: int) -> Tensor:
        """What settles scales and centres: the first rows of the run."""
        parts, n_rows = [], 0
        for batch in self._batches(seed):
            parts.append(batch)
            n_rows += len(batch)
            if n_rows >= SAMPLE_ROWS:
                break
        return torch.cat(parts)

    @torch.no_grad()
    def _score(self, sae: SAE) -> dict[str, float]:
        found = reconstruction_metrics(sae, self.held.scored, held_out_only=False)  # type: ignore[arg-type]
        fired = torch.zeros(sae.d_sae, dtype=torch.bool, device=sae.device)
        for rows in self.rows[:COUNTED_ROWS].split(SAMPLE_ROWS):
            features = sae.encode_sparse(rows.float())
            fired[features.ids[features.values > 0].long()] = True
        figures = {name: float(getattr(found, name)) for name in ("fvu", "fvu_all", "l0", "over_dense_share")}
        figures["dead_share"] = float((~fired).float().mean())
        if self.losses is not None:
            sae.cfg = replace(sae.cfg, metadata=replace(sae.cfg.metadata, hook_name=self.hook))
            loss = self.losses.of(sae)
            figures |= {"delta_ce": loss.delta_ce, "ce_recovered": loss.ce_recovered}
        return figures

    def _training_rows(self, store: ActivationStore) -> Tensor:
        selection = Selection(exclude_flags=EXCLUDED, max_norm_ratio=10.0)
        return self._read(store, selection, self.config.rows)[1]

    def _held_out(self, store: ActivationStore) -> _Held:
        table = store.documents().query("held_out")
        halves = sorted(table["document"])[::2], sorted(table["document"])[1::2]
        if not halves[1]:
            raise InvalidInputError("The store has fewer than two held-out documents; capture more text.")
        flags = Selection(exclude_flags=RowFlag.BOS, require_flags=RowFlag.HELD_OUT)
        rows, values = self._read(store, flags, None)
        sequences = store.sequences().sort_values("start_row")
        documents = np.repeat(sequences["document"].to_numpy(), sequences["n_rows"].to_numpy())[rows]
        first = torch.from_numpy(np.isin(documents, halves[0])).to(values.device)
        return _Held(Rows(values[first], self.hook), Rows(values[~first], self.hook), frozenset(map(int, halves[1])))

    def _read(self, store: ActivationStore, select: Selection, n_rows: int | None) -> tuple[np.ndarray, Tensor]:
        batches = ShuffledBatches(
            store, [self.hook], SAMPLE_ROWS, 0, passes=1, tokens=n_rows, select=select, memory_bytes=2**28
        )
        ids, parts = [], []
        for rows, values in batches:
            ids.append(rows)
            parts.append(as_tensor(values[self.hook], store.dtype).flatten(1).to(self.device))
        if not parts:
            raise InvalidInputError(f"No row of {self.hook} is left to train or to measure on.")
        return np.concatenate(ids), torch.cat(parts)

    def _losses(self, store: ActivationStore, model: LossModel) -> SplicedLosses:
        windows, documents = held_out_windows(store, 2 * self.config.evaluate_tokens, 0)
        kept = [number for number, document in enumerate(documents) if document in self.held.scored_documents]
        mean = self.rows[:COUNTED_ROWS].float().mean(dim=0)
        return SplicedLosses(
            model, [windows[i] for i in kept], {self.hook: mean}, documents=[documents[i] for i in kept]
        )


def student_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95% interval of a mean, by Student's t; None for a single value."""
    n = len(values)
    if n < 2:
        return None
    half = T_975.get(n - 1, 1.96) * float(np.std(values, ddof=1)) / n**0.5
    return float(np.mean(values)) - half, float(np.mean(values)) + half


def _means(runs: Sequence[dict[str, float]]) -> dict[str, Any]:
    names = [name for name in runs[0] if name != "seed"]
    by_name = {name: [run[name] for run in runs] for name in names}
    return {
        **{name: float(np.mean(values)) for name, values in by_name.items()},
        **{f"{name}_interval": student_interval(values) for name, values in by_name.items()},
    }


def compared(ours: Sequence[dict[str, float]], theirs: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Differences, ours less theirs, seed by seed: their mean and interval; and by name whether ours is better: below 0
    beyond the interval, for the dead share not above it."""
    names = [name for name in LOWER_IS_BETTER if name in ours[0]]
    found: dict[str, dict[str, Any]] = {}
    better: dict[str, bool] = {}
    for name in names:
        differences = [one[name] - other[name] for one, other in zip(ours, theirs, strict=True)]
        mean, interval = float(np.mean(differences)), student_interval(differences)
        found[name] = {"mean": mean, "interval": interval}
        better[name] = mean <= 0 if name == "dead_share" else interval is not None and interval[1] < 0
    return {"difference": found, "better": better}
