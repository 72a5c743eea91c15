"""What people call a feature: an editable label, notes, a star and lists, saved as they change.

Each part is saved when one leaves it (or on Enter, in the label), and says so beside the title. The components' ids
name the index and the feature, so that an answer that comes late changes nothing of another feature's panel. Elements
elsewhere on the page with `data-label-of="INDEX:FEATURE"` show the new label at once (assets/45_labels.js).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import dash_mantine_components as dmc
from dash import MATCH, ClientsideFunction, Dash, Input, Output, State, ctx, dcc, html, no_update
from dash.exceptions import PreventUpdate

from dashboards.components.controls import button, icon
from dashboards.context import Context
from dashboards.queries import feature_id
from scope.errors import ScopeError
from scope.features.labels import OWN, FeatureLabels, Label, StoredLabel

if TYPE_CHECKING:
    from scope.features.index import FeatureIndex

__all__ = ["label_panel", "label_panel_of", "register"]

PARTS = ("text", "notes", "star", "lists", "status", "source", "said")
SAVED = {"text": "Label saved", "notes": "Notes saved", "lists": "Lists saved"}


def label_panel_of(index: "FeatureIndex", feature: int) -> html.Section:
    """The panel of one feature, with all its labels and the lists that there are."""
    labels = index.labels
    return label_panel(index.id, feature, labels.get(feature), others=labels.all(feature), lists=list(labels.lists()))


def label_panel(
    index_id: str,
    feature: int,
    label: Label,
    *,
    others: Sequence[StoredLabel] = (),
    lists: Sequence[str] = (),
) -> html.Section:
    """The panel of one feature.

    Args:
        index_id: of the workspace's registry.
        feature: the feature's id.
        label: what is said of it.
        others: all its labels, one's own and imported ones.
        lists: names of lists, to choose from.
    """
    of = f"{index_id}:{feature}"
    return html.Section(
        className="panel label-panel",
        **{"aria-label": "Label, notes and lists"},
        children=[
            html.Header(
                [
                    html.H2("Label"),
                    html.Span(id=_id("status", of), className="label-status", role="status"),
                    button(*_star(label.starred), id=_id("star", of), className="icon-only star", **_pressed(label)),
                ]
            ),
            dmc.Textarea(
                id=_id("text", of),
                value=label.text,
                placeholder="What does it stand for?",
                debounce=True,
                autosize=True,
                minRows=1,
                maxRows=8,
                size="sm",
                attributes={
                    "input": {"aria-label": f"Label of feature {feature}", "dir": "auto", "spellcheck": "true"}
                },
            ),
            html.Div(_source(label, others), id=_id("source", of), className="label-source small muted"),
            dmc.Textarea(
                id=_id("notes", of),
                label="Notes",
                value=label.notes,
                debounce=True,
                autosize=True,
                minRows=1,
                maxRows=14,
                size="sm",
                attributes={"input": {"dir": "auto"}},
            ),
            dmc.TagsInput(
                id=_id("lists", of),
                label="Lists",
                value=list(label.lists),
                data=sorted({*lists, *label.lists}),
                placeholder="Add to a list",
                size="sm",
                comboboxProps={"shadow": "md"},
            ),
            dcc.Store(id=_id("said", of)),
        ],
    )


def _id(part: str, of: Any) -> dict[str, Any]:
    return {"part": f"label-{part}", "of": of}


def _star(starred: bool) -> list[Any]:
    return [icon("star-filled" if starred else "star")]


def _pressed(label: Label) -> dict[str, str]:
    words = "Starred. Take the star away" if label.starred else "Star this feature"
    return {"aria-pressed": str(label.starred).lower(), "aria-label": words, "title": words, "data-key": "s"}


def _source(label: Label, others: Sequence[StoredLabel]) -> list[Any]:
    """Where the label is from, and the imported ones that one's own stands before."""
    if label.text and label.source != OWN:
        return [html.Bdi(label.source), ". What you write instead is kept as yours; this one stays beside it."]
    hidden = [other for other in others if other.source != OWN]
    if not label.text or not hidden:
        return []
    return [
        "Yours. Imported: ",
        html.Ul([html.Li([html.Bdi(other.text), f" ({other.source})"], dir="auto") for other in hidden]),
    ]


def register(app: Dash, context: Context) -> None:
    """Save what changes.

    What is kept can read otherwise than what was typed (blanks go; an imported label comes back where one's own is
    taken away): assets/45_labels.js puts it into the box, unless one has typed on meanwhile. The names to choose from
    stay as they were: given new ones, the input drops every tag that is not among them, and one typed while an answer
    is under way would be lost.
    """

    @app.callback(
        Output(_id("status", MATCH), "children"),
        Output(_id("status", MATCH), "className"),
        Output(_id("source", MATCH), "children"),
        Output(_id("star", MATCH), "children"),
        Output(_id("star", MATCH), "aria-pressed"),
        Output(_id("star", MATCH), "aria-label"),
        Output(_id("star", MATCH), "title"),
        Output(_id("said", MATCH), "data"),
        Input(_id("text", MATCH), "value"),
        Input(_id("notes", MATCH), "value"),
        Input(_id("star", MATCH), "n_clicks"),
        Input(_id("lists", MATCH), "value"),
        State(_id("status", MATCH), "className"),
        prevent_initial_call=True,
    )
    def change(
        text: str | None, notes: str | None, clicks: int | None, names: list[str] | None, shown: str
    ) -> tuple[Any, ...]:
        ids = list(ctx.triggered_prop_ids.values())  # several, where one has changed a part and gone on to the next
        parts = [str(id["part"]).removeprefix("label-") for id in ids]
        index_id, _, number = str(ids[0]["of"]).rpartition(":")
        said = []
        try:
            index = context.index(index_id)
            feature = feature_id(index, number)
            after = index.labels.get(feature)
            for part in parts:
                before = after
                after = _changed(index.labels, feature, before, part, text or "", notes or "", names or [])
                if after != before:
                    said.append(SAVED.get(part) or ("Starred" if after.starred else "Star taken away"))
        except ScopeError as problem:
            return (f"Not saved. {problem}", "label-status failed", *[no_update] * 6)
        typed = text or "" if "text" in parts else after.text
        if not said and typed == after.text and "failed" not in shown:
            raise PreventUpdate
        pressed = _pressed(after)
        return (
            ". ".join(said),
            "label-status",
            _source(after, index.labels.all(feature)),
            _star(after.starred),
            pressed["aria-pressed"],
            pressed["aria-label"],
            pressed["title"],
            {"of": f"{index_id}:{feature}", "label": after.text, "typed": typed, "starred": after.starred},
        )

    app.clientside_callback(
        ClientsideFunction("scope", "labelSaid"),
        Output(_id("said", MATCH), "storage_type"),
        Input(_id("said", MATCH), "data"),
        State(_id("said", MATCH), "storage_type"),
        prevent_initial_call=True,
    )


def _changed(
    labels: FeatureLabels, feature: int, before: Label, part: str, text: str, notes: str, names: Sequence[str]
) -> Label:
    """Save one part; what holds now."""
    if part == "star":
        return labels.set(feature, starred=not before.starred)
    if part == "notes":
        return labels.set(feature, notes=notes)
    if part == "lists":
        for name in set(before.lists) - set(names):
            labels.remove_from_list(feature, name)
        for name in names:
            if name not in before.lists:
                labels.add_to_list(feature, name)
        return labels.get(feature)
    # A field that was left as it was must not turn an imported label into one's own.
    return before if " ".join(text.split()) == before.text else labels.set(feature, text=text)
