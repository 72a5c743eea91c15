"""How hook tables and models show themselves, as text and in a notebook. Everything from outside is escaped."""

import re
from collections.abc import Iterable
from html import escape
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from scope.models.hooks import HookPoint, HookTable
    from scope.models.language_model import LanguageModel

__all__ = ["hook_table_html", "hook_table_text", "model_html"]

BLOCK = re.compile(r"^blocks\.(\d+)\.")


class _Line(NamedTuple):
    """The same hook in some layers."""

    name: str
    shape: str
    kind: str
    path: str
    aliases: str


def _lines(table: Iterable["HookPoint"]) -> list[_Line]:
    """One line for each hook, layers folded: blocks.{0…17}.hook_resid_post."""
    folded: dict[tuple[str, str, str, str, str], list[int]] = {}
    for point in table:
        block = BLOCK.match(point.name)
        shape = "(" + ", ".join(map(str, point.shape)) + ")"
        aliases = [alias for alias in point.aliases if bool(BLOCK.match(alias)) == bool(block)]
        pattern = BLOCK.sub("blocks.{}.", point.name)
        key = (pattern, shape, point.kind, point.path, ", ".join(BLOCK.sub("", alias) for alias in aliases))
        folded.setdefault(key, []).extend([int(block[1])] if block else [])
    lines = []
    for (pattern, shape, kind, path, aliases_text), layers in folded.items():
        span = f"{layers[0]}" if len(layers) == 1 else f"{{{layers[0]}…{layers[-1]}}}" if layers else ""
        lines.append(_Line(pattern.replace("{}", span), shape, kind, path, aliases_text))
    return lines


def hook_table_text(table: "HookTable") -> str:
    """Aligned columns."""
    lines = [_Line("hook", "shape", "kind", "path", "also"), *_lines(table)]
    widths = [max(len(line[column]) for line in lines) for column in range(5)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([f"{len(table)} hooks", *text])


def hook_table_html(table: "HookTable") -> str:
    """A table."""
    head = "".join(f"<th style='text-align:left'>{name}</th>" for name in ("hook", "shape", "kind", "path", "also"))
    body = "".join(
        "<tr>" + "".join(f"<td style='text-align:left'>{escape(cell)}</td>" for cell in line) + "</tr>"
        for line in _lines(table)
    )
    return f"<table><caption>{len(table)} hooks</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def model_html(model: "LanguageModel") -> str:
    """Name and sizes of a model."""
    count = model.parameter_count()
    facts = {
        "parameters": f"{count.total / 1e6:,.1f} million, {count.active_per_token / 1e6:,.1f} million active per token",
        "lookup tables": f"{sum(count.lookup_tables.values()) / 1e6:,.1f} million",
        **({"experts": f"{count.experts / 1e6:,.1f} million"} if count.experts else {}),
        "lie on": ", ".join(f"{device}: {place.bytes / 1e6:,.1f} MB" for device, place in count.devices.items()),
        "layers": f"{model.n_layers}",
        "residual width": f"{model.d_model:,}",
        "vocabulary": f"{model.d_vocab:,}",
        "context": f"{model.max_context_size:,} tokens",
        "computes in": f"{str(model.dtype).removeprefix('torch.')} on {model.device}",
        "hooks": f"{len(model.hook_table):,}; model.hook_names() lists them",
    }
    if model.files.revision:
        facts["revision"] = model.files.revision
    rows = "".join(
        f"<tr><th style='text-align:left'>{escape(key)}</th><td style='text-align:left'>{escape(value)}</td></tr>"
        for key, value in facts.items()
    )
    return f"<table><caption>{escape(model.name)}</caption><tbody>{rows}</tbody></table>"
