"""A small index in memory for the dashboard's tests: the interface of `FeatureIndex`, with everything that is hard to
show (right-to-left text, Japanese, a token that is part of a character, `<script>`, a label of 200 characters, a
feature that never fires)."""

import json
import re
import threading
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import helpers_chats
import numpy as np
import pandas as pd

from scope.bench.dashboard import Client
from scope.errors import InvalidInputError, OutOfRangeError, UnknownNameError
from scope.features.examples import Example, Examples
from scope.features.labels import FeatureLabels

TEXTS = [
    (
        "Alice",
        "gutenberg",
        "en",
        "Alice was beginning to get very tired of sitting by her sister on the bank, and of "
        "having nothing to do: once or twice she had peeped into the book her sister was reading, but it had no "
        "pictures or conversations in it, “and what is the use of a book,” thought Alice, "
        "“without pictures or conversations?”\n"
        "So she was considering in her own mind, as well as she could, for the hot day made her feel very sleepy.\n",
    ),
    (
        "sockets.py",
        "code",
        "code",
        "def serve(host, port):\n    with socket.socket() as server:\n        server.bind((host, port))\n"
        "        # <script>alert('xss')</script> is only text\n        for line in server:\n            del line\n",
    ),
    (
        "ألف ليلة وليلة",
        "handbook",
        "ar",
        "يُحكى أنه كان في قديم الزمان ملك من ملوك ساسان بجزائر الهند والصين، صاحب جند وأعوان "
        "وخدم وحشم له ولدان أحدهما كبير والآخر صغير، وكانا فارسين بطلين وكان الكبير أفرس من الصغير.",
    ),
    (
        "吾輩は猫である",
        "handbook",
        "ja",
        "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。何でも薄暗いじめじめした所で"
        "ニャーニャー泣いていた事だけは記憶している。吾輩はここで始めて人間というものを見た。",
    ),
    (
        "Handbook of <b>markup</b> & more",
        "handbook",
        "en",
        "The handbook says: write <script>alert(1)</script> and it shows as text. "
        "Every page of the book is translated into twenty-six languages, and every language has the same pages.\n\n",
    ),
]
FEATURES = 96
DEAD = 7
GATE = threading.Event()
"""Lets prompts with "wait" in them go on."""
PATIENCE = 600
"""Seconds that they wait for it, longer than a test may take to see them wait; the test's end opens it in any case."""
LONG_LABEL = 3


def split(text: str) -> list[str]:
    """Rough tokens: words with the space before them, single signs, CJK by the character."""
    return re.findall(r" ?[^\W\d_\u3040-\u30ff\u4e00-\u9fff]+|[\u3040-\u30ff\u4e00-\u9fff]| ?\d+|\s|[^\w\s]", text)


