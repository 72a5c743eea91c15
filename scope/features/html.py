"""How an index shows itself in a notebook: plain HTML with inline styles, no scripts, everything escaped.

Notebooks have light and dark themes and do not say which; a panel therefore brings its own page colour with it.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from scope.figures.template import FONT, PALETTES, activation_colour
from scope.figures.text import one_in, short_number, visible_token

if TYPE_CHECKING:
    from scope.features.examples import Example
    from scope.features.index import FeatureIndex
    from scope.features.prompt import PromptFeatures

__all__ = [
    "example_html",
    "examples_html",
    "facts_html",
    "index_html",
    "page_html",
    "prompt_html",
    "token_html",
    "token_strip",
]

PALETTE = PALETTES["light"]
STRIP = "unicode-bidi:plaintext;white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.7;text-align:start"
MUTED = f"color:{PALETTE.muted};font-size:12px"
SHOWN_METRICS = ("fvu", "l0", "delta_ce")
NUMBER = "font-variant-numeric:tabular-nums;text-align:right;padding:1px 12px 1px 0"
LINE_BREAK = f'<span style="color:{PALETTE.muted};opacity:.6">⏎</span>'
SHARE = re.compile(r"(?s)(.*) ([⁰¹²³⁴⁵⁶⁷⁸⁹]+⁄[₀₁₂₃₄₅₆₇₈₉]+)")
"""A token that is part of a character, as `scope.models.token_text` writes it."""
TABLE = '<table style="font-size:inherit;border-collapse:collapse;margin:8px 0">'


def token_strip(tokens: Sequence[str], values: Sequence[float], maximum: float, centre: int | None = None) -> str:
    """Tokens on one line of text, firing strength as background from the page to the accent. A token that is part of a
    character shows the character and, small, its share of it."""
    parts = []
    for place, (token, value) in enumerate(zip(tokens, values, strict=True)):
        text = _with_share(token, lambda part: escape(part).replace("\n", LINE_BREAK))
        style = f"background:{activation_colour(value, maximum)};border-radius:2px" if value > 0 else ""
        style += ";font-weight:700" if place == centre else ""
        title = f' title="{escape(short_number(value))}"' if value > 0 else ""
        parts.append(f'<span style="{style.strip(";")}"{title}>{text}</span>' if style else f"<span>{text}</span>")
    return f'<div dir="auto" style="{STRIP}">{"".join(parts)}</div>'


def examples_html(examples: Iterable["Example"], maximum: float) -> str:
    """Examples under each other, on one scale from 0 to `maximum`."""
    blocks = [example_html(example, maximum) for example in examples]
    return page_html("".join(blocks) or f'<div style="{MUTED}">No examples.</div>')


def example_html(example: "Example", maximum: float) -> str:
    """One example with where it is from."""
    origin = " · ".join(escape(part) for part in (example.title, example.source, example.language) if part)
    facts = f"{short_number(example.value)} · {origin} · token {example.document_position:,}"
    strip = token_strip(example.tokens, example.values, maximum, example.centre)
    style = f"padding:6px 0;border-bottom:1px solid {PALETTE.rule}"
    return f'<div style="{style}">{strip}<div style="{MUTED}">{facts}</div></div>'


def index_html(index: "FeatureIndex") -> str:
    """An index: what it is of, and its densest living features."""
    info = index.info()
    facts = {
        "model": escape(str(info["model"].get("name", ""))),
        "hook": escape(info["hook_name"]),
        "SAE": f"{escape(str(info['sae'].get('architecture', '')))}, {info['d_sae']:,} features",
        "text": f"{info['n_documents']:,} documents, {info['n_rows']:,} tokens, {len(info['languages'])} languages",
        "firings": f"{info['n_firings']:,} ({short_number(info['firings_per_row'])} a token)",
        "dead": f"{info['dead']:,}",
        **{name: short_number(info["metrics"][name]) for name in SHOWN_METRICS if name in info["metrics"]},
    }
    table = index.query(sort=[("n_firings", False)], filters={"over_dense": False, "dead": False}, stop=10).rows
    rows = "".join(
        f'<tr><td style="{NUMBER}">{row["feature"]}</td><td style="{NUMBER}">{one_in(row["density"])}</td>'
        f'<td style="{NUMBER}">{short_number(row["max_value"])}</td>'
        f'<td style="text-align:left">{_tokens(row["top_tokens"][:6])}</td></tr>'
        for row in table.to_dict("records")
    )
    head = "".join(f'<th style="{MUTED};{NUMBER}">{name}</th>' for name in ("feature", "fires on", "max"))
    head += f'<th style="{MUTED};text-align:left">top tokens</th>'
    name = f'<div style="font-size:16px;font-weight:600">Feature index {escape(info["name"])} '
    name += f'<code style="{MUTED}">{info["id"]}</code></div>'
    return page_html(f"{name}{facts_html(facts)}{TABLE}<tr>{head}</tr>{rows}</table>")


def prompt_html(prompt: "PromptFeatures", n: int = 3) -> str:
    """A prompt, one row per token with its strongest features."""
    largest = float(prompt.table["value"].max()) if len(prompt.table) else 0.0
    rows = []
    for position, token in enumerate(prompt.tokens):
        firing = prompt.at(position).head(n)
        cells = "".join(
            f'<td style="{NUMBER};background:{activation_colour(value, largest)}">{int(feature)}'
            f' <span style="{MUTED}">{short_number(value)}</span></td>'
            for feature, value in zip(firing["feature"], firing["value"], strict=True)
        )
        rows.append(f'<tr><td dir="auto" style="text-align:left;white-space:pre">{token_html(token)}</td>{cells}</tr>')
    head = f'<th style="{MUTED};text-align:left">token</th><th style="{MUTED}" colspan="{n}">strongest features</th>'
    return page_html(f"{TABLE}<tr>{head}</tr>{''.join(rows)}</table>")


def page_html(content: str) -> str:
    """A panel that brings its own colours."""
    style = f"font-family:{escape(FONT)};font-size:14px;color:{PALETTE.text};background:{PALETTE.page}"
    return f'<div style="{style};padding:12px;max-width:900px">{content}</div>'


def facts_html(facts: dict[str, str]) -> str:
    """Names and values (HTML already)."""
    rows = (
        f'<tr><td style="{MUTED};text-align:left;padding-right:12px">{name}</td>'
        f'<td style="text-align:left;font-variant-numeric:tabular-nums">{value}</td></tr>'
        for name, value in facts.items()
    )
    return f"{TABLE}{''.join(rows)}</table>"


def _tokens(tokens: Sequence[Any]) -> str:
    return " ".join(f"<bdi>{token_html(str(token))}</bdi>" for token in tokens)


def token_html(token: str) -> str:
    """A token with its blanks drawn, escaped."""
    return _with_share(token, lambda part: escape(visible_token(part)))


def _with_share(token: str, draw: Callable[[str], str]) -> str:
    found = SHARE.fullmatch(token)
    if not found:
        return draw(token)
    return f'{draw(found[1])}<span style="font-size:.75em;color:{PALETTE.muted}">{found[2]}</span>'
