"""Languages compared on texts that both have: parity with plain Python over the texts' own paragraphs."""

import helpers_features
import numpy as np
import pytest
from helpers_features import FakeModel, FakeStore, dense_strengths, small_sae

from scope.errors import InvalidInputError, UnknownNameError
from scope.features import build_index

EN = "Every package of the system has a name and a version, and its files lie in an archive of a plain kind."
EN_2 = "This second paragraph of the page was never translated into German, so that it stands there as it was."
DE = "Jedes Paket des Systems hat einen Namen und eine Version und seine Dateien liegen in einem Archiv."
DE_2 = "Noch ein Absatz der Seite, den es auch auf Deutsch gibt, damit etwas zu vergleichen bleibt im Test."
FR = "Chaque paquet du système porte un nom et une version, et ses fichiers se trouvent dans une archive."
CODE = "apt install scope"
PAGES = [
    (title, source, language, "\n\n".join([*paragraphs, ""]))
    for title, source, language, paragraphs in (
        ("page-1", "book", "en", [EN, EN_2, CODE]),
        ("page-1", "book", "de", [DE, EN_2, CODE]),
        ("page-1", "book", "fr", [FR, EN_2]),
        ("page-2", "book", "en", [EN_2, EN]),
        ("page-2", "book", "de", [DE_2]),
        ("page-3", "book", "de", [DE]),
        ("page-3", "book", "fr", [FR, DE]),
        ("page-4", "book", "en", [EN]),
        ("page-4", "other", "de", [DE]),
    )
]
KEPT = {
    ("page-1", "en"): [EN],
    ("page-1", "de"): [DE],
    ("page-2", "en"): [EN_2, EN],
    ("page-2", "de"): [DE_2],
}


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    model = FakeModel()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(helpers_features, "TEXTS", PAGES)
        store = FakeStore(model, repeats=1)
    sae = small_sae()
    index = build_index(store, sae, tmp_path_factory.mktemp("pages") / "pages.index", model=model)
    return index, model, dense_strengths(store, sae) != 0


def paragraphs(text: str) -> list[str]:
    return [part for part in text.split("\n\n") if part.strip()]


def test_titles_that_languages_share(pages):
    index, model, _ = pages
    found = index.parallel_titles(["en", "de"])
    assert set(zip(found["title"], found["language"], strict=True)) == set(KEPT)
    for page in found.itertuples():
        lengths = {part: len(model.encode(part)) for part in paragraphs(index.document_text(page.document))}
        text = index.document_text(page.document)
        assert page.n_rows == sum(lengths[part] for part in paragraphs(text))
        kept = KEPT[page.title, page.language]
        assert page.n_kept == sum(lengths[part] for part in paragraphs(text) if part in kept)
    assert set(index.parallel_titles(["de", "fr"])["title"]) == {"page-1", "page-3"}
    assert set(index.parallel_titles(["en", "de", "fr"])["title"]) == {"page-1"}
    assert index.parallel_titles(["en", "fr"]).query("title == 'page-3'").empty


def test_a_translation_keeps_nothing_of_another_page(pages):
    index, _, _ = pages
    found = index.parallel_titles(["fr", "de"]).set_index(["title", "language"])
    # EN_2 stands in both, and the German of page 3 in the French one.
    assert found["n_kept"]["page-3", "de"] == 0
    assert 0 < found["n_kept"]["page-3", "fr"] < found["n_rows"]["page-3", "fr"]


def test_rates_are_compared_not_counts(pages):
    index, _, fires = pages
    found = index.compare_languages("en", "de", n=40)
    from scope.features.parallel import parallel_pages

    kept = parallel_pages(index._reader, ["en", "de"])
    rows = {language: np.concatenate(own["rows"].to_list()) for language, own in kept.groupby("language")}
    for feature in found.itertuples():
        assert feature.rate_a == pytest.approx(fires[rows["en"], feature.feature].mean())
        assert feature.rate_b == pytest.approx(fires[rows["de"], feature.feature].mean())
        assert feature.rate_a_low <= feature.rate_a <= feature.rate_a_high
        assert feature.rate_b_low <= feature.rate_b <= feature.rate_b_high
        assert feature.log_ratio_low - 1e-9 <= feature.log_ratio <= feature.log_ratio_high + 1e-9
    assert found["z"].abs().is_monotonic_decreasing
    assert found.attrs == {"n_titles": 2, "n_rows_a": len(rows["en"]), "n_rows_b": len(rows["de"])}
    other = index.compare_languages("de", "en", n=40).set_index("feature")
    assert np.allclose(other["z"].loc[found["feature"]], -found["z"])


def test_what_cannot_be_compared(pages):
    index, _, _ = pages
    with pytest.raises(InvalidInputError, match="at least two"):
        index.compare_languages("en", "fr")
    with pytest.raises(InvalidInputError, match="two different"):
        index.compare_languages("en", "en")
    with pytest.raises(InvalidInputError, match="two languages"):
        index.parallel_titles(["en"])
    with pytest.raises(UnknownNameError, match="de"):
        index.compare_languages("en", "dee")


def test_neutral_and_specific_follow_the_table(pages):
    index, _, _ = pages
    table = index.table
    assert set(index.language_neutral(100)["feature"]) == set(table["feature"][table["language_neutral"]])
    for language in index.languages:
        own = index.language_specific(language, 100)
        assert set(own["feature"]) == set(table["feature"][table["language_specific"] == language])
        assert own["z"].is_monotonic_decreasing
    with pytest.raises(UnknownNameError):
        index.language_specific("xx")
