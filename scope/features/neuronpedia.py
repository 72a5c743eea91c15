"""Neuronpedia's explanation exports, read as labels.

Neuronpedia publishes its explanations per model and source (its word for one SAE) as gzipped batches of JSON lines,
`v1/MODEL/SOURCE/explanations/batch-N.jsonl.gz`, one row of its table "Explanation" a line. What is read here:

    id                      tells explanations of one feature apart
    modelId                 "gemma-2-2b"
    layer                   the source's id, "20-gemmascope-res-16k": layer, then the name of the set of SAEs
    index                   the feature's id, as a string
    description             the explanation
    explanationModelName    who wrote it, "gpt-4o-mini"
    typeName                by which method, "oai_token-act-pair"

Source: hijohnnylin/neuronpedia, `utils/neuronpedia-utils/neuronpedia_utils/export-data.py` (export_explanations) and
`apps/webapp/prisma/schema.prisma` (model Explanation). Its earlier exports, one JSON array of the same fields, are
read too.
"""

import gzip
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from scope.errors import InvalidInputError, MismatchError, UnknownNameError
from scope.features.labels import MAX_LABEL, FeatureLabels, ImportedLabel

__all__ = ["Explanation", "ImportReport", "SAEAddress", "import_explanations", "read_explanations"]

KINDS = {
    "res": "hook_resid", "resid": "hook_resid", "att": "attn", "attn": "attn", "mlp": "mlp",
}  # fmt: skip
"""Words of a source's name that say what it reads, and what is in the name of such a hook."""


@dataclass(frozen=True)
class SAEAddress:
    """Which SAE labels are for, as far as it is known; an empty string where it is not."""

    model: str = ""
    """The model's name, here or on the hub."""
    hook_name: str = ""
    neuronpedia_id: str = ""
    """MODEL/SOURCE at Neuronpedia, as SAELens's releases record it."""

    @classmethod
    def of(cls, model: Any, hook_name: Any, metadata: Any) -> "SAEAddress":
        """From what an SAE or an index of one knows; anything may be missing."""
        found = (metadata or {}).get("neuronpedia_id")
        return cls(str(model or ""), str(hook_name or ""), found if isinstance(found, str) else "")

    def mismatch(self, model: str, source: str) -> str:
        """Why labels of this model and source (Neuronpedia's names) are not this SAE's; empty where nothing is."""
        if "/" in self.neuronpedia_id:
            own_model, own_source = self.neuronpedia_id.split("/", 1)
            if (model, source) != (own_model, own_source):
                return f"they are of {model}/{source}, and the SAE is Neuronpedia's {self.neuronpedia_id}"
            return ""
        if self.model and _plain(model) != _plain(self.model):
            return f"they are of the model {model!r}, and the SAE is of {self.model!r}"
        layer = re.match(r"(\d+)(?:-(.*))?$", source)
        own_layer = re.match(r"blocks\.(\d+)\.(.+)$", self.hook_name)
        if layer and own_layer:
            if int(layer[1]) != int(own_layer[1]):
                return f"they are of layer {layer[1]} ({source!r}), and the SAE reads {self.hook_name}"
            kinds = {KINDS[word] for word in re.split(r"[-_]", layer[2] or "") if word in KINDS}
            if kinds and not any(kind in self.hook_name for kind in kinds):
                return f"they are of {source!r}, and the SAE reads {self.hook_name}"
        return ""


class Explanation(NamedTuple):
    """One explanation of an export."""

    model: str
    source: str
    feature: int
    text: str
    origin: str
    """Who wrote it and by which method, "gpt-4o-mini, oai_token-act-pair"."""
    key: str
    """Its id, or a digest of its text where it has none."""
    created: str
    """When, where the export says so."""
    where: str
    """File and line."""


class ImportReport(NamedTuple):
    """What an import took in."""

    labels: int
    features: int
    """Features that have at least one of them."""
    skipped_empty: int
    """Explanations without text."""
    skipped_long: int
    """Explanations longer than a label may be."""
    sources: dict[str, int]
    """Labels by where they are from."""


def read_explanations(files: Iterable[str | Path]) -> Iterator[Explanation]:
    """The explanations of export files (.jsonl, .jsonl.gz, .json), or of all batches in a folder.

    Raises:
        UnknownNameError: a file does not exist, or a folder has no batch in it.
        InvalidInputError: a line is not an explanation; file and line are named.
    """
    for file in _expand(files):
        for line, row in _rows(file):
            yield _explanation(row, f"{file.name}, line {line}")


