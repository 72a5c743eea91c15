"""One feature in a notebook: the panels of the dashboard's page, as plain HTML with inline styles and no scripts.

Label and notes, its numbers, histogram, what it fires on, what it makes likelier and less likely, languages, of chats
roles and kinds of content, decoder neighbours, co-firing features, and examples by strength. Everything is escaped;
what folds does so with `<details>`.
"""

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from scope.features.html import MUTED, PALETTE, example_html, facts_html, page_html, token_html
from scope.figures.text import one_in, short_number

if TYPE_CHECKING:
    import pandas as pd

    from scope.features.examples import Example
    from scope.features.feature import Feature
    from scope.features.index import FeatureIndex
    from scope.features.labels import Label

__all__ = ["feature_html"]

BANDS = ((0.75, 1.0), (0.5, 0.75), (0.25, 0.5), (0.0, 0.25))
"""Quantiles of a feature's firings that examples are drawn from."""
TOP, IN_BAND, ROWS, GROUPS = 6, 4, 8, 6
"""The strongest examples, examples of a band, rows of a list, languages."""


def feature_html(feature: "Feature") -> str:
    """One feature: its numbers, histogram, tokens, logits, languages, neighbours and examples."""
    index, row = feature.index, feature.statistics
    head = _head(feature) + _said(index.labels.get(feature.id))
    promoted = _logits(index, feature.id)
    neighbours = _features("Decoder neighbours", index, index.neighbours(feature.id, ROWS), "cosine", "cosine")
    if row["dead"]:
        never = f"<p>It never fires on the {index.n_indexed_rows:,} tokens of this text.</p>"
        return page_html(head + never + _columns([*promoted, neighbours]))
    edges, counts = index.histogram(feature.id)
    cofiring = _features("Fires with", index, index.cofiring(feature.id, ROWS), "jaccard", "Jaccard")
    columns = [
        f"<div>{facts_html(_numbers(row))}{_histogram(counts, float(edges[0]), float(edges[-1]))}</div>",
        _top_tokens(index.top_tokens(feature.id, ROWS)),
        *promoted,
        *_groups(index, feature.id),
        neighbours,
        cofiring,
    ]
    return page_html(head + _columns(columns) + _examples(index, feature.id, float(row["max_value"])))


def _head(feature: "Feature") -> str:
    index = feature.index
    where = f"{escape(index.hook_name)} · {escape(str(index.model_info.get('name', '')))}"
    title = f'<span style="font-size:16px;font-weight:600">Feature {feature.id}</span>'
    return f'<div>{title} <span style="{MUTED}">{where}</span></div>'


def _said(label: "Label") -> str:
    """The label, where it is from, star, lists and notes; nothing where nothing is said."""
    if not (label.text or label.notes or label.starred or label.lists):
        return ""
    star = f'<span title="starred" style="color:{PALETTE.accent_text}">★ </span>' if label.starred else ""
    origin = [escape(label.source)] if label.source not in ("", "own") else []
    aside = " · ".join([*origin, *(f"in {escape(name)}" for name in label.lists)])
    text = f'<bdi style="font-size:15px;overflow-wrap:anywhere">{escape(label.text)}</bdi>'
    notes = f'<div dir="auto" style="white-space:pre-wrap;overflow-wrap:anywhere;{MUTED}">{escape(label.notes)}</div>'
    lines = notes if label.notes else ""
    return f'<div style="margin:4px 0">{star}{text} <span style="{MUTED}">{aside}</span>{lines}</div>'


def _numbers(row: dict[str, Any]) -> dict[str, str]:
    low, high = one_in(row["density_high"]), one_in(row["density_low"])
    return {
        "fires on": f'<span title="95%: {low} to {high}">{one_in(row["density"])} tokens</span>',
        "firings": f"{row['n_firings']:,}",
        "strongest": short_number(row["max_value"]),
        "mean": short_number(row["mean_value"]),
        "token entropy": f"{short_number(row['token_entropy'])} bits",
        "encoder · decoder": short_number(row["encoder_decoder_cosine"]),
    }


def _columns(blocks: Iterable[str]) -> str:
    return f'<div style="display:flex;flex-wrap:wrap;gap:10px 32px;margin:10px 0">{"".join(blocks)}</div>'


def _titled(title: str, content: str, unit: str = "") -> str:
    aside = f' <span style="opacity:.8">{unit}</span>' if unit else ""
    return f'<div style="min-width:150px"><div style="{MUTED}">{title}{aside}</div>{content}</div>'


def _bars(rows: Sequence[tuple[str, float, str, str]], colour: str) -> str:
    """Rows of (what, share of the longest bar, value, title) with a bar under each."""
    lines = "".join(
        f'<div title="{escape(title)}" style="display:flex;gap:12px;justify-content:space-between;'
        f"background:linear-gradient({colour},{colour}) 0 100%/{100 * min(max(share, 0.0), 1.0):.1f}% 2px no-repeat;"
        f'padding:1px 0 3px"><span style="white-space:pre;overflow:hidden;text-overflow:ellipsis;max-width:22em">'
        f'{what}</span><span style="font-variant-numeric:tabular-nums">{value}</span></div>'
        for what, share, value, title in rows
    )
    return lines or f'<div style="{MUTED}">–</div>'


