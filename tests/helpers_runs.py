"""A workspace with trainings in every state, made in a second or two."""

import json
import os
from pathlib import Path
from typing import Any

from helpers_training import HOOK, MemorySource, synthetic

from scope.errors import NonFiniteError
from scope.training import TrainConfig, train

SETTINGS: dict[str, Any] = {"d_sae": 32, "tokens": 2560, "batch_size": 128, "log_steps": 2, "checkpoint_steps": 5}


def trained_workspace(folder: Path) -> Path:
    """Two finished trainings, one that a NaN stopped after its checkpoint, one whose process was killed."""
    source = MemorySource(synthetic(600).rows)
    saes = folder / "saes"
    for k in (2, 4):
        train(source, HOOK, TrainConfig(k=k, **SETTINGS), saes / f"topk-{k}")
    stopped_training(folder, "diverged", NonFiniteError("A NaN in the activations of the document <b>'Alice'</b>."))
    stopped_training(folder, "killed", RuntimeError("no word of this"))
    (saes / ".killed.training" / "stopped.json").unlink()
    for name in ("train.jsonl", "checkpoint.safetensors"):
        os.utime(saes / ".killed.training" / name, (1, 1))
    return folder


def stopped_training(folder: Path, name: str, error: Exception) -> None:
    """A training that an error has stopped at its step 13."""

    def stop(done: int, total: int | None) -> None:
        if done >= 13 * 128:
            raise error

    try:
        source = MemorySource(synthetic(600).rows)
        train(source, HOOK, TrainConfig(k=3, **SETTINGS), folder / "saes" / name, progress=stop)
    except type(error):
        return
    raise AssertionError("it did not stop")


def write_lines(folder: Path, name: str, steps: range) -> None:
    """Append to the log of a run that looks as if it were under way."""
    work = folder / "saes" / f".{name}.training"
    work.mkdir(parents=True, exist_ok=True)
    config = {"d_sae": 32, "k": 3, "tokens": 10_000, "arch": "topk"}
    (work / "run.json").write_text(json.dumps({"config": config, "hook": HOOK, "d_in": 32, "source": None}))
    with open(work / "train.jsonl", "a") as file:
        for step in steps:
            line = {"step": step, "tokens": 100 * step, "loss": 1 / step, "fvu": 0.5 / step, "l0": 3.0,
                    "dead_share": 0.1, "learning_rate": 1e-3, "grad_norm": 0.2, "tokens_per_s": 500.0}  # fmt: skip
            file.write(json.dumps(line) + "\n")
