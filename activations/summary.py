"""What a store shows of itself: `info()` and its table in a notebook."""

from dataclasses import asdict
from html import escape
from typing import Any

import numpy as np

from activations.layout import PLAN
from activations.media import MODALITIES
from activations.selection import RowSelection
from activations.source import RowFlag
from activations.store import ActivationStore

__all__ = ["norm_statistics", "store_html", "store_info"]

SAMPLED_ROWS = 2**24
"""Norm statistics read at most about so many rows, in whole row groups spread over the store."""


def store_info(store: ActivationStore) -> dict[str, Any]:
    """What is in the store, JSON-able; see `ActivationStore.info`.

    Keys: `id, fingerprint, path, complete, rows, planned_rows, bytes, spec, text, appended, selection, chats, media,
    created_by, hooks, sequences, documents, held_out_documents, by_language, by_source`, and
    `by_modality` where there are media. Per hook: `shape, rows, bytes, norms`.
    """
    info: dict[str, Any] = {
        "id": store.id,
        "fingerprint": store.fingerprint,
        "path": str(store.path),
        "complete": store.complete,
        "rows": store.n_rows,
        "planned_rows": store.ledger.committed_rows(PLAN),
        "bytes": sum(_bytes_of(store, capture) for capture in store.ledger.records),
        "spec": store.manifest["spec"],
        "text": store.manifest.get("text", {}),
        "appended": store.manifest.get("appended", []),
        "selection": store.manifest.get("selection"),
        "chats": store.manifest.get("chats"),
        "media": store.manifest.get("media"),
        "created_by": store.manifest["created_by"],
        "hooks": {
            hook: {
                "shape": list(store.hook_shape(hook)),
                "rows": store.rows_of(hook),
                "bytes": _hook_bytes(store, hook),
                "norms": norm_statistics(store, hook),
            }
            for hook in store.hooks
        },
    }
    if store.n_rows:
        documents, sequences = store.documents(), store.sequences()
        info["sequences"], info["documents"] = len(sequences), len(documents)
        info["held_out_documents"] = int(documents["held_out"].sum())
        for column in ("language", "source"):
            counts = documents.groupby(column)["n_tokens"].agg(["size", "sum"]).sort_values("sum", ascending=False)
            info[f"by_{column}"] = {
                str(name): {"documents": int(row["size"]), "tokens": int(row["sum"])} for name, row in counts.iterrows()
            }
        if store.has_media:
            info["by_modality"] = _by_modality(store)
    return info


def _by_modality(store: ActivationStore) -> dict[str, dict[str, int]]:
    """Rows of each modality, and how many media there are."""
    kinds, size = store.media()["kind"].value_counts(), SAMPLED_ROWS
    counts = np.zeros(len(MODALITIES), np.int64)
    for start in range(0, store.n_rows, size):
        codes = store.column("modality", start, min(store.n_rows, start + size))
        counts += np.bincount(codes, minlength=len(MODALITIES))
    rows = dict(zip(MODALITIES, counts.tolist(), strict=True))
    return {
        name: {"rows": n, **({} if name == "text" else {"media": int(kinds.get(name, 0))})} for name, n in rows.items()
    }


def norm_statistics(store: ActivationStore, hook: str) -> dict[str, Any]:
    """Median of the rows' norms at a hook and how many rows lie above 10 and 100 times it, BOS rows left out.

    `rows` says how many rows were looked at: all of them up to 16.8 million, else whole row groups spread evenly.
    """
    n_rows, size = store.rows_of(hook), store.spec.rows_per_group
    n_groups = -(-n_rows // size)
    step = max(1, -(-n_rows // SAMPLED_ROWS))
    pieces = [np.empty(0, np.float32)]
    for group in range(0, n_groups, step):
        start, stop = group * size, min(n_rows, (group + 1) * size)
        is_bos = (store.flags(start, stop) & RowFlag.BOS) > 0
        pieces.append(store.norms(hook, start, stop)[~is_bos])
    norms = np.concatenate(pieces)
    if not len(norms):
        return {"rows": 0, "median": None, "above_10x": 0, "above_100x": 0}
    median = float(np.median(norms))
    return {
        "rows": len(norms),
        "median": median,
        "above_10x": int((norms > 10 * median).sum()),
        "above_100x": int((norms > 100 * median).sum()),
    }


def _bytes_of(store: ActivationStore, capture: str) -> int:
    declaration, records = store.ledger.declarations[capture], store.ledger.records[capture].values()
    objects = (known for record in records for known in store.layout.objects_of(record, declaration).values())
    return sum(known.n_bytes for known in objects)


def _hook_bytes(store: ActivationStore, hook: str) -> int:
    prefix = store.layout.hook_array(hook) + "/"
    records = store.ledger.records[store.capture_of(hook)].values()
    return sum(known.n_bytes for record in records for name, known in record.objects.items() if name.startswith(prefix))


def store_html(store: ActivationStore) -> str:
    """A small table for notebooks. It reads the ledger only, so it costs nothing on a store of any size."""
    spec = store.spec
    state = "complete" if store.complete else "not complete"
    texts = [store.manifest.get("text", {}), *(entry["text"] for entry in store.manifest.get("appended", ()))]
    facts = {
        "rows": f"{store.n_rows:,} ({state})",
        "model": spec.model + (f" @ {spec.revision}" if spec.revision else ""),
        "windows": f"{spec.context_size} tokens{' with BOS' if spec.bos_token_id is not None else ''}",
        "stored as": f"{spec.dtype}, {spec.rows_per_group:,} rows a group",
        "text": ", ".join(file for text in texts for file in text.get("files", [])[:4]),
    }
    chosen = store.manifest.get("selection")
    if chosen:
        narrowed = asdict(RowSelection())
        facts["rows are"] = ", ".join(f"{name} {value}" for name, value in chosen.items() if value != narrowed[name])
    head = "".join(
        f"<tr><th style='text-align:left'>{escape(name)}</th><td style='text-align:left'>{escape(value)}</td></tr>"
        for name, value in facts.items()
    )
    rows = "".join(
        f"<tr><td style='text-align:left'><code>{escape(hook)}</code></td>"
        f"<td>{' × '.join(map(str, store.hook_shape(hook)))}</td><td>{store.rows_of(hook):,}</td>"
        f"<td>{_readable(_hook_bytes(store, hook))}</td></tr>"
        for hook in store.hooks
    )
    return (
        f"<div><b>ActivationStore</b> <code>{escape(store.id)}</code> {escape(str(store.path))}"
        f"<table><tbody>{head}</tbody></table>"
        f"<table><thead><tr><th style='text-align:left'>hook</th><th>shape</th><th>rows</th><th>size</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
    )


def _readable(n_bytes: int) -> str:
    size = float(n_bytes)
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
