"""Features in Neuronpedia's import format, and in SAEDashboard's, which Neuronpedia's tools convert.

1. `feature_json` is one feature: a row of Neuronpedia's table "Neuron" with its "Activation" and "Explanation" rows
   under `activations` and `explanations`.
2. `export_neuronpedia` writes a whole SAE, or some of its features, as the folder that Neuronpedia imports:

       OUT/MODEL/SOURCE/release.jsonl, model.jsonl, sourceset.jsonl, source.jsonl
                        features/batch-N.jsonl.gz, activations/batch-N.jsonl.gz, explanations/batch-N.jsonl.gz

3. `saedashboard_batch` is what SAEDashboard's neuronpedia runner writes as `batch-N.json`.

Field names: hijohnnylin/neuronpedia, `utils/neuronpedia-utils/neuronpedia_utils/db_models/*.py`, `export-data.py` and
`apps/webapp/prisma/schema.prisma`; jbloomAus/SAEDashboard, `sae_dashboard/neuronpedia/neuronpedia_dashboard.py`
(to_dict) and `neuronpedia_export.py` (the folder).

Values are firing strengths, activation x ||W_dec row||, and logit effects are per unit of them. Explanations are one's
own labels only. The histograms of firing strengths and of effects on all logits give the middle of each bin and what
lies in it, as SAEDashboard's do; the latter needs the model (`scope.features.all_logits`) and is empty without it. What
an index does not hold stays empty, as the format allows: alignment with and correlation to neurons, the weights of
attention heads (`decoder_weights_dist`), the decoder row (`vector`). `topkCosSim*` are the nearest decoder rows.
"""

import gzip
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import xxhash

from activations.disk import write_file
from scope.errors import InvalidInputError, OccupiedError
from scope.features.all_logits import logit_histogram
from scope.features.labels import OWN

if TYPE_CHECKING:
    from scope.features.all_logits import AllLogits
    from scope.features.examples import Example
    from scope.features.index import FeatureIndex

__all__ = [
    "ExportReport",
    "NeuronpediaNames",
    "export_neuronpedia",
    "feature_json",
    "neuronpedia_files",
    "saedashboard_batch",
]

BATCH = 64
"""Features in a batch file: few enough to be made in a second or two."""
TOP, BANDS, IN_BAND = 20, 5, 5
"""Examples of a feature: the strongest, then some from each of so many bands of equal numbers of firings."""
WINDOW = (64, 63)
"""Tokens before and after an example's own."""
N_LOGITS = 10
ABSENT = {
    "neuron_alignment_indices": "neuron_alignment_values neuron_alignment_l1",
    "correlated_neurons_indices": "correlated_neurons_pearson correlated_neurons_l1",
    "correlated_features_indices": "correlated_features_pearson correlated_features_l1",
}
DEFAULT_USER = "clkht01d40000jv08hvalcvly"
"""The user that Neuronpedia's own seed makes (apps/webapp/prisma/seed.ts); rows belong to it unless told."""
KINDS = (("resid", "res"), ("attn", "att"), ("mlp", "mlp"))


@dataclass(frozen=True)
class NeuronpediaNames:
    """What the SAE is called at Neuronpedia. Empty ones are derived from the index."""

    model_id: str = ""
    """The model, lower case: "gemma-2-2b"."""
    source_set: str = ""
    """The set of SAEs without the layer: "gemmascope-res-16k"."""
    layer: int | None = None
    """The layer that the SAE reads."""
    creator_id: str = DEFAULT_USER
    """The user that rows belong to."""
    creator_name: str = ""
    """Who made the SAE, in words."""

    def of(self, index: "FeatureIndex") -> "NeuronpediaNames":
        """These names with all gaps filled.

        Raises:
            InvalidInputError: a name holds more than letters, digits, dashes, underscores and dots.
        """
        layer = re.match(r"blocks\.(\d+)\.", index.hook_name)
        kind = next((short for part, short in KINDS if part in index.hook_name), "sae")
        width = f"{index.d_sae // 1024}k" if index.d_sae % 1024 == 0 else str(index.d_sae)
        names = NeuronpediaNames(
            self.model_id or _slug(str(index.model_info.get("name", "")).split(",")[0].rsplit("/", 1)[-1]) or "model",
            self.source_set or f"scope-{kind}-{width}",
            int(layer[1]) if self.layer is None and layer else self.layer or 0,
            self.creator_id,
            self.creator_name or "Scope",
        )
        for name in (names.model_id, names.source_set, names.creator_id):
            if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}", name):
                raise InvalidInputError(f"{name!r} is no name for Neuronpedia: letters, digits, '-', '_' and '.' only.")
        return names

    @property
    def source(self) -> str:
        """The id of one SAE, "20-gemmascope-res-16k"."""
        return f"{self.layer}-{self.source_set}"


