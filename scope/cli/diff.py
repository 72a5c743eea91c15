"""`scope diff` and `scope quantisation`: what a fine-tuning, or a quantisation, changed inside a model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scope.cli._command import Outcome, command, progress_bar, say
from scope.cli._model import EmbeddingPlace, EmbeddingsOption, load_model
from scope.diffing.settings import ComparisonConfig, DiffConfig

if TYPE_CHECKING:
    from scope.saes.base import SAE

__all__ = ["register"]

DataOption = Annotated[
    list[Path] | None, typer.Option(help="The text: a parquet, jsonl or plain text file. By default the sample text.")
]
SaeOption = Annotated[
    list[str] | None,
    typer.Option(help="An SAE of the first model (a folder or an address); its features are compared. Repeatable."),
]
OutOption = Annotated[Path, typer.Option(help="The folder for the report, such as WORKSPACE/diffs/NAME.")]
DeviceOption = Annotated[str | None, typer.Option(help="Where the models run: cpu, cuda.")]
DtypeOption = Annotated[str, typer.Option(help="dtype in which both models compute: auto, float32, bfloat16.")]
KeepOption = Annotated[bool, typer.Option(help="Keep the two activation stores beside the report.")]


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""

    @command(app, "diff", config=DiffConfig)
    def diff(
        base: Annotated[str, typer.Argument(help="The model that both come from.")],
        tuned: Annotated[str, typer.Argument(help="The fine-tuned one, with the same tokenizer.")],
        out: OutOption,
        config: DiffConfig,
        data: DataOption = None,
        hook: Annotated[
            str | None,
            typer.Option(help="Of the crosscoder. By default the first SAE's, or the middle layer's residual stream."),
        ] = None,
        sae: SaeOption = None,
        control: Annotated[
            Path | None,
            typer.Option(
                help="The report of a control against BASE, on the same text and SAEs: what changed beyond it is told."
            ),
        ] = None,
        device: DeviceOption = None,
        embeddings: EmbeddingsOption = "device",
        dtype: DtypeOption = "auto",
        keep_captures: KeepOption = False,
    ) -> Outcome:
        """What a fine-tuning changed: layer by layer, feature by feature, and by a crosscoder over both models."""
        return _compare(
            base,
            tuned,
            out,
            config,
            data,
            hook,
            sae,
            device,
            dtype,
            embeddings,
            keep_captures,
            control=control,
            conclusions=False,
        )

    @command(app, "quantisation", config=ComparisonConfig)
    def quantisation(
        reference: Annotated[str, typer.Argument(help="The model with reference weights.")],
        quantised: Annotated[str, typer.Argument(help="The same model from a quantised file, such as a .gguf.")],
        out: OutOption,
        config: ComparisonConfig,
        data: DataOption = None,
        sae: SaeOption = None,
        device: DeviceOption = None,
        embeddings: EmbeddingsOption = "device",
        dtype: DtypeOption = "float32",
        keep_captures: KeepOption = False,
    ) -> Outcome:
        """What a quantisation changed: capture error by layer, features, and whether conclusions hold. No crosscoder is
        trained."""
        return _compare(
            reference,
            quantised,
            out,
            config,
            data,
            None,
            sae,
            device,
            dtype,
            embeddings,
            keep_captures,
            conclusions=True,
        )


def _compare(
    base: str,
    tuned: str,
    out: Path,
    config: ComparisonConfig,
    data: list[Path] | None,
    hook: str | None,
    saes: list[str] | None,
    device: str | None,
    dtype: str,
    embeddings: EmbeddingPlace,
    keep_captures: bool,
    *,
    conclusions: bool,
    control: Path | None = None,
) -> Outcome:
    from activations.text import TextSource
    from scope.diffing import Control, ModelPair, diff_models
    from scope.sample import sample_text

    text = TextSource(
        data or [sample_text()], shuffle_seed=config.shuffle_seed, max_document_tokens=config.document_tokens
    )
    text.check()
    opened = None if control is None else Control.open(control)
    dictionaries = _dictionaries(saes or [])
    models = []
    for name in (base, tuned):
        say(f"Loading {name}")
        models.append(load_model(name, device=device, dtype=dtype, embeddings=embeddings))
    pair = ModelPair.of(*models)
    for dictionary in dictionaries.values():
        dictionary.to(pair.base.device)
    bars: dict[str, Any] = {}

    def progress(what: str, done: int, total: int | None) -> None:
        if what not in bars:
            bars[what] = True
            say(f"{what} ({total:,} rows)" if total else what)
        bar(done, total)

    with progress_bar("Comparing") as bar:
        found = diff_models(
            pair, text, out, config, hook=hook, saes=dictionaries, control=opened, conclusions=conclusions,
            keep_captures=keep_captures, progress=progress,
        )  # fmt: skip
    data_out = {"report": str(out), "id": found.manifest["fingerprint"][:12], **found.figures}
    return Outcome(data_out, found.summary())


def _dictionaries(names: list[str]) -> "dict[str, SAE]":
    """By the names of their folders, told apart where two are the same."""
    from scope.saes.formats import load

    found: dict[str, SAE] = {}
    for name in names:
        short = Path(name).name or name
        found[short if short not in found else name] = load(name)
    return found