def _top_tokens(tokens: "pd.DataFrame") -> str:
    rows = [
        (
            f"<bdi>{token_html(str(row['token']))}</bdi>",
            float(row["share"]),
            f"{short_number(100 * row['share'])}%",
            f"{row['count']:,} firings, mean strength {short_number(row['mean_value'])}",
        )
        for row in tokens.to_dict("records")
    ]
    return _titled("Fires on", _bars(rows, PALETTE.accent_text), "share of strength")


def _logits(index: "FeatureIndex", feature: int) -> list[str]:
    top, bottom = index.top_logits(feature, ROWS), index.bottom_logits(feature, ROWS)
    if not len(top):
        return [_titled("Logit effects", f'<div style="{MUTED}">The index was built without the model.</div>')]
    largest = max(float(top["effect"].abs().max()), float(bottom["effect"].abs().max())) or 1.0
    blocks = []
    for title, frame, colour in (
        ("Makes likelier", top, PALETTE.positive),
        ("Makes less likely", bottom, PALETTE.negative),
    ):
        rows = [
            (
                f"<bdi>{token_html(str(token))}</bdi>",
                abs(float(effect)) / largest,
                ("+" if effect > 0 else "") + short_number(float(effect)),
                f"{effect:+.4g} logit per unit of firing strength",
            )
            for token, effect in zip(frame["token"], frame["effect"], strict=True)
        ]
        blocks.append(_titled(title, _bars(rows, colour)))
    return blocks


def _groups(index: "FeatureIndex", feature: int) -> list[str]:
    """How often it fires in each language; of chats also in each role's turns and on each kind of content, of a text
    with media on each modality, of denoising on tokens of each state."""
    frames = [index.by_language(feature)]
    if index.roles:
        frames += [index.by_role(feature), index.by_kind(feature)]
    if index.modalities:
        frames.append(index.by_modality(feature))
    if index.states:
        frames.append(index.by_state(feature))
    return [_rates(frame.head(GROUPS)) for frame in frames]


def _rates(frame: "pd.DataFrame") -> str:
    group = str(frame.columns[0])
    largest = float(frame["rate"].max()) or 1.0
    rows = [
        (
            escape(str(row[group]) or "–"),
            row["rate"] / largest,
            one_in(row["rate"]),
            f"{row['n_firings']:,} firings; 95%: {one_in(row['rate_high'])} to {one_in(row['rate_low'])}",
        )
        for row in frame.to_dict("records")
    ]
    return _titled(f"By {group}", _bars(rows, PALETTE.accent_text), "fires on")


def _features(title: str, index: "FeatureIndex", frame: "pd.DataFrame", column: str, unit: str) -> str:
    labels = index.labels.table().set_index("feature")["label"].to_dict()
    rows = []
    for row in frame.to_dict("records"):
        name = escape(labels.get(row["feature"], "")) or token_html(str(row["top_token"]))
        value = float(row[column])
        rows.append((f"{row['feature']} <bdi>{name}</bdi>", value, short_number(value), one_in(row["density"])))
    return _titled(title, _bars(rows, PALETTE.accent_text), unit)


def _examples(index: "FeatureIndex", feature: int, maximum: float) -> str:
    """The strongest, and some from each band, folded."""
    colours = f"background:linear-gradient(to right,{PALETTE.page},{PALETTE.accent})"
    ramp = f'<span style="display:inline-block;width:80px;height:9px;{colours}"></span>'
    scale = f'<div style="{MUTED};margin-top:8px">Firing strength 0 {ramp} {short_number(maximum)}</div>'
    parts = [scale, _group("Strongest", index.top_examples(feature, TOP), maximum, opened=True)]
    seen = {example.row for example in index.top_examples(feature, TOP)}
    for low, high in BANDS:
        drawn = [one for one in index.quantile_examples(feature, low, high, IN_BAND) if one.row not in seen]
        if drawn:
            parts.append(_group(f"Quantile {low:g} to {high:g}", drawn, maximum, opened=False))
    return "".join(parts)


def _group(title: str, examples: Iterable["Example"], maximum: float, *, opened: bool) -> str:
    content = "".join(example_html(example, maximum) for example in examples)
    head = f'<summary style="cursor:pointer;font-weight:600;margin-top:8px">{title}</summary>'
    return f"<details{' open' if opened else ''}>{head}{content}</details>"


def _histogram(counts: Any, low: float, high: float, width: int = 220, height: int = 64) -> str:
    """Bars on a logarithmic scale, as SVG."""
    heights = np.log1p(counts) / max(float(np.log1p(counts.max(initial=1))), 1e-9) * height
    step = width / len(counts)
    bars = "".join(
        f'<rect x="{place * step:.1f}" y="{height - bar:.1f}" width="{step - 0.5:.1f}" height="{bar:.1f}" '
        f'fill="{PALETTE.accent_text}"><title>{int(count):,} firings</title></rect>'
        for place, (bar, count) in enumerate(zip(heights, counts, strict=True))
    )
    label = f'<div style="{MUTED};display:flex;justify-content:space-between"><span>{short_number(low)}</span>'
    label += f"<span>firing strength</span><span>{short_number(high)}</span></div>"
    svg = f'<svg width="{width}" height="{height}" role="img" aria-label="Histogram of firing strengths">{bars}</svg>'
    return f'<div style="width:{width}px"><div style="{MUTED}">How strongly it fires (log)</div>{svg}{label}</div>'
