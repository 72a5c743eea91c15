"""`scope bench train`: our training step against its floor and its peers, in one run.

1. *Input*: rows and weights of a dictionary as it is late in training (`scope.bench.synthetic`): features that fire on
   half of the rows and on one in a million, and six in a hundred dead, so that AuxK is at work.
2. *Ours*: `SAETrainer.step`, all of it: scaling, encoder, selection, decoder, AuxK, gradients, clipping, Adam, decoder
   norms, counting. On a GPU in bfloat16 with float32 weights and moments, on a CPU in float32.
3. *Peers*, from the same weights on the same rows: SAELens's `SAETrainer.step` (autocast on a GPU), the same with its
   forward pass compiled, and, on a GPU where it is installed, sparsify's coder with fused Adam. Each takes its turn in
   each round, and its best counts; one that is not installed is not run.
4. *Floor* (`scope.bench.floor`).
5. On a GPU once more with rows that come from the host through `scope.training.prefetch`: the share of the speed that
   is left says whether the GPU waits for its input.
6. If asked for, both trainers' losses after a number of steps from an untrained start on the same batches.
"""

import importlib.util
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scope.bench import train_peers
from scope.bench.floor import Floor, measure_floor
from scope.bench.machine import PeakMemory, describe_machine
from scope.bench.settings import TrainBench
from scope.bench.synthetic import dictionary_like
from scope.training.config import TrainConfig
from scope.training.data import Batch
from scope.training.prefetch import Timed, on_device
from scope.training.trainer import SAETrainer

__all__ = ["bench_train"]

N_BATCHES = 4
LONG_DEAD = 10**9
DEAD_AFTER = 10_000_000
WARM_UP = 3
LEARNING_RATE = 1e-4
THRESHOLD_ROWS = 512
QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)

Step = Callable[[Tensor], Any]


def bench_train(config: TrainBench, say: Callable[[str], None]) -> dict[str, Any]:
    """Run the benchmark.

    Args:
        config: what to run.
        say: is told what is measured next.

    Returns:
        Figures, JSON-able: tokens per second and peak memory of each, `ratio_to_saelens`, `ratio_to_saelens_compiled`,
        `ratio_to_sparsify` and `ratio_to_floor` (None where one is not run), and what the rows were like.
    """
    return _Bench(config, say).run()


