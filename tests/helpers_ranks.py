"""Training processes that are quick to start, alone or in pairs, for tests that compare, kill or break them.

A server imports torch once and forks for each job: n processes that find each other as torchrun's do. It speaks JSON
lines: it reads a job, answers the pids, and on the next line waits for the processes' ends and answers how they came.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from helpers_training import HOOK, MemorySource, synthetic

import scope
from activations.source import ActivationBatch
from scope.saes import formats
from scope.training import SweepRun, TrainConfig, TrainReport, sweep, train, train_sweep
from scope.training.trainer import SAETrainer, StepReport

__all__ = ["CASES", "CONFIG", "Ended", "Ranks", "Trainers", "config_of", "hooks_of", "source_of"]

PATIENCE_SECONDS = 600
"""A process that is still there then is taken to hang."""
OUT_HOOK = "blocks.1.hook_mlp_out"
CONFIG = TrainConfig(
    d_sae=96, k=4, tokens=12 * 64, batch_size=64, lr=3e-3, checkpoint_steps=4, log_steps=4, shuffle_bytes=2**18,
    dead_feature_tokens=65,
)  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "standard": {"arch": "standard"},
    "standard, free decoder": {"arch": "standard", "decoder_norm": "free"},
    "gated": {"arch": "gated"},
    "topk": {},
    "topk, uneven": {"d_sae": 97, "batch_size": 63, "tokens": 12 * 63, "k_anneal": 0.5},
    "batchtopk": {"arch": "batchtopk"},
    "jumprelu": {"arch": "jumprelu"},
    "jumprelu, quadratic": {"arch": "jumprelu", "sparsity_loss": "quadratic"},
    "matryoshka": {"arch": "matryoshka"},
    "frequency": {"arch": "batchtopk", "frequency_coefficient": 0.1, "frequency_cap": 0.05},
    "transcoder": {"arch": "transcoder"},
    "skip_transcoder": {"arch": "skip_transcoder", "activation": "topk"},
    "crosscoder": {"arch": "crosscoder", "activation": "jumprelu"},
    "clt": {"arch": "clt", "activation": "batchtopk"},
}
"""Settings that differ from `CONFIG`."""


class PairSource(MemorySource):
    """A `MemorySource` with a second hook, a fixed linear map of the first."""

    hooks = property(lambda self: (self.hook, OUT_HOOK))

    def batches(self, hooks: Any, batch_size: int, start: int = 0) -> Any:
        mixing = np.random.default_rng(5).normal(size=(32, 32)).astype(np.float32) / 6
        for batch in super().batches(hooks, batch_size, start):
            both = {self.hook: batch.activations[self.hook], OUT_HOOK: batch.activations[self.hook] @ mixing}
            norms = {hook: np.linalg.norm(values, axis=1) for hook, values in both.items()}
            wanted = {hook: both[hook] for hook in hooks}
            yield ActivationBatch(batch.rows, wanted, batch.flags, {hook: norms[hook] for hook in hooks})


def source_of(bad_row: int | None = None) -> PairSource:
    rows = synthetic(1000).rows
    if bad_row is not None:
        rows[bad_row, 3] = torch.nan
    return PairSource(rows)


def config_of(**changed: Any) -> TrainConfig:
    return replace(CONFIG, **changed)


def hooks_of(arch: str) -> dict[str, Any]:
    """What is read and written by an architecture."""
    both = [HOOK, OUT_HOOK]
    return {
        "crosscoder": {"hook": both},
        "clt": {"hook": both, "hook_out": both},
        "transcoder": {"hook": HOOK, "hook_out": OUT_HOOK},
        "skip_transcoder": {"hook": HOOK, "hook_out": OUT_HOOK},
    }.get(arch, {"hook": HOOK})


# ---- what processes do


def is_last() -> bool:
    return int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1


def run_cases(folder: str, names: list[str], parallel: str) -> dict[str, Any]:
    """Train each case; the first process leaves its SAE in a folder of its name."""
    resumed = {}
    for name in names:
        config = config_of(**CASES[name], parallel=parallel)
        report = train(source_of(), **hooks_of(config.arch), config=config, out=Path(folder) / name)
        resumed[name] = report.resumed_at
    return resumed


def run_one(
    out: str,
    settings: Mapping[str, Any],
    bad_row: int | None = None,
    dies_at: int | None = None,
    error: str | None = None,
) -> Any:
    """Train one SAE; with `dies_at` the last process is killed after so many steps, or fails with an error,
    or ("nan") gets a spoilt row."""

    source = source_of(bad_row)
    config = config_of(**settings)
    if dies_at is not None and is_last():
        step = SAETrainer.step

        def dying(trainer: SAETrainer, *arguments: Any) -> StepReport:
            if trainer.steps_done == dies_at:
                if error == "nan":
                    spoilt = arguments[0].clone()
                    spoilt[3, 5] = torch.nan
                    return step(trainer, spoilt, *arguments[1:])
                if error:
                    raise OSError(error)
                os.kill(os.getpid(), signal.SIGKILL)
            return step(trainer, *arguments)

        SAETrainer.step = dying  # type: ignore[method-assign]
    return facts(train(source, **hooks_of(config.arch), config=config, out=out))


def run_sweep(out: str, settings: Mapping[str, Any], values: Mapping[str, list[Any]]) -> Any:
    runs: list[SweepRun] = sweep(config_of(**settings), [HOOK], **values)
    return [facts(report) for report in train_sweep(source_of(), runs, out)]


def facts(report: TrainReport) -> dict[str, Any]:
    log = [{**line, "tokens_per_s": 0, "data_wait_share": 0} for line in report.log]
    return {"resumed_at": report.resumed_at, "log": log, "fingerprint": formats.load(report.path).fingerprint}


JOBS: dict[str, Callable[..., Any]] = {"cases": run_cases, "one": run_one, "sweep": run_sweep}


# ---- starting them


class Ended(NamedTuple):
    """How a process ended."""

    status: int
    """As of `os.waitpid`: a signal's number, or the exit code times 256."""
    said: Any
    """What its job returned, or `error` (type name) and `message`; None where it was killed."""


