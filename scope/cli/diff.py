"""`scope diff` and `scope quantisation`: what a fine-tuning, or a quantisation, changed inside a model."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from scope.cli._command import Outcome, command, progress_bar, say
from scope.cli._model import EmbeddingPlace, EmbeddingsOption, load_model
from scope.diffing.settings import ComparisonConfig, DiffConfig, QuantisationConfig

if TYPE_CHECKING:
    from activations.text import TextSource
    from scope.diffing.report import Progress
    from scope.diffing.stored import DiffReport
    from scope.models import LanguageModel
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
        from scope.diffing import Control, ModelPair, diff_models

        text, dictionaries = _read(config, data, sae)
        opened = None if control is None else Control.open(control)
        pair = ModelPair.of(*(_load(name, device, dtype, embeddings) for name in (base, tuned)))
        for dictionary in dictionaries.values():
            dictionary.to(pair.base.device)
        with _progress() as progress:
            found = diff_models(
                pair, text, out, config, hook=hook, saes=dictionaries, control=opened, keep_captures=keep_captures,
                progress=progress,
            )  # fmt: skip
        return _told(out, found)

    @command(app, "quantisation", config=QuantisationConfig)
    def quantisation(
        reference: Annotated[str, typer.Argument(help="The model with reference weights.")],
        quantised: Annotated[
            list[str], typer.Argument(help="The same model from a quantised file, such as a .gguf; or several.")
        ],
        out: Annotated[
            Path, typer.Option(help="The folder for the report; of several, for a folder each by the file's name.")
        ],
        config: QuantisationConfig,
        data: DataOption = None,
        sae: SaeOption = None,
        device: DeviceOption = None,
        embeddings: EmbeddingsOption = "device",
        dtype: DtypeOption = "float32",
        keep_captures: KeepOption = False,
    ) -> Outcome:
        """What a quantisation changed: capture error by layer, features, and whether conclusions hold. No crosscoder is
        trained, and of several files the reference runs once."""
        from scope.diffing import quantisation_reports
        from scope.diffing.several import names_of
        from scope.diffing.summary import conclusions_table
        from scope.models.loading import find_model

        files = names_of(quantised)
        for file in (reference, *quantised):
            find_model(file)
        text, dictionaries = _read(config, data, sae)
        model = _load(reference, device, dtype, embeddings)
        for dictionary in dictionaries.values():
            dictionary.to(model.device)
        with _progress() as progress:
            reports = quantisation_reports(
                model, files, lambda name: _load(name, device, dtype, embeddings), text, out, config, saes=dictionaries,
                keep_captures=keep_captures, progress=progress,
            )  # fmt: skip
        if len(reports) == 1:
            return _told(out, next(iter(reports.values())))
        told = {name: _told(out / name, report).data for name, report in reports.items()}
        words = [*(report.summary() for report in reports.values()), conclusions_table(told)]
        return Outcome({"reports": told}, "\n\n".join(words))


def _read(
    config: ComparisonConfig, data: list[Path] | None, saes: list[str] | None
) -> "tuple[TextSource, dict[str, SAE]]":
    from activations.text import TextSource
    from scope.sample import sample_text

    text = TextSource(
        data or [sample_text()], shuffle_seed=config.shuffle_seed, max_document_tokens=config.document_tokens
    )
    text.check()
    return text, _dictionaries(saes or [])


def _load(name: str, device: str | None, dtype: str, embeddings: EmbeddingPlace) -> "LanguageModel":
    say(f"Loading {name}")
    return load_model(name, device=device, dtype=dtype, embeddings=embeddings)


@contextmanager
def _progress() -> "Iterator[Progress]":
    told: set[str] = set()

    def progress(what: str, done: int, total: int | None) -> None:
        if what not in told:
            told.add(what)
            say(f"{what} ({total:,} rows)" if total else what)
        bar(done, total)

    with progress_bar("Comparing") as bar:
        yield progress


def _told(out: Path, found: "DiffReport") -> Outcome:
    data = {"report": str(out), "id": found.manifest["fingerprint"][:12], **found.figures}
    return Outcome(data, found.summary())


def _dictionaries(names: list[str]) -> "dict[str, SAE]":
    """By the names of their folders, told apart where two are the same."""
    from scope.saes.formats import load

    found: dict[str, SAE] = {}
    for name in names:
        short = Path(name).name or name
        found[short if short not in found else name] = load(name)
    return found