class FakeIndex:
    """Stands in for `FeatureIndex`."""

    def __init__(self, name: str = "fake", repeats: int = 40, chat_template: str | None = None) -> None:
        self.chat_template = chat_template
        self.modalities: tuple[str, ...] = ()
        self.roles = ("system", "user", "assistant", "tool") if chat_template else ()
        self.kinds = ("markup", "text", "tool_call", "tool_response") if chat_template else ()
        self.states: tuple[str, ...] = ()
        self.name, self.path = name, Path(f"/nowhere/{name}.index")
        self.fingerprint = "fa4e" * 15 + ("fa4e" if repeats == 40 else f"{repeats:04x}")
        self.id = self.fingerprint[:12]
        self.hook_name = "blocks.8.hook_resid_post"
        self.d_sae = FEATURES
        self.sae_info = {
            "fingerprint": "5ae0" * 16,
            "architecture": "topk",
            "d_in": 640,
            "d_sae": FEATURES,
            "k": 8,
            "hook_name": self.hook_name,
            "name": "topk-96",
        }
        self.model_info = {
            "name": "Gemma 3 270M, Q4_K_M dequantised",
            "revision": None,
            "weight_hash": "ab" * 32,
            "tokenizer_hash": "cd" * 32,
            "context_size": 256,
            "bos_token_id": 0,
        }
        self.metrics = {"fvu": 0.2132, "l0": 32.02, "delta_ce": 0.4312, "dead_share": 0.0104}
        self.manifest = {
            "format": "feature-index",
            "version": 1,
            "fingerprint": self.fingerprint,
            "parents": ["5ae0" * 16],
            "sae": self.sae_info,
            "created_by": "scope-workbench 0.1.0",
        }
        rng = np.random.default_rng(0)
        tokens: list[str] = []
        documents, sequences = [], []
        for copy in range(repeats):
            for number, (title, source, language, text) in enumerate(TEXTS):
                pieces = split(text)
                document = copy * len(TEXTS) + number
                documents.append((document, title, source, language, "CC0", len(pieces), False))
                sequences.append((document, document, len(tokens), len(pieces) + 1, 0))
                tokens += ["<bos>", *pieces]
        self.documents = pd.DataFrame(
            documents, columns=["document", "title", "source", "language", "license", "n_tokens", "held_out"]
        )
        self.sequences = pd.DataFrame(
            sequences, columns=["sequence", "document", "start_row", "n_rows", "document_offset"]
        )
        self.languages = ("ar", "code", "en", "ja")
        self.sources = ("code", "gutenberg", "handbook")
        self._tokens = np.array(tokens, dtype=object)
        self.n_rows = len(tokens)
        self.n_indexed_rows = self.n_rows - len(documents)
        self._row_document = np.repeat(self.documents.index, self.sequences["n_rows"])
        words = [word for word, _ in pd.Series(tokens).value_counts().items() if word != "<bos>"]
        self._words = words
        self._values = np.zeros((self.n_rows, FEATURES), dtype=np.float32)
        for feature in range(FEATURES):
            if feature == DEAD:
                continue
            hit = np.isin(self._tokens, words[feature::FEATURES][: 1 + feature % 4]) | (
                (rng.random(self.n_rows) < 0.002) & (self._tokens != "<bos>")
            )
            self._values[hit, feature] = rng.gamma(3.0, 60.0, hit.sum()).astype(np.float32)
        self.n_firings = int((self._values > 0).sum())
        self.labels = FeatureLabels(self.sae_info["fingerprint"], d_sae=FEATURES)
        self.labels.set(LONG_LABEL, text=("a very long label " * 12)[:200])
        self._known_groups: dict[str, tuple[np.ndarray, dict[str, int]]] = {}
        self._vocabulary = {word: id for id, word in enumerate(dict.fromkeys(["<bos>", *words]))}

    def _check(self, feature: int) -> int:
        if not 0 <= feature < self.d_sae:
            raise OutOfRangeError(f"There is no feature {feature}; the index has features 0 to {self.d_sae - 1}.")
        return feature

    @cached_property
    def table(self) -> pd.DataFrame:
        rows = []
        for feature in range(self.d_sae):
            values = self._values[:, feature]
            fired = values[values > 0]
            top = self.top_tokens(feature, 5)
            density = len(fired) / self.n_indexed_rows
            rows.append(
                {
                    "feature": feature,
                    "n_firings": len(fired),
                    "density": density,
                    "density_low": density * 0.9,
                    "density_high": density * 1.1,
                    "max_value": fired.max(initial=0),
                    "mean_value": fired.mean() if len(fired) else 0.0,
                    "q50": np.median(fired) if len(fired) else 0.0,
                    "top_token": top["token"].iloc[0] if len(top) else "",
                    "top_tokens": list(top["token"]),
                    "top_logits": list(self.top_logits(feature, 5)["token"]),
                    "bottom_logits": list(self.bottom_logits(feature, 5)["token"]),
                    "top_language": self.by_language(feature)["language"].iloc[0] if len(fired) else "",
                    "language_entropy": 1.0,
                    "top_source": "handbook",
                    "dead": len(fired) == 0,
                    "over_dense": density > 0.1,
                    "encoder_decoder_cosine": 0.71,
                    "top_token_share": 0.4,
                    "token_entropy": 2.2,
                    "source_entropy": 1.1,
                    "neighbours": [(feature + step) % self.d_sae for step in range(1, 6)],
                    "neighbour_cosines": [0.8 - 0.1 * step for step in range(5)],
                    "language_neutral": feature % 5 == 0,
                    "language_specific": "ja" if feature % 11 == 0 else "",
                    **self._spoken_cells(feature),
                }
            )
        return pd.DataFrame(rows)

    def _spoken_cells(self, feature: int) -> dict[str, Any]:
        if not self.roles:
            return {}
        tops = {"role": self.by_role(feature)["role"].iloc[0], "kind": self.by_kind(feature)["kind"].iloc[0]}
        return {f"top_{name}": top for name, top in tops.items()} | {f"{name}_entropy": 1.5 for name in tops}

    def info(self) -> dict[str, Any]:
        return {"id": self.id}

    def firings(self, feature: int, start: int = 0, stop: int | None = None) -> pd.DataFrame:
        values = self._values[:, self._check(feature)]
        rows = np.flatnonzero(values)
        rows = rows[np.argsort(-values[rows], kind="stable")][start:stop]
        return pd.DataFrame({"row": rows, "value": values[rows]})

    def histogram(self, feature: int) -> tuple[np.ndarray, np.ndarray]:
        values = self._values[:, self._check(feature)]
        values = values[values > 0]
        counts, edges = np.histogram(values, bins=40, range=(0, float(values.max(initial=1))))
        return edges, counts

    def _examples(self, feature: int, rows: pd.DataFrame, window: tuple[int, int] = (24, 12)) -> Examples:
        values = self._values[:, feature]
        n = int((values > 0).sum())
        made = []
        for rank, row, value in rows.itertuples():
            document = int(self._row_document[row])
            sequence = self.sequences.iloc[document]
            start = max(int(sequence.start_row) + 1, row - window[0])
            stop = min(int(sequence.start_row + sequence.n_rows), row + window[1] + 1)
            about = self.documents.iloc[document]
            made.append(
                Example(
                    feature,
                    int(row),
                    float(value),
                    tuple(self._tokens[start:stop]),
                    tuple(float(v) for v in values[start:stop]),
                    int(row - start),
                    start,
                    document,
                    about.title,
                    about.source,
                    about.language,
                    int(row - sequence.start_row),
                    int(row - sequence.start_row - 1),
                    int(rank),
                    1 - rank / max(n, 1),
                )
            )
        return Examples(made)

    def top_examples(self, feature: int, n: int = 20, window: tuple[int, int] = (24, 12), **_: Any) -> Examples:
        return self._examples(feature, self.firings(feature, 0, n), window)

    def quantile_examples(
        self, feature: int, low: float, high: float, n: int = 10, seed: int = 0, window: tuple[int, int] = (24, 12)
    ) -> Examples:
        fired = self.firings(feature)
        band = fired.iloc[int((1 - high) * len(fired)) : int((1 - low) * len(fired))]
        return self._examples(feature, band.sample(min(n, len(band)), random_state=seed), window)

    def random_examples(self, feature: int, n: int = 10, seed: int = 0, window: tuple[int, int] = (24, 12)) -> Examples:
        return self.quantile_examples(feature, 0, 1, n, seed, window)

    def examples_in(
        self,
        feature: int,
        n: int = 10,
        *,
        language: str | None = None,
        source: str | None = None,
        document: int | None = None,
        role: str | None = None,
        kind: str | None = None,
        window: tuple[int, int] = (24, 12),
        **_: Any,
    ) -> Examples:
        fired = self.firings(feature)
        about = self.documents.iloc[self._row_document[fired["row"]]]
        keep = np.ones(len(fired), dtype=bool)
        if language:
            keep &= (about["language"] == language).to_numpy()
        if source:
            keep &= (about["source"] == source).to_numpy()
        if document is not None:
            if document not in set(self.documents["document"]):
                raise OutOfRangeError(f"There is no document {document}.")
            keep &= (about["document"] == document).to_numpy()
        if role:
            keep &= np.array([self.roles[row % len(self.roles)] == role for row in fired["row"]], bool)
        if kind:
            keep &= np.array([self.kinds[row % len(self.kinds)] == kind for row in fired["row"]], bool)
        return self._examples(feature, fired[keep].head(n), window)

    def neighbours(self, feature: int, n: int = 20) -> pd.DataFrame:
        others = [(self._check(feature) + step) % self.d_sae for step in range(1, n + 1)]
        return pd.DataFrame(
            {
                "feature": others,
                "cosine": np.linspace(0.8, 0.1, n),
                "top_token": self.table["top_token"].iloc[others].to_numpy(),
                "density": self.table["density"].iloc[others].to_numpy(),
            }
        )

    def cofiring(self, feature: int, n: int = 20) -> pd.DataFrame:
        if not len(self.firings(feature, 0, 1)):
            return self.neighbours(feature, 0).assign(
                jaccard=[], pmi=[], n_both=[], p_other_given_this=[], p_this_given_other=[]
            )
        return self.neighbours(feature, n).assign(
            jaccard=np.linspace(0.5, 0.01, n),
            pmi=np.linspace(5, 1, n),
            n_both=7,
            p_other_given_this=0.5,
            p_this_given_other=0.25,
        )

    def top_tokens(self, feature: int, n: int = 20) -> pd.DataFrame:
        values = self._values[:, self._check(feature)]
        rows = np.flatnonzero(values)
        grouped = pd.DataFrame({"token": self._tokens[rows], "value": values[rows]}).groupby("token")["value"]
        table = grouped.agg(["sum", "mean", "count"]).sort_values("sum", ascending=False).head(n).reset_index()
        return pd.DataFrame(
            {
                "token": table["token"],
                "token_id": range(len(table)),
                "mean_value": table["mean"],
                "count": table["count"],
                "share": table["sum"] / max(table["sum"].sum(), 1e-9),
                "rate": 0.5,
            }
        )

    def top_logits(self, feature: int, n: int = 20) -> pd.DataFrame:
        self._check(feature)
        return pd.DataFrame(
            {
                "token": [self._words[(feature * 7 + i) % len(self._words)] for i in range(n)],
                "effect": np.linspace(0.031, 0.004, n),
            }
        )

    def bottom_logits(self, feature: int, n: int = 20) -> pd.DataFrame:
        return self.top_logits(feature + 11 if feature + 11 < self.d_sae else 0, n).assign(
            effect=np.linspace(-0.02, -0.003, n)
        )

    def _groups(self, column: str) -> tuple[np.ndarray, dict[str, int]]:
        if column in self._known_groups:
            return self._known_groups[column]
        of_row = self.documents[column].to_numpy()[self._row_document]
        names, counts = np.unique(of_row.astype(str), return_counts=True)
        self._known_groups[column] = of_row, dict(zip(names.tolist(), counts.tolist(), strict=True))
        return self._known_groups[column]

    def _by(self, feature: int, column: str) -> pd.DataFrame:
        fired = self.firings(feature)
        of_row, n_rows_of = self._groups(column)
        about = of_row[fired["row"]]
        rows = []
        for name, n_rows in n_rows_of.items():
            hits = int((about == name).sum())
            rate = hits / n_rows
            rows.append(
                {
                    column: name,
                    "n_firings": hits,
                    "share": hits / max(len(fired), 1),
                    "n_rows": n_rows,
                    "rate": rate,
                    "rate_low": rate * 0.8,
                    "rate_high": min(1.0, rate * 1.2 + 1e-5),
                    "mean_value": float(fired["value"][about == name].mean()) if hits else 0.0,
                }
            )
        return pd.DataFrame(rows).sort_values("rate", ascending=False, ignore_index=True)

    def by_language(self, feature: int) -> pd.DataFrame:
        return self._by(feature, "language")

    def by_source(self, feature: int) -> pd.DataFrame:
        return self._by(feature, "source")

    def by_role(self, feature: int) -> pd.DataFrame:
        return self._by_spoken(feature, "role", self.roles)

    def by_kind(self, feature: int) -> pd.DataFrame:
        return self._by_spoken(feature, "kind", self.kinds)

    def _by_spoken(self, feature: int, group: str, names: tuple[str, ...]) -> pd.DataFrame:
        rows = []
        for place, name in enumerate(names):
            n_firings, n_rows = (feature + 7 * place) % 29, 900 + 100 * place
            rate = n_firings / n_rows
            row = {group: name, "n_firings": n_firings, "share": 0.25, "n_rows": n_rows, "rate": rate}
            rows.append({**row, "rate_low": 0.8 * rate, "rate_high": 1.2 * rate + 1e-4, "mean_value": 3.0})
        return pd.DataFrame(rows).sort_values("rate", ascending=False, ignore_index=True)

    def features_at(self, row: int) -> pd.DataFrame:
        if not 0 <= row < self.n_rows:
            raise OutOfRangeError(f"There is no row {row}; the index has rows 0 to {self.n_rows - 1}.")
        values = self._values[row]
        ids = np.flatnonzero(values)
        ids = ids[np.argsort(-values[ids])]
        return pd.DataFrame({"feature": ids, "value": values[ids], "rank": range(len(ids))})

    def tokens(self, start: int, stop: int) -> pd.DataFrame:
        rows = np.arange(start, stop)
        sequence = np.asarray(self._row_document)[start:stop]
        texts = self._tokens[start:stop]
        return pd.DataFrame(
            {
                "row": rows,
                "token": texts,
                "token_id": [self._vocabulary[text] for text in texts],
                "sequence": sequence,
                "position": rows - self.sequences["start_row"].to_numpy()[sequence],
                "flags": (texts == "<bos>").astype(int),
                **(
                    {
                        "role": [self.roles[row % len(self.roles)] for row in rows],
                        "kind": [self.kinds[row % len(self.kinds)] for row in rows],
                        "message": rows % 5,
                    }
                    if self.roles
                    else {}
                ),
            }
        )

    def values_on(self, feature: int, start: int, stop: int) -> np.ndarray:
        return self._values[start:stop, self._check(feature)]

    def document_rows(self, document: int) -> np.ndarray:
        if not 0 <= document < len(self.documents):
            raise OutOfRangeError(f"There is no document {document}.")
        about = self.sequences.iloc[document]
        return np.arange(about.start_row + 1, about.start_row + about.n_rows)

    def contrast(self, a: str, b: str | None = None, n: int = 50) -> SimpleNamespace:
        """Of languages only."""
        for condition in filter(None, (a, b)):
            if not condition.startswith("language:"):
                raise InvalidInputError(f"The condition {condition!r} is none; expected one like language:de.")
        on_a = self._rows_of(a)
        on_b = self._rows_of(b) if b else ~on_a
        fired = self._values > 0
        rate_a, rate_b = fired[on_a].mean(axis=0), fired[on_b].mean(axis=0)
        table = pd.DataFrame({"feature": np.arange(self.d_sae), "rate_a": rate_a, "rate_b": rate_b})
        for side in ("a", "b"):
            table[f"rate_{side}_low"], table[f"rate_{side}_high"] = (
                table[f"rate_{side}"] * 0.8,
                table[f"rate_{side}"] * 1.2,
            )
        table["log_ratio"] = np.log2((rate_a + 1e-6) / (rate_b + 1e-6))
        table["z"] = (rate_a - rate_b) * 100
        table = table[table["rate_a"] > table["rate_b"]].sort_values("z", ascending=False, kind="stable").head(n)
        n_a, n_b = int(on_a.sum()), int(on_b.sum())
        return SimpleNamespace(table=table, n_rows_a=n_a, n_rows_b=n_b, looked_at_a=n_a, looked_at_b=n_b)

    def _rows_of(self, condition: str) -> np.ndarray:
        language = condition.removeprefix("language:")
        return (self.documents["language"].to_numpy()[self._row_document] == language) & (self._tokens != "<bos>")

    def query(
        self, sort: Any = (), filters: Any = None, text: str | None = None, start: int = 0, stop: int | None = None
    ) -> SimpleNamespace:
        table = self.table
        for column, wanted in (filters or {}).items():
            if column not in table:
                raise UnknownNameError("column", column, table.columns)
            table = table[table[column] == wanted]
        if text:
            low = text.lower()
            hit = [
                low in " ".join([*row.top_tokens, *row.top_logits, *row.bottom_logits]).lower()
                or str(row.feature) == low
                for row in table.itertuples()
            ]
            table = table[hit]
        if sort:
            columns, ascending = zip(*sort, strict=True)
            table = table.sort_values(list(columns), ascending=list(ascending), kind="stable")
        return SimpleNamespace(rows=table.iloc[start:stop], total=len(table))


