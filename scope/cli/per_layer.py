"""`scope per-layer`: what each layer's own embedding table wrote into the residual stream, token by token."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from scope.cli._command import Outcome, command
from scope.cli._model import EmbeddingsOption, load_model
from scope.cli.sae import SAE_HELP, DownloadOption

if TYPE_CHECKING:
    import pandas as pd

    from scope.attribution.per_layer import PerLayerReport

__all__ = ["register"]


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
        device: Annotated[str | None, typer.Option(help="Such as cpu or cuda; by default the best there is.")] = None,
        embeddings: EmbeddingsOption = "device",
        allow_download: DownloadOption = False,
    ) -> Outcome:
        """What each layer's table wrote for each token: its norm, its share of the residual stream, along which
        features; beside what the projection of the main embedding wrote."""
        from scope.attribution.per_layer import per_layer_writes
        from scope.errors import OutOfRangeError
        from scope.saes.formats import load

        opened = load_model(model, embeddings=embeddings, device=device, allow_download=allow_download)
        saes = [load(one, allow_download=allow_download).to(opened.device) for one in sae or ()]
        report = per_layer_writes(opened, prompt, saes, top)
        if token is not None and not 0 <= token < len(report.tokens):
            raise OutOfRangeError(
                f"Position {token} is out of range: the prompt has positions 0 to {len(report.tokens) - 1}."
            )
        data: dict[str, Any] = {
            "model": opened.name,
            "tokens": list(report.tokens),
            "writes": _at(report.writes, token).to_dict("records"),
            "features": _at(report.features, token).to_dict("records"),
        }
        return Outcome(data, _grid_text(report) if token is None else _token_text(report, token))


def _at(table: "pd.DataFrame", token: int | None) -> "pd.DataFrame":
    return table if token is None else table[table["position"] == token]


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