def import_explanations(
    labels: FeatureLabels,
    files: Sequence[str | Path],
    address: SAEAddress,
    *,
    source: str | None = None,
    allow_mismatch: bool = False,
    progress: Callable[[int, int | None], None] | None = None,
) -> ImportReport:
    """Take Neuronpedia's explanations in as labels of one SAE, all of them or, on an error, none.

    Args:
        labels: of the SAE.
        files: export files, or folders of them.
        address: what the SAE is of; the export must be of the same.
        source: which of the export's sources to take ("20-gemmascope-res-16k"), needed where there are several.
        allow_mismatch: take labels of another model or hook.
        progress: called with the number of explanations read.
    Raises:
        MismatchError: the labels are of another model or hook.
        InvalidInputError: a file cannot be read, or has several sources and none was named.
        OutOfRangeError: a label is of a feature that the SAE does not have.
    """
    taken: list[ImportedLabel] = []
    sources: Counter[tuple[str, str]] = Counter()
    skipped: Counter[str] = Counter()
    for number, one in enumerate(read_explanations(files), start=1):
        sources[one.model, one.source] += 1
        if progress is not None and number % 1000 == 0:
            progress(number, None)
        if source is not None and one.source != source:
            continue
        if labels.d_sae is not None and not 0 <= one.feature < labels.d_sae:
            _check_source(sources, source, address, allow_mismatch)
            raise InvalidInputError(
                f"{one.where} is about feature {one.feature:,}; this SAE has {labels.d_sae:,} features (0 to "
                f"{labels.d_sae - 1:,}). The export is of another SAE."
            )
        text = " ".join(one.text.split())
        if text and len(text) <= MAX_LABEL:
            taken.append(ImportedLabel(one.feature, text, f"neuronpedia: {one.origin}", one.key, one.created))
        else:
            skipped["long" if text else "empty"] += 1
    _check_source(sources, source, address, allow_mismatch)
    labels.take_in(taken)
    by_source = Counter(label.source for label in taken)
    n_features = len({label.feature for label in taken})
    return ImportReport(len(taken), n_features, skipped["empty"], skipped["long"], dict(by_source))


def _check_source(
    sources: Counter[tuple[str, str]], wanted: str | None, address: SAEAddress, allow_mismatch: bool
) -> None:
    names = [f"{model}/{source}" for model, source in sources]
    if not sources:
        raise InvalidInputError("There is no explanation in what was given.")
    left = [name for name in sources if wanted is None or name[1] == wanted]
    if not left:
        raise UnknownNameError("source", wanted, [source for _, source in sources])
    if len(left) > 1:
        raise InvalidInputError(
            f"The explanations are of several sources: {', '.join(names[:12])}. Name one of them with --source."
        )
    reason = address.mismatch(*left[0])
    if reason and not allow_mismatch:
        raise MismatchError(f"These are not labels of this SAE: {reason}. Take them anyway with --allow-mismatch.")


def _expand(files: Iterable[str | Path]) -> Iterator[Path]:
    for name in files:
        path = Path(name)
        if path.is_dir():
            found = [p for p in path.rglob("*") if re.search(r"\.jsonl?(\.gz)?$", p.name) and _may_explain(p, path)]
            if not found:
                raise UnknownNameError("export", str(path), hint="The folder has no .jsonl or .jsonl.gz file in it.")
            yield from sorted(found, key=lambda p: [int(n) if n.isdigit() else n for n in re.split(r"(\d+)", str(p))])
        elif path.is_file():
            yield path
        else:
            siblings = path.parent.iterdir() if path.parent.is_dir() else ()
            raise UnknownNameError("file", str(path), [str(sibling) for sibling in siblings])


def _may_explain(path: Path, folder: Path) -> bool:
    """Whether a file of an export's folder holds explanations: it has features and activations beside them."""
    above = set(path.relative_to(folder).parts[:-1])
    if above & {"features", "activations"}:
        return False
    return "explanations" in above or path.parent.name == "explanations" or path.name.startswith("batch-")


def _rows(file: Path) -> Iterator[tuple[int, Any]]:
    opener = gzip.open if _is_gzip(file) else open
    try:
        with opener(file, "rt", encoding="utf-8") as lines:
            if file.name.removesuffix(".gz").endswith(".json"):
                content = json.load(lines)
                yield from enumerate(content if isinstance(content, list) else [content], start=1)
                return
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    try:
                        yield number, json.loads(line)
                    except ValueError as problem:
                        raise InvalidInputError(f"{file.name}, line {number} is not JSON ({problem}).") from problem
    except (gzip.BadGzipFile, EOFError, UnicodeDecodeError, json.JSONDecodeError) as problem:
        raise InvalidInputError(f"{file} cannot be read ({problem}); expected JSON lines, gzipped or not.") from problem


def _is_gzip(file: Path) -> bool:
    with open(file, "rb") as opened:
        return opened.read(2) == b"\x1f\x8b"


def _explanation(row: Any, where: str) -> Explanation:
    if not isinstance(row, dict):
        raise InvalidInputError(f"{where} is a {type(row).__name__}; expected an object with an explanation.")
    missing = [name for name in ("modelId", "layer", "index", "description") if name not in row]
    if missing:
        raise InvalidInputError(
            f"{where} has no {', '.join(missing)}: it is no explanation of Neuronpedia's. It has: "
            f"{', '.join(map(str, list(row)[:12]))}."
        )
    try:
        feature = int(str(row["index"]))
    except ValueError as problem:
        raise InvalidInputError(f"{where}: the index {row['index']!r} is no feature id.") from problem
    text = str(row["description"] or "")
    origin = ", ".join(str(row[name]) for name in ("explanationModelName", "typeName") if row.get(name)) or "unknown"
    key = str(row.get("id") or xxhash.xxh3_128_hexdigest(text.encode("utf-8", "replace")))
    created = str(row.get("createdAt") or "")
    return Explanation(str(row["modelId"]), str(row["layer"]), feature, text, origin, key, created, where)


def _plain(model: str) -> str:
    """A model's name for comparing: without the organisation, what follows a comma, case and punctuation."""
    name = re.sub(r"[^a-z0-9]", "", model.split(",")[0].rsplit("/", 1)[-1].lower())
    return {"gpt2small": "gpt2"}.get(name, name)