class FakeWorkspace:
    """Stands in for `scope.workspace.Workspace`, with one index or none."""

    def __init__(self, *indexes: FakeIndex) -> None:
        self._indexes = indexes
        self._interventions: dict[str, Any] = {}
        self.path = Path("/nowhere/workspace")

    def entries(self, kind: str | None = None) -> list[SimpleNamespace]:
        entries = [
            SimpleNamespace(
                kind="feature-index",
                id=index.id,
                name=index.name,
                path=index.path,
                manifest=index.manifest,
                problem=None,
            )
            for index in self._indexes
        ]
        return entries if kind in (None, "feature-index") else []

    def excerpt_of(self, sae: str) -> None:
        return None

    def stores(self) -> list[SimpleNamespace]:
        return []

    def saes(self) -> list[SimpleNamespace]:
        return []

    def indexes(self) -> list[SimpleNamespace]:
        return self.entries("feature-index")

    def trainings(self) -> list[Any]:
        return []

    def training(self, id: str) -> Any:
        raise UnknownNameError("training", id)

    def graphs(self) -> list[Any]:
        return []

    def interventions(self) -> list[str]:
        return sorted(self._interventions)

    def intervention(self, name: str) -> Any:
        if name not in self._interventions:
            raise UnknownNameError("named intervention", name, self.interventions())
        return self._interventions[name]

    def save_intervention(self, spec: Any) -> None:
        if not spec.name:
            raise InvalidInputError("'' cannot be a name.")
        self._interventions[spec.name] = spec

    def find(self, id: str, kind: str | None = None) -> SimpleNamespace:
        for entry in self.entries(kind):
            if id in (entry.id, entry.name):
                return entry
        raise UnknownNameError(kind or "artefact", id, [entry.id for entry in self.entries(kind)])

    def parents(self, entry: SimpleNamespace) -> list[SimpleNamespace]:
        return []

    def sae(self, id: str) -> SimpleNamespace:
        import torch

        decoder = torch.randn(FEATURES, FakeModel.d_model, generator=torch.Generator().manual_seed(1))
        return SimpleNamespace(hook_name="blocks.8.hook_resid_post", W_dec=decoder)

    def index(self, id: str) -> FakeIndex:
        return next(index for index in self._indexes if index.id == self.find(id).id)


