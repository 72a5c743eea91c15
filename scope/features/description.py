"""What an index says of itself."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scope.features.index import FeatureIndex

__all__ = ["info"]


def info(index: "FeatureIndex") -> dict[str, Any]:
    """See `FeatureIndex.info`."""
    table = index.table
    return {
        "format": index.manifest["format"],
        "id": index.id,
        "name": index.name,
        "path": str(index.path),
        "fingerprint": index.fingerprint,
        "parents": list(index.manifest["parents"]),
        "created_by": index.manifest["created_by"],
        "model": index.model_info,
        "sae": index.sae_info,
        "hook_name": index.hook_name,
        "d_sae": index.d_sae,
        "n_rows": index.n_rows,
        "n_indexed_rows": index.n_indexed_rows,
        "n_firings": index.n_firings,
        "firings_per_row": index.n_firings / max(index.n_indexed_rows, 1),
        "n_documents": len(index.documents),
        "dead": int(table["dead"].sum()),
        "over_dense": int(table["over_dense"].sum()),
        "languages": dict(index.manifest["languages"]),
        "sources": dict(index.manifest["sources"]),
        **{
            name: dict(index.manifest[name])
            for name in ("roles", "kinds", "modalities", "states")
            if name in index.manifest
        },
        **({"denoising": index.manifest["denoising"]} if "denoising" in index.manifest else {}),
        "bytes": index.n_bytes,
        "metrics": index.metrics,
        "allowed_mismatches": list(index.manifest["allowed_mismatches"]),
    }