class _Bench:
    """One run: the rows and the weights that all contenders start from."""

    def __init__(self, config: TrainBench, say: Callable[[str], None]) -> None:
        self.config, self.say = config, say
        self.device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.cuda = self.device.type == "cuda"
        self.d_in, self.d_sae, self.k, self.batch_size = config.shape(self.cuda)
        self.steps = config.steps or (20 if self.cuda else 4)
        say(f"Making rows of a dictionary of {self.d_sae:,} features")
        self.data = dictionary_like(self.d_in, self.d_sae, self.k, self.batch_size, N_BATCHES, self.device)
        self.dead: int | None = None
        self.density: Tensor | None = None

    def run(self) -> dict[str, Any]:
        contenders = self._contenders()
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        peaks: dict[str, int | None] = dict.fromkeys(contenders)
        floors = []
        for number in range(self.config.rounds):
            for name, make in contenders.items():
                self.say(f"Round {number + 1} of {self.config.rounds}: {name}")
                with train_peers.without_wandb() if name != "ours" else nullcontext():
                    took, peaks[name] = self._time(make)
                seconds[name].append(took)
                self.say(f"  {self.batch_size / took:,.0f} tokens/s")
            floors.append(measure_floor(self.d_in, self.d_sae, self.k, self.batch_size, self.device))
        floor = min(floors, key=lambda measured: measured.seconds)
        best = {name: self.batch_size / min(times) for name, times in seconds.items()}
        return {
            **self._description(),
            **_figures(best, peaks, self.batch_size / floor.seconds),
            **_floor_figures(floor),
            "fed_from_host": self._fed_from_host(best["ours"]) if self.cuda else None,
            **self._losses(),
        }

    def _contenders(self) -> dict[str, Callable[[], Step]]:
        found: dict[str, Callable[[], Step]] = {"ours": self._our_step}
        if not self.config.with_peers:
            return found
        scale, arch = self._scale(), self.config.arch
        threshold = self._threshold() if arch == "jumprelu" else None
        if importlib.util.find_spec("sae_lens") and arch in train_peers.SAELENS_ARCHITECTURES:

            def saelens(compiled: bool = False) -> Step:
                return train_peers.saelens_step(self.data, scale, arch, self.k, LEARNING_RATE, compiled, threshold)

            found["saelens"] = saelens
            if self.cuda and self.config.with_compiled:
                found["saelens_compiled"] = lambda: saelens(compiled=True)
        if self.cuda and arch == "topk" and importlib.util.find_spec("sparsify"):
            found["sparsify"] = lambda: train_peers.sparsify_step(self.data, scale, self.k, LEARNING_RATE)
        return found

    def _time(self, make: Callable[[], Step]) -> tuple[float, int | None]:
        """Seconds of a step, and the most memory that it held."""
        memory = PeakMemory(self.device)
        step = make()
        batches = itertools.cycle(self.data.batches)
        for _ in range(WARM_UP):
            step(next(batches))
        self._wait()
        started = time.perf_counter()
        for _ in range(self.steps):
            step(next(batches))
        self._wait()
        took = (time.perf_counter() - started) / self.steps
        return took, memory.bytes()

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def _scale(self) -> float:
        norms = self.data.batches[0].float().norm(dim=-1)
        return float(self.d_in**0.5 / norms.mean())

    def _threshold(self) -> float:
        """The threshold for all features with which k of them fire on a row, for scaled rows."""
        rows = self.data.batches[0][:THRESHOLD_ROWS]
        pre = (rows - rows.mean(dim=0)) @ self.data.W_enc.T + self.data.b_enc
        return self._scale() * float(pre.flatten().topk(self.k * len(rows)).values[-1])

    def _trainer(self) -> SAETrainer:
        config = TrainConfig(
            arch=self.config.arch,
            d_sae=self.d_sae,
            k=self.k,
            tokens=self.batch_size * 1_000_000,
            batch_size=self.batch_size,
            lr=LEARNING_RATE,
            warmup=0.0,
            decay=0.0,
            dead_feature_tokens=DEAD_AFTER,
            device=str(self.device),
        )
        trainer = SAETrainer(config, self.d_in)
        trainer.initialise(self.data.batches[0])
        assert trainer.scale is not None
        with torch.no_grad():
            trainer.sae.W_enc.copy_(self.data.W_enc.T)
            trainer.sae.W_dec.copy_(self.data.W_dec)
            trainer.sae.b_enc.copy_(self.data.b_enc * trainer.scale)
            if self.config.arch == "jumprelu":
                trainer.sae.threshold.fill_(self._threshold())
        trainer.tokens_since_fired[self.d_sae - self.data.n_dead :] = LONG_DEAD
        return trainer

    def _our_step(self) -> Step:
        trainer = self._trainer()

        def step(batch: Tensor) -> Any:
            report = trainer.step(batch)
            if trainer.steps_done == WARM_UP + self.steps:
                self.dead, self.density = int(report.dead), trainer.density
            return report

        return step

    def _fed_from_host(self, resident: float) -> dict[str, float]:
        """Our speed with every batch coming from the host, and its share of the speed with batches on the device."""
        self.say("Ours, rows coming from the host")
        host = [batch.to("cpu", torch.bfloat16) for batch in self.data.batches]

        def stream() -> Iterator[Batch]:
            for values in itertools.islice(itertools.cycle(host), WARM_UP + self.steps):
                yield Batch(np.arange(len(values)), values)

        trainer, started, waited = self._trainer(), 0.0, 0.0
        batches = Timed(on_device(stream(), self.device))
        for number, batch in enumerate(batches):
            trainer.step(batch.values)
            if number + 1 == WARM_UP:
                self._wait()
                started, waited = time.perf_counter(), batches.waited
        self._wait()
        took = time.perf_counter() - started
        rate = self.steps * self.batch_size / took
        return {
            "tokens_per_second": rate,
            "share_of_resident": rate / resident,
            "data_wait_share": (batches.waited - waited) / took,
        }

    def _losses(self) -> dict[str, Any]:
        n_steps = self.config.loss_steps
        if not n_steps or not importlib.util.find_spec("sae_lens"):
            return {}
        self.say(f"Training ours and SAELens's for {n_steps:,} steps on the same batches")
        with train_peers.without_wandb():
            ours, theirs = train_peers.losses_on_the_same_batches(
                self.config.arch, self.d_in, self.d_sae, self.k, self.batch_size, n_steps, self.device
            )
        return {"loss_steps": n_steps, "loss": ours, "saelens_loss": theirs, "loss_ratio_to_saelens": ours / theirs}

    def _description(self) -> dict[str, Any]:
        assert self.density is not None
        assert self.dead is not None
        live = self.density[self.density > 0]
        return {
            **describe_machine(self.device),
            "arch": self.config.arch,
            "d_in": self.d_in,
            "d_sae": self.d_sae,
            "k": self.k,
            "batch_size": self.batch_size,
            "steps": self.steps,
            "rounds": self.config.rounds,
            "dead_share": self.dead / self.d_sae,
            "firing_density": {f"q{int(100 * q)}": float(live.quantile(q)) for q in QUANTILES},
            "rows_counted": self.batch_size * (WARM_UP + self.steps),
        }


def _figures(best: dict[str, float], peaks: dict[str, int | None], floor: float) -> dict[str, Any]:
    def ratio(name: str) -> float | None:
        return best["ours"] / best[name] if name in best else None

    ours, saelens = peaks["ours"], peaks.get("saelens")
    return {
        "tokens_per_second": {**best, "floor": floor},
        "peak_bytes": peaks,
        "memory_ratio_to_saelens": ours / saelens if ours and saelens else None,
        "ratio_to_saelens": ratio("saelens"),
        "ratio_to_saelens_compiled": ratio("saelens_compiled"),
        "ratio_to_sparsify": ratio("sparsify"),
        "ratio_to_floor": best["ours"] / floor,
    }


def _floor_figures(floor: Floor) -> dict[str, Any]:
    parts = {name: 1000 * getattr(floor, name) for name in ("encode", "output_pass", "gathers", "optimiser")}
    return {"floor_milliseconds": parts, "bytes_per_second": floor.bytes_per_second}