# --- a model that needs no model ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class FakePromptFeatures:
    """Stands in for `scope.features.PromptFeatures`."""

    hook_name: str
    d_sae: int
    tokens: tuple[str, ...]
    token_ids: np.ndarray
    flags: np.ndarray
    table: pd.DataFrame
    next_logits: None
    final_residual: np.ndarray

    def at(self, position: int) -> pd.DataFrame:
        return self.table[self.table["position"] == position]

    def values_of(self, feature: int) -> np.ndarray:
        values = np.zeros(len(self.tokens), dtype=np.float32)
        mine = self.table[self.table["feature"] == feature]
        values[mine["position"]] = mine["value"]
        return values


class FakeModel:
    """Tokens, vocabulary and logits, seeded; a text with "wait" in it waits for `GATE`."""

    name = "Gemma 3 270M, Q4_K_M dequantised"
    max_context_size = 2048
    n_layers = 6
    bos_token_id = 0
    chat_template = None
    d_model = 4

    def __init__(self, index: "FakeIndex", embeddings: str = "device") -> None:
        self.index = index
        self.vocabulary = list(dict.fromkeys(["<bos>", " cold", "cold", " hot", " warm", *index._words]))
        self.d_vocab = len(self.vocabulary)
        self.lock = threading.RLock()
        self.written: dict[str, list[str]] = {"plain": [], "steered": []}

    def residual_logits(self, residual: Any) -> Any:
        """Stands in for `scope.models.losses.residual_logits`."""
        import torch

        weights = np.random.default_rng(1).normal(0, 1, (self.d_model, self.d_vocab)).astype(np.float32)
        return residual @ torch.from_numpy(weights)

    def tokenize(self, text: str) -> list[int]:
        return list(range(1 + len(split(text))))

    def prompt_tokens(self, text: str) -> list[int]:
        return self.tokenize(text)

    def encode_chats(self, chats: Any, template: str, answer: bool = False) -> Any:
        """Character by character, as the real one."""
        from scope.models.chats import encode_chats

        tokenizer = helpers_chats.character_tokenizer()
        return encode_chats(tokenizer, frozenset(tokenizer.all_special_ids), chats, template, answer)

    def encode_documents(self, texts: list[str]) -> list[list[int]]:
        return [
            [self.vocabulary.index(piece) if piece in self.vocabulary else 1 for piece in split(text)] for text in texts
        ]

    def vocabulary_strings(self, ids: Any) -> list[str]:
        return [self.vocabulary[int(id)] for id in ids]

    def token_strings(self, ids: Any) -> list[SimpleNamespace]:
        n = len(ids) - len(self.written["plain"])
        return [SimpleNamespace(display=word) for word in ["?"] * n + self.written["steered"]]

    def logit_effects(self, directions: Any) -> Any:
        import torch

        generator = torch.Generator().manual_seed(0)
        return directions @ torch.randn(self.d_model, self.d_vocab, generator=generator)