class Ranks:
    """The processes of one job."""

    def __init__(self, server: "Trainers", pids: list[int]) -> None:
        self._server, self.pids = server, pids

    def kill(self) -> None:
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)

    def wait(self) -> list[Ended]:
        """Wait for their ends; processes that hang are killed, and fail the test by their status."""
        timer = threading.Timer(PATIENCE_SECONDS, self.kill)
        timer.start()
        statuses = self._server.ask("")
        timer.cancel()
        reports = [self._server.folder / f"report-{rank}.json" for rank in range(len(statuses))]
        said = [json.loads(path.read_text()) if path.exists() else None for path in reports]
        return [Ended(*pair) for pair in zip(statuses, said, strict=True)]


class Trainers:
    """The server; a context manager.

    Args:
        folder: where processes leave their reports.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = os.pathsep.join([str(Path(scope.__file__).parents[1]), *sys.path])
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )

    def __enter__(self) -> "Trainers":
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.wait() == 0

    def ask(self, line: str) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(line, file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def start(self, job: str, processes: int = 1, **arguments: Any) -> Ranks:
        """Begin one of `JOBS` in so many processes."""
        return Ranks(self, self.ask(json.dumps([job, processes, arguments], default=str)))

    def run(self, job: str, processes: int = 1, **arguments: Any) -> list[Ended]:
        return self.start(job, processes, **arguments).wait()


def _child(folder: Path, rank: int, size: int, port: int, job: str, arguments: Mapping[str, Any]) -> None:
    if size > 1:
        os.environ |= {
            "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
    code = 0
    try:
        said = JOBS[job](**arguments)
    except BaseException as error:
        said = {"error": type(error).__name__, "message": str(error), "told": getattr(error, "told", None)}
        code = 3
    (folder / f"report-{rank}.json").write_text(json.dumps(said, default=str))
    if torch.distributed.is_initialized() and code == 0:
        torch.distributed.destroy_process_group()
    os._exit(code)


def _serve(folder: Path) -> None:
    def answer(content: Any) -> None:
        sys.stdout.write(json.dumps(content) + "\n")
        sys.stdout.flush()

    for line in sys.stdin:
        job, size, arguments = json.loads(line)
        for rank in range(size):
            (folder / f"report-{rank}.json").unlink(missing_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        pids = []
        for rank in range(size):
            pids.append(os.fork())
            if pids[-1] == 0:
                _child(folder, rank, size, port, job, arguments)
        answer(pids)
        sys.stdin.readline()
        answer([os.waitpid(pid, 0)[1] for pid in pids])


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    os.fsync = lambda descriptor: None  # type: ignore[assignment]  # it matters when the power fails, not here
    torch.set_num_threads(1)
    import torch._dynamo  # every optimiser asks for it, a second in each process

    _serve(Path(sys.argv[1]))
