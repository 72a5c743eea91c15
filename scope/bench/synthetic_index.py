"""A text and a dictionary that nobody ran, at the size that queries must hold at: what `scope bench index` builds from.

`build_index` takes them as it takes a store and an SAE, so the index on disk is one like any other; only its firings
come from a random generator instead of an encoder.

1. *Text*: documents of lognormal length in 26 languages and six sources, cut into windows; tokens by Zipf's law over
   a vocabulary of 262,144, each language preferring other ones; the strings are made-up words in several scripts,
   each once.
2. *Firings*: on each row `l0` features, of which most are drawn by Zipf's law (a few are over-dense, most rare), some
   follow from the row's token and some from its language, so that there are top tokens, features of a language and
   features that fire together.
3. All of it is a function of the row alone, made in blocks: nothing is held, and a build goes on where it stopped.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from activations.source import ActivationBatch, ModelIdentity, RowFlag, float32_to_bf16
from activations.spec import CaptureSpec, fingerprint_of
from scope.saes.base import SAEMetadata, SparseFeatures
from scope.saes.topk import TopKConfig

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["SyntheticModel", "SyntheticSAE", "SyntheticText", "zipf_table"]

HOOK = "blocks.8.hook_resid_post"
D_VOCAB = 262_144
N_SPECIAL = 4
BOS = 2
D_IN = 64
CONTEXT = 256
BLOCK = 2**14
"""Rows that are made at once."""
TOKENS_PER_DOCUMENT = 2_300
SHARED_RANKS = 64
"""The most frequent tokens, which all languages share: marks, spaces, digits."""
N_PAGES = 77
LANGUAGES = (
    *("ar", "ca", "cs", "da", "de", "el", "en", "es", "fa", "fr", "hr", "id", "it"),
    *("ja", "ko", "nb", "nl", "pl", "pt-br", "ro", "ru", "sv", "tr", "vi", "zh-cn", "zh-tw"),
)
SOURCES = (("handbook", 0.18), ("docs", 0.42), ("code", 0.16), ("plays", 0.2), ("jargon", 0.04))
TABLE_BITS = 22
ZIPF_FEATURES, ZIPF_TOKENS = 1.1, 1.0
EXTRA_DRAWS, TOKEN_DRAWS, LANGUAGE_DRAWS = 18, 8, 3
STRENGTH_SPREAD = 0.7
SHOWN_LOGITS = 8_192
SYLLABLES = (
    *("ba", "de", "ki", "lo", "mu", "na", "re", "si", "to", "vu"),
    *("ga", "pe", "fi", "ho", "su", "ta", "ne", "ri", "co", "du"),
)
SCRIPTS = (("", 0), ("\u0430", 32), ("\u0627", 24), ("\u4e00", 4_096), ("\uac00", 2_048))


def zipf_table(n: int, exponent: float, seed: int) -> np.ndarray:
    """int32 `(2^22,)`: a uniform draw from it is one of 0 to n - 1 by Zipf's law, in an order that `seed` shuffles."""
    weights = np.arange(1, n + 1, dtype=np.float64) ** -exponent
    ends = np.cumsum(weights) / weights.sum()
    ranks = np.searchsorted(ends, (np.arange(2**TABLE_BITS) + 0.5) / 2**TABLE_BITS)
    return np.random.default_rng(seed).permutation(n).astype(np.int32)[np.minimum(ranks, n - 1)]