def prompt_pieces(prompt: Any) -> tuple[str, ...]:
    """The tokens of a text, or of a chat, which is given character by character."""
    if isinstance(prompt, str):
        return ("<bos>", *split(prompt))
    return ("<bos>", *helpers_chats.character_tokenizer().convert_ids_to_tokens(prompt[1:].tolist()))


def fake_features_on_prompt(
    model: FakeModel, sae: Any, prompt: Any, *, index: Any = None, logits: bool = True
) -> FakePromptFeatures:
    """Stands in for `scope.features.prompt.features_on_prompt`."""
    if isinstance(prompt, str) and "wait" in prompt:
        GATE.wait(PATIENCE)
    tokens = prompt_pieces(prompt)
    rng = np.random.default_rng(len(prompt))
    rows = []
    for position in range(1, len(tokens)):
        ids = rng.choice(FEATURES, 8, replace=False)
        values = np.sort(rng.gamma(3.0, 80.0, 8))[::-1]
        rows += [
            (position, tokens[position], int(id), float(value), rank)
            for rank, (id, value) in enumerate(zip(ids, values, strict=True))
        ]
    flags = np.zeros(len(tokens), dtype=np.uint8)
    flags[0] = 1
    return FakePromptFeatures(
        "blocks.8.hook_resid_post",
        FEATURES,
        tokens,
        np.array([zlib.crc32(token.encode()) % 10_000 for token in tokens]),
        flags,
        pd.DataFrame(rows, columns=["position", "token", "feature", "value", "rank"]),
        None,
        rng.normal(0, 1, (len(tokens), model.d_model)).astype(np.float32),
    )


def fake_logit_lens(
    model: FakeModel,
    prompt: Any,
    *,
    positions: Any = None,
    k: int = 10,
    follow: Any = (),
    sae: Any = None,
    sae_mode: str = "read",
    progress: Any = None,
) -> Any:
    """Stands in for `scope.attribution.lens.logit_lens`: each layer is a random distribution."""
    from scope.attribution.lens import LogitLens

    if isinstance(prompt, str) and "wait" in prompt:
        progress(1, 2)
        GATE.wait(PATIENCE)
        progress(2, 2)
    tokens = prompt_pieces(prompt)
    places = np.arange(len(tokens)) if positions is None else np.array(positions)
    rng = np.random.default_rng(len(prompt) + (0 if sae is None else 1))
    logits = rng.normal(0, 2, (model.n_layers, len(tokens), model.d_vocab))[:, places]
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    top = np.argsort(-p, -1)[..., :k]
    followed = [int(one) for one in follow]
    return LogitLens(
        layers=tuple(range(model.n_layers)),
        hook_names=tuple(f"blocks.{layer}.hook_resid_post" for layer in range(model.n_layers)),
        tokens=tokens,
        token_ids=np.arange(len(tokens)),
        positions=places,
        top_ids=top,
        top_tokens=np.array(model.vocabulary, dtype=object)[top],
        top_probabilities=np.take_along_axis(p, top, -1),
        entropy=-(p * np.log(p)).sum(-1),
        kl=(p[-1] * np.log(p[-1] / p)).sum(-1),
        followed_ids=tuple(followed),
        followed_tokens=tuple(model.vocabulary_strings(followed)),
        probability=p[..., followed],
        rank=1 + (p[..., None, :] > p[..., followed, None]).sum(-1),
        sae_layer=None if sae is None else 3,
        sae_mode=None if sae is None else sae_mode,
    )


def fake_direct_logit_effects(
    model: Any, sae: Any, features: Any, position: int | None, target_token: int
) -> pd.DataFrame:
    """Stands in for `scope.attribution.direct.direct_logit_effects`."""
    here = features.table if position is None else features.at(position)
    signs = np.where((here["feature"] + target_token) % 3 == 0, -1.0, 1.0)
    return pd.DataFrame(
        {
            "feature": here["feature"],
            "position": here["position"],
            "strength": here["value"],
            "effect": signs * here["value"] * 0.004,
        }
    )


def fake_attribute(
    model: FakeModel, tokens: list[int], target: Any, sae: Any, method: str, progress: Any = None
) -> SimpleNamespace:
    """Stands in for `scope.attribution.methods.attribute`: the later a token, the more it did."""
    rows = [
        (place, feature, 2.0, 0.1 * place * (-1) ** feature) for place in range(len(tokens)) for feature in range(96)
    ]
    table = pd.DataFrame(rows, columns=["position", "feature", "strength", "effect"])
    return SimpleNamespace(
        table=table[table["position"] <= target.position], value=3.25, completeness={"blocks.8.hook_resid_post": 0.97}
    )


def fake_ablation_effect(
    index: "FakeIndex", model: FakeModel, sae: Any, feature: int, n: int, progress: Any = None
) -> Any:
    """Stands in for `scope.features.ablation.ablation_effect`."""
    from scope.features.ablation import AblationEffect

    progress(1, 2)
    examples = index.top_examples(feature, 3)
    rng = np.random.default_rng(feature)
    tokens = pd.concat(
        pd.DataFrame(
            {
                "example": place,
                "row": np.arange(one.start_row, one.start_row + len(one.tokens)),
                "token": list(one.tokens),
                "strength": one.values,
                "change": rng.normal(0.02, 0.1, len(one.tokens)),
            }
        )
        for place, one in enumerate(examples)
    )
    table = pd.DataFrame(
        {
            "row": [one.row for one in examples],
            "title": [one.title for one in examples],
            "change": 0.02,
            "next_change": 0.1,
        }
    )
    return AblationEffect(feature, table, tokens, 0.02, (0.01, 0.03))


