"""An excerpt shows what the index shows, says when it cannot, and takes no other text for its own."""

import dataclasses
import json

import numpy as np
import pytest
from helpers_features import TEXTS, FakeModel, FakeStore, GrowingStore, WideSAE, small_sae, tiny_index
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from typer.testing import CliRunner

from activations.text import TextSource
from scope.cli import app
from scope.errors import IntegrityError, InvalidInputError, MismatchError, OccupiedError, OutOfRangeError, ScopeError
from scope.features import ExcerptSettings, FeatureExcerpt, build_index, make_excerpt
from scope.features.excerpt import EXACT, ROUNDED
from scope.features.packed import PackedArrays, pack_arrays, rounded
from scope.workspace import Workspace


class TokenizingModel(FakeModel):
    """With what reading a text asks of a model."""

    def encode_documents(self, texts):
        return [np.array(self.encode(text), np.int32) for text in texts]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("excerpt")
    index, store, _ = tiny_index(folder)
    return index, make_excerpt(index, folder / "tiny.excerpt", text=True), store


@pytest.fixture
def bare(built, tmp_path):
    """An excerpt without its text, to be read or damaged."""
    return make_excerpt(built[0], tmp_path / "bare.excerpt")


def documents_of(folder, repeats: int = 2) -> TextSource:
    """The documents of `FakeStore` as a file."""
    path = folder / "text.jsonl"
    with open(path, "w") as file:
        for number, (title, source, language, text) in enumerate(TEXTS * repeats):
            content = {"title": title, "source": source, "language": language, "text": text * (1 + number % 3)}
            file.write(json.dumps(content) + "\n")
    return TextSource(path)


def shown(examples) -> list[dict]:
    """Everything that an example says; rows are counted otherwise in an excerpt, from its own first token."""
    return [{**dataclasses.asdict(one), "row": one.row - one.start_row, "start_row": 0} for one in examples]


def assert_shows_the_same(index, excerpt, window=(24, 12), top=10, per_band=3, seed=0):
    assert sum(len(excerpt.top_examples(feature)) for feature in range(index.d_sae)) > 0 or top == 0
    for feature in range(index.d_sae):
        assert shown(excerpt.top_examples(feature)) == shown(index.top_examples(feature, top, window))
        for band, (low, high) in enumerate(excerpt.bands):
            expected = index.quantile_examples(feature, low, high, per_band, seed, window)
            assert shown(excerpt.band_examples(feature, band)) == shown(expected)


def test_the_examples_are_the_indexs_own(built):
    index, excerpt, _ = built
    assert_shows_the_same(index, excerpt)


@pytest.mark.parametrize(
    "chosen", [ExcerptSettings(top=0, per_band=5), ExcerptSettings(3, 0), ExcerptSettings(2, 1, 0, 0, 1, 7)]
)
def test_the_number_of_examples_is_a_setting(built, tmp_path, chosen):
    excerpt = make_excerpt(built[0], tmp_path / "few.excerpt", chosen, text=True)
    window = chosen.before, chosen.after
    assert_shows_the_same(built[0], excerpt, window, chosen.top, chosen.per_band, chosen.seed)


@pytest.mark.parametrize("signed", [False, True])
def test_negative_strengths_and_a_text_that_ends_in_a_window(tmp_path, signed):
    model = FakeModel()
    store = GrowingStore(model, 131)
    index = build_index(store, WideSAE(30, threshold=2.0, signed=signed), tmp_path / "i.index", model=model)
    assert_shows_the_same(index, make_excerpt(index, tmp_path / "e.excerpt", text=True))


