"""`scope bench`: benchmarks against peers and floors, on this machine, in one run."""

from typing import Any

import typer

from scope.bench.settings import CaptureBench, IndexBench, IndexBuildBench, TrainBench
from scope.cli._command import Outcome, command, progress_bar, say

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command group to `app`."""
    bench = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Benchmarks against peers, in one run.")
    app.add_typer(bench, name="bench")

    @command(bench, "capture", config=CaptureBench)
    def capture(config: CaptureBench) -> Outcome:
        """Capture's speed against the plain forward pass, TransformerBridge, SAELens and the disk."""
        from scope.bench.capture import bench_capture

        figures = bench_capture(config, say)
        return Outcome(figures, _table(figures))

    @command(bench, "train", config=TrainBench)
    def train(config: TrainBench) -> Outcome:
        """The training step's speed and memory against its floor, SAELens and sparsify."""
        from scope.bench.train import bench_train

        figures = bench_train(config, say)
        return Outcome(figures, _table(figures))

    @command(bench, "index-build", config=IndexBuildBench)
    def index_build(config: IndexBuildBench) -> Outcome:
        """How fast a feature index is built, against the SAE's own encode; bytes a firing, and memory."""
        from scope.bench.index_build import bench_index_build

        figures = bench_index_build(config, say)
        return Outcome(figures, _table(figures))

    @command(bench, "index", config=IndexBench)
    def index(config: IndexBench) -> Outcome:
        """How long each kind of question to a feature index takes, on a synthetic index."""
        from scope.bench.index import bench_index

        with progress_bar("Building the index") as progress:
            figures = bench_index(config, say, progress)
        return Outcome(figures.data(), figures.text())


def _table(figures: dict[str, Any]) -> str:
    lines = []
    for name, value in figures.items():
        if isinstance(value, dict):
            lines += [f"{name}:", *(f"  {key:<40}{_shown(item)}" for key, item in value.items())]
        else:
            lines.append(f"{name:<42}{_shown(value)}")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.2f}" if value < 100 else f"{value:,.0f}"
    return "not run" if value is None else str(value)
