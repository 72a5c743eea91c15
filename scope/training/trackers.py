"""Where else the lines of a run log go: TensorBoard and Weights & Biases, both only when asked for.

The run log itself (`train.jsonl`) is always written and is what the dashboard reads. A tracker repeats its figures:

1. `require_trackers` answers for an unknown name or a missing package before anything is computed; it imports neither.
2. `open_tracker` starts one for a run. TensorBoard's files lie in the folder `tensorboard/NAME` beside the SAE. wandb
   keeps its own folder there too, and follows its environment: WANDB_MODE=offline writes to disk alone, WANDB_PROJECT
   names the project ("scope" otherwise).
3. A run that is taken up from a checkpoint goes on in the same place: TensorBoard drops what came after the
   checkpoint, wandb gets the run's id again (`key`).

A tracker that fails during a run is left out with a warning: no training is lost to one.
"""

import importlib.util
import logging
import math
import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from scope.errors import InvalidInputError, MissingDependencyError, UnknownNameError

__all__ = ["TRACKERS", "Tracker", "Trackers", "open_tracker", "require_trackers"]

TRACKERS = ("tensorboard", "wandb")
"""Names that `--tracker` takes; each is the name of the package, too."""
PROJECT = "scope"
log = logging.getLogger(__name__)


@runtime_checkable
class Tracker(Protocol):
    """Takes the lines of a run log."""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Take note of the figures of a step."""
        ...

    def close(self) -> None:
        """Write what is left."""
        ...


def require_trackers(names: Iterable[str]) -> tuple[str, ...]:
    """The names, each once.

    Raises:
        UnknownNameError: there is no such tracker.
        MissingDependencyError: its package is not installed.
    """
    wanted = tuple(dict.fromkeys(names))
    for name in wanted:
        if name not in TRACKERS:
            raise UnknownNameError("tracker", name, TRACKERS)
        if importlib.util.find_spec(name) is None:
            raise MissingDependencyError(name, "trackers", f"--tracker {name}")
    return wanted


def open_tracker(
    name: str, out: Path | None, settings: Mapping[str, Any], key: str | None = None, first_step: int = 0
) -> Tracker:
    """Start a tracker for the run that makes `out`.

    Args:
        name: one of `TRACKERS`, whose package is there (`require_trackers`).
        out: the SAE's folder; None, for a run that is kept in memory, stands for "sae" in the current folder.
        settings: what the run is, JSON-able.
        key: what stands for the run where it is taken up again; None makes one.
        first_step: steps that an earlier call has done.

    Raises:
        InvalidInputError: the tracker cannot be started, such as wandb without an account or WANDB_MODE=offline.
    """
    out = (out or Path("sae")).absolute()
    start = _TensorBoard if name == "tensorboard" else _Wandb
    try:
        return start(out, settings, key or secrets.token_hex(8), first_step)
    except Exception as error:
        hint = " Log in with `wandb login`, or set WANDB_MODE=offline." if name == "wandb" else ""
        raise InvalidInputError(f"The tracker {name} cannot be started: {error}.{hint}") from error


class Trackers:
    """Some trackers as one. One that fails is left out from then on, with a warning."""

    def __init__(self, trackers: Mapping[str, Tracker]) -> None:
        self._open = dict(trackers)

    def add(self, name: str, tracker: Tracker) -> None:
        """Take in one more."""
        self._open[name] = tracker

    def log(self, line: Mapping[str, Any]) -> None:
        """Hand a line of the run log on: its finite numbers, at its step."""
        figures = {
            name: float(value)
            for name, value in line.items()
            if name != "step" and isinstance(value, int | float) and math.isfinite(value)
        }
        for name, tracker in list(self._open.items()):
            try:
                tracker.log(line["step"], figures)
            except Exception as error:
                log.warning("The tracker %s failed and is left out from here on: %s", name, error)
                del self._open[name]

    def close(self) -> None:
        """End all of them."""
        for name, tracker in self._open.items():
            try:
                tracker.close()
            except Exception as error:
                log.warning("The tracker %s could not be closed: %s", name, error)
        self._open.clear()


class _TensorBoard:
    def __init__(self, out: Path, settings: Mapping[str, Any], key: str, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = out.parent / "tensorboard" / out.name
        self._writer: Any = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)
        text = "\n".join(f"    {name}: {value}" for name, value in settings.items())
        self._writer.add_text("settings", text, global_step=first_step)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, global_step=step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, out: Path, settings: Mapping[str, Any], key: str, first_step: int) -> None:
        import wandb

        out.parent.mkdir(parents=True, exist_ok=True)
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=out.name,
            id=key,
            resume="allow",
            reinit="create_new",  # a sweep has several at once
            config=dict(settings),
            dir=str(out.parent),
        )

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        self._run.finish()
