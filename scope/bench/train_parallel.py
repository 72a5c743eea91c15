"""`scope bench parallel`: how much faster several processes train one SAE than one of them alone, in one run.

    torchrun --nproc-per-node 2 -m scope.cli bench parallel

1. *Input*: rows and weights of a dictionary as it is late in training (`scope.bench.synthetic`), as `scope bench train`
   has them; every process makes the same.
2. *Alone*: the first process trains on batches of B rows, the others wait.
3. *Together*, with --parallel data and with --parallel features: on batches of B rows (the same run, sooner), and of B
   rows for each process (a larger run in the same time). Each takes its turn in each round, and its best counts.

What is timed is the trainer's whole step, from an exchange of all processes to the next one after so many steps.
"""

import gc
import itertools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from scope.bench.machine import describe_machine
from scope.bench.settings import ParallelBench
from scope.bench.synthetic import DictionaryLike, dictionary_like
from scope.errors import InvalidInputError
from scope.training.config import TrainConfig
from scope.training.distributed import local_device, n_processes, team_for
from scope.training.team import ALONE, Team
from scope.training.trainer import SAETrainer

__all__ = ["bench_parallel"]

N_BATCHES = 4
LONG_DEAD = 10**9
DEAD_AFTER = 10_000_000
WARM_UP = 3
LEARNING_RATE = 1e-4
THRESHOLD_ROWS = 512


class _Contender(NamedTuple):
    """One way to train."""

    parallel: str | None
    """None: the first process alone."""
    batch_size: int
    """Rows of a batch, of all processes together."""


def bench_parallel(config: ParallelBench, say: Callable[[str], None]) -> dict[str, Any]:
    """Run the benchmark; all processes must call it.

    Args:
        config: what to run.
        say: is told what is measured next.

    Returns:
        Figures, JSON-able: tokens per second and peak memory of each contender, and `ratio_to_one` of each: how many
        times the tokens per second of one process alone. They are complete on the first process.

    Raises:
        InvalidInputError: torchrun did not start several processes.
    """
    if n_processes() == 1:
        raise InvalidInputError(
            "There is one process. Start several: torchrun --nproc-per-node 2 -m scope.cli bench parallel"
        )
    return _Bench(config, say).run()


class _Bench:
    """One run: the rows and the weights that all contenders start from."""

    def __init__(self, config: ParallelBench, say: Callable[[str], None]) -> None:
        self.config, self.say = config, say
        self.device = torch.device(local_device(config.device or ("cuda" if torch.cuda.is_available() else "cpu")))
        self.team = team_for("data", str(self.device))
        self.cuda = self.device.type == "cuda"
        self.d_in, self.d_sae, self.k, self.batch_size = config.shape(self.cuda)
        self.steps = config.steps or (20 if self.cuda else 4)
        say(f"Making rows of a dictionary of {self.d_sae:,} features")
        most = self.batch_size * self.team.size
        self.data = dictionary_like(self.d_in, self.d_sae, self.k, most, N_BATCHES, self.device)

    def run(self) -> dict[str, Any]:
        n = self.team.size
        contenders = {"one": _Contender(None, self.batch_size)}
        for parallel in ("data", "features"):
            contenders[parallel] = _Contender(parallel, self.batch_size)
            contenders[f"{parallel}_{n}_batches"] = _Contender(parallel, self.batch_size * n)
        rates: dict[str, list[float]] = {name: [] for name in contenders}
        peaks: dict[str, int | None] = {}
        dead = 0.0
        for number in range(self.config.rounds):
            for name, contender in contenders.items():
                self.say(f"Round {number + 1} of {self.config.rounds}: {name}")
                seconds, peaks[name], dead = self._time(contender)
                rates[name].append(contender.batch_size / seconds)
                self.say(f"  {rates[name][-1]:,.0f} tokens/s")
        best = {name: max(each) for name, each in rates.items()}
        return {
            **describe_machine(self.device),
            "processes": n,
            "arch": self.config.arch,
            "d_in": self.d_in,
            "d_sae": self.d_sae,
            "k": self.k,
            "batch_size": self.batch_size,
            "steps": self.steps,
            "rounds": self.config.rounds,
            "dead_share": dead / self.d_sae,
            "tokens_per_second": best,
            "peak_bytes": peaks,
            "ratio_to_one": {name: rate / best["one"] for name, rate in best.items() if name != "one"},
        }

    def _time(self, contender: _Contender) -> tuple[float, int | None, float]:
        """Seconds of a step, the most memory that it had allocated on this process's GPU, and dead features."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        took, dead = 0.0, 0.0
        if contender.parallel is not None or self.team.leads:
            team = ALONE if contender.parallel is None else team_for(contender.parallel, str(self.device))
            took, dead = self._steps(_trainer(self.config, self.data, contender, team, self.device), contender, team)
        self.team.same(0)
        peak = torch.cuda.max_memory_allocated(self.device) if self.cuda else None
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
        return max(took, 1e-9), peak, dead

    def _steps(self, trainer: SAETrainer, contender: _Contender, team: Team) -> tuple[float, float]:
        rows = [batch[: contender.batch_size] for batch in self.data.batches]
        parts = itertools.cycle([batch[team.part_of(len(batch))] for batch in rows])
        for _ in range(WARM_UP):
            trainer.step(next(parts))
        self._meet(team)
        started = time.perf_counter()
        for _ in range(self.steps):
            report = trainer.step(next(parts))
        self._meet(team)
        return (time.perf_counter() - started) / self.steps, float(report.dead)

    def _meet(self, team: Team) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)
        team.same(0)


@torch.no_grad()
def _trainer(
    bench: ParallelBench, data: DictionaryLike, contender: _Contender, team: Team, device: torch.device
) -> SAETrainer:
    """A trainer late in training, with this process's part of the weights."""
    d_sae, d_in = data.W_dec.shape
    k = bench.shape(device.type == "cuda")[2]
    config = TrainConfig(
        arch=bench.arch,
        d_sae=d_sae,
        k=k,
        tokens=contender.batch_size * 1_000_000,
        batch_size=contender.batch_size,
        lr=LEARNING_RATE,
        warmup=0.0,
        decay=0.0,
        dead_feature_tokens=DEAD_AFTER,
        device=str(device),
        parallel=contender.parallel or "data",
    )
    trainer = SAETrainer(config, d_in, team=team)
    trainer.initialise(data.batches[0])
    assert trainer.scale is not None
    sae, share = trainer.sae, team.features
    sae.W_enc.copy_(share.of(data.W_enc).T)
    sae.W_dec.copy_(share.of(data.W_dec))
    sae.b_enc.copy_(share.of(data.b_enc) * trainer.scale)
    if bench.arch == "jumprelu":
        rows = data.batches[0][:THRESHOLD_ROWS]
        pre = (rows - rows.mean(dim=0)) @ data.W_enc.T + data.b_enc
        sae.threshold.fill_(trainer.scale * float(pre.flatten().topk(k * len(rows)).values[-1]))
    since = torch.zeros(d_sae, dtype=torch.int64, device=device)
    since[d_sae - data.n_dead :] = LONG_DEAD
    trainer.tokens_since_fired.copy_(share.of(since))
    return trainer
