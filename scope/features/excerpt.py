"""`FeatureExcerpt`: what an index over a large text says of each feature of an SAE, small enough to ship with the SAE.

    NAME.excerpt/
      manifest.json     written last; SAE, model, text, settings, and the table of what is in arrays.zst
      arrays.zst        statistics by feature, and where its examples are (`scope.features.packed`)
      text/             what the examples read, once it is there (`scope.features.excerpt_text`)

An excerpt holds of each feature the numbers of the index's table, its histogram, its firings by language and source,
its strongest tokens, the `top` examples that the index shows first, and `per_band` examples of each of some bands of
strength. An example is its place in the text, its strength, and the feature's other strengths in the window that is
shown; strengths are exact (bfloat16). Statistics that are no strengths of single firings are rounded to 12 bits.

In `arrays.zst`, by feature: the columns of `STATISTICS`, `n_top` (uint8), `histogram` `(d_sae, 40)`,
`language_firings`, `source_firings`, `token_id` (-1: none), `token_firings`, `token_strength`. By example, those of a
feature one after the other, the strongest of all first, then those of each band: `place` (of its token among all the
tokens of the text, BOS aside), `key_step` (what `order_key` of its strength adds to that of the example before it,
modulo 2¹⁶), `n_beside` (other tokens of the window on which the feature fires). `top_rank`: of the strongest examples,
the place among all the feature's firings; that of an example of a band follows from `band_ranks`. By other token:
`beside_offset` (place in the window shown), `beside_value` (bfloat16 bits). `document_tokens`: by document.
"""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd

from activations.manifest import ID_LENGTH, has_its_digest, read_manifest
from activations.source import bf16_to_float32
from scope.errors import IntegrityError, InvalidInputError, MismatchError, OutOfRangeError
from scope.features.described import Described
from scope.features.examples import CHARACTER_TOKENS, Example, Examples, band_ranks
from scope.features.excerpt_text import ExcerptText, read_text
from scope.features.firings import from_order_key
from scope.features.packed import PackedArrays
from scope.features.reader import IndexFault
from scope.features.statistics import wilson
from scope.features.table import OVER_DENSE

if TYPE_CHECKING:
    from activations.text import TextSource

__all__ = ["ARRAYS", "EXACT", "FORMAT", "ROUNDED", "STATISTICS", "FeatureExcerpt", "band_counts"]

FORMAT: Final = "feature-excerpt"
ARRAYS: Final = "arrays.zst"
EXACT: Final = ("n_firings", "min_value", "max_value", "q50", "q90", "q99")
"""Columns of the index's table that are kept as they are."""
ROUNDED: Final = (
    "mean_value",
    "std_value",
    "mean_position",
    "top_token_share",
    "token_entropy",
    "token_bits",
    "position_bits",
    "special_share",
    "language_entropy",
    "source_entropy",
    "encoder_decoder_cosine",
)
STATISTICS: Final = EXACT + ROUNDED


def band_counts(n_firings: np.ndarray, bands: list[tuple[float, float]], per_band: int) -> np.ndarray:
    """How many examples of each band features with so many firings have, int64 `(n, n_bands)`."""
    n = np.asarray(n_firings, np.float64)[:, None]
    low, high = np.array(bands, np.float64).reshape(-1, 2).T
    inside = np.rint((1 - low) * n) - np.rint((1 - high) * n)
    return np.minimum(inside, per_band).astype(np.int64)


