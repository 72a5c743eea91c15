"""`scope bench`: benchmarks against peers and floors, on this machine, in one run."""

from typing import Any

import typer

from scope.bench.settings import AttributeBench, CaptureBench, TrainBench
from scope.cli._command import Outcome, command, say

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command group to `app`."""
    bench = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Benchmarks against peers, in one run.")
    app.add_typer(bench, name="bench")

    @command(bench, "attribute", config=AttributeBench)
    def attribute(config: AttributeBench) -> Outcome:
        """Time and peak memory of a circuit graph, by the length of the prompt."""
        from scope.bench.attribute import bench_attribute

        figures = bench_attribute(config, say)
        lines = "\n".join(_table(graph) + "\n" for graph in figures["graphs"])
        return Outcome(figures, f"{_table({k: v for k, v in figures.items() if k != 'graphs'})}\n\n{lines}")

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
