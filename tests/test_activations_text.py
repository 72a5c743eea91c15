"""Documents: what is read, in which order, and what bad input gets."""

import json
import sys
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from activations import documents
from activations import text as text_module
from activations.errors import InvalidInputError, UnknownNameError
from activations.text import Document, TextSource, is_held_out

ROWS = [
    {"text": f"text {i}", "title": f"t{i}", "source": "s", "language": "en", "license": "L", "n": i} for i in range(57)
]


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(path: Path, rows: list[dict], row_group_size: int = 10) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=row_group_size)
    return path


@pytest.fixture(params=["jsonl", "parquet"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    write = write_jsonl if request.param == "jsonl" else write_parquet
    return write(tmp_path / f"data.{request.param}", ROWS)


def test_documents_come_in_file_order_with_their_columns(path: Path) -> None:
    documents = list(TextSource(path).documents())
    assert [document.text for document in documents] == [row["text"] for row in ROWS]
    assert documents[3] == Document("text 3", "t3", "s", "en", "L", {"n": "3"})


def test_another_text_column(path: Path) -> None:
    assert next(TextSource(path, text_column="title").documents()).text == "t0"


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_start_skips_exactly(path: Path, seed: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "LINES_PER_BLOCK", 4)
    monkeypatch.setattr(text_module, "BLOCKS_PER_POOL", 2)
    source = TextSource(path, shuffle_seed=seed)
    everything = list(source.documents())
    for start in (0, 1, 9, 20, 56, 57, 60):
        assert list(source.documents(start)) == everything[start:]


def test_shuffling_is_a_permutation_that_the_seed_decides(path: Path) -> None:
    plain = [document.title for document in TextSource(path).documents()]
    orders = [[d.title for d in TextSource(path, shuffle_seed=seed).documents()] for seed in (0, 0, 1)]
    assert orders[0] == orders[1]
    assert len({tuple(plain), tuple(orders[0]), tuple(orders[2])}) == 3
    assert sorted(orders[0]) == sorted(plain) == sorted(orders[2])


def test_text_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first", encoding="utf-8-sig")
    write_jsonl(tmp_path / "c.jsonl", ROWS[:2])
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    documents = list(TextSource(tmp_path).documents())
    assert [d.text for d in documents] == ["first", "second", "text 0", "text 1"]
    assert (documents[0].title, documents[0].source) == ("a", tmp_path.name)


def test_missing_values_are_empty_documents(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": null}\n\n{"text": "x", "title": null}\n')
    assert [d.text for d in TextSource(file).documents()] == ["", "", "x"]
    assert [d.source for d in TextSource(file).documents()][2] == "a"
    pq.write_table(pa.table({"text": pa.array(["x", None])}), tmp_path / "a.parquet")
    assert [d.text for d in TextSource(tmp_path / "a.parquet").documents()] == ["x", ""]


def test_lone_surrogates_are_replaced(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a\\ud800b \\ud83d\\ude00", "title": "\\udc00"}\n')
    (document,) = TextSource(file).documents()
    assert (document.text, document.title) == ("a\ufffdb \U0001f600", "\ufffd")


def test_fingerprint_follows_content_and_settings_but_not_the_folder(path: Path, tmp_path: Path) -> None:
    source = TextSource(path)
    moved = tmp_path / "elsewhere" / path.name
    moved.parent.mkdir()
    moved.write_bytes(path.read_bytes())
    assert TextSource(moved).fingerprint == source.fingerprint == TextSource([str(path)]).fingerprint
    others = {
        TextSource(path, shuffle_seed=0).fingerprint,
        TextSource(path, max_document_tokens=5).fingerprint,
        TextSource(path, text_column="title").fingerprint,
        TextSource([path, path]).fingerprint,
    }
    moved.write_bytes(write_jsonl(tmp_path / "x.jsonl", ROWS[:3]).read_bytes())
    others.add(TextSource(moved).fingerprint)
    assert source.fingerprint not in others
    assert len(others) == 5


def test_held_out_goes_by_title_before_the_hash_mark() -> None:
    titles = [f"book {i}" for i in range(2000)]
    share = sum(is_held_out(Document("", title=title)) for title in titles) / len(titles)
    assert 0.07 < share < 0.13
    for title in titles[:50]:
        expected = zlib.crc32(title.encode()) % 10 == 0
        assert is_held_out(Document("a", title=f"{title}#1")) == is_held_out(Document("b", title=title)) == expected
    text = "word " * 100
    assert (
        is_held_out(Document(text)) == is_held_out(Document(text[:200])) == (zlib.crc32(text[:200].encode()) % 10 == 0)
    )


def test_missing_file_suggests_its_neighbours(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "sample.jsonl", ROWS)
    with pytest.raises(UnknownNameError, match=r"no file .*sampel\.jsonl.*Did you mean .*sample\.jsonl"):
        TextSource(tmp_path / "sampel.jsonl").check()
    with pytest.raises(UnknownNameError):
        TextSource(tmp_path / "nowhere" / "x.jsonl").check()


def test_missing_column_suggests_those_that_exist(path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"'txt'.*Did you mean text"):
        TextSource(path, text_column="txt").check()


def test_a_bad_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    for line, message in (
        ("{oops", r"bad\.jsonl, line 3 is not JSON"),
        ("[1]", r"bad\.jsonl, line 3 holds list"),
        ('{"text": 5}', r"bad\.jsonl, line 3: 'text' holds int"),
        ('{"body": "x"}', r"text column 'text'.*line 3"),
    ):
        file.write_text('{"text": "a"}\n\n' + line + "\n")
        with pytest.raises(InvalidInputError, match=message):
            TextSource(file).check()


def test_other_bad_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"ok \xff")
    (tmp_path / "a.csv").write_text("text\n")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    (tmp_path / "empty").mkdir()
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "n.parquet")
    for name, message in (
        ("a.txt", "not UTF-8 text: byte 3"),
        ("a.csv", r"unknown kind; expected one of \.parquet"),
        ("a.parquet", "cannot be read as parquet"),
        ("n.parquet", "holds int64; expected text"),
        ("empty", "holds no parquet, jsonl or txt"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            TextSource(tmp_path / name).check()
    with pytest.raises(InvalidInputError, match="No text was given"):
        TextSource([])
    with pytest.raises(InvalidInputError, match="max_document_tokens is 0"):
        TextSource(tmp_path, max_document_tokens=0)
    with pytest.raises(InvalidInputError, match="cannot be mixed"):
        TextSource(["hf://a/b", tmp_path])


def test_data_sets_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InvalidInputError, match="pip install datasets"):
        TextSource("hf://a/b").check()


def test_data_sets_are_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class FakeDatasets:
        @staticmethod
        def load_dataset(name: str, config: str | None, split: str, streaming: bool) -> list[dict]:
            calls.append((name, config, split, streaming))
            return ROWS

    monkeypatch.setitem(sys.modules, "datasets", FakeDatasets)
    source = TextSource("hf://owner/name:config@test")
    source.check()
    assert TextSource(Path("hf://owner/name:config@test")) == source
    assert [d.title for d in source.documents(55)] == ["t55", "t56"]
    assert set(calls) == {("owner/name", "config", "test", True)}
    assert source.fingerprint != TextSource("hf://owner/name").fingerprint
    with pytest.raises(UnknownNameError, match="text column"):
        TextSource("hf://owner/name", text_column="body").check()
