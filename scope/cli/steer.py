"""`scope steer`: let a model write under interventions: features that are pushed, or a file that says what is done."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from scope.cli._command import Outcome, command, progress_bar
from scope.cli._interventions import SPEC_HELP, SaeFinder, declared, maxima_of
from scope.cli._model import EmbeddingsOption, load_model
from scope.cli.sae import SAE_HELP, DownloadOption
from scope.errors import InvalidInputError

__all__ = ["register"]

MAX_FLIPS = 100
"""Features that are listed, those whose firing changes the most."""


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""

    @command(app, "steer")
    def steer(
        model: Annotated[str, typer.Option(help="A Hugging Face id, a folder, a GGUF file, or gemma-3-270m.")],
        prompt: Annotated[str, typer.Option(help="The text to go on from.")],
        sae: Annotated[str | None, typer.Option(help=f"The features' SAE. {SAE_HELP}")] = None,
        feature: Annotated[list[int] | None, typer.Option(help="The feature to push; may be repeated.")] = None,
        strength: Annotated[
            list[float] | None,
            typer.Option(
                help="Firing strength to add, one for each --feature; with --index in multiples of the feature's "
                "largest. Negative ones suppress."
            ),
        ] = None,
        spec: Annotated[
            str | None,
            typer.Option(help=f"In place of features: {SPEC_HELP}"),
        ] = None,
        workspace: Annotated[
            Path, typer.Option(help="Where named interventions lie, and the SAEs that they name.")
        ] = Path("workspace"),
        index: Annotated[
            Path | None, typer.Option(help="An index of the SAE: says how strongly features fire.")
        ] = None,
        flips: Annotated[
            str | None,
            typer.Option(
                help="An SAE, such as of a later layer: its features that begin or cease to fire on the prompt are "
                f"listed. {SAE_HELP}"
            ),
        ] = None,
        max_new_tokens: Annotated[int, typer.Option(help="Tokens to write, at most.")] = 40,
        temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
        seed: Annotated[int, typer.Option(help="Of sampling and of the random direction.")] = 0,
        device: Annotated[str | None, typer.Option(help="Such as cpu or cuda; by default the best there is.")] = None,
        embeddings: EmbeddingsOption = "device",
        allow_download: DownloadOption = False,
    ) -> Outcome:
        """Let the model go on from a prompt under interventions, without, and along a random direction as long."""
        given = dict(zip(feature or (), strength or (), strict=False))
        if len(feature or ()) != len(strength or ()):
            raise InvalidInputError(
                f"{len(feature or ())} features and {len(strength or ())} strengths were given; expected one for each."
            )
        if bool(given) == (spec is not None):
            raise InvalidInputError(
                "Give features with --feature and --strength and --sae, or interventions with --spec."
            )
        if given and sae is None:
            raise InvalidInputError("Whose features are these? Give the SAE with --sae.")
        from scope.features.experts import feature_flips
        from scope.interventions.resolving import control
        from scope.interventions.spec import Intervention
        from scope.interventions.steering import steer_with
        from scope.saes.formats import load

        wanted = declared(spec, workspace) if spec is not None else _pushes(given, index is not None)
        saes = SaeFinder(sae, workspace, allow_download)
        maxima = maxima_of(index, saes)
        for one in wanted.interventions:
            assert isinstance(one, Intervention)
            if one.features:
                saes(one.sae)
        watched = None if flips is None else load(flips, allow_download=allow_download)
        opened = load_model(model, device=device, allow_download=allow_download, embeddings=embeddings)
        for dictionary in (*(saes(one.sae) for one in wanted.interventions if one.features), watched):
            if dictionary is not None:
                dictionary.to(opened.device)
        edits = wanted.resolve(opened, saes, maxima)
        beside = control(wanted, opened, saes, maxima, seed)
        flipped = None if watched is None else feature_flips(opened, watched, prompt, edits)
        with progress_bar("Writing (tokens)") as progress:
            found = steer_with(
                opened,
                edits,
                beside,
                prompt,
                max_new_tokens,
                temperature=temperature,
                seed=seed,
                listen=lambda done, texts: progress(done, max_new_tokens),
            )
        outcome = _outcome(found, wanted, prompt)
        return outcome if flipped is None else _with_flips(outcome, flipped)


def _pushes(strengths: Mapping[int, float], relative: bool) -> Any:
    from scope.interventions.spec import Intervention, InterventionSpec

    pushed = Intervention(
        kind="add",
        features=tuple(strengths),
        value=tuple(map(float, strengths.values())),
        unit="maximum" if relative else "strength",
    )
    return InterventionSpec(interventions=(pushed,))


def _with_flips(outcome: Outcome, table: Any) -> Outcome:
    """What was written, and the features that begin or cease to fire on the prompt."""
    begun = int((table["before"] == 0).sum())
    rows = table.head(MAX_FLIPS)
    words = f"Features of the prompt: {begun:,} begin to fire, {len(table) - begun:,} cease to."
    text = f"{outcome.text}\n{words}" + (f"\n{rows.to_string(index=False)}" if len(rows) else "")
    flips = {"begin": begun, "cease": len(table) - begun, "features": rows.to_dict("records")}
    return Outcome({**outcome.data, "flips": flips}, text)


def _outcome(found: Any, declared: Any, prompt: str) -> Outcome:
    parts = {"plain": found.plain, "steered": found.steered, "random": found.random}
    known = {name: part for name, part in parts.items() if part is not None}
    data = {
        name: {"text": part.generation.text, "kl": part.kl, "mean_kl": part.mean_kl, "perplexity": part.perplexity}
        for name, part in known.items()
    }
    text = "\n".join(
        f"{name:<8} (kl {part.mean_kl:.3f} nats a token, perplexity {part.perplexity:.1f})  "
        f"{prompt}{part.generation.text}"
        for name, part in known.items()
    )
    changes = found.changes.drop(columns=[] if found.random is not None else ["random"])
    return Outcome(
        {**data, "norm": found.norm, "spec": declared.to_dict(), "changes": changes.to_dict("records")},
        f"{text}\nNext token, the largest changes:\n{changes.to_string(index=False)}",
    )
