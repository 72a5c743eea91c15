"""`scope denoise` captures text diffusion step by step, `scope denoising` reports what happens over the steps.

A command of its own beside `scope capture`: prompts are generated, not read, and most of what `scope capture` asks for
(windows, chats, which tokens are rows, appending, engines) has no meaning there.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from activations.spec import StorageDtype
from scope.cli._command import Outcome, command, progress_bar, say
from scope.cli._model import EmbeddingsOption, TrustOption, load_model
from scope.errors import InvalidInputError

if TYPE_CHECKING:
    import pandas as pd

    from activations.store import ActivationStore
    from scope.features.index import FeatureIndex
    from scope.models import LanguageModel

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""

    @command(app, "denoise")
    def denoise(
        model: Annotated[str, typer.Option(help="A model that denoises: a Hugging Face id or a local folder.")],
        data: Annotated[
            list[Path],
            typer.Option(
                help="Prompts: a jsonl, parquet or plain text file. Columns suffix (text) and gap (tokens) make one to "
                "be filled in the middle. May be repeated."
            ),
        ],
        hook: Annotated[
            list[str], typer.Option(help="A hook of the denoiser, such as blocks.8.hook_resid_post. May be repeated.")
        ],
        out: Annotated[
            str, typer.Option(help="The store to make, to go on with, or to add hooks to: NAME.zarr or s3://….")
        ],
        seed: Annotated[int, typer.Option(help="Prompt n is generated with the seed SEED + n.")] = 0,
        max_new_tokens: Annotated[
            int | None, typer.Option(help="Tokens to generate for each prompt; by default what the model says.")
        ] = None,
        max_steps: Annotated[
            int | None, typer.Option(help="Steps for a canvas, at most; by default what the model says.")
        ] = None,
        max_rows: Annotated[int | None, typer.Option(help="Stop after this many rows.")] = None,
        text_column: Annotated[str, typer.Option(help="The column that holds the prompts.")] = "text",
        dtype: Annotated[
            StorageDtype | None, typer.Option(help="How activations are stored; bfloat16, or what the store has.")
        ] = None,
        rows_per_group: Annotated[
            int | None, typer.Option(help="Rows in a unit of work and commit: a power of two up to 65,536.")
        ] = None,
        revision: Annotated[str | None, typer.Option(help="Revision of a model from the hub.")] = None,
        device: Annotated[str | None, typer.Option(help="Such as cpu or cuda; by default the best there is.")] = None,
        compute_dtype: Annotated[
            str, typer.Option(help="dtype in which the model runs: auto, bfloat16 or float32.")
        ] = "auto",
        embeddings: EmbeddingsOption = "device",
        allow_download: Annotated[
            bool, typer.Option("--allow-download", help="Fetch the model from the hub if it is not here.")
        ] = False,
        trust_remote_code: TrustOption = False,
    ) -> Outcome:
        """Generate with a model that denoises, in its own loop, and keep what hooks see at every step: a row for each
        step and position of each canvas."""
        from activations.denoising import DenoisingSettings
        from activations.denoising_capture import capture_denoising
        from activations.text import TextSource

        def load() -> "LanguageModel":
            say(f"Loading {model}")
            return load_model(
                model,
                embeddings=embeddings,
                revision=revision,
                device=device,
                dtype=compute_dtype,
                allow_download=allow_download,
                trust_remote_code=trust_remote_code,
            )

        settings = DenoisingSettings(seed=seed, max_new_tokens=max_new_tokens, max_steps=max_steps)
        prompts = TextSource(data, text_column=text_column)
        with progress_bar("Denoising (rows)") as progress:
            report = capture_denoising(
                load,
                prompts,
                hook,
                out,
                settings=settings,
                max_rows=max_rows,
                dtype=dtype,
                rows_per_group=rows_per_group,
                progress=progress,
            )
        figures = report._asdict()
        store = figures.pop("store")
        kept = ("rows", "new_rows", "seconds", "resumed", "documents", "empty_documents")
        facts = {"store": str(store.path), "id": store.id, "hooks": list(store.hooks)}
        facts |= {name: figures[name] for name in kept}
        return Outcome(
            facts,
            f"{store.path} holds {report.rows:,} rows of {report.documents:,} generations; {report.new_rows:,} were "
            f"computed, in {report.seconds:,.0f} s. scope denoising {store.path} tells when tokens were committed.",
        )

    @command(app, "denoising")
    def denoising(
        source: Annotated[Path, typer.Argument(help="A store of scope denoise, or an index over one.")],
        feature: Annotated[int | None, typer.Option(help="Of an index: one feature, its rate at each step.")] = None,
        n: Annotated[int, typer.Option("--top", help="Of an index: early and late features to list.", min=1)] = 10,
        figure: Annotated[
            Path | None, typer.Option(help="Write the figure (rate or commits by step) as a page, FILE.html.")
        ] = None,
    ) -> Outcome:
        """At which steps tokens are committed and, of an index, which features fire early and which late."""
        from activations.store import ActivationStore
        from scope.features.denoising import commit_table, features_by_step, rate_by_step
        from scope.figures import commit_bars, step_rates

        opened = _opened(source)
        if feature is not None:
            index = _index(opened)
            rates, states = rate_by_step(index, feature), index.by_state(feature)
            _write(figure, lambda: step_rates(rates, title=f"Feature {feature}: how often it fires at each step"))
            facts = {"feature": feature, "steps": _records(rates), "states": _records(states)}
            return Outcome(facts, f"{_rates(rates, 'step')}\n\n{_rates(states, 'state')}")
        commits = commit_table(opened)
        _write(figure, lambda: commit_bars(commits))
        facts, text = {"commits": _records(commits)}, _commits(commits)
        if not isinstance(opened, ActivationStore):
            found = features_by_step(opened, n)
            facts["features"] = _records(found)
            text += f"\n\n{_features(found)}"
        return Outcome(facts, text)


def _opened(source: Path) -> "ActivationStore | FeatureIndex":
    from activations.layout import FORMAT
    from activations.manifest import read_manifest
    from activations.store import ActivationStore
    from scope.features.index import FeatureIndex

    is_store = read_manifest(source)["format"] == FORMAT
    return ActivationStore.open(source) if is_store else FeatureIndex.open(source)


def _index(opened: "ActivationStore | FeatureIndex") -> "FeatureIndex":
    from scope.features.index import FeatureIndex

    if isinstance(opened, FeatureIndex):
        return opened
    raise InvalidInputError(f"{opened.path} is a store, which has no features; give an index over it for --feature.")


def _write(path: Path | None, draw: Any) -> None:
    if path is None:
        return
    if path.suffix != ".html":
        raise InvalidInputError(f"--figure is {path}; expected the name of a page, FILE.html.")
    path.write_text(draw().to_html(include_plotlyjs=True), "utf-8")


def _records(table: "pd.DataFrame") -> list[dict[str, Any]]:
    """Rows, JSON-able: NaN becomes null."""
    return [
        {str(name): None if value != value else value for name, value in row.items()}
        for row in table.to_dict("records")
    ]


def _rates(table: "pd.DataFrame", group: str) -> str:
    lines = [f"{group:<12}{'tokens':>10}{'firings':>10}{'per 1,000':>11}  95%"]
    for row in table.to_dict("records"):
        figures = f"{row['n_rows']:>10,}{row['n_firings']:>10,}{1000 * row['rate']:>11.3g}"
        lines.append(f"{row[group]:<12}{figures}  {1000 * row['rate_low']:.3g} to {1000 * row['rate_high']:.3g}")
    return "\n".join(lines)


def _commits(table: "pd.DataFrame") -> str:
    lines = ["committed at       tokens   share  so far"]
    for row in table.to_dict("records"):
        name = "no step" if row["step"] < 0 else f"step {row['step']}"
        lines.append(f"{name:<15}{row['n_tokens']:>10,}{row['share']:>8.1%}{row['so_far']:>8.1%}")
    return "\n".join(lines)


def _features(table: "pd.DataFrame") -> str:
    lines = ["feature     when      z  mean step   firings"]
    for row in table.to_dict("records"):
        figures = f"{row['z']:>7.1f}{row['mean_step']:>11.2f}{row['n_firings']:>10,}"
        lines.append(f"{row['feature']:>7}{row['when']:>9}{figures}  {row['top_token']!r}")
    return "\n".join(lines if len(table) else [*lines, "no feature fires often enough to tell"])
