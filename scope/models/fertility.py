"""What a text costs in tokens, by language.

- `per_word`, `per_character`, `per_byte`: tokens over words (runs of letters, digits and marks), characters and UTF-8
  bytes of a language's documents, each document weighed by its length. Languages that write no spaces have few "words".
- `premium`: tokens of the pages that a language shares with the reference language, by source and title, over tokens of
  the same pages in the reference (Petrov et al. 2023, "Language model tokenizers introduce unfairness between
  languages"). Paragraphs that stand word for word in both, which nobody translated, are left out of both.

Intervals are the middle 95% over resampled documents, of the premium over resampled titles.
"""

import re
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from activations.text import TextSource
from scope.errors import UnknownNameError
from scope.models.loading import find_model, quiet_transformers

__all__ = ["encoder_of", "fertility"]

WORD = re.compile(r"\w+")
PARAGRAPH = re.compile(r"\n\s*\n")
AT_ONCE = 64
RESAMPLES = 1000
Encode = Callable[[Sequence[str]], list[np.ndarray]]


def encoder_of(model: str) -> Encode:
    """What turns texts into token ids as a model's tokenizer does; the model's weights are not loaded.

    Raises:
        UnknownNameError, InvalidInputError, MissingDependencyError: as `scope.models.loading.find_model`.
    """
    from transformers import AutoTokenizer

    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(
            find_model(model).folder, local_files_only=True, trust_remote_code=False
        ).backend_tokenizer

    def encode(texts: Sequence[str]) -> list[np.ndarray]:
        found = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.int32) for encoding in found]

    return encode


def fertility(encode: Encode, text: TextSource, reference: str = "en") -> pd.DataFrame:
    """Tokens by language.

    Args:
        encode: token ids of each of some texts, such as `LanguageModel.encode_documents`.
        text: documents with a language.
        reference: the language that others are compared with.

    Returns:
        Columns language, n_documents, tokens, per_word, per_character, per_byte, per_character_low,
        per_character_high, premium, premium_low, premium_high, n_titles; by premium, then per_byte. Premium is NaN for
        languages that share fewer than two titles with the reference.
    Raises:
        UnknownNameError: no document is in the reference language.
    """
    found: dict[str, list[tuple[int, int, int, int]]] = {}
    pages: dict[tuple[str, str], dict[str, str]] = {}
    waiting: list[tuple[str, str]] = []

    def count() -> None:
        for (language, body), ids in zip(waiting, encode([body for _, body in waiting]), strict=True):
            sizes = (len(ids), len(WORD.findall(body)), len(body), len(body.encode("utf-8", "surrogatepass")))
            found.setdefault(language, []).append(sizes)
        waiting.clear()

    for document in text.documents():
        if not document.text.strip():
            continue
        waiting.append((document.language or "unknown", document.text))
        if document.title and document.language:
            pages.setdefault((document.source, document.title), {})[document.language] = document.text
        if len(waiting) == AT_ONCE:
            count()
    count()
    if reference not in found:
        raise UnknownNameError("language", reference, sorted(found))
    rows = [
        {"language": language, **_of_language(np.array(sizes, float)), **_premium(encode, pages, language, reference)}
        for language, sizes in found.items()
    ]
    return pd.DataFrame(rows).sort_values(["premium", "per_byte"], kind="stable", ignore_index=True)


def _of_language(sizes: np.ndarray) -> dict[str, float | int]:
    tokens, words, characters, n_bytes = sizes.sum(axis=0)
    drawn = sizes[np.random.default_rng(0).integers(0, len(sizes), (RESAMPLES, len(sizes)))].sum(axis=1)
    low, high = np.quantile(drawn[:, 0] / drawn[:, 2], (0.025, 0.975))
    return {
        "n_documents": len(sizes),
        "tokens": int(tokens),
        "per_word": float(tokens / max(words, 1)),
        "per_character": float(tokens / characters),
        "per_byte": float(tokens / n_bytes),
        "per_character_low": float(low),
        "per_character_high": float(high),
    }


def _premium(
    encode: Encode, pages: dict[tuple[str, str], dict[str, str]], language: str, reference: str
) -> dict[str, float | int]:
    counts = []
    for page in pages.values():
        if language == reference or not {language, reference} <= set(page):
            continue
        parts = [[part.strip() for part in PARAGRAPH.split(page[name])] for name in (language, reference)]
        same = set(parts[0]) & set(parts[1])
        bodies = ["\n\n".join(part for part in side if part not in same) for side in parts]
        if all(body.strip() for body in bodies):
            counts.append([len(ids) for ids in encode(bodies)])
    if len(counts) < 2:
        one = 1.0 if language == reference else float("nan")
        return {"premium": one, "premium_low": one, "premium_high": one, "n_titles": len(counts)}
    sizes = np.array(counts, float)
    drawn = sizes[np.random.default_rng(0).integers(0, len(sizes), (RESAMPLES, len(sizes)))].sum(axis=1)
    low, high = np.quantile(drawn[:, 0] / drawn[:, 1], (0.025, 0.975))
    ratio = sizes[:, 0].sum() / sizes[:, 1].sum()
    return {"premium": float(ratio), "premium_low": float(low), "premium_high": float(high), "n_titles": len(sizes)}