class SyntheticText:
    """What `build_index` asks of a source. Activations say no more than which row they are of.

    Args:
        n_rows: rows, BOS included.
        seed: of everything.
    """

    dtype = "bfloat16"
    hooks = (HOOK,)

    def __init__(self, n_rows: int, seed: int = 0) -> None:
        self.n_rows = n_rows
        self.seed = seed
        self.spec = CaptureSpec("synthetic", None, "synthetic", "synthetic", CONTEXT, BOS, "float32", "bfloat16", 2**14)
        self._rows_of = lru_cache(maxsize=4)(self._make_rows)

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(["synthetic text", self.n_rows, self.seed])

    def hook_shape(self, name: str) -> tuple[int, ...]:
        return (D_IN,)

    @cached_property
    def _tables(self) -> "tuple[pd.DataFrame, pd.DataFrame]":
        """Documents and sequences."""
        import pandas as pd

        rng = np.random.default_rng([self.seed, 1])
        n = 1 + self.n_rows // TOKENS_PER_DOCUMENT
        lengths = np.maximum(16, rng.lognormal(np.log(TOKENS_PER_DOCUMENT) - 0.5, 1.0, n)).astype(np.int64)
        windows = -(-lengths // (CONTEXT - 1))
        ends = np.cumsum(lengths + windows)
        # The last document takes what is left, so that there are as many rows as were asked for.
        n = min(n, int(np.searchsorted(ends, self.n_rows)) + 1)
        left = self.n_rows - (int(ends[n - 2]) if n > 1 else 0)
        windows[n - 1] = -(-left // CONTEXT)
        lengths, windows = lengths[:n], windows[:n]
        lengths[n - 1] = left - windows[n - 1]
        source = rng.choice(len(SOURCES), n, p=[share for _, share in SOURCES])
        language = np.where(source == 0, rng.integers(0, len(LANGUAGES), n), LANGUAGES.index("en"))
        names = [SOURCES[number][0] for number in source]
        languages = ["code" if name == "code" else LANGUAGES[own] for name, own in zip(names, language, strict=True)]
        page = rng.integers(0, N_PAGES, n)
        documents = pd.DataFrame(
            {
                "document": np.arange(n),
                "title": [
                    f"page-{page[i]}.html" if name == "handbook" else f"{name}-{i}" for i, name in enumerate(names)
                ],
                "source": names,
                "language": languages,
                "license": "CC0",
                "n_tokens": lengths,
                "held_out": False,
            }
        )
        of = np.repeat(np.arange(n), windows)
        place = np.arange(len(of)) - np.repeat(np.cumsum(windows) - windows, windows)
        offset = place * (CONTEXT - 1)
        rows = np.minimum(lengths[of] - offset, CONTEXT - 1) + 1
        sequences = pd.DataFrame(
            {
                "sequence": np.arange(len(of)),
                "document": of,
                "start_row": np.cumsum(rows) - rows,
                "n_rows": rows,
                "document_offset": offset,
            }
        )
        return documents, sequences

    def documents(self) -> "pd.DataFrame":
        return self._tables[0].copy()

    def sequences(self) -> "pd.DataFrame":
        return self._tables[1].copy()

    @cached_property
    def _starts(self) -> np.ndarray:
        return self._tables[1]["start_row"].to_numpy()

    @cached_property
    def _language_of_sequence(self) -> np.ndarray:
        codes = {name: number for number, name in enumerate((*LANGUAGES, "code"))}
        of_document = self._tables[0]["language"].map(codes).to_numpy()
        return of_document[self._tables[1]["document"].to_numpy()]

    @cached_property
    def _token_table(self) -> np.ndarray:
        return zipf_table(D_VOCAB - N_SPECIAL, ZIPF_TOKENS, self.seed)

    @cached_property
    def _shared(self) -> np.ndarray:
        """Which tokens are the same in all languages."""
        shared = np.zeros(D_VOCAB - N_SPECIAL, bool)
        shared[np.unique(self._token_table[: 2**TABLE_BITS // 3])[:SHARED_RANKS]] = True
        return shared

    def languages_of(self, rows: np.ndarray) -> np.ndarray:
        """Language number of each row."""
        numbers: np.ndarray = self._language_of_sequence[np.searchsorted(self._starts, rows, side="right") - 1]
        return numbers

    def rows(self, start: int, stop: int) -> Any:
        """The columns of rows `start` to `stop`."""
        blocks = [self._rows_of(number) for number in range(start // BLOCK, -(-stop // BLOCK))]
        first = start - start // BLOCK * BLOCK
        joined = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
        return type("Rows", (), {name: array[first : first + stop - start] for name, array in joined.items()})

    def _make_rows(self, number: int) -> dict[str, np.ndarray]:
        rows = np.arange(number * BLOCK, min((number + 1) * BLOCK, self.n_rows))
        sequence = np.searchsorted(self._starts, rows, side="right") - 1
        position = rows - self._starts[sequence]
        rng = np.random.default_rng([self.seed, 2, number])
        token = self._token_table[rng.integers(0, 2**TABLE_BITS, len(rows))].astype(np.int64)
        moved = (token + 7_001 * self._language_of_sequence[sequence]) % (D_VOCAB - N_SPECIAL)
        token = N_SPECIAL + np.where(self._shared[token], token, moved)
        return {
            "token_id": np.where(position == 0, BOS, token),
            "sequence": sequence,
            "position": position,
            "flags": np.where(position == 0, int(RowFlag.BOS), 0).astype(np.uint8),
        }

    def batches(self, hooks: Sequence[str], batch_size: int, start: int = 0) -> Iterator[ActivationBatch]:
        for first in range(start, self.n_rows, batch_size):
            rows = np.arange(first, min(first + batch_size, self.n_rows))
            x = np.zeros((len(rows), D_IN), np.float32)
            # bfloat16 holds whole numbers up to 256, so a row's number travels as four digits, and one for safety.
            for place in range(4):
                x[:, place] = rows >> (8 * place) & 255
            flags = self.rows(first, int(rows[-1]) + 1).flags
            yield ActivationBatch(rows, {HOOK: float32_to_bf16(x)}, flags, {})


class SyntheticSAE:
    """What `build_index` asks of an SAE; `encode_sparse` draws the firings of the rows that it is given.

    Args:
        text: the text that it is for.
        d_sae: number of features.
        l0: firings on a row, BOS aside.
    """

    def __init__(self, text: SyntheticText, d_sae: int, l0: int) -> None:
        self.text = text
        self.d_in, self.d_sae, self.l0, self.hook_name = D_IN, d_sae, l0, HOOK
        metadata = SAEMetadata(
            hook_name=HOOK, model_name="synthetic", weight_hash="synthetic", tokenizer_hash="synthetic"
        )
        self.cfg = TopKConfig(d_in=D_IN, d_sae=d_sae, k=l0, metadata=metadata)
        generator = torch.Generator().manual_seed(text.seed)
        directions = torch.randn(d_sae, D_IN, generator=generator)
        self.W_dec = directions / directions.norm(dim=1, keepdim=True)
        self.W_enc = (self.W_dec + 0.05 * torch.randn(d_sae, D_IN, generator=generator)).T
        self.decoder_norms = torch.ones(d_sae)
        self._table = zipf_table(d_sae, ZIPF_FEATURES, text.seed + 1)
        self._scale = np.random.default_rng([text.seed, 3]).lognormal(3, 1, d_sae).astype(np.float32)

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(["synthetic SAE", self.text.fingerprint, self.d_sae, self.l0])

    def encode_sparse(self, x: Float[Tensor, "n d_in"]) -> SparseFeatures:
        digits = x[:, :4].to(torch.int64).numpy()
        rows = (digits << (8 * np.arange(4))).sum(axis=1)
        rng = np.random.Generator(np.random.SFC64([self.text.seed, 4, int(rows[0])]))
        drawn = self._table[rng.integers(0, 2**TABLE_BITS, (len(rows), self._draws), dtype=np.uint32)]
        tokens = np.asarray(self.text.rows(int(rows[0]), int(rows[-1]) + 1).token_id)[rows - rows[0]]
        candidates = np.concatenate([drawn, self._of(tokens, TOKEN_DRAWS, 5), self._of_language(rows)], axis=1)
        ids, fires = _first_unique(candidates, self.l0, self.d_sae, rng)
        strength = np.exp(STRENGTH_SPREAD * rng.standard_normal(ids.shape, dtype=np.float32)) * self._scale[ids]
        return SparseFeatures(torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(np.where(fires, strength, 0)))

    @property
    def _draws(self) -> int:
        return max(1, self.l0 + EXTRA_DRAWS - TOKEN_DRAWS - LANGUAGE_DRAWS)

    def _of(self, what: np.ndarray, n: int, salt: int) -> np.ndarray:
        """`n` features that follow from a number."""
        mixed = (what[:, None].astype(np.uint64) * np.uint64(64) + np.arange(n, dtype=np.uint64)) * np.uint64(salt)
        mixed = (mixed ^ (mixed >> np.uint64(7))) * np.uint64(0x9E3779B97F4A7C15)
        return self._table[(mixed >> np.uint64(64 - TABLE_BITS)).astype(np.int64)]

    def _of_language(self, rows: np.ndarray) -> np.ndarray:
        return self._of(self.text.languages_of(rows), LANGUAGE_DRAWS, 11)


def _first_unique(
    candidates: np.ndarray, n: int, d_sae: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """`n` different ones of each row, and which of them are (where a row has fewer). Rows are turned by a random
    number before they are sorted, so that no id is preferred."""
    turn = rng.integers(0, d_sae, (len(candidates), 1), dtype=np.int32)
    turned = np.sort((candidates + turn) % d_sae, axis=1)
    repeats = np.zeros(turned.shape, bool)
    repeats[:, 1:] = turned[:, 1:] == turned[:, :-1]
    turned[repeats] = d_sae
    turned.sort(axis=1)
    kept = turned[:, :n]
    return np.where(kept < d_sae, (kept - turn) % d_sae, 0), kept < d_sae


class SyntheticModel:
    """What `build_index` asks of a model: strings, and effects on the most frequent tokens' logits."""

    d_model = D_IN
    d_vocab = D_VOCAB
    name = "synthetic"
    special_token_ids = frozenset(range(N_SPECIAL))

    @property
    def identity(self) -> ModelIdentity:
        return ModelIdentity("synthetic", None, "synthetic", "synthetic", BOS, "float32")

    def vocabulary_strings(self, ids: Sequence[int]) -> list[str]:
        return [_word(number) for number in ids]

    def logit_effects(self, directions: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_vocab"]:
        unembedding = torch.randn(D_IN, SHOWN_LOGITS, generator=torch.Generator().manual_seed(0))
        return directions @ unembedding


def _word(number: int) -> str:
    """A token's string, another for each number."""
    if number < N_SPECIAL:
        return ("<pad>", "<eos>", "<bos>", "<unk>")[number]
    script, size = SCRIPTS[number % 7 % len(SCRIPTS)] if number % 4 == 0 else SCRIPTS[0]
    rest, word = number, ""
    while rest:
        rest, digit = divmod(rest, size or len(SYLLABLES))
        word += chr(ord(script) + digit) if size else SYLLABLES[digit]
    if number % 40 == 1:
        return str(number)
    return f" {word}" if number % 2 else word