class FeatureExcerpt(Described):
    """An excerpt, opened for reading. Safe across threads. `open` it; `scope.features.make_excerpt` makes one.

    Where the names are those of `FeatureIndex`, so is the meaning, over the text that the excerpt was made from.
    """

    SUFFIX = ".excerpt"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest: dict[str, Any] = read_manifest(path, FORMAT)
        if not has_its_digest(self.manifest):
            raise IntegrityError(f"{path / 'manifest.json'} is damaged: its digest does not fit. Restore it.")
        self._arrays = PackedArrays(path / ARRAYS, self.manifest["packed"])
        self._arrays.check()
        settings = self.manifest["settings"]
        self.bands: list[tuple[float, float]] = [(low, high) for low, high in settings["bands"]]
        """The quantile bands that there are examples of, the strongest first."""
        self._window = int(settings["before"]), int(settings["after"])
        self._per_band, self._seed = int(settings["per_band"]), int(settings["seed"])
        self.text = ExcerptText(path, self.manifest["text"])

    @classmethod
    def open(cls, path: str | Path) -> "FeatureExcerpt":
        """Open an excerpt.

        Raises:
            UnknownNameError: there is none at `path`.
            InvalidInputError: it is something else, or written by a newer release.
            IntegrityError: it is damaged.
        """
        return cls(Path(path))

    # --- what it is -------------------------------------------------------------------------------------------

    @property
    def d_sae(self) -> int:
        return int(self.manifest["d_sae"])

    @property
    def n_rows(self) -> int:
        """Tokens of the text, BOS and special tokens included."""
        return int(self.manifest["n_rows"])

    @property
    def has_text(self) -> bool:
        """Whether the examples can be read: the text lies beside them (`read_text`)."""
        return self.text.is_there

    @property
    def n_bytes(self) -> int:
        """Size of what is shipped, in bytes, the text left out."""
        return sum((self.path / name).stat().st_size for name in (ARRAYS, "manifest.json"))

    def info(self) -> dict[str, Any]:
        """What `scope info` prints; JSON-able."""
        about = ("format", "fingerprint", "parents", "created_by", "model", "hook_name", "d_sae", "n_rows")
        kept = (*about, "n_indexed_rows", "n_firings", "settings", "text")
        told = {name: self.manifest[name] for name in kept}
        return {**told, "sae": self.sae_info, "has_text": self.has_text, "bytes": self.n_bytes}

    def verify(self, progress: Callable[[int, int | None], None] | None = None) -> list[IndexFault]:
        """Read every byte and compare with the digests; `progress` counts files."""
        parts = [ARRAYS, *(self.text.parts if self.has_text else ())]
        faults = []
        for done, name in enumerate(parts, start=1):
            try:
                if name == ARRAYS:
                    PackedArrays(self.path / ARRAYS, self.manifest["packed"]).check()
                else:
                    self.text.check(name)
            except IntegrityError as problem:
                faults.append(IndexFault(name, str(problem)))
            if progress is not None:
                progress(done, len(parts))
        return faults

    def require_sae(self, fingerprint: str) -> None:
        """Raise MismatchError unless the excerpt is of the SAE with this fingerprint."""
        own = str(self.sae_info["fingerprint"])
        if own != fingerprint:
            raise MismatchError(
                f"{self.path} is of the SAE {own[:ID_LENGTH]}; expected {fingerprint[:ID_LENGTH]}. Give that one's."
            )

    def read_text(
        self, text: "TextSource", model: Any, progress: Callable[[int, int | None], None] | None = None
    ) -> None:
        """Tokenise the excerpt's text and keep it beside the examples, which can be read from then on.

        Args:
            text: the documents that were indexed, in their order (with the same shuffle seed).
            model: the one whose activations were indexed, or another with its tokenizer.
            progress: called with (documents read, documents in all).
        Raises:
            MismatchError: it is another text or another tokenizer.
        """
        if self.has_text:
            return
        lengths = self._arrays["document_tokens"].tolist()
        about = {**self.manifest["text"], "model": self.model_info.get("name")}
        read_text(self.path, about, lengths, text, model, progress)

    # --- statistics -------------------------------------------------------------------------------------------

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row per feature: feature, density, density_low, density_high, dead, over_dense, and the columns of
        `STATISTICS`, as `FeatureIndex.table` has them. Shared between callers: copy before changing it."""
        columns: dict[str, Any] = {"feature": np.arange(self.d_sae)}
        columns |= {name: self._arrays[name] for name in STATISTICS if name in self._arrays.names}
        n = self._arrays["n_firings"]
        low, high = wilson(n, self.n_indexed_rows)
        density = n / max(self.n_indexed_rows, 1)
        columns |= {"density": density, "density_low": low, "density_high": high}
        return pd.DataFrame({**columns, "dead": n == 0, "over_dense": density > OVER_DENSE})

    def row(self, feature: int) -> dict[str, Any]:
        """One feature's row of `table`."""
        return {str(name): value for name, value in self.table.iloc[self.check_feature(feature)].items()}

    def check_feature(self, feature: Any) -> int:
        """The id as an int; raises OutOfRangeError."""
        if isinstance(feature, bool) or not isinstance(feature, int | np.integer) or not 0 <= feature < self.d_sae:
            raise OutOfRangeError(
                f"There is no feature {feature!r}: this excerpt has features 0 to {self.d_sae - 1:,}."
            )
        return int(feature)

    def histogram(self, feature: int) -> tuple[np.ndarray, np.ndarray]:
        """As `FeatureIndex.histogram`."""
        counts = self._arrays["histogram"][self.check_feature(feature)].astype(np.int64)
        low, high = (float(self._arrays[name][feature]) for name in ("min_value", "max_value"))
        return np.linspace(min(low, 0.0), max(high, 0.0), len(counts) + 1), counts

    def by_language(self, feature: int) -> pd.DataFrame:
        """Columns language, n_firings, share, n_rows, rate, rate_low, rate_high: every language, by rate."""
        return self._by_group("language", feature)

    def by_source(self, feature: int) -> pd.DataFrame:
        """As `by_language`, with `source` as its first column."""
        return self._by_group("source", feature)

    def _by_group(self, group: str, feature: int) -> pd.DataFrame:
        listed = self.manifest[f"{group}s"]
        names, rows = [name for name, _ in listed], np.array([n for _, n in listed], np.int64)
        firings = self._arrays[f"{group}_firings"][self.check_feature(feature)].astype(np.int64)
        low, high = wilson(firings, rows)
        share, rate = firings / max(int(firings.sum()), 1), firings / np.maximum(rows, 1)
        columns = {group: names, "n_firings": firings, "share": share, "n_rows": rows, "rate": rate}
        table = pd.DataFrame({**columns, "rate_low": low, "rate_high": high})
        return table.sort_values(["rate", "n_rows"], ascending=False, kind="stable", ignore_index=True)

    def top_tokens(self, feature: int) -> pd.DataFrame:
        """Columns token, token_id, mean_value, count, share: the strongest tokens by summed strength, as
        `FeatureIndex.top_tokens` has them. Needs the text."""
        feature = self.check_feature(feature)
        tokens, counts, strengths = (
            self._arrays[name][feature] for name in ("token_id", "token_firings", "token_strength")
        )
        kept = tokens >= 0
        tokens, counts, strengths = tokens[kept].astype(np.int64), counts[kept].astype(np.int64), strengths[kept]
        first = abs(float(strengths[0])) if len(strengths) else 0.0
        share = np.abs(strengths) / (first or 1.0) * float(self._arrays["top_token_share"][feature])
        return pd.DataFrame(
            {
                "token": self._with_text().vocabulary.strings(tokens),
                "token_id": tokens,
                "mean_value": strengths / np.maximum(counts, 1),
                "count": counts,
                "share": share,
            }
        )

    # --- examples ---------------------------------------------------------------------------------------------

    def top_examples(self, feature: int) -> Examples:
        """What `FeatureIndex.top_examples` of the whole text shows, as many as were kept.

        Of an excerpt's examples `row` and `start_row` count the tokens of the text without BOS.

        Raises:
            InvalidInputError: the excerpt does not have its text yet.
        """
        feature = self.check_feature(feature)
        first, n = int(self._example_start[feature]), int(self._arrays["n_top"][feature])
        at = self._top_start[feature]
        return self._examples(feature, first, self._arrays["top_rank"][at : at + n].tolist())

    def band_examples(self, feature: int, band: int) -> Examples:
        """Some firings of one of the `bands`, drawn at random: what `FeatureIndex.quantile_examples` shows of it.

        Args:
            feature: the feature.
            band: which of `bands`.
        Raises:
            InvalidInputError: as of `top_examples`.
        """
        feature = self.check_feature(feature)
        low, high = self.bands[band]
        total = int(self._arrays["n_firings"][feature])
        before = int(self._arrays["n_top"][feature]) + int(self._band_counts[feature, :band].sum())
        ranks = band_ranks(feature, total, low, high, self._per_band, self._seed)
        return self._examples(feature, int(self._example_start[feature]) + before, ranks)

    def _with_text(self) -> ExcerptText:
        if not self.has_text:
            raise InvalidInputError(
                f"{self.path} does not have its text yet, so its examples cannot be read. `scope demo` reads that of "
                "the demo's SAE; FeatureExcerpt.read_text that of any."
            )
        return self.text

    @cached_property
    def _band_counts(self) -> np.ndarray:
        return band_counts(self._arrays["n_firings"], self.bands, self._per_band)

    @cached_property
    def _example_start(self) -> np.ndarray:
        counts = self._arrays["n_top"].astype(np.int64) + self._band_counts.sum(axis=1)
        return np.concatenate([[0], np.cumsum(counts)])

    @cached_property
    def _top_start(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self._arrays["n_top"], dtype=np.int64)])

    @cached_property
    def _strengths(self) -> np.ndarray:
        """float32, by example."""
        keys = np.cumsum(self._arrays["key_step"], dtype=np.uint16)
        return bf16_to_float32(from_order_key(keys))

    @cached_property
    def _beside_start(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self._arrays["n_beside"], dtype=np.int64)])

    @cached_property
    def _document_start(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self._arrays["document_tokens"], dtype=np.int64)])

    def _examples(self, feature: int, first: int, ranks: list[int]) -> Examples:
        text = self._with_text()
        return Examples(self._example(text, feature, first + place, rank) for place, rank in enumerate(ranks))

    def _example(self, text: ExcerptText, feature: int, number: int, rank: int) -> Example:
        """Example `number` of all, whose firing has this rank."""
        place = int(self._arrays["place"][number])
        document = int(np.searchsorted(self._document_start, place, "right")) - 1
        begin, end = self._document_start[document : document + 2].tolist()
        stride = int(self.manifest["text"]["window_tokens"])
        # The window that the model saw.
        outer = begin + (place - begin) // stride * stride
        outer_stop = min(outer + stride, end)
        start, stop = max(outer, place - self._window[0]), min(outer_stop, place + self._window[1] + 1)
        wide = max(outer, start - CHARACTER_TOKENS), min(outer_stop, stop + CHARACTER_TOKENS)
        values = np.zeros(stop - start, np.float32)
        beside = slice(*self._beside_start[number : number + 2].tolist())
        values[self._arrays["beside_offset"][beside]] = bf16_to_float32(self._arrays["beside_value"][beside])
        values[place - start] = value = self._strengths[number]
        about = text.documents[document]
        return Example(
            feature=feature,
            row=place,
            value=float(value),
            tokens=tuple(text.display(*wide)[start - wide[0] : stop - wide[0]]),
            values=tuple(values.tolist()),
            centre=place - start,
            start_row=start,
            document=document,
            title=about.title,
            source=about.source,
            language=about.language,
            position=place - outer + int(self.manifest["text"]["has_bos"]),
            document_position=place - begin,
            rank=rank,
            quantile=1 - rank / int(self._arrays["n_firings"][feature]),
        )
