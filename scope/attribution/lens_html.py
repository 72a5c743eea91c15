"""The logit lens in a notebook: layers by tokens, the likeliest next token in each cell."""

from html import escape
from typing import TYPE_CHECKING

from scope.figures.template import activation_colour
from scope.figures.text import short_number, visible_token

if TYPE_CHECKING:
    from scope.attribution.lens import LogitLens

__all__ = ["lens_html"]

MOST = 64
"""Tokens that are shown, at most: the last ones."""


def lens_html(lens: "LogitLens") -> str:
    """A table; probability is background colour, the last layer on top."""
    from scope.figures import PALETTES

    first = max(0, len(lens.positions) - MOST)
    ink = PALETTES["light"].text
    head = "".join(f"<th>{escape(visible_token(lens.tokens[place]))}</th>" for place in lens.positions[first:])
    body = []
    for row in reversed(range(len(lens.layers))):
        cells = []
        for column in range(first, len(lens.positions)):
            token, share = lens.top_tokens[row, column, 0], float(lens.top_probabilities[row, column, 0])
            cells.append(
                f"<td style='background:{activation_colour(share, 1.0)};color:{ink};text-align:left' "
                f"title='probability {short_number(share)}'>{escape(visible_token(token))}</td>"
            )
        mark = " (SAE)" if lens.layers[row] == lens.sae_layer else ""
        body.append(f"<tr><th>{lens.layers[row]}{mark}</th>{''.join(cells)}</tr>")
    left_out = f"; the last {MOST} of {len(lens.positions):,} tokens" if first else ""
    return (
        f"<div style='overflow-x:auto'><table><caption>Likeliest next token after each layer, by probability{left_out}"
        f"</caption><thead><tr><th>layer</th>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )
