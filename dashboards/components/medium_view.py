"""An image with a feature's strength over its patches, or a sound with its strength over time.

Like a strip's, the content travels as JSON in one attribute; assets/46_media.js draws it.
"""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from dash import html

from dashboards.components.strip import Kind
from dashboards.format import count, number, plural
from dashboards.links import prompt_link
from dashboards.media import media_link
from scope.features.examples import Example

if TYPE_CHECKING:
    from scope.features.index import FeatureIndex
    from scope.features.media import MediumValues

__all__ = ["example_medium", "medium_figure"]

MAX_SIDE = 320
"""CSS pixels of an image's longer side."""


def example_medium(index: "FeatureIndex", example: Example, *, scale: float) -> html.Figure:
    """The image or the sound that an example's token belongs to."""
    assert example.medium is not None
    found = index.medium_values(example.feature, example.document, example.medium)
    place = int(example.row - index.window_start(example.row))
    sequence = int(index.tokens(example.row, example.row + 1)["sequence"].iloc[0])
    link = prompt_link(index.id, window=sequence, feature=example.feature, token=place)
    centre = np.flatnonzero(found.rows == example.row).tolist()
    return medium_figure(
        found, media_link(index.id, found.digest), scale, centre, html.A("Run it as a prompt", href=link)
    )


def medium_figure(
    found: "MediumValues",
    source: str,
    scale: float,
    centre: Sequence[int] = (),
    more: Any = None,
    kind: Kind = "activation",
    who: str = "",
) -> html.Figure:
    """A feature's strength over a medium.

    Args:
        found: the medium and the strengths.
        source: where its file is served.
        scale: the strength with the full colour.
        centre: places of the soft tokens that the figure is about, which are outlined.
        more: what else stands below it.
        kind: what the values are, as of a strip.
        who: what fires, where it is not one feature.
    """
    fires = np.flatnonzero(found.values)
    drawn = np.union1d(fires, np.array(centre, np.int64)).astype(np.int64)
    spec: dict[str, Any] = {
        "kind": found.kind,
        "src": source,
        "m": float(scale),
        "k": kind,
        "places": np.round(found.places[drawn].astype(float), 5).tolist(),
        "v": [float(f"{value:.5g}") for value in found.values[drawn].tolist()],
        "n": drawn.tolist(),
        "c": list(centre),
        "words": _words(found, fires, who or "the feature"),
    }
    if found.kind == "image":
        spec |= {"w": found.width, "h": found.height, "side": MAX_SIDE}
    else:
        spec |= {"s": found.seconds}
    return html.Figure(
        [
            html.Div(**{"data-medium": json.dumps(spec, ensure_ascii=False)}, className="medium-view"),
            html.Figcaption(
                [
                    html.Bdi(found.name),
                    f" · {_size(found)} · {f'{who} {_share(found, fires)}'.strip()}",
                    *([] if more is None else [" · ", more]),
                ]
            ),
        ],
        className=f"medium {found.kind}",
    )


def _size(found: "MediumValues") -> str:
    if found.kind == "image":
        return f"{found.width} × {found.height} pixels"
    return f"{number(found.seconds or 0.0)} s"


def _share(found: "MediumValues", fires: np.ndarray) -> str:
    unit = "patch" if found.kind == "image" else "span"
    units = plural(len(found.values), unit) if unit == "span" else f"{count(len(found.values))} patches"
    return f"fires on {count(len(fires))} of {units}"


def _words(found: "MediumValues", fires: np.ndarray, who: str) -> str:
    """What a screen reader says of it."""
    what = "Image" if found.kind == "image" else "Sound"
    if not len(fires):
        return f"{what} {found.name}; {who} does not fire in it"
    best = int(fires[np.argmax(np.abs(found.values[fires]))])
    place = found.places[best]
    if found.kind == "image":
        across, down = (round(50 * float(place[axis] + place[axis + 2])) for axis in (0, 1))
        where = f"{across}% across, {down}% down"
    else:
        where = f"from {number(float(place[0]))} to {number(float(place[1]))} s"
    strength = number(float(found.values[best]))
    return f"{what} {found.name}; {who} {_share(found, fires)}, most strongly ({strength}) {where}"
