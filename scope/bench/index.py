"""`scope bench index`: how long a question to a feature index takes, at the size of the sample text.

1. *Index*: `scope.bench.synthetic_index`, built by `build_index` like any other; one that lies in the folder already is
   used again.
2. *Questions*: as a researcher or the dashboard asks them, through `FeatureIndex` alone. Half of the features are drawn
   by how often they fire and half evenly among those that fire; tokens likewise; documents evenly; conditions are
   languages, sources, tokens, regular expressions, features, and two of them at once.
3. *Warm*: the index is open, its tables are read, files are in the page cache as far as memory allows. No answer is
   kept from one question to the next: counts of conditions are dropped before each.
4. *Cold*: a few questions of each kind with every file of the index dropped from the page cache before each, so that
   it is read from disk and its digests are checked again.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scope.bench.machine import drop_from_cache
from scope.bench.settings import IndexBench
from scope.bench.synthetic_index import SyntheticModel, SyntheticSAE, SyntheticText
from scope.errors import InvalidInputError
from scope.features import FeatureIndex, build_index
from scope.features.conditions import Term
from scope.features.labels import FeatureLabels, ImportedLabel

__all__ = ["QUESTIONS", "IndexFigures", "bench_index"]

Ask = Callable[[FeatureIndex], Any]
LIMIT_MS = 150.0
BATCH = 2**14
WORDS = (
    *("German", "verb", "past", "tense", "code", "comment", "name", "of", "a", "city", "number", "list"),
    *("plural", "greeting", "law", "error", "path"),
)


class Timing(NamedTuple):
    """Milliseconds of one kind of question."""

    p50: float
    p95: float
    worst: float
    cpu_p95: float
    """Of the processor's time, all threads together: what a busy machine's clock does not tell."""
    cold_p95: float | None
    """None where no cold questions were asked."""


class IndexFigures(NamedTuple):
    """What the benchmark found."""

    timings: dict[str, Timing]
    """By question, as in `QUESTIONS`."""
    facts: dict[str, Any]
    """Of the index: rows, firings, bytes per firing, seconds to build and to open."""

    def data(self) -> dict[str, float]:
        """The figures for `--json`."""
        return {f"{name}_p95_ms": round(timing.p95, 3) for name, timing in self.timings.items()}

    def text(self) -> str:
        """The figures for a person."""
        lines = [f"{name:<22}{_shown(value)}" for name, value in self.facts.items()]
        lines.append(f"\n{'milliseconds':<22}{'p50':>9}{'p95':>9}{'worst':>9}{'cpu p95':>9}{'cold p95':>10}")
        for name, timing in self.timings.items():
            figures = "".join(f"{value:>9.1f}" for value in timing[:4])
            cold = "" if timing.cold_p95 is None else f"{timing.cold_p95:>10.1f}"
            lines.append(f"{name:<22}{figures}{cold}{'' if timing.p95 < LIMIT_MS else f'  over {LIMIT_MS:.0f} ms'}")
        return "\n".join(lines)


class _Draw:
    """Draws what questions are about."""

    def __init__(self, index: FeatureIndex, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        firings = index.table["n_firings"].to_numpy(np.int64)
        self._firing = np.flatnonzero(firings)
        self._by_firings = firings / firings.sum()
        vocabulary = index.vocabulary
        vocabulary = vocabulary[(vocabulary["n_rows"] > 0) & ~vocabulary["special"]]
        self._texts, rows = vocabulary["text"].to_numpy(object), vocabulary["n_rows"].to_numpy(np.int64)
        self._by_rows = rows / rows.sum()
        self._documents = index.documents["document"].to_numpy()
        self._languages, self._sources = index.languages, index.sources

    def feature(self) -> int:
        if self._rng.random() < 0.5:
            return int(self._rng.choice(len(self._by_firings), p=self._by_firings))
        return int(self._rng.choice(self._firing))

    def token(self) -> str:
        return str(self._rng.choice(self._texts, p=self._by_rows if self._rng.random() < 0.5 else None))

    def document(self) -> int:
        return int(self._rng.choice(self._documents))

    def band(self) -> tuple[float, float]:
        low = float(self._rng.uniform(0, 0.9))
        return low, low + 0.1

    def part_of_token(self) -> str:
        token = self.token().strip()
        start = int(self._rng.integers(0, max(1, len(token) - 3)))
        return token[start : start + 4] or token

    def words(self) -> str:
        return " ".join(self._rng.choice(WORDS, 2, replace=False))

    def labels(self, d_sae: int) -> Iterator[ImportedLabel]:
        for feature in range(d_sae):
            yield ImportedLabel(feature, " ".join(self._rng.choice(WORDS, 4)), "synthetic", "")

    def condition(self) -> str:
        kind = self._rng.choice(["language", "source", "token", "regex", "feature", "two"])
        if kind == "two":
            return f"language:{self._rng.choice(self._languages)} & regex:{self._expression()}"
        if kind == "token":
            return str(Term("token", self.token()))
        if kind == "regex":
            return f"regex:{self._expression()}"
        if kind == "feature":
            return f"feature:{self.feature()}"
        return f"{kind}:{self._rng.choice(self._languages if kind == 'language' else self._sources)}"

    def _expression(self) -> str:
        part = self.part_of_token()[:2]
        return str(self._rng.choice([f"^ {part}", f"{part}$", f"(?i){part}", r"^\d+$", r"\p{Han}", "^ [a-d]", "a.*e"]))

    def contrast(self) -> tuple[str, str | None]:
        return self.condition(), None if self._rng.random() < 0.5 else self.condition()


def _contrast(draw: _Draw) -> Ask:
    a, b = draw.contrast()

    def ask(index: FeatureIndex) -> None:
        # Where no row meets a condition, that was found out by looking, so it counts.
        with suppress(InvalidInputError):
            index.contrast(a, b)

    return ask


def _search_tokens(draw: _Draw) -> Ask:
    text = draw.part_of_token()
    return lambda index: index.search_tokens(text)


def _quantile(draw: _Draw) -> Ask:
    feature, (low, high) = draw.feature(), draw.band()
    return lambda index: index.quantile_examples(feature, low, high)


def _of_feature(name: str) -> Callable[[_Draw], Ask]:
    def make(draw: _Draw) -> Ask:
        feature = draw.feature()
        return lambda index: getattr(index, name)(feature)

    return make


def _of(name: str, drawn: str) -> Callable[[_Draw], Ask]:
    def make(draw: _Draw) -> Ask:
        what = getattr(draw, drawn)()
        return lambda index: getattr(index, name)(what)

    return make


QUESTIONS: dict[str, Callable[[_Draw], Ask]] = {
    "top_examples": _of_feature("top_examples"),
    "quantile": _quantile,
    "histogram": _of_feature("histogram"),
    "token": _of("features_on_token", "token"),
    "document": _of("features_on_document", "document"),
    "a_not_b": _contrast,
    "cofiring": _of_feature("cofiring"),
    "neighbours": _of_feature("neighbours"),
    "search_token": _search_tokens,
    "search_label": _of("search_labels", "words"),
}
"""Makes one question of each kind."""


def bench_index(
    config: IndexBench,
    say: Callable[[str], None],
    progress: Callable[[int, int | None], None] | None = None,
) -> IndexFigures:
    """Run the benchmark.

    Args:
        config: sizes, and where the index lies.
        say: is told what is done next.
        progress: is told how much of the index is built.
    """
    with _folder(config) as folder:
        started = time.perf_counter()
        path = folder / f"synthetic-{config.tokens}-{config.d_sae}-{config.l0}.index"
        reused = (path / "manifest.json").is_file()
        say(f"{'Using' if reused else 'Building'} {path}")
        text = SyntheticText(config.tokens, config.seed)
        sae = SyntheticSAE(text, config.d_sae, config.l0)
        build_index(text, sae, path, model=SyntheticModel(), batch_size=BATCH, progress=progress)
        built = time.perf_counter() - started
        with tempfile.TemporaryDirectory() as labels:
            figures = _ask_all(config, path, Path(labels) / "workspace.db", say)
        return IndexFigures(figures.timings, {**figures.facts, "seconds to build": None if reused else built})


@contextmanager
def _folder(config: IndexBench) -> Iterator[Path]:
    if config.folder is not None:
        config.folder.mkdir(parents=True, exist_ok=True)
        yield config.folder
    else:
        with tempfile.TemporaryDirectory(prefix="scope-bench-index-") as folder:
            yield Path(folder)


def _ask_all(config: IndexBench, path: Path, database: Path, say: Callable[[str], None]) -> IndexFigures:
    started = time.perf_counter()
    index = FeatureIndex.open(path)
    index.labels = FeatureLabels(index.sae_info["fingerprint"], database, d_sae=index.d_sae)
    draw = _Draw(index, config.seed)
    opened = time.perf_counter() - started
    index.labels.take_in(draw.labels(index.d_sae))
    timings = {}
    for name, make in QUESTIONS.items():
        say(f"Asking: {name}")
        first = _time(index, make(draw)).wall
        warm = [_time(index, make(draw)) for _ in range(config.queries)]
        cold = [_time(index, make(draw), cold=True).wall for _ in range(config.cold_queries)]
        wall = [taken.wall for taken in warm]
        timings[name] = Timing(
            float(np.median(wall)),
            float(np.quantile(wall, 0.95)),
            max(wall),
            float(np.quantile([taken.cpu for taken in warm], 0.95)),
            float(np.quantile(cold, 0.95)) if cold else None,
        )
        say(f"  first {first:,.0f} ms, p95 {timings[name].p95:,.1f} ms")
    size = sum(file.stat().st_size for part in ("by_token", "by_feature") for file in (path / part).rglob("*"))
    facts = {
        "rows": index.n_rows,
        "features": index.d_sae,
        "firings": index.n_firings,
        "firings per row": index.n_firings / max(index.n_indexed_rows, 1),
        "bytes per firing": size / max(index.n_firings, 1),
        "queries of each kind": config.queries,
        "seconds to open": opened,
    }
    return IndexFigures(timings, facts)


class _Taken(NamedTuple):
    """Milliseconds."""

    wall: float
    cpu: float


def _time(index: FeatureIndex, ask: Ask, cold: bool = False) -> _Taken:
    """How long it takes until the answer is there."""
    index.forget()
    if cold:
        index.release()
        drop_from_cache([file for file in index.path.rglob("*") if file.is_file()])
    started, cpu = time.perf_counter(), time.process_time()
    ask(index)
    return _Taken((time.perf_counter() - started) * 1e3, (time.process_time() - cpu) * 1e3)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.2f}"
    return "not built in this run" if value is None else f"{value:,}"