class ExportReport(NamedTuple):
    """What an export wrote."""

    folder: Path
    features: int
    activations: int
    explanations: int
    files: int
    bytes: int


def feature_json(
    index: "FeatureIndex",
    feature: int,
    names: NeuronpediaNames | None = None,
    *,
    effects: np.ndarray | None = None,
) -> dict[str, Any]:
    """One feature as Neuronpedia has it: the row of "Neuron" with `activations` and `explanations`. JSON-able.

    Args:
        effects: `(d_vocab,)`, the feature's effect on every logit, for their histogram.
    """
    known = (names or NeuronpediaNames()).of(index)
    neuron, activations, explanations = _rows(index, index.feature(feature).id, known, effects)
    return {**neuron, "activations": activations, "explanations": explanations}


def saedashboard_batch(
    index: "FeatureIndex",
    features: Sequence[int],
    names: NeuronpediaNames | None = None,
    *,
    logits: "AllLogits | None" = None,
) -> dict[str, Any]:
    """Some features as SAEDashboard's runner writes them, `batch-N.json`. JSON-able.

    Args:
        logits: computes the effects on all logits, for their histograms.
    """
    known = (names or NeuronpediaNames()).of(index)
    return {
        "model_id": known.model_id,
        "layer": known.layer,
        "sae_set": known.source_set,
        "sae_id_suffix": None,
        "features": [
            _dashboard_feature(index, index.feature(feature).id, effects)
            for feature, effects in _with_effects(features, logits)
        ],
    }