def test_the_statistics_are_the_indexs_own(built):
    index, excerpt, _ = built
    own = index.table
    for name in (*EXACT, "density", "density_low", "density_high", "dead", "over_dense"):
        assert np.array_equal(excerpt.table[name], own[name], equal_nan=excerpt.table[name].dtype.kind == "f"), name
    for name in ROUNDED:
        np.testing.assert_allclose(excerpt.table[name], own[name], rtol=2**-13, err_msg=name)
    for feature in range(index.d_sae):
        assert all(
            np.array_equal(*pair) for pair in zip(excerpt.histogram(feature), index.histogram(feature), strict=True)
        )
        for group in ("by_language", "by_source"):
            expected = getattr(index, group)(feature).drop(columns="mean_value")
            assert getattr(excerpt, group)(feature).equals(expected)
        tokens, expected = excerpt.top_tokens(feature), index.top_tokens(feature, 8)
        assert tokens["token"].tolist() == expected["token"].tolist()
        assert tokens["count"].tolist() == expected["count"].tolist()
        np.testing.assert_allclose(tokens[["mean_value", "share"]], expected[["mean_value", "share"]], rtol=2**-11)


def test_its_text_is_read_from_the_documents(built, bare, tmp_path):
    index, whole, store = built
    assert not bare.has_text
    with pytest.raises(InvalidInputError, match="does not have its text"):
        bare.top_examples(0)
    model = TokenizingModel(vocabulary=list(store.model.vocabulary))
    bare.read_text(documents_of(tmp_path), model)
    assert bare.has_text
    assert_shows_the_same(index, bare)
    assert bare.top_tokens(3).equals(whole.top_tokens(3))


def test_another_text_or_tokenizer_is_refused(built, bare, tmp_path):
    model = TokenizingModel(vocabulary=list(built[2].model.vocabulary))
    with pytest.raises(MismatchError, match=r"is not the text of .*bare\.excerpt"):
        bare.read_text(dataclasses.replace(documents_of(tmp_path), shuffle_seed=1), model)
    with pytest.raises(MismatchError, match="is not the text"):
        bare.read_text(documents_of(tmp_path, repeats=1), model)

    class Other(TokenizingModel):
        @property
        def identity(self):
            return dataclasses.replace(super().identity, tokenizer_hash="other")

    with pytest.raises(MismatchError, match="has the tokenizer other"):
        bare.read_text(documents_of(tmp_path), Other())
    assert not FeatureExcerpt.open(bare.path).has_text


def test_it_belongs_to_an_sae(built):
    index, excerpt, _ = built
    excerpt.require_sae(index.sae_info["fingerprint"])
    with pytest.raises(MismatchError, match="expected 0123"):
        excerpt.require_sae("0123" * 16)
    for feature in (-1, excerpt.d_sae, True, "1"):
        with pytest.raises(OutOfRangeError):
            excerpt.row(feature)


@pytest.mark.parametrize("name", ["arrays.zst", "manifest.json"])
def test_a_damaged_one_is_not_opened(bare, name):
    path = bare.path / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match=name):
        FeatureExcerpt.open(bare.path)


def test_what_is_missing_newer_or_something_else(built, bare):
    with pytest.raises(InvalidInputError, match="format 'feature-index'"):
        FeatureExcerpt.open(built[0].path)
    manifest = bare.path / "manifest.json"
    known = manifest.read_text()
    manifest.write_text(known.replace('"version": 1', '"version": 2'))
    with pytest.raises(InvalidInputError, match="version 2"):
        FeatureExcerpt.open(bare.path)
    manifest.write_text(known)
    (bare.path / "arrays.zst").unlink()
    with pytest.raises(IntegrityError, match=r"arrays\.zst cannot be read"):
        FeatureExcerpt.open(bare.path)


@pytest.mark.parametrize("name", ["tokens.int32", "documents.parquet", "vocabulary.parquet"])
def test_a_damaged_text_is_not_shown(built, tmp_path, name):
    excerpt = make_excerpt(built[0], tmp_path / "torn.excerpt", text=True)
    path = excerpt.path / "text" / name
    path.write_bytes(path.read_bytes()[:-4] + b"\0\1\2\3")
    with pytest.raises(IntegrityError, match=name):
        FeatureExcerpt.open(excerpt.path).top_examples(0)
    told = CliRunner().invoke(app, ["verify", str(excerpt.path), "--json"])
    assert [fault["object"] for fault in json.loads(told.stdout)["faults"]] == [f"text/{name}"]


