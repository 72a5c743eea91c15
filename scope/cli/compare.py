"""`scope compare`: which features two dictionaries share."""

from pathlib import Path
from typing import Annotated, Any

import typer

from scope.cli._command import Outcome, command, progress_bar

__all__ = ["register"]

SHOWN = 10


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""

    @command(app, "compare")
    def compare(
        a: Annotated[
            str, typer.Argument(help="An SAE (a folder or an address), or the folder or checkpoint of a training.")
        ],
        b: Annotated[
            str, typer.Argument(help="Another of the same activations; the later one, where there is a time.")
        ],
        threshold: Annotated[float, typer.Option(help="Cosine from which two features count as the same.")] = 0.7,
        index_a: Annotated[
            Path | None, typer.Option(help="The index of A; with one of B over the same text, firings are correlated.")
        ] = None,
        index_b: Annotated[Path | None, typer.Option(help="The index of B.")] = None,
        device: Annotated[str, typer.Option(help="Where the cosines are computed: cpu, cuda.")] = "cpu",
    ) -> Outcome:
        """Match the features of two dictionaries: those that both have, those that only one has, those that split."""
        from scope.errors import InvalidInputError
        from scope.features.compare import decoder_of, match
        from scope.features.index import FeatureIndex

        if (index_a is None) != (index_b is None):
            raise InvalidInputError("Give both --index-a and --index-b, or neither.")
        indexes = (FeatureIndex.open(index_a), FeatureIndex.open(index_b)) if index_a and index_b else None
        with progress_bar("Comparing") as progress:
            found = match(
                decoder_of(_checkpoint(a)),
                decoder_of(_checkpoint(b)),
                threshold=threshold,
                indexes=indexes,
                progress=progress,
                device=device,
            )
        return Outcome({"a": a, "b": b, **found.to_dict(), **_lists(found)}, _text(found))


def _checkpoint(name: str) -> str:
    """The checkpoint in a training's folder; else the name itself."""
    from scope.training.runs import CHECKPOINT_NAME

    inside = Path(name) / CHECKPOINT_NAME
    return str(inside) if inside.is_file() else name


def _lists(found: Any) -> dict[str, Any]:
    return {
        "pairs": found.matched.to_dict("records"),
        "only_a": found.unique_a["feature"].tolist(),
        "only_b": found.unique_b["feature"].tolist(),
        "split": found.splits.to_dict("records"),
        "merged": found.merges.to_dict("records"),
    }


def _text(found: Any) -> str:
    figures = found.to_dict()
    lines = [
        f"{figures['matched']:,} features match (each other's nearest decoder row, cosine {found.threshold:g} or "
        f"more), of {figures['n_a']:,} in A and {figures['n_b']:,} in B.",
        f"{figures['unique_a']:,} only in A, {figures['unique_b']:,} only in B; {figures['splits']:,} of A are several "
        f"in B, {figures['merges']:,} of B are several in A.",
        f"Mean cosine to the nearest: {figures['mean_best_cosine_a']:.3f} from A, "
        f"{figures['mean_best_cosine_b']:.3f} from B.",
    ]
    if figures["mean_correlation"] is not None:
        lines.append(f"Mean correlation of matched features' firings: {figures['mean_correlation']:.3f}.")
    for feature, parts in found.splits[["feature", "parts"]].head(SHOWN).itertuples(index=False):
        lines.append(f"  A {feature} -> B {', '.join(map(str, parts))}")
    return "\n".join(lines)