def export_neuronpedia(
    index: "FeatureIndex",
    out: str | Path,
    features: Sequence[int] | None = None,
    names: NeuronpediaNames | None = None,
    *,
    layout: str = "neuronpedia",
    logits: "AllLogits | None" = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> ExportReport:
    """Write a whole SAE, or some of its features, as a folder that Neuronpedia imports.

    Args:
        index: the SAE's index; its own labels become explanations.
        out: a folder; MODEL/SOURCE is made in it.
        features: which; by default all.
        names: what it is called there.
        layout: "neuronpedia" (its import format) or "saedashboard" (batch-N.json, for its converter).
        logits: computes the effects on all logits, for their histograms; without it these stay empty.
        progress: called with features done and in all.
    Raises:
        OccupiedError: OUT/MODEL/SOURCE holds something.
        InvalidInputError: a name or layout that is none.
        OutOfRangeError: the SAE has no such feature.
    """
    if layout not in ("neuronpedia", "saedashboard"):
        raise InvalidInputError(f"There is no layout {layout!r}; expected neuronpedia or saedashboard.")
    known = (names or NeuronpediaNames()).of(index)
    wanted = [index.feature(f).id for f in (range(index.d_sae) if features is None else features)]
    folder = Path(out) / known.model_id / known.source
    if folder.exists() and any(folder.iterdir()):
        raise OccupiedError(f"{folder} holds something already. Give another --out, or remove it.")
    folder.mkdir(parents=True, exist_ok=True)
    counts: Counter[str] = Counter()
    files = neuronpedia_files(index, wanted, known, layout=layout, logits=logits, counts=counts, progress=progress)
    for name, content in files:
        (folder / name).parent.mkdir(exist_ok=True)
        write_file(folder / name, content)
        counts["files"] += 1
        counts["bytes"] += len(content)
    return ExportReport(
        folder, len(wanted), counts["activations"], counts["explanations"], counts["files"], counts["bytes"]
    )


def neuronpedia_files(
    index: "FeatureIndex",
    features: Sequence[int] | None = None,
    names: NeuronpediaNames | None = None,
    *,
    layout: str = "neuronpedia",
    logits: "AllLogits | None" = None,
    counts: "Counter[str] | None" = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> Iterator[tuple[str, bytes]]:
    """What `export_neuronpedia` writes into MODEL/SOURCE, one after the other: name within it, content.

    Args:
        logits: as `export_neuronpedia` takes it.
        counts: counts up "activations" and "explanations".
    """
    known = (names or NeuronpediaNames()).of(index)
    wanted = range(index.d_sae) if features is None else features
    counted = Counter() if counts is None else counts
    if layout == "neuronpedia":
        for name, row in _descriptions(index, known).items():
            yield f"{name}.jsonl", _lines([row])
    for batch, start in enumerate(range(0, len(wanted), BATCH)):
        part = wanted[start : start + BATCH]
        if layout == "saedashboard":
            content = saedashboard_batch(index, part, known, logits=logits)
            counted["activations"] += sum(len(one["activations"]) for one in content["features"])
            yield f"batch-{batch}.json", json.dumps(content, ensure_ascii=False).encode()
        else:
            tables: dict[str, list[dict[str, Any]]] = {"features": [], "activations": [], "explanations": []}
            for feature, effects in _with_effects(part, logits):
                neuron, activations, explanations = _rows(index, feature, known, effects)
                tables["features"].append(neuron)
                tables["activations"] += activations
                tables["explanations"] += explanations
            for table, rows in tables.items():
                counted[table] += len(rows)
                if rows:
                    yield f"{table}/batch-{batch}.jsonl.gz", gzip.compress(_lines(rows), compresslevel=5, mtime=0)
        if progress is not None:
            progress(start + len(part), len(wanted))


def _lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


# --- the parts of a feature -----------------------------------------------------------------------------------


def _with_effects(features: Sequence[int], logits: "AllLogits | None") -> "Iterator[tuple[int, np.ndarray | None]]":
    """Features with their effects on all logits, None where nothing computes them."""
    return zip(features, repeat(None) if logits is None else logits.of(features), strict=logits is not None)


def _shared(index: "FeatureIndex", feature: int, effects: np.ndarray | None) -> dict[str, Any]:
    """The fields that have one name in both formats."""
    row = index.table.iloc[feature]
    edges, counts = index.histogram(feature)
    top, bottom = index.top_logits(feature, N_LOGITS), index.bottom_logits(feature, N_LOGITS)
    fires = bool(row["n_firings"])
    histogram = None if effects is None else logit_histogram(effects)
    shared: dict[str, Any] = {name: [] for first, rest in ABSENT.items() for name in (first, *rest.split())}
    return {
        **shared,
        "neg_str": [str(token) for token in bottom["token"]],
        "neg_values": _rounded(bottom["effect"]),
        "pos_str": [str(token) for token in top["token"]],
        "pos_values": _rounded(top["effect"]),
        "frac_nonzero": float(row["density"]),
        "freq_hist_data_bar_values": _rounded((edges[:-1] + edges[1:]) / 2) if fires else [],
        "freq_hist_data_bar_heights": [int(count) for count in counts] if fires else [],
        "logits_hist_data_bar_heights": [] if histogram is None else histogram.heights.tolist(),
        "logits_hist_data_bar_values": [] if histogram is None else _rounded(histogram.values),
        "decoder_weights_dist": [],
        "vector": [],
    }


def _examples(index: "FeatureIndex", feature: int) -> "Iterator[tuple[Example, float, float, float]]":
    """Examples with the ends of their band and the share of firings in it; -1, maximum, -1 for the strongest."""
    n = int(index.table.iloc[feature]["n_firings"])
    if not n:
        return
    maximum = float(index.table.iloc[feature]["max_value"])
    for example in index.top_examples(feature, TOP, WINDOW):
        yield example, -1.0, maximum, -1.0
    strengths = index.firings(feature)["value"].to_numpy()
    for band in range(BANDS, 0, -1):
        low, high = (band - 1) / BANDS, band / BANDS
        first, last = round((1 - high) * n), round((1 - low) * n)
        if first < last:
            for example in index.quantile_examples(feature, low, high, IN_BAND, window=WINDOW):
                yield example, float(strengths[last - 1]), float(strengths[first]), (last - first) / n


def _dashboard_feature(index: "FeatureIndex", feature: int, effects: np.ndarray | None) -> dict[str, Any]:
    activations = [
        {
            "bin_min": low,
            "bin_max": high,
            "bin_contains": share,
            "tokens": list(example.tokens),
            "values": _rounded(example.values),
            "qualifying_token_index": example.centre,
        }
        for example, low, high, share in _examples(index, feature)
    ]
    return {
        "feature_index": feature,
        **_shared(index, feature, effects),
        "n_prompts_total": len(index.sequences),
        "n_tokens_in_prompt": int(index.model_info.get("context_size") or 0),
        "dataset": _dataset(index),
        "activations": activations,
    }


def _rows(
    index: "FeatureIndex", feature: int, names: NeuronpediaNames, effects: np.ndarray | None
) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
    """The feature's row of "Neuron", its rows of "Activation" and of "Explanation"."""
    place = {"modelId": names.model_id, "layer": names.source, "index": str(feature)}
    neighbours = index.neighbours(feature)
    neuron = {
        **place,
        "creatorId": names.creator_id,
        "maxActApprox": float(index.table.iloc[feature]["max_value"]),
        "hasVector": False,
        "vectorLabel": None,
        "vectorDefaultSteerStrength": None,
        "hookName": index.hook_name,
        "topkCosSimIndices": [int(other) for other in neighbours["feature"]],
        "topkCosSimValues": _rounded(neighbours["cosine"]),
        **_shared(index, feature, effects),
        "sourceSetName": names.source_set,
    }
    activations = [_activation(index, place, names, *found) for found in _examples(index, feature)]
    explanations = [
        {
            "id": _id(index, "explanation", feature),
            **place,
            "authorId": names.creator_id,
            "description": label.text,
            "typeName": None,
            "explanationModelName": None,
            "notes": index.labels.get(feature).notes or None,
        }
        for label in index.labels.all(feature)
        if label.source == OWN
    ]
    return neuron, activations, explanations


def _activation(
    index: "FeatureIndex",
    place: dict[str, str],
    names: NeuronpediaNames,
    example: "Example",
    low: float,
    high: float,
    share: float,
) -> dict[str, Any]:
    values = _rounded(example.values)
    return {
        "id": _id(index, "activation", example.feature, example.row, low),
        **place,
        "creatorId": names.creator_id,
        "tokens": list(example.tokens),
        "dataIndex": str(example.row),
        "dataSource": " / ".join(part for part in (example.source, example.title) if part) or None,
        "maxValue": max(values),
        "maxValueTokenIndex": values.index(max(values)),
        "minValue": min(values),
        "values": values,
        "dfaValues": [],
        "dfaTargetIndex": None,
        "dfaMaxValue": None,
        "lossValues": [],
        "logitContributions": None,
        "binMin": low,
        "binMax": high,
        "binContains": share,
        "qualifyingTokenIndex": example.centre,
    }


def _descriptions(index: "FeatureIndex", names: NeuronpediaNames) -> dict[str, dict[str, Any]]:
    """The rows about the release, model, set and source."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    name = str(index.model_info.get("name") or names.model_id)
    owner = {"creatorId": names.creator_id, "createdAt": now}
    words = f"{index.hook_name}, {index.d_sae:,} features"
    model = {"id": names.model_id, "instruct": names.model_id.endswith("-it"), "displayNameShort": name}
    numbers = {"layers": 0, "neuronsPerLayer": 0}
    maker = {"creatorName": names.creator_name}
    return {
        "release": {
            "name": names.source_set, "description": words, "descriptionShort": words, "urls": [], **maker, **owner,
        },
        "model": {**model, "displayName": name, **numbers, "owner": "", "updatedAt": now, **owner},
        "sourceset": {
            "modelId": names.model_id, "name": names.source_set, "description": words, "visibility": "PUBLIC",
            "releaseName": names.source_set, **maker, **owner,
        },
        "source": {
            "id": names.source, "modelId": names.model_id, "setName": names.source_set, "visibility": "PUBLIC",
            "dataset": _dataset(index), "num_prompts": len(index.sequences),
            "num_tokens_in_prompt": int(index.model_info.get("context_size") or 0),
            "notes": "Values are activation x norm of the decoder row; BOS and special tokens are left out.", **owner,
        },
    }  # fmt: skip


def _dataset(index: "FeatureIndex") -> str:
    return ", ".join(index.sources)


def _rounded(values: Any) -> list[float]:
    return [round(float(value), 5) for value in values]


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9._]+", "-", text.lower()).strip("-.")


def _id(index: "FeatureIndex", *parts: object) -> str:
    """An id of the length that the database's own have, equal for equal things: importing twice adds nothing."""
    return "c" + xxhash.xxh3_128_hexdigest("|".join(map(str, (index.fingerprint, *parts))).encode())[:24]
