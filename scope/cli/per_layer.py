"""`scope per-layer`: what each layer's own embedding table wrote into the residual stream, token by token, and what
that did for a next token."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from scope.cli._command import Outcome, command
from scope.cli._model import EmbeddingsOption, load_model
from scope.cli.sae import SAE_HELP, DownloadOption

if TYPE_CHECKING:
    import pandas as pd

    from scope.attribution.per_layer import PerLayerReport
    from scope.attribution.tables import TableEffects

__all__ = ["register"]

SHOWN = 20


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""

    @command(app, "per-layer")
    def per_layer(
        model: Annotated[str, typer.Argument(help="A model with per-layer embeddings: Gemma 3n, Gemma 4 E2B or E4B.")],
        prompt: Annotated[str, typer.Option(help="The text.")],
        sae: Annotated[
            list[str] | None,
            typer.Option(help=f"Along whose features; may be repeated. {SAE_HELP}"),
        ] = None,
        token: Annotated[
            int | None, typer.Option(help="One position: both parts by layer. By default all tokens, the tables alone.")
        ] = None,
        top: Annotated[int, typer.Option(help="Features for each layer, token and SAE.", min=1)] = 5,
        target: Annotated[
            str | None,
            typer.Option(help="A next token, with its space: what each token's row in each layer's table did for it."),
        ] = None,
        against: Annotated[
            str | None, typer.Option(help="Another next token: the difference of their logits is explained.")
        ] = None,
        counterfactual: Annotated[
            str | None, typer.Option(help="A prompt of as many tokens whose rows are put in place; by default zeros.")
        ] = None,
        method: Annotated[
            str, typer.Option(help="integrated_gradients, or activation_patching: exact, a run for each row.")
        ] = "integrated_gradients",
        device: Annotated[str | None, typer.Option(help="Such as cpu or cuda; by default the best there is.")] = None,
        embeddings: EmbeddingsOption = "device",
        allow_download: DownloadOption = False,
    ) -> Outcome:
        """What each layer's table wrote for each token: its norm, its share of the residual stream, along which
        features; beside what the projection of the main embedding wrote. With --target, what that did for a logit."""
        from scope.attribution.baselines import counterfactual as against_prompt
        from scope.attribution.per_layer import per_layer_writes
        from scope.attribution.tables import table_effects
        from scope.attribution.targets import logit, logit_difference
        from scope.errors import InvalidInputError, OutOfRangeError
        from scope.saes.formats import load

        if target is None and (against is not None or counterfactual is not None):
            raise InvalidInputError("--against and --counterfactual are about a --target; give one.")
        opened = load_model(model, embeddings=embeddings, device=device, allow_download=allow_download)
        saes = [load(one, allow_download=allow_download).to(opened.device) for one in sae or ()]
        report = per_layer_writes(opened, prompt, saes, top)
        if token is not None and not 0 <= token < len(report.tokens):
            raise OutOfRangeError(
                f"Position {token} is out of range: the prompt has positions 0 to {len(report.tokens) - 1}."
            )
        effects = None
        if target is not None:
            asked = logit(target) if against is None else logit_difference(target, against)
            baseline = None if counterfactual is None else against_prompt(counterfactual)
            effects = table_effects(opened, prompt, asked, method, baseline)  # type: ignore[arg-type]
        data: dict[str, Any] = {
            "model": opened.name,
            "tokens": list(report.tokens),
            "writes": _at(report.writes, token).to_dict("records"),
            "features": _at(report.features, token).to_dict("records"),
            "effects": None if effects is None else _effects(effects, token),
        }
        text = _grid_text(report) if token is None else _token_text(report, token)
        return Outcome(data, text if effects is None else f"{text}\n{_effects_text(effects, token)}")


def _at(table: "pd.DataFrame", token: int | None) -> "pd.DataFrame":
    return table if token is None else table[table["position"] == token]


def _effects(effects: "TableEffects", token: int | None) -> dict[str, Any]:
    return {
        "target": effects.target,
        "method": effects.method,
        "baseline": effects.baseline,
        "value": effects.value,
        "without_tables": effects.without,
        "rows": _at(effects.table, token).to_dict("records"),
    }


def _effects_text(effects: "TableEffects", token: int | None) -> str:
    lines = [
        f"{effects.target} = {effects.value:.4g}, and {effects.without:.4g} with all rows at their {effects.baseline} "
        "baseline",
        "Layers, all tokens together: "
        + ", ".join(f"{row.layer}: {row.effect:+.3g}" for row in effects.by_layer().itertuples()),
    ]
    rows = _at(effects.table, token).head(SHOWN)
    lines += [f"  layer {row.layer:>2}, {row.position} {row.token!r}: {row.effect:+.3g}" for row in rows.itertuples()]
    return "\n".join(lines)


def _grid_text(report: "PerLayerReport") -> str:
    own = report.writes[report.writes["part"] == "table"]
    wide = own.pivot(index="position", columns="layer", values="share")
    lines = ["Share of the residual stream's norm that each layer's table wrote, in %"]
    lines.append(f"{'':>4} {'token':<16}" + "".join(f"{layer:>7}" for layer in wide.columns))
    for position, shares in wide.iterrows():
        name = repr(report.tokens[int(str(position))])
        lines.append(f"{position:>4} {name:<16}" + "".join(f"{100 * share:>7.3g}" for share in shares))
    return "\n".join([*lines, *_feature_lines(report.features.head(20))])


def _token_text(report: "PerLayerReport", token: int) -> str:
    lines = [f"At {report.tokens[token]!r}: norms, and shares of the residual stream's"]
    lines.append(f"{'layer':>5}{'table':>10}{'share':>8}{'projection':>12}{'share':>8}")
    for row in report.of_token(token).itertuples():
        lines.append(
            f"{row.layer:>5}{row.table:>10.3g}{row.share_table:>8.1%}{row.projection:>12.3g}{row.share_projection:>8.1%}"
        )
    return "\n".join([*lines, *_feature_lines(_at(report.features, token).head(20))])


def _feature_lines(features: "pd.DataFrame") -> list[str]:
    if not len(features):
        return []
    lines = ["Features, and what table and projection added to what makes them fire"]
    lines += [
        f"  layer {row.layer:>2} at {row.position} {row.token!r}: feature {row.feature} ({row.value:.3g}) "
        f"table {row.table:+.3g}, projection {row.projection:+.3g}"
        for row in features.itertuples()
    ]
    return lines
