"""`scope demo`: the whole line on Gemma 3 270M and the sample text. A second call goes on with what is there."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scope.cli._command import Outcome, command, progress_bar, say
from scope.training.config import TrainConfig

if TYPE_CHECKING:
    from activations.store import ActivationStore
    from scope.models import LanguageModel
    from scope.saes.base import SAE
    from scope.sample import SampleSAE

__all__ = ["DemoConfig", "make_demo", "register"]

MODEL = "gemma-3-270m"
SMALL = "gemma-3-270m-topk"
"""Name of the SAE that the demo trains, and of its index."""


@dataclass(frozen=True)
class DemoConfig:
    """What the demo makes; the defaults take some minutes on two cores."""

    hook: str = "blocks.8.hook_resid_post"
    """The hook that is captured: the residual stream after the ninth of eighteen layers."""
    max_tokens: int = 120_000
    """Tokens to capture, BOS included."""
    context_size: int = 256
    """Tokens in a window."""
    max_document_tokens: int = 1024
    """Tokens of one document, so that many documents and all languages are there."""
    rows_per_group: int = 8192
    """Rows in a unit of work and commit."""
    d_sae: int = 2048
    """Features of the SAE."""
    k: int = 32
    """Features that fire on a token."""
    batch_size: int = 1024
    """Tokens in a training step."""
    passes: float = 12.0
    """How many times training sees each token."""
    evaluate_tokens: int = 2000
    """Held-out tokens for the cross-entropy."""
    shipped: bool = True
    """Take in the SAE that ships, with its examples over the whole sample, before another one is trained."""


class _Demo:
    """The steps, each of which is skipped when what it makes is there."""

    def __init__(self, folder: Path, config: DemoConfig) -> None:
        from scope.workspace import Workspace

        self.config = config
        self.workspace = Workspace(folder)
        self._model: LanguageModel | None = None

    @property
    def model(self) -> "LanguageModel":
        """The model, loaded when first needed."""
        if self._model is None:
            from scope.models import LanguageModel

            say(f"Loading {MODEL} (the first time it is converted, which takes about a minute)")
            self._model = LanguageModel.load(MODEL)
        return self._model

    def capture(self) -> "ActivationStore":
        from activations.capture import capture
        from activations.store import ActivationStore
        from activations.text import TextSource
        from scope.sample import SAMPLE_SEED, sample_text

        config = self.config
        path = self.workspace.path_for("activation-store", "gemma-3-270m-sample")
        if (path / "manifest.json").is_file():
            store = ActivationStore.open(path)
            if store.is_complete_for([config.hook]) and store.n_rows == config.max_tokens:
                return store
        text = TextSource(sample_text(), shuffle_seed=SAMPLE_SEED, max_document_tokens=config.max_document_tokens)
        with progress_bar("Capturing (rows)") as progress:
            report = capture(
                self.model,
                text,
                [config.hook],
                path,
                max_tokens=config.max_tokens,
                context_size=config.context_size,
                rows_per_group=config.rows_per_group,
                progress=progress,
            )
        return report.store

    def take_in(self, store: "ActivationStore", shipped: "SampleSAE") -> dict[str, Any]:
        """The SAE that ships, indexed over the store, and its excerpt with the text of its examples."""
        from activations.text import TextSource
        from scope.cli._shipped import copy_excerpt, copy_sae
        from scope.sample import SAMPLE_SEED, sample_text

        sae = copy_sae(shipped.path, self.workspace.path_for("sae", shipped.name))
        index, info = self.index(store, sae, shipped.name)
        excerpt = copy_excerpt(shipped.excerpt, self.workspace.path_for("feature-excerpt", shipped.name))
        excerpt.require_sae(info["sae"]["fingerprint"])
        if not excerpt.has_text:
            model = self.model
            with progress_bar("Reading the sample (documents)") as progress:
                excerpt.read_text(TextSource(sample_text(), shuffle_seed=SAMPLE_SEED), model, progress)
        facts = {"sae": str(sae), "index": str(index), "excerpt": str(excerpt.path), "tokens": excerpt.n_rows}
        return {**facts, "features": excerpt.d_sae}

    def train(self, store: "ActivationStore") -> tuple["SAE", Path]:
        from scope.cli._steps import finished_sae, train_sae

        config = self.config
        path = self.workspace.path_for("sae", SMALL)
        tokens = round(config.passes * store.n_rows)
        settings = TrainConfig(d_sae=config.d_sae, k=config.k, batch_size=config.batch_size, tokens=tokens)
        sae = finished_sae(path, store, config.hook, settings)
        return sae or train_sae(store, config.hook, settings, path).sae, path

    def measure(self, sae: "SAE", path: Path, store: "ActivationStore") -> dict[str, Any]:
        from scope.cli._steps import measure_sae
        from scope.training.evaluate import read_quality

        kept = read_quality(path)
        # Splicing the baselines in too would double the time; `scope evaluate` does it.
        return kept or measure_sae(sae, path, store, self.model, self.config.evaluate_tokens, baselines=False).to_dict()

    def index(self, store: "ActivationStore", sae_folder: Path, name: str = SMALL) -> tuple[Path, dict[str, Any]]:
        from scope.cli._steps import index_sae
        from scope.features.index import FeatureIndex

        path = self.workspace.path_for("feature-index", name)
        if (path / "manifest.json").is_file():
            return path, FeatureIndex.open(path).info()
        return path, index_sae(store, sae_folder, path, self.model).info()


def make_demo(folder: Path, config: DemoConfig | None = None) -> Outcome:
    """Make the demo's workspace, or what is missing of it."""
    from scope.sample import sample_sae

    started = time.monotonic()
    demo = _Demo(folder, config or DemoConfig())
    store = demo.capture()
    shipped = sample_sae() if demo.config.shipped else None
    taken_in = None if shipped is None else demo.take_in(store, shipped)
    sae, sae_folder = demo.train(store)
    quality = demo.measure(sae, sae_folder, store)
    index_folder, info = demo.index(store, sae_folder)
    seconds = time.monotonic() - started
    data = {
        "workspace": str(folder),
        "store": str(store.path),
        "sae": str(sae_folder),
        "index": str(index_folder),
        "rows": store.n_rows,
        "features": sae.d_sae,
        "firings": info["n_firings"],
        "seconds": round(seconds, 1),
        "shipped": taken_in,
        **{name: quality.get(name) for name in ("fvu", "fvu_all", "l0", "dead_share", "delta_ce", "ce_recovered")},
    }
    text = (
        f"\nMade in {seconds:.0f} s, in {folder}:\n"
        f"  store  {store.path}  {store.n_rows:,} tokens of {store.spec.model}, {demo.config.hook}\n"
        f"{_told(taken_in)}"
        f"  SAE    {sae_folder}  {sae.d_sae:,} features, {demo.config.k} a token\n"
        f"  index  {index_folder}  {info['n_firings']:,} firings\n"
        f"How good the SAE trained here is, on held-out documents: fvu {quality['fvu']:.4f}, l0 {quality['l0']:.1f}, "
        f"delta_ce {quality['delta_ce']:.3f} nats (recovered {quality['ce_recovered']:.1%})\n"
        f"Look at it: scope serve {folder}   then http://127.0.0.1:8050"
    )
    return Outcome(data, text)


def _told(taken_in: dict[str, Any] | None) -> str:
    if taken_in is None:
        return ""
    return (
        f"  SAE    {taken_in['sae']}  {taken_in['features']:,} features, which ships with the workbench\n"
        f"  index  {taken_in['index']}\n"
        f"         {taken_in['excerpt']}  its examples over {taken_in['tokens']:,} tokens\n"
    )


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""

    @command(app, "demo", config=DemoConfig)
    def demo(
        config: DemoConfig,
        workspace: Annotated[Path, typer.Argument(help="The folder to make.")] = Path("workspace"),
        serve: Annotated[bool, typer.Option("--serve/--no-serve", help="Serve the dashboard at the end.")] = True,
        host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
        port: Annotated[int, typer.Option(help="Port to listen at.")] = 8050,
    ) -> Outcome:
        """Capture, train, index and serve, on Gemma 3 270M and a sample text; goes on with what is there."""
        outcome = make_demo(workspace, config)
        if serve:
            from scope.cli.serve import serve_workspace

            say(outcome.text)
            serve_workspace(workspace, host, port)
        return outcome