def test_an_index_of_some_tokens_of_its_documents_is_refused(tmp_path):
    store = FakeStore(FakeModel())
    store.columns["position"] = store.columns["position"] * 2
    index = build_index(store, small_sae(), tmp_path / "some.index")
    with pytest.raises(InvalidInputError, match="whole documents"):
        make_excerpt(index, tmp_path / "some.excerpt")
    assert not (tmp_path / "some.excerpt").exists()


def test_a_workspace_finds_that_of_an_sae(built, tmp_path):
    index, excerpt, _ = built
    workspace = Workspace(tmp_path)
    fingerprint = index.sae_info["fingerprint"]
    assert workspace.excerpt_of(fingerprint) is None
    workspace.add(excerpt.path)
    assert workspace.excerpt_of(fingerprint).id == excerpt.id
    assert workspace.excerpt_of("0" * 64) is None
    assert workspace.excerpt("tiny").fingerprint == excerpt.fingerprint
    # Of several, the one over the larger text.
    small = build_index(GrowingStore(FakeModel(), 131), small_sae(), tmp_path / "small.index")
    make_excerpt(small, workspace.path_for("feature-excerpt", "small"))
    assert workspace.excerpt_of(fingerprint).manifest["n_rows"] == index.n_rows
    facts = json.loads(CliRunner().invoke(app, ["info", str(excerpt.path), "--json"]).stdout)
    assert (facts["kind"], facts["has_text"]) == ("feature-excerpt", True)
    assert "as it was written" in CliRunner().invoke(app, ["verify", str(excerpt.path)]).stdout


def test_nothing_is_overwritten(built, bare):
    before = (bare.path / "manifest.json").read_bytes()
    with pytest.raises(OccupiedError, match="is there already"):
        make_excerpt(built[0], bare.path)
    assert (bare.path / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("wrong", [{"top": 128}, {"before": -1}, {"tokens": 0}, {"tokens": 65}])
def test_settings_are_checked(wrong):
    with pytest.raises(InvalidInputError, match=next(iter(wrong))):
        ExcerptSettings(**wrong)


def test_the_command(built, tmp_path):
    out = tmp_path / "made.excerpt"
    done = CliRunner().invoke(app, ["excerpt", str(built[0].path), "--out", str(out), "--top", "4", "--text", "--json"])
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["settings"]["top"] == 4
    assert told["bytes"] == FeatureExcerpt.open(out).n_bytes
    assert len(FeatureExcerpt.open(out).top_examples(3)) <= 4
    again = CliRunner().invoke(app, ["excerpt", str(built[0].path), "--out", str(out)])
    assert again.exit_code == 2


NUMBERS = st.sampled_from([np.uint8, np.uint16, np.int32, np.int64, np.float32])


@given(st.dictionaries(st.sampled_from("abc"), NUMBERS.flatmap(lambda kind: arrays(kind, array_shapes(min_side=0)))))
@settings(max_examples=40, deadline=None)
def test_packed_arrays_come_back_as_they_were(tmp_path_factory, given_arrays):
    content, table = pack_arrays(given_arrays)
    path = tmp_path_factory.mktemp("packed") / "arrays.zst"
    path.write_bytes(content)
    packed = PackedArrays(path, json.loads(json.dumps(table)))
    assert packed.names == tuple(given_arrays)
    for name, array in given_arrays.items():
        assert packed[name].dtype == array.dtype
        assert packed[name].shape == array.shape
        assert packed[name].tobytes() == array.tobytes()
    if content:
        path.write_bytes(content[:-1])
        with pytest.raises(ScopeError, match="damaged"):
            PackedArrays(path, table).check()


@given(arrays(np.float32, 20, elements=st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)))
@settings(deadline=None)
def test_rounding_keeps_twelve_bits(values):
    kept = rounded(values)
    assert (np.abs(kept - values) <= np.abs(values) * 2.0**-13).all()
    assert not (kept.view(np.uint32) & 0x7FF).any()
