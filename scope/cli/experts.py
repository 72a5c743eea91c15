"""`scope experts`: which experts tokens go to, over a store and on a prompt, and which features fire there."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from scope.cli._command import Outcome, command, progress_bar
from scope.cli._model import EmbeddingsOption, load_model
from scope.cli.sae import SAE_HELP, DownloadOption, require_hook
from scope.errors import InvalidInputError

if TYPE_CHECKING:
    import pandas as pd

    from scope.models.tokens import TokenReader

__all__ = ["register"]

StoreArgument = Annotated[
    str, typer.Argument(help="A store with blocks.L.moe.hook_experts (a folder or s3://BUCKET/NAME).")
]
LayerOption = Annotated[int | None, typer.Option(help="The layer; by default the first that the store has.", min=0)]
TopOption = Annotated[int, typer.Option("--top", help="Rows to print; --json has all.", min=1)]


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    group = typer.Typer(
        no_args_is_help=True,
        rich_markup_mode=None,
        help="Experts of Mixtral, Qwen3-MoE and Gemma 4 26B-A4B: load, specialisation, features, routing.",
    )
    app.add_typer(group, name="experts")
    _register_load(group)
    _register_features(group)
    _register_prompt(group)


def _register_load(group: typer.Typer) -> None:
    @command(group, "load")
    def load(
        store: StoreArgument,
        layer: Annotated[
            int | None, typer.Option(help="One layer, with what its experts are for; by default all.", min=0)
        ] = None,
        by: Annotated[
            str | None,
            typer.Option(
                help="With --layer: groups that experts may be for: language, source or token; by default language."
            ),
        ] = None,
        model: Annotated[
            str | None,
            typer.Option(help="Whose tokenizer says how tokens read, with --by token; its weights are not loaded."),
        ] = None,
        seed: Annotated[int, typer.Option(help="Of the shuffles that tell what chance does.")] = 0,
        top: TopOption = 20,
    ) -> Outcome:
        """How many tokens went to each expert, and how far those are of one language, source or token."""
        from activations.store import ActivationStore
        from scope.features.experts import expert_load, expert_specialisation
        from scope.features.routing import load_by_layer
        from scope.models.tokens import reader_of

        opened = ActivationStore.open(store)
        if model is not None and by != "token":
            raise InvalidInputError("--model says how tokens read; give it with --by token.")
        if layer is None:
            if by is not None:
                raise InvalidInputError("--by is asked of one layer's experts; say which with --layer.")
            with progress_bar("Reading (layers)") as progress:
                table = load_by_layer(opened, progress=progress)
            return Outcome({"store": store, "load": _rows(table)}, _load_text(table))
        by = by or "language"
        groups = expert_load(opened, layer, by)  # type: ignore[arg-type]  # checked there
        found = expert_specialisation(opened, layer, by, seed)  # type: ignore[arg-type]
        if model is not None:
            reader = reader_of(model, expected_hash=opened.spec.tokenizer_hash)
            found, groups = _named(reader, found, "top_group"), _named(reader, groups, "group")
        data = {"store": store, "layer": layer, "by": by, "experts": _rows(found), "load": _rows(groups)}
        return Outcome(data, _specialisation_text(found, layer, by, top))


def _register_features(group: typer.Typer) -> None:
    @command(group, "features")
    def features(
        store: StoreArgument,
        sae: Annotated[str, typer.Option(help=f"It reads a hook of the store. {SAE_HELP}")],
        layer: LayerOption = None,
        feature: Annotated[int | None, typer.Option(help="One feature: the experts of its tokens.", min=0)] = None,
        expert: Annotated[int | None, typer.Option(help="One expert: the features of its tokens.", min=0)] = None,
        min_firings: Annotated[int, typer.Option(help="Leave out features that fire on fewer tokens.", min=1)] = 10,
        top: TopOption = 20,
        allow_download: DownloadOption = False,
    ) -> Outcome:
        """Features and experts that meet on the same tokens more often than by chance."""
        from activations.store import ActivationStore
        from scope.features.experts import feature_experts
        from scope.features.routing import expert_layers
        from scope.saes.formats import load

        opened = ActivationStore.open(store)
        layers = expert_layers(opened)
        if layer is None and not layers:
            raise InvalidInputError(f"{store} has no chosen experts; capture blocks.L.moe.hook_experts into it.")
        place = layers[0] if layer is None else layer
        dictionary = load(sae, allow_download=allow_download)
        require_hook(dictionary)
        table = feature_experts(opened, dictionary, place, min_firings)
        if table.empty:
            raise InvalidInputError(f"Every feature fires on fewer than {min_firings} tokens; see --min-firings.")
        for name, asked in (("feature", feature), ("expert", expert)):
            if asked is not None:
                table = _only(table, name, asked, min_firings)
        table = table.sort_values(["lift", "firings"], ascending=False, kind="stable", ignore_index=True)
        data = {"store": store, "layer": place, "min_firings": min_firings, "pairs": _rows(table)}
        return Outcome(data, _pairs_text(table, place, top))


def _register_prompt(group: typer.Typer) -> None:
    @command(group, "prompt")
    def prompt(
        model: Annotated[str, typer.Argument(help="A Hugging Face id, a folder or a GGUF file.")],
        prompt: Annotated[str, typer.Option(help="The text.")],
        layer: Annotated[int | None, typer.Option(help="Print this layer alone; --json has all.", min=0)] = None,
        device: Annotated[str | None, typer.Option(help="Such as cpu or cuda; by default the best there is.")] = None,
        embeddings: EmbeddingsOption = "device",
        allow_download: DownloadOption = False,
    ) -> Outcome:
        """The experts that each token of a prompt goes to, with their weights; beside what the dense MLP writes, where
        both stand side by side (Gemma 4)."""
        from scope.features.experts import dense_against_experts
        from scope.features.routing import prompt_routing
        from scope.models.experts import require_experts

        opened = load_model(model, embeddings=embeddings, device=device, allow_download=allow_download)
        require_experts(opened, layer)
        routing = prompt_routing(opened, prompt)
        beside = any(sizes.n_experts and sizes.dense for sizes in opened.layout.sizes)
        dense = dense_against_experts(opened, prompt) if beside else None
        data = {
            "model": opened.name,
            "prompt": prompt,
            "routing": _rows(routing),
            "dense": None if dense is None else _rows(dense),
        }
        shown = routing if layer is None else routing[routing["layer"] == layer]
        return Outcome(data, _routing_text(shown, dense))


def _rows(table: "pd.DataFrame") -> list[dict[Any, Any]]:
    return table.to_dict("records")


def _only(table: "pd.DataFrame", name: str, asked: int, min_firings: int) -> "pd.DataFrame":
    found = table[table[name] == asked]
    if found.empty and name == "feature":
        raise InvalidInputError(f"Feature {asked} fires on fewer than {min_firings} tokens; see --min-firings.")
    if found.empty:
        raise InvalidInputError(f"There is no expert {asked}: the layer has 0 to {int(table['expert'].max())}.")
    return found


def _named(reader: "TokenReader", table: "pd.DataFrame", column: str) -> "pd.DataFrame":
    """Token ids, and beside them how the tokens read."""
    return table.assign(token=reader.vocabulary_strings(table[column].tolist()))


def _load_text(table: "pd.DataFrame") -> str:
    lines = [f"{'layer':>5}  share of the tokens that went to each expert, the busiest first"]
    for layer, own in table.groupby("layer"):
        busiest = own.sort_values("share", ascending=False, kind="stable").head(10)
        shown = "  ".join(f"{row.expert}: {row.share:.1%}" for row in busiest.itertuples())
        lines.append(f"{layer:>5}  {shown}{'  …' if len(own) > len(busiest) else ''}")
    return "\n".join(lines)


def _specialisation_text(table: "pd.DataFrame", layer: int, by: str, top: int) -> str:
    lines = [f"Layer {layer}, by {by}", f"{'expert':>6}{'share':>8}{'bits':>8}{'by chance':>11}  most of one {by}"]
    for row in table.head(top).to_dict("records"):
        name = row.get("token", row["top_group"])
        lines.append(
            f"{row['expert']:>6}{row['share']:>8.1%}{row['information']:>8.3f}{row['information_by_chance']:>11.3f}  "
            f"{name!r}: {row['top_share']:.1%} of its tokens, {row['top_lift']:.2f} times its due"
        )
    return "\n".join(lines)


def _pairs_text(table: "pd.DataFrame", layer: int, top: int) -> str:
    lines = [f"Layer {layer}", f"{'feature':>8}{'expert':>8}{'firings':>9}{'there':>8}{'share':>8}{'lift':>7}"]
    lines += [
        f"{row.feature:>8}{row.expert:>8}{row.firings:>9,}{row.together:>8,}{row.share:>8.1%}{row.lift:>7.2f}"
        for row in table.head(top).itertuples()
    ]
    return "\n".join(lines)


def _routing_text(routing: "pd.DataFrame", dense: "pd.DataFrame | None") -> str:
    shares = {} if dense is None else dense.set_index(["layer", "position"])["dense_share"].to_dict()
    lines = []
    for layer, own in routing.groupby("layer"):
        lines.append(f"Layer {layer}" + (" (expert: weight; share of the dense MLP)" if shares else ""))
        for position, slots in own.groupby("position"):
            chosen = "  ".join(f"{row.expert}: {row.weight:.3f}" for row in slots.itertuples())
            share = f"  dense {shares[layer, position]:.1%}" if (layer, position) in shares else ""
            lines.append(f"  {position:>4} {slots['token'].iloc[0]!r:<16} {chosen}{share}")
    return "\n".join(lines)
