"""Translations against random pairs, on a model whose middle layer alone means the same in both languages."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_activations import FakeModel
from test_cli import scope

from activations.capture import capture
from activations.store import ActivationStore
from activations.text import TextSource
from scope.errors import InvalidInputError, MismatchError
from scope.features import FeatureIndex, build_index
from scope.features.discoveries import overlap_by_chance
from scope.features.translations import layer_similarity, shared_features, title_similarity
from scope.figures import translation_lines
from scope.models.fertility import fertility
from scope.saes.base import SAEMetadata
from scope.saes.topk import TopKConfig, TopKSAE

LETTERS = "abcdefghij"
WIDTH = len(LETTERS) + 2
HOOKS = [f"blocks.{layer}.hook_resid_post" for layer in range(3)]
N_TITLES = 16


@dataclass
class Bilingual(FakeModel):
    """The second language writes the first one's letters as capitals. The first and last layers see the letter, the
    middle one what it means, and which language it is."""

    def __post_init__(self) -> None:
        self.hooks: Mapping[str, tuple[int, ...]] = dict.fromkeys(HOOKS, (WIDTH,))

    def rows_at(self, hook: str, window: np.ndarray) -> np.ndarray:
        rows = np.zeros((len(window), WIDTH), np.float32)
        for at, token in enumerate(window):
            letter = chr(max(int(token) - 3, 0))
            if letter.lower() not in LETTERS:
                continue
            if hook == HOOKS[1]:
                rows[at, LETTERS.index(letter.lower())] = 2.0
                rows[at, len(LETTERS) + int(letter.isupper())] = 0.2
            else:
                rows[at] = np.random.default_rng([int(token), HOOKS.index(hook)]).normal(size=WIDTH)
        return rows


def letters_sae() -> TopKSAE:
    """A feature for each letter, and one for each language, of the middle layer."""
    sae = TopKSAE(TopKConfig(d_in=WIDTH, d_sae=WIDTH, k=2, metadata=SAEMetadata(hook_name=HOOKS[1])))
    with torch.no_grad():
        sae.W_dec.copy_(torch.eye(WIDTH))
        sae.W_enc.copy_(torch.eye(WIDTH))
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    return sae


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[FeatureIndex, ActivationStore]:
    folder = tmp_path_factory.mktemp("bilingual")
    rng = np.random.default_rng(0)
    with open(folder / "book.jsonl", "w") as file:
        for title in range(N_TITLES):
            letters = rng.choice(list(LETTERS), 4, replace=False)
            text = "".join(rng.choice(letters, 60))
            for language, body in (("small", text), ("large", text.upper())):
                row = {"text": body, "title": f"page-{title}", "source": "book", "language": language}
                file.write(json.dumps(row) + "\n")
    capture(
        Bilingual(), TextSource([folder / "book.jsonl"]), HOOKS, folder / "a.zarr", context_size=64, dtype="float32"
    )
    store = ActivationStore.open(folder / "a.zarr")
    return build_index(store, letters_sae(), folder / "a.index", allow_mismatch=True), store


def test_similarity_is_highest_where_the_layer_means_the_same(made: tuple[FeatureIndex, ActivationStore]) -> None:
    index, store = made
    table = layer_similarity(index, store, ["small", "large"])
    assert table["hook"].tolist() == HOOKS
    assert (table["n_titles"] == N_TITLES).all()
    middle, others = table.loc[1], table.drop(index=1)
    assert middle["similarity"] > others["similarity"].max() + 0.2
    assert middle["nearest"] > 0.9
    assert middle["difference_low"] > 0.1
    assert (others["difference_low"] < middle["difference_low"]).all()
    figure = translation_lines(table)
    drawn = {trace.name: list(trace.y) for trace in figure.data if trace.name}
    assert drawn["translations"] == table["similarity"].tolist()
    assert drawn["random pairs"] == table["baseline"].tolist()
    for name in ("similarity", "baseline", "difference"):
        assert (table[f"{name}_low"] <= table[name] + 1e-9).all()
        assert (table[name] <= table[f"{name}_high"] + 1e-9).all()


def test_similarity_against_plain_loops() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(2, 5, 7))
    found = title_similarity(a, b)
    centre = np.concatenate([a, b]).mean(axis=0)

    def cosine(x: np.ndarray, y: np.ndarray) -> float:
        x, y = x - centre, y - centre
        return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))

    pairs = [[cosine(x, y) for y in b] for x in a]
    assert found["similarity"] == pytest.approx(np.mean([pairs[i][i] for i in range(5)]))
    assert found["baseline"] == pytest.approx(np.mean([pairs[i][j] for i in range(5) for j in range(5) if i != j]))
    same = title_similarity(a, a)
    assert same["similarity"] == pytest.approx(1)
    assert same["nearest"] == 1


def test_features_that_follow_the_text_and_features_of_a_language(made: tuple[FeatureIndex, ActivationStore]) -> None:
    index, _ = made
    table = shared_features(index, "small", "large").set_index("feature")
    assert table.attrs["n_titles"] == N_TITLES
    assert table.loc[len(LETTERS), "kind"] == "small"
    assert table.loc[len(LETTERS) + 1, "kind"] == "large"
    letters = table.loc[list(range(len(LETTERS)))]
    assert (letters["both"] == letters["titles_a"]).all()
    assert (letters["both"] == letters["titles_b"]).all()
    assert (letters["kind"] == "shared").all()
    assert (letters["expected"] <= letters["both"]).all()
    # All titles but these n_a are without it in both languages: one way of n_titles choose n_a.
    ways = [math.comb(N_TITLES, n) for n in letters["titles_a"]]
    np.testing.assert_allclose(letters["p"], [1 / n for n in ways], rtol=1e-9)


def test_titles_in_common_by_chance() -> None:
    rng = np.random.default_rng(0)
    n_a, n_b, both = np.array([3, 1, 7, 10, 0]), np.array([4, 1, 7, 10, 3]), np.array([2, 1, 5, 10, 0])
    found = overlap_by_chance(both, n_a, n_b, 10)
    drawn = np.array(
        [
            [len(np.intersect1d(*(rng.permutation(10)[:k] for k in (a, b)))) for _ in range(4000)]
            for a, b in zip(n_a, n_b, strict=True)
        ]
    )
    np.testing.assert_allclose(found, (drawn >= both[:, None]).mean(axis=1), atol=0.03)
    assert found[1] == pytest.approx(0.1)
    assert found[3] == found[4] == pytest.approx(1)


def test_unrelated_pages_share_no_features(tmp_path: Path) -> None:
    """Each title has other letters in the second language: with many features on few titles chance alone would give
    some that meet."""
    rng = np.random.default_rng(3)
    with open(tmp_path / "book.jsonl", "w") as file:
        for title in range(N_TITLES):
            for language, upper in (("small", False), ("large", True)):
                text = "".join(rng.choice(rng.choice(list(LETTERS), 3, replace=False), 60))
                row = {"text": text.upper() if upper else text, "title": f"page-{title}", "source": "book"}
                file.write(json.dumps({**row, "language": language}) + "\n")
    store = capture(
        Bilingual(), TextSource([tmp_path / "book.jsonl"]), HOOKS[1:2], tmp_path / "a.zarr", context_size=64,
        dtype="float32",
    ).store  # fmt: skip
    index = build_index(store, letters_sae(), tmp_path / "a.index", allow_mismatch=True)
    assert not (shared_features(index, "small", "large")["kind"] == "shared").any()


def test_the_command_says_both(made: tuple[FeatureIndex, ActivationStore], tmp_path: Path) -> None:
    index, store = made
    found: Any = scope("languages", index.path, "--languages", "small,large", "--store", store.path, "--json")
    (pair,) = found["pairs"]
    assert (pair["n_shared"], pair["n_small"], pair["n_large"]) == (len(LETTERS), 1, 1)
    assert len(found["layers"]) == len(HOOKS)
    text = scope("languages", index.path, "--languages", "small,large", "--store", store.path).stdout
    assert "random pairs" in text
    page = tmp_path / "layers.html"
    scope("languages", index.path, "--languages", "small,large", "--store", store.path, "--figure", page)
    drawn = page.read_text()
    assert "small and large" in drawn
    assert "random pairs" in drawn
    assert "<script src" not in drawn
    refused = scope("languages", index.path, "--languages", "small,large", "--figure", page, "--json", code=2)
    assert "--store" in refused["error"]["message"]
    told = scope("languages", index.path, "--languages", "small", "--json", code=2)["error"]["message"]
    assert "two or more" in told
    with pytest.raises(InvalidInputError, match="two different"):
        shared_features(index, "small", "small")
    (tmp_path / "other.txt").write_text("abc" * 10)
    capture(Bilingual(), TextSource([tmp_path / "other.txt"]), HOOKS[:1], tmp_path / "b.zarr", context_size=64)
    with pytest.raises(MismatchError, match="other rows"):
        layer_similarity(index, ActivationStore.open(tmp_path / "b.zarr"), ["small", "large"])


def test_fertility_of_a_tokenizer_of_bytes(tmp_path: Path) -> None:
    pages = [
        ("one", "en", "the cat sat\n\napt install scope"),
        ("one", "el", "η γάτα\n\napt install scope"),
        ("two", "en", "a dog ran off"),
        ("two", "el", "ο σκύλος"),
        ("three", "el", "μόνο εδώ"),
    ]
    with open(tmp_path / "book.jsonl", "w") as file:
        for title, language, text in pages:
            file.write(json.dumps({"title": title, "language": language, "source": "book", "text": text}) + "\n")
    table = fertility(FakeModel().encode_documents, TextSource([tmp_path / "book.jsonl"])).set_index("language")
    assert (table["per_byte"] == 1).all()
    greek = [text for _, language, text in pages if language == "el"]
    assert table.loc["el", "per_character"] == pytest.approx(
        sum(len(text.encode()) for text in greek) / sum(map(len, greek))
    )
    assert table.loc["el", "per_word"] == pytest.approx(sum(len(text.encode()) for text in greek) / 9)
    # The command stands in both and counts in neither; the third page has no English.
    own, english = "η γάτα" + "ο σκύλος", "the cat sat" + "a dog ran off"
    assert table.loc["el", "premium"] == pytest.approx(len(own.encode()) / len(english))
    assert table.loc["el", "n_titles"] == 2
    assert table.loc["en", "premium"] == 1
    assert table.loc["el", "premium_low"] <= table.loc["el", "premium"] <= table.loc["el", "premium_high"]
