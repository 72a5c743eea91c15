"""How an index shows itself in a notebook: plain HTML with inline styles, no scripts, everything escaped.

Notebooks have light and dark themes and do not say which; a panel therefore brings its own page colour with it.
"""

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from scope.figures.template import FONT, PALETTES, activation_colour
from scope.figures.text import one_in, short_number, visible_token

if TYPE_CHECKING:
    from scope.features.examples import Example
    from scope.features.feature import Feature
    from scope.features.index import FeatureIndex
    from scope.features.prompt import PromptFeatures

__all__ = ["examples_html", "feature_html", "index_html", "prompt_html", "token_strip"]

PALETTE = PALETTES["light"]
STRIP = "white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.7;text-align:start"
MUTED = f"color:{PALETTE.muted};font-size:12px"
SHOWN_METRICS = ("fvu", "l0", "delta_ce")
NUMBER = "font-variant-numeric:tabular-nums;text-align:right;padding:1px 12px 1px 0"
TABLE = '<table style="font-size:inherit;border-collapse:collapse;margin:8px 0">'


def token_strip(tokens: Sequence[str], values: Sequence[float], maximum: float, centre: int | None = None) -> str:
    """Tokens on one line of text, firing strength as background from the page to the accent."""
    parts = []
    for place, (token, value) in enumerate(zip(tokens, values, strict=True)):
        text = escape(token).replace("\n", f'<span style="color:{PALETTE.muted};opacity:.6">⏎</span>')
        style = f"background:{activation_colour(value, maximum)};border-radius:2px" if value > 0 else ""
        style += ";font-weight:700" if place == centre else ""
        title = f' title="{escape(short_number(value))}"' if value > 0 else ""
        parts.append(f'<span style="{style.strip(";")}"{title}>{text}</span>' if style else f"<span>{text}</span>")
    return f'<div dir="auto" style="{STRIP}">{"".join(parts)}</div>'


def examples_html(examples: Iterable["Example"], maximum: float) -> str:
    """Examples under each other, on one scale from 0 to `maximum`."""
    blocks = [_example(example, maximum) for example in examples]
    return _panel("".join(blocks) or f'<div style="{MUTED}">No examples.</div>')


def _example(example: "Example", maximum: float) -> str:
    origin = " · ".join(escape(part) for part in (example.title, example.source, example.language) if part)
    facts = f"{short_number(example.value)} · {origin} · token {example.document_position:,}"
    strip = token_strip(example.tokens, example.values, maximum, example.centre)
    style = f"padding:6px 0;border-bottom:1px solid {PALETTE.rule}"
    return f'<div style="{style}">{strip}<div style="{MUTED}">{facts}</div></div>'


def feature_html(feature: "Feature") -> str:
    """One feature: its numbers, histogram, logits and strongest examples."""
    index, row = feature.index, feature.statistics
    title = f"Feature {feature.id}"
    where = f"{escape(index.hook_name)} · {escape(str(index.model_info.get('name', '')))}"
    head = f'<div style="font-size:16px;font-weight:600">{title}</div><div style="{MUTED}">{where}</div>'
    if row["dead"]:
        return _panel(f"{head}<p>It never fires on the {index.n_indexed_rows:,} tokens of this text.</p>")
    language = row["top_language"] or "–"
    facts = {
        "fires on": f"{one_in(row['density'])} tokens ({row['n_firings']:,} firings)",
        "strongest": short_number(row["max_value"]),
        "mean": short_number(row["mean_value"]),
        "mostly": f"{language} ({row['language_entropy']:.1f} bits over languages)",
        "encoder · decoder": short_number(row["encoder_decoder_cosine"]),
    }
    edges, counts = index.histogram(feature.id)
    columns = [
        _facts(facts),
        _histogram(counts, float(edges[-1])),
        _words("Fires on", row["top_tokens"][:8]),
        _words("Makes likelier", row["top_logits"][:8]),
        _words("Makes less likely", row["bottom_logits"][:8]),
    ]
    top = f'<div style="display:flex;flex-wrap:wrap;gap:8px 28px;margin:10px 0">{"".join(columns)}</div>'
    examples = "".join(_example(example, float(row["max_value"])) for example in index.top_examples(feature.id, 8))
    return _panel(head + top + examples)


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
    return _panel(f"{name}{_facts(facts)}{TABLE}<tr>{head}</tr>{rows}</table>")


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
        rows.append(f'<tr><td dir="auto" style="text-align:left;white-space:pre">{_token(token)}</td>{cells}</tr>')
    head = f'<th style="{MUTED};text-align:left">token</th><th style="{MUTED}" colspan="{n}">strongest features</th>'
    return _panel(f"{TABLE}<tr>{head}</tr>{''.join(rows)}</table>")


def _panel(content: str) -> str:
    style = f"font-family:{escape(FONT)};font-size:14px;color:{PALETTE.text};background:{PALETTE.page}"
    return f'<div style="{style};padding:12px;max-width:900px">{content}</div>'


def _facts(facts: dict[str, str]) -> str:
    rows = (
        f'<tr><td style="{MUTED};text-align:left;padding-right:12px">{name}</td>'
        f'<td style="text-align:left;font-variant-numeric:tabular-nums">{value}</td></tr>'
        for name, value in facts.items()
    )
    return f"{TABLE}{''.join(rows)}</table>"


def _words(title: str, tokens: Sequence[Any]) -> str:
    if not len(tokens):
        return ""
    lines = "".join(f'<div dir="auto" style="white-space:pre">{_token(str(token))}</div>' for token in tokens)
    return f'<div><div style="{MUTED}">{title}</div>{lines}</div>'


def _tokens(tokens: Sequence[Any]) -> str:
    return " ".join(f"<bdi>{_token(str(token))}</bdi>" for token in tokens)


def _token(token: str) -> str:
    return escape(visible_token(token))


def _histogram(counts: Any, maximum: float, width: int = 200, height: int = 60) -> str:
    """Bars on a logarithmic scale, as SVG."""
    import numpy as np

    heights = np.log1p(counts) / max(float(np.log1p(counts.max(initial=1))), 1e-9) * height
    step = width / len(counts)
    bars = "".join(
        f'<rect x="{place * step:.1f}" y="{height - bar:.1f}" width="{step - 0.5:.1f}" height="{bar:.1f}" '
        f'fill="{PALETTE.accent}"><title>{int(count):,} firings</title></rect>'
        for place, (bar, count) in enumerate(zip(heights, counts, strict=True))
    )
    label = f'<div style="{MUTED};display:flex;justify-content:space-between"><span>0</span>'
    label += f"<span>firing strength</span><span>{short_number(maximum)}</span></div>"
    svg = f'<svg width="{width}" height="{height}" role="img" aria-label="Histogram of firing strengths">{bars}</svg>'
    return f'<div style="width:{width}px"><div style="{MUTED}">How strongly it fires (log)</div>{svg}{label}</div>'
