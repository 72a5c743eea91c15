"""What the training page shows: runs, their logs as frames, and how good all SAEs of the workspace are.

No Dash, no torch.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from dashboards.artefacts import ARCHITECTURES
from dashboards.context import Context
from scope.errors import ScopeError
from scope.figures import METRICS, pareto_front, short_number
from scope.training.runs import LogReader, Run, RunState, read_quality

if TYPE_CHECKING:
    from scope.workspace import Entry

__all__ = ["MAX_SHOWN", "Trainings", "qualities", "settings_in_words"]

MAX_SHOWN = 8
"""Runs in one chart, at most: so many colours can be told apart."""
BY_ITSELF = 4
"""Runs that are shown where the address names none, beside those under way."""
COLUMNS = ["id", "name", "hook", "what", "l0", "fvu", "delta_ce", "dead_share", "held_out", "front", "note"]


class Trainings:
    """The runs of a workspace and their logs, each byte of which is read once."""

    def __init__(self, context: Context) -> None:
        self._workspace = context.workspace
        self._reader = LogReader()

    def runs(self) -> list[Run]:
        """All runs, those under way first."""
        return self._workspace.trainings()

    def chosen(self, runs: Sequence[Run], asked: str) -> list[Run]:
        """The runs that an address asks for (ids or names, separated by commas), at most `MAX_SHOWN`.

        Where it asks for none, those under way and the latest others.

        Raises:
            UnknownNameError: there is no such run.
        """
        names = [name for name in asked.split(",") if name]
        if names:
            by_name = {key: run for run in runs for key in (run.name, run.id)}
            picked = [by_name.get(name) or self._workspace.training(name) for name in dict.fromkeys(names)]
            return picked[:MAX_SHOWN]
        running = [run for run in runs if run.state is RunState.RUNNING]
        return [*running, *(run for run in runs if run not in running)][: max(len(running), BY_ITSELF)][:MAX_SHOWN]

    def last(self, run: Run) -> dict[str, Any]:
        """The last line of a run's log; empty where it has none yet."""
        lines = self._reader.read(run)
        return lines[-1] if lines else {}

    def frame(self, run: Run) -> pd.DataFrame:
        """A run's log: step, tokens, seconds, and the metrics that it has."""
        lines = self._reader.read(run)
        frame = pd.DataFrame(lines, columns=["step", "tokens", *METRICS] if lines else ["step", "tokens"])
        if lines:
            frame["seconds"] = frame["tokens"] / frame["tokens_per_s"].where(frame["tokens_per_s"] > 0)
        else:
            frame["seconds"] = []
        return frame

    def version(self, runs: Sequence[Run]) -> list[Any]:
        """Equal as long as there is nothing new to draw."""
        return [[run.id, run.state.value, self.last(run).get("step"), run.problem] for run in runs]


def settings_in_words(settings: Any) -> str:
    """ "TopK, 4,096 features, k = 32"."""
    arch = str(settings.get("arch") or settings.get("architecture") or "")
    words = [ARCHITECTURES.get(arch, arch)] if arch else []
    if settings.get("d_sae"):
        words.append(f"{int(settings['d_sae']):,} features")
    if settings.get("k"):
        words.append(f"k = {settings['k']}")
    return ", ".join(words)


def qualities(workspace: Any) -> pd.DataFrame:
    """L0 and FVU of every SAE of the workspace that says: held-out figures where they were saved, else those of the
    training rows. `front` marks what no other SAE of the same hook, measured alike, beats in both."""
    rows = []
    for entry in workspace.saes():
        if entry.problem is None:
            try:
                rows.append(_quality(entry))
            except (OSError, ValueError, ScopeError, TypeError):
                continue
    frame = pd.DataFrame([row for row in rows if row is not None], columns=COLUMNS)
    frame["front"] = False
    for _, group in frame.groupby(["hook", "held_out"], sort=False):
        frame.loc[group.index, "front"] = pareto_front(group["l0"].tolist(), group["fvu"].tolist())
    return frame.sort_values(["hook", "l0", "fvu"], ignore_index=True)


def _quality(entry: "Entry") -> dict[str, Any] | None:
    saved = read_quality(entry.path)
    trained = entry.manifest.get("training") or {}
    settings = _read(entry.path / "cfg.json")
    held_out = saved.get("fvu") is not None and saved.get("l0") is not None
    l0 = saved["l0"] if held_out else trained.get("train_l0")
    fvu = saved["fvu"] if held_out else trained.get("train_fvu")
    if not (l0 and fvu):
        return None
    metadata = settings.get("metadata") or {}
    training = metadata.get("training") or {}
    what = settings_in_words({**settings, "arch": training.get("arch") or settings.get("architecture")})
    measured = "held-out text" if held_out else "training rows"
    return {
        "id": entry.id,
        "name": entry.name,
        "hook": str(trained.get("hook") or metadata.get("hook_name") or "unknown"),
        "what": what,
        "l0": float(l0),
        "fvu": float(fvu),
        "delta_ce": saved.get("delta_ce"),
        "dead_share": saved.get("dead_share", trained.get("train_dead_share")),
        "held_out": held_out,
        "note": f"{entry.name}: fvu {short_number(fvu)} at l0 {short_number(l0)}, on {measured} ({what})",
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError:
        return {}
    return content if isinstance(content, dict) else {}
