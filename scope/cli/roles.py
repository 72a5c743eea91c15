"""`scope roles`: in whose turns, and on what kind of content, features of an index of chats fire."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scope.cli._command import Outcome, command

if TYPE_CHECKING:
    import pandas as pd

    from scope.features.index import FeatureIndex

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""

    @command(app, "roles")
    def roles(
        index: Annotated[Path, typer.Argument(help="A feature index of chats.")],
        feature: Annotated[
            int | None, typer.Option(help="One feature: its rate in each role's turns and on each kind of content.")
        ] = None,
        n: Annotated[int, typer.Option("--top", help="Features to list for each role and kind.", min=1)] = 5,
    ) -> Outcome:
        """Features by role (system, user, assistant, tool) and by kind of content (text, calls, answers, markup)."""
        from scope.features.index import FeatureIndex

        opened = FeatureIndex.open(index)
        if feature is not None:
            tables = {"roles": opened.by_role(feature), "kinds": opened.by_kind(feature)}
            facts = {"feature": feature, **{name: table.to_dict("records") for name, table in tables.items()}}
            return Outcome(facts, "\n\n".join(map(_rates, tables.values())))
        found = {str(condition): _found(opened, condition, n) for condition in _conditions(opened)}
        return Outcome(
            {"conditions": {name: table.to_dict("records") for name, table in found.items()}},
            "\n\n".join(_listed(name, table) for name, table in found.items()),
        )


def _conditions(index: "FeatureIndex") -> list[str]:
    """A condition for each role and kind, once the index is known to have them."""
    index.by_role(0)
    return [f"role:{name}" for name in index.roles] + [f"kind:{name}" for name in index.kinds]


def _found(index: "FeatureIndex", condition: str, n: int) -> "pd.DataFrame":
    """The features that fire there and not elsewhere."""
    return index.contrast(condition, n=n).table


def _rates(table: "pd.DataFrame") -> str:
    group = str(table.columns[0])
    lines = [f"{group:<18}{'tokens':>10}{'firings':>10}{'per 1,000':>11}  95%"]
    for row in table.to_dict("records"):
        low, high = 1000 * row["rate_low"], 1000 * row["rate_high"]
        figures = f"{row['n_rows']:>10,}{row['n_firings']:>10,}{1000 * row['rate']:>11.3g}"
        lines.append(f"{row[group]:<18}{figures}  {low:.3g} to {high:.3g}")
    return "\n".join(lines)


def _listed(condition: str, table: "pd.DataFrame") -> str:
    lines = [f"{condition}, against the rest (firings per 1,000 tokens)"]
    lines += [_line(row) for row in table.to_dict("records")]
    return "\n".join(lines if len(table) else [*lines, "  no feature fires more often there"])


def _line(row: dict[Any, Any]) -> str:
    rates = f"{1000 * row['rate_a']:>8.3g} against {1000 * row['rate_b']:<8.3g}"
    return f"  {row['feature']:>7}  {rates} z {row['z']:<6.3g} {row['top_token']!r}"
