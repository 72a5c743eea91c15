"""What a workspace holds, as the workspace page shows it: facts, parents, health. No Dash."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from scope.errors import ScopeError

if TYPE_CHECKING:
    from scope.features.index import FeatureIndex
    from scope.workspace import Entry, Workspace

__all__ = ["Artefact", "Model", "describe", "models", "sae_name"]

ARCHITECTURES = {"topk": "TopK", "batchtopk": "BatchTopK", "jumprelu": "JumpReLU", "standard": "ReLU", "gated": "Gated"}


@dataclass(frozen=True)
class Artefact:
    """A store, SAE or index as the workspace page shows it."""

    entry: "Entry"
    facts: Mapping[str, Any]
    """What its `info()` or manifest says."""
    parents: "tuple[Entry, ...]"
    problem: str | None


@dataclass(frozen=True)
class Model:
    """A language model as stores and indexes record it."""

    name: str
    revision: str
    weight_hash: str
    """SHA-256 of its weights, hex; "" where nothing recorded it."""
    used_by: tuple[str, ...]
    """Names of the stores and indexes."""


def models(artefacts: Iterable[Artefact]) -> list[Model]:
    """The models that stores and indexes were made with, one for each name and weights."""
    users: dict[tuple[str, str, str], list[str]] = {}
    for artefact in artefacts:
        facts = artefact.facts
        if artefact.problem is None and facts.get("model"):
            key = (str(facts["model"]), str(facts.get("revision") or ""), str(facts.get("weight_hash") or ""))
            users.setdefault(key, []).append(artefact.entry.name)
    return [Model(*key, tuple(names)) for key, names in sorted(users.items())]


def describe(workspace: "Workspace", entry: "Entry", index: "FeatureIndex | None" = None) -> Artefact:
    """Facts about one artefact. One that cannot be read is shown with its problem, never left out."""
    if entry.problem is not None:
        return Artefact(entry, {}, (), entry.problem)
    try:
        if index is not None:
            excerpt = workspace.excerpt_of(str(index.sae_info["fingerprint"]))
            facts = {**_index_facts(index), "excerpt_rows": excerpt and int(excerpt.manifest["n_rows"])}
        elif entry.kind == "activation-store":
            facts = _store_facts(workspace.store(entry.id).info())
        else:
            facts = _sae_facts(entry.manifest)
        return Artefact(entry, facts, tuple(workspace.parents(entry)), None)
    except (ScopeError, OSError, KeyError, ValueError) as error:
        return Artefact(entry, {}, (), str(error))


def _index_facts(index: "FeatureIndex") -> dict[str, Any]:
    return {
        "name": index.name,
        "model": index.model_info.get("name", ""),
        "revision": index.model_info.get("revision"),
        "weight_hash": index.model_info.get("weight_hash"),
        "hook": index.hook_name,
        "sae": sae_name(index),
        "d_sae": index.d_sae,
        "n_rows": index.n_rows,
        "n_firings": index.n_firings,
        "n_documents": len(index.documents),
        "languages": index.languages,
        "dead": int(index.table["dead"].sum()),
        "over_dense": int(index.table["over_dense"].sum()),
        "metrics": dict(index.metrics),
        "mismatches": list(index.manifest.get("allowed_mismatches", ())),
    }


def _store_facts(info: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "model": info["spec"]["model"],
        "revision": info["spec"].get("model_revision") or info["spec"].get("revision"),
        "weight_hash": info["spec"].get("weight_hash"),
        "rows": info["rows"],
        "documents": info["documents"],
        "hooks": list(info["hooks"]),
        "files": list(info["text"].get("files", ())),
        "complete": info["complete"],
    }


def _sae_facts(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """From the manifest alone: opening an SAE would load torch."""
    training = manifest.get("training") or {}
    hook = training.get("hook")
    return {"d_sae": training.get("d_sae"), "trained_on": training.get("tokens"), "hooks": [hook] if hook else []}


def sae_name(index: "FeatureIndex") -> str:
    """The SAE in words: "TopK, 4,096 features, k = 32"."""
    info = index.sae_info
    architecture = str(info.get("architecture", "SAE"))
    k = f", k = {info['k']}" if info.get("k") else ""
    return f"{ARCHITECTURES.get(architecture, architecture)}, {index.d_sae:,} features{k}"
