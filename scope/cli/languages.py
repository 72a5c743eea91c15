"""`scope fertility`, `scope languages`: what languages cost in tokens, and how alike their translations are inside."""

from pathlib import Path
from typing import Annotated, Any

import typer

from scope.cli._command import Outcome, command, progress_bar
from scope.errors import InvalidInputError

__all__ = ["register"]

SHOWN = 8


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""

    @command(app, "fertility")
    def fertility(
        model: Annotated[str, typer.Argument(help="The model whose tokenizer is asked; its weights are not loaded.")],
        data: Annotated[
            list[Path] | None, typer.Option(help="The text, with a column language. By default the sample text.")
        ] = None,
        reference: Annotated[str, typer.Option(help="The language that others are compared with.")] = "en",
    ) -> Outcome:
        """Tokens per word, character and byte of each language, and what its translations cost more."""
        from activations.text import TextSource
        from scope.models.fertility import encoder_of
        from scope.models.fertility import fertility as measure
        from scope.sample import sample_text

        text = TextSource(data or [sample_text()])
        text.check()
        table = measure(encoder_of(model), text, reference)
        return Outcome({"model": model, "reference": reference, "languages": _rows(table)}, _fertility_text(table))

    @command(app, "languages")
    def languages(
        index: Annotated[Path, typer.Argument(help="A feature index of a text with pages in several languages.")],
        compared: Annotated[str, typer.Option("--languages", help="Two or more, separated by commas.")] = "en,de",
        store: Annotated[
            str | None,
            typer.Option(help="A store of the same text with hooks of several layers: similarity layer by layer."),
        ] = None,
        figure: Annotated[
            Path | None, typer.Option(help="With --store: draw similarity over the layers into this HTML file.")
        ] = None,
        hook: Annotated[
            list[str] | None, typer.Option(help="Of the store, in the order of the layers. By default all of it.")
        ] = None,
    ) -> Outcome:
        """Translations against random pairs: which features follow a text into another language, which are of one
        language, and how alike pages are layer by layer."""
        from activations.store import ActivationStore
        from scope.features.index import FeatureIndex
        from scope.features.translations import layer_similarity, shared_features

        opened = FeatureIndex.open(index)
        names = [name.strip() for name in compared.split(",") if name.strip()]
        if len(names) < 2:
            raise InvalidInputError(f"--languages is {compared!r}; expected two or more, such as en,de.")
        if figure is not None and store is None:
            raise InvalidInputError(
                "--figure draws similarity over the layers, which needs a --store with their hooks."
            )
        pairs = [(a, b) for place, a in enumerate(names) for b in names[place + 1 :]]
        features = {pair: shared_features(opened, *pair) for pair in pairs}
        layers = None
        if store is not None:
            with progress_bar("Hooks") as progress:
                layers = layer_similarity(opened, ActivationStore.open(store), names, hook, progress)
        if figure is not None:
            figure.write_text(_page(layers))
        data: dict[str, Any] = {
            "index": str(index),
            "pairs": [
                {"a": a, "b": b, "n_titles": table.attrs["n_titles"], **_counts(table), "features": _rows(table)}
                for (a, b), table in features.items()
            ],
            "layers": None if layers is None else _rows(layers),
        }
        return Outcome(data, _languages_text(features, layers))


def _page(layers: Any) -> str:
    """A figure for each pair of languages, one below the other; nothing is fetched."""
    from scope.figures import translation_lines

    parts = [
        translation_lines(own, title=f"How alike pages and their translations are: {a} and {b}").to_html(
            full_html=False, include_plotlyjs=number == 0
        )
        for number, ((a, b), own) in enumerate(layers.groupby(["a", "b"], sort=False))
    ]
    return "\n".join(['<!doctype html><meta charset="utf-8"><title>Languages</title>', *parts])


def _rows(table: Any) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = table.to_dict("records")
    return records


def _counts(table: Any) -> dict[str, int]:
    return {f"n_{kind}": int(count) for kind, count in table["kind"].value_counts().items() if kind}


def _fertility_text(table: Any) -> str:
    lines = [f"{'language':<14}{'per word':>9}{'per character':>15}{'per byte':>10}{'premium':>9}  titles"]
    for row in table.itertuples():
        known = row.premium == row.premium
        premium = f"{row.premium:>9.2f}  {row.n_titles}" if known else f"{'–':>9}  {row.n_titles}"
        lines.append(f"{row.language:<14}{row.per_word:>9.2f}{row.per_character:>15.3f}{row.per_byte:>10.3f}{premium}")
    return "\n".join(lines)


def _languages_text(features: dict[tuple[str, str], Any], layers: Any) -> str:
    lines = []
    for (a, b), table in features.items():
        counts = _counts(table)
        lines.append(
            f"{a} and {b}, {table.attrs['n_titles']} titles: {counts.get('n_shared', 0):,} features follow a text into "
            f"its translation, {counts.get(f'n_{a}', 0):,} are of {a}, {counts.get(f'n_{b}', 0):,} of {b}."
        )
        best = table[table["kind"] == "shared"].head(SHOWN)
        lines += [
            f"  {row.feature} {row.top_token!r}: on {row.both} titles in both, {row.expected:.1f} expected"
            for row in best.itertuples()
        ]
    if layers is not None:
        for row in layers.itertuples():
            lines.append(
                f"  {row.hook} {row.a}-{row.b}: translations {row.similarity:.3f}, random pairs {row.baseline:.3f} "
                f"[difference {row.difference_low:.3f}, {row.difference_high:.3f}], nearest is the translation "
                f"{row.nearest:.0%} (chance {row.chance:.0%})"
            )
    return "\n".join(lines)
