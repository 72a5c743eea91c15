"""`scope steer`: push features of an SAE while the model writes."""

from pathlib import Path
from typing import Annotated

import typer

from scope.cli._command import Outcome, command
from scope.cli.sae import SAE_HELP, DownloadOption
from scope.errors import InvalidInputError

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""

    @command(app, "steer")
    def steer(
        model: Annotated[str, typer.Option(help="A Hugging Face id, a folder, a GGUF file, or gemma-3-270m.")],
        sae: Annotated[str, typer.Option(help=SAE_HELP)],
        feature: Annotated[list[int], typer.Option(help="The feature to push; may be repeated.")],
        strength: Annotated[
            list[float],
            typer.Option(
                help="Firing strength to add, one for each --feature; with --index in multiples of the feature's "
                "largest. Negative ones suppress."
            ),
        ],
        prompt: Annotated[str, typer.Option(help="The text to go on from.")],
        index: Annotated[
            Path | None, typer.Option(help="An index of the SAE: says how strongly features fire.")
        ] = None,
        max_new_tokens: Annotated[int, typer.Option(help="Tokens to write, at most.")] = 40,
        temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
        seed: Annotated[int, typer.Option(help="Of sampling and of the random direction.")] = 0,
        device: Annotated[str | None, typer.Option(help="Such as cpu or cuda; by default the best there is.")] = None,
        allow_download: DownloadOption = False,
    ) -> Outcome:
        """Let the model go on from a prompt with features pushed, without, and along a random direction as long."""
        if len(feature) != len(strength):
            raise InvalidInputError(
                f"{len(feature)} features and {len(strength)} strengths were given; expected one for each."
            )
        from scope.interventions.steering import steer as run
        from scope.models import LanguageModel
        from scope.saes.formats import load

        loaded = load(sae, allow_download=allow_download)
        strengths = dict(zip(feature, strength, strict=True))
        if index is not None:
            from scope.features.index import FeatureIndex

            table = FeatureIndex.open(index)
            strengths = {
                number: size * float(table.feature(number).statistics["max_value"])
                for number, size in strengths.items()
            }
        opened = LanguageModel.load(model, device=device, allow_download=allow_download)
        found = run(opened, loaded, strengths, prompt, max_new_tokens, temperature=temperature, seed=seed)
        parts = {"plain": found.plain, "steered": found.steered, "random": found.random}
        data = {
            name: {"text": part.generation.text, "kl": part.kl, "perplexity": part.perplexity}
            for name, part in parts.items()
        }
        text = "\n".join(
            f"{name:<8} (kl {part.kl:.3f} nats, perplexity {part.perplexity:.1f})  {prompt}{part.generation.text}"
            for name, part in parts.items()
        )
        changes = found.changes.to_dict("records")
        return Outcome(
            {**data, "norm": found.norm, "strengths": strengths, "changes": changes},
            f"{text}\nNext token, the largest changes:\n{found.changes.to_string(index=False)}",
        )
