"""`scope bench`: benchmarks against peers and floors, on this machine, in one run."""

from pathlib import Path
from typing import Annotated, Any

import typer

from scope.bench.settings import (
    AttributeBench,
    CaptureBench,
    EmbeddingsBench,
    IndexBench,
    IndexBuildBench,
    ParallelBench,
    QualityBench,
    TrainBench,
    TunedCopy,
)
from scope.cli._command import Outcome, command, follows, progress_bar, say

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

    @command(bench, "embeddings", config=EmbeddingsBench)
    def embeddings(config: EmbeddingsBench) -> Outcome:
        """Memory saved and time lost where lookup tables lie on the host, on a random model with per-layer tables."""
        from scope.bench.embeddings import bench_embeddings

        figures = bench_embeddings(config, say)
        return Outcome(figures, _table(figures))

    @command(bench, "parallel", config=ParallelBench)
    def parallel(config: ParallelBench) -> Outcome:
        """How much faster several processes train one SAE than one alone:
        torchrun --nproc-per-node 2 -m scope.cli bench parallel"""
        from scope.bench.train_parallel import bench_parallel

        figures = bench_parallel(config, say)
        if follows():
            raise typer.Exit
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

    @command(bench, "dashboard")
    def dashboard(
        workspace: Annotated[Path, typer.Argument(help="The workspace whose dashboard is clicked through.")] = Path(
            "workspace"
        ),
        index: Annotated[str | None, typer.Option(help="The index, by id or name; by default the first one.")] = None,
        clients: Annotated[int, typer.Option(help="People who click at once.", min=1)] = 10,
        seconds: Annotated[float, typer.Option(help="How long they click.", min=0.1)] = 20.0,
    ) -> Outcome:
        """How fast pages of an index are answered while many people click and a model works in the background."""
        from scope.bench.dashboard import bench_dashboard

        figures = bench_dashboard(workspace, index, clients, seconds, say)
        return Outcome(figures, _table(figures), exit_code=1 if figures["errors"] else 0)

    @command(bench, "quality", config=QualityBench)
    def quality(
        store: Annotated[str, typer.Argument(help="The activation store: a folder or s3://BUCKET/NAME.")],
        config: QualityBench,
        model: Annotated[
            str | None, typer.Option(help="The store's model, where it is not found under its own name.")
        ] = None,
    ) -> Outcome:
        """What our trainer and SAELens's make of the same rows, at equal tokens and equal tuning."""
        from activations.store import ActivationStore
        from scope.bench.quality import bench_quality
        from scope.cli._steps import load_model_of

        opened = ActivationStore.open(store)
        language_model = load_model_of(opened, model, config.device) if config.evaluate_tokens else None
        figures = bench_quality(opened, language_model, config, say)
        return Outcome(figures, _table(figures))

    @command(bench, "tune", config=TunedCopy, required=("source",))
    def tune(
        out: Annotated[Path, typer.Option(help="The folder for the copy.")],
        config: TunedCopy,
    ) -> Outcome:
        """Fine-tune a copy of a model a little on one source of a text: something for `scope diff` to find."""
        from scope.bench.tuned import tuned_copy

        figures = tuned_copy(config, out, say)
        return Outcome({"model": str(out), **figures}, _table(figures))

    @command(bench, "requantise")
    def requantise(
        source: Annotated[str, typer.Argument(help="A .gguf file, or a packaged model such as gemma-3-270m.")],
        kind: Annotated[str, typer.Argument(help="The quantisation, such as Q8_0 or Q4_0.")],
        out: Annotated[Path, typer.Option(help="The .gguf file to make.")],
    ) -> Outcome:
        """Write a GGUF file again in another quantisation: something for `scope quantisation` to look at."""
        import tempfile

        from scope.bench.requantised import requantised
        from scope.models.loading import packaged_gguf

        with tempfile.TemporaryDirectory(prefix="scope-gguf-") as folder:
            file = Path(source) if source.endswith(".gguf") else packaged_gguf(source, Path(folder))
            figures = requantised(file, kind, out, say)
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
        return f"{value:.4g}" if abs(value) < 1 else f"{value:,.2f}" if value < 100 else f"{value:,.0f}"
    return "not run" if value is None else str(value)