def fake_resolve(spec: Any, model: FakeModel, *_: Any) -> Any:
    """Stands in for `scope.interventions.resolving.resolve`, and for `control`."""
    from scope.interventions.resolving import Control

    return Control({}, 4.0)


def fake_steer_with(
    model: FakeModel,
    edits: Any,
    control: Any,
    prompt: str,
    max_new_tokens: int = 40,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    listen: Any = None,
) -> Any:
    """Stands in for `scope.interventions.steering.steer_with`: words of the vocabulary, some of them hard to show."""
    from scope.interventions.steering import Continuation, Steering
    from scope.models import Generation

    pieces = [" cold", " <script>alert(1)</script>", "\n", " ملك", "吾", " warm"]
    written: dict[str, list[str]] = {"plain": [], "steered": [], "random": []}
    for step in range(max_new_tokens):
        for place, (name, words) in enumerate(written.items()):
            words.append(pieces[(step + place) % len(pieces)])
            listen(step + 1, {name: "".join(words) for name, words in written.items()})
        if "wait" in prompt and step == 3:
            GATE.wait(PATIENCE)
    model.written = written
    n = len(split(prompt)) + 1
    parts = []
    for place, words in enumerate(written.values()):
        generation = Generation(np.arange(n + len(words)), n, "".join(words))
        kls = tuple(0.4 * place * (step % 5) for step in range(len(words)))
        parts.append(Continuation(generation, 0.3 * place, float(np.mean(kls)), 9.0 + 20 * place, kls))
    changes = pd.DataFrame(
        {
            "token": [" cold", " hot"],
            "token_id": [1, 3],
            "plain": [0.6, 0.1],
            "steered": [0.1, 0.45],
            "random": [0.58, 0.1],
            "change": [-0.5, 0.35],
        }
    )
    return Steering(*parts, changes, 4.0)


# --- a browser's requests without a browser -----------------------------------------------------------------------


class LocalClient(Client):
    """A client of an application in this process, without a socket."""

    def __init__(self, app: Any) -> None:
        self._app = app.server.test_client()
        self._callbacks = json.loads(self.get("/_dash-dependencies"))

    def _ask(self, method: str, path: str, body: str | None = None) -> bytes:
        headers = {"Host": "127.0.0.1:8050", "Content-Type": "application/json"}
        answer = self._app.open(path, method=method, data=body, headers=headers)
        assert answer.status_code < 500, (path, answer.text)
        return bytes(answer.data)

    def content(self, path: str, search: str = "") -> str:
        view = {"path": path, "search": search, "visit": 1}
        answer = self.call("content.children", {"view.data": view}, "view.data")
        return json.dumps(answer["response"]["content"], ensure_ascii=False)
