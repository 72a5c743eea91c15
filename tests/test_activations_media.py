"""Texts with images and sounds: reading them, cutting them into windows, and the store that comes of it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers_activations import tree
from helpers_media import media_model, png, wav, write_lines
from helpers_models import one_thread, relative_difference, tiny_model  # noqa: F401  one_thread is a fixture

from activations.capture import capture
from activations.documents import Document, is_held_out
from activations.errors import InvalidInputError, MismatchError, UnknownNameError
from activations.export import export_store
from activations.media import BOX, MODALITIES, SPAN, Medium, window_breaks
from activations.selection import RowSelection
from activations.shuffle import Selection, ShuffledBatches
from activations.source import RowFlag
from activations.store import ActivationStore
from activations.text import TextSource
from scope.training.config import TrainConfig
from scope.training.data import shuffled_batches

HOOK = "blocks.1.hook_resid_post"


def words(n: int) -> str:
    return "the cat sat on the mat and " * n


def written(folder: Path, sounds: bool) -> Path:
    """Documents with none, one and several media, and one of media alone."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(3):
        (folder / f"{seed}.png").write_bytes(png(width=30 + 10 * seed, seed=seed))
    (folder / "a.wav").write_bytes(wav(0.3))
    (folder / "b.wav").write_bytes(wav(0.5, pitch=880))
    heard = ["a.wav"] if sounds else []
    rows: list[dict[str, Any]] = [
        {"text": words(3), "media": [], "title": "words"},
        {"text": "look <image> and " + ("<audio> " if sounds else "") + words(4), "media": ["0.png", *heard]},
        {"text": words(1), "media": ["1.png", "2.png"], "title": "pictures first"},
        {"text": "", "media": ["0.png", *(["b.wav"] if sounds else [])], "title": "no words"},
        {"text": words(2) + "<image>" + words(2) + "<image>", "media": ["2.png", "1.png"], "title": "spread"},
    ]
    return write_lines(folder / "docs.jsonl", rows)


def made(folder: Path, kind: str = "gemma3", **settings: Any) -> ActivationStore:
    text = TextSource(written(folder / "text", kind == "gemma4"), media_column="media")
    given = {"context_size": 24 if kind == "gemma3" else 96, "dtype": "float32", "rows_per_group": 16, **settings}
    return capture(media_model(kind), text, [HOOK], folder / "s.zarr", **given).store


@pytest.fixture(scope="module", params=["gemma3", "gemma4"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """Windows that media nearly fill, in row groups that cut them in two."""
    return made(tmp_path_factory.mktemp(request.param), request.param)


def columns(store: ActivationStore) -> pd.DataFrame:
    return pd.DataFrame({name: store.column(name, 0, store.n_rows) for name in store.token_columns})


def test_rows_equal_a_run_of_each_window(store: ActivationStore) -> None:
    model = media_model("gemma3" if store.spec.context_size == 24 else "gemma4")
    rows = columns(store)
    for sequence in rows["sequence"].unique().tolist():
        own = rows[rows["sequence"] == sequence]
        (tokens,), (placed,) = store.window_tokens([sequence]), store.window_media([sequence])
        assert tokens.tolist() == own["token_id"].tolist()
        alone = model.forward_rows([tokens], [HOOK], "float32", 4096, [placed]).wait()[HOOK]
        stored = store.read(HOOK, int(own.index[0]), int(own.index[-1]) + 1)
        assert relative_difference(torch.from_numpy(stored), torch.from_numpy(alone)) <= 1e-5


def test_a_whole_document_in_one_window_equals_its_prompt(tmp_path: Path) -> None:
    """What a store holds is what `run` shows for the same document."""
    for kind in ("gemma3", "gemma4"):
        store = made(tmp_path / kind, kind, context_size=256)
        model = media_model(kind)
        documents = list(TextSource(tmp_path / kind / "text/docs.jsonl", media_column="media").documents())
        rows = columns(store)
        for number, document in enumerate(documents):
            table = store.sequences()
            prompt = model.media_prompt(document)
            (sequence,) = table.loc[table["document"] == number, "sequence"]
            own = rows[rows["sequence"] == sequence]
            assert own["token_id"].tolist() == prompt.tokens.tolist()
            for name in ("modality", "medium", *BOX, *SPAN):
                np.testing.assert_allclose(own[name], prompt.columns[name], rtol=1e-6)
            stored = torch.from_numpy(store.read(HOOK, int(own.index[0]), int(own.index[-1]) + 1))
            assert relative_difference(stored, model.run(prompt, hooks=[HOOK]).activations[HOOK]) <= 1e-5


def test_columns_say_what_each_row_is(store: ActivationStore) -> None:
    rows = columns(store)
    document = store.sequences().set_index("sequence")["document"]
    rows["document"] = document[rows["sequence"]].to_numpy()
    image, sound = (rows["modality"] == MODALITIES.index(kind) for kind in ("image", "audio"))
    flags = rows["flags"].to_numpy()
    assert (((flags & RowFlag.IMAGE) > 0) == image).all()
    assert (((flags & RowFlag.AUDIO) > 0) == sound).all()
    assert not (flags[image | sound] & RowFlag.SPECIAL).any()
    assert rows.loc[image, list(BOX)].notna().all().all()
    assert rows.loc[~image, list(BOX)].isna().all().all()
    assert rows.loc[sound, list(SPAN)].notna().all().all()
    assert rows.loc[~sound, list(SPAN)].isna().all().all()
    for _, own in rows[image].groupby(["document", "medium"]):  # patches tile the image
        assert np.isclose(((own["x1"] - own["x0"]) * (own["y1"] - own["y0"])).sum(), 1, atol=1e-5)
    media = store.media(content=True)
    assert len(media) == (8 if sound.any() else 6)
    for one in media.to_dict("records"):
        here = (rows["document"] == one["document"]) & (rows["medium"] == one["medium"]) & (rows["modality"] > 0)
        own = rows[here]
        assert len(own) == one["n_tokens"]
        assert set(own["sequence"]) == {one["sequence"]}  # never cut in two
        assert own["position"].tolist() == list(range(one["position"], one["position"] + one["n_tokens"]))
        assert one["content"] == (Path(store.path).parent / "text" / one["name"]).read_bytes()
    info = store.info()["by_modality"]
    assert info["image"] == {"rows": int(image.sum()), "media": int((media["kind"] == "image").sum())}
    assert sum(counts["rows"] for counts in info.values()) == store.n_rows


def test_windows_break_before_a_medium() -> None:
    medium = np.array([-1] * 5 + [0] * 4 + [-1] * 2 + [1] * 3 + [2] * 3)
    assert window_breaks(medium, 8) == [0, 5, 11]
    assert window_breaks(medium, 6) == [0, 5, 11]
    assert window_breaks(medium, 100) == [0]
    assert window_breaks(np.full(20, -1), 8) == [0, 8, 16]
    with pytest.raises(ValueError, match="0, 4") as caught:
        window_breaks(medium, 3)
    assert caught.value.args == (0, 4)


def test_an_interrupted_capture_ends_with_the_same_bytes(tmp_path: Path) -> None:
    whole = tree(Path(made(tmp_path / "a").path))
    part = made(tmp_path / "b", max_tokens=None)
    assert tree(Path(part.path)) == whole

    class StopAfterThreeBatches(Exception):  # noqa: N818
        pass

    calls = 0

    def progress(done: int, total: int | None) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise StopAfterThreeBatches

    with pytest.raises(StopAfterThreeBatches):
        made(tmp_path / "c", progress=progress)
    assert tree(Path(made(tmp_path / "c").path)) == whole


def test_hooks_are_added_when_the_files_are_gone(tmp_path: Path) -> None:
    made(tmp_path)
    for path in (tmp_path / "text").iterdir():
        path.unlink()
    more = "blocks.2.hook_resid_post"
    store = capture(media_model("gemma3"), None, [more], tmp_path / "s.zarr").store
    assert store.complete
    assert store.rows_of(more) == store.rows_of(HOOK)


def test_appending_and_selecting(tmp_path: Path) -> None:
    store = made(tmp_path / "a")
    n_rows, n_media = store.n_rows, len(store.media())
    text = TextSource(
        write_lines(tmp_path / "a/text/more.jsonl", [{"text": "<image> then", "media": ["1.png"]}]),
        media_column="media",
    )
    grown = capture(media_model("gemma3"), text, [], tmp_path / "a/s.zarr", append=True).store
    assert len(grown.media()) == n_media + 1
    added = grown.window_media([int(grown.sequences()["sequence"].max())])[0]
    assert [one.name for one in added] == ["1.png"]
    assert (grown.flags(n_rows, grown.n_rows) & RowFlag.IMAGE).any()
    assert grown.verify() == []
    chosen = made(tmp_path / "b", selection=RowSelection(every=2))
    kept = columns(chosen)
    rows = columns(store).iloc[:n_rows]
    number = rows["position"] - 1
    wanted = np.flatnonzero((number >= 0) & (number % 2 == 0))
    assert kept["token_id"].tolist() == rows["token_id"].iloc[wanted].tolist()
    stored = store.read_rows(HOOK, wanted)
    assert relative_difference(torch.from_numpy(chosen.read(HOOK, 0, chosen.n_rows)), torch.from_numpy(stored)) <= 1e-5


def test_chats_with_media_have_roles_too(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    content = [{"type": "image", "path": "a.png"}, {"type": "text", "text": "the cat sat"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "the moon"}]
    text = TextSource(
        write_lines(tmp_path / "c.jsonl", [{"messages": messages}]), messages_column="messages", message_media=True
    )
    store = capture(media_model("gemma3"), text, [HOOK], tmp_path / "s.zarr", context_size=64).store
    rows = columns(store)
    image = rows["modality"] == 1
    assert image.sum() == 4
    assert (rows.loc[image, "role"] == 3).all()
    assert (rows.loc[image, "message"] == 0).all()
    said = rows.loc[(rows["role"] == 4) & (rows["kind"] == 1), "token_id"].tolist()
    assert media_model("gemma3").tokenizer.decode(said) == "the moon"
    with pytest.raises(InvalidInputError, match="role and content are text"):
        TextSource(tmp_path / "c.jsonl", messages_column="messages").check()
    frame = pd.DataFrame({"messages": [messages[:1]]})
    frame.to_parquet(tmp_path / "c.parquet")
    parquet = TextSource(tmp_path / "c.parquet", messages_column="messages", message_media=True)
    assert [one.name for one in next(parquet.documents()).media] == ["a.png"]


def test_what_is_wrong_with_media_is_named_before_anything_is_written(tmp_path: Path) -> None:
    model, out = media_model("gemma3"), tmp_path / "s.zarr"
    (tmp_path / "bad.png").write_bytes(b"no picture")
    (tmp_path / "bad.wav").write_bytes(b"RIFF")
    (tmp_path / "a.png").write_bytes(png())

    def refused(row: dict[str, Any], match: str, **settings: Any) -> None:
        text = TextSource(write_lines(tmp_path / "t.jsonl", [{"text": "a", "title": "T", **row}]), media_column="media")
        with pytest.raises(InvalidInputError, match=match):
            capture(model, text, [HOOK], out, **settings)
        assert not out.exists()

    refused({"media": ["gone.png"]}, r"document 'T' \(number 0\): the image gone\.png cannot be read")
    refused({"media": ["bad.png"]}, r"'T'.*the image bad\.png cannot be read")
    refused({"media": ["bad.wav"]}, r"'T'.*bad\.wav cannot be read.*PCM WAV")
    refused({"media": ["a.xyz"]}, r"t\.jsonl, line 1: a\.xyz is no medium")
    refused({"media": ["https://x.org/a.png"]}, "line 1: .*lies elsewhere")
    refused({"media": 3}, "line 1: expected a list of paths")
    refused({"text": "<image> <image>", "media": ["a.png"]}, "'T'.*has the marks <image>, <image>")
    refused({"media": ["a.png"]}, "up to 10 tokens.*context_size of at least 11", context_size=8)
    text = TextSource(write_lines(tmp_path / "t.jsonl", [{"text": "a", "media": ["a.png"]}]), media_column="media")
    with pytest.raises(InvalidInputError, match="takes text alone"):
        capture(tiny_model("llama"), text, ["blocks.0.hook_resid_post"], out)
    pd.DataFrame({"text": ["a"]}).to_parquet(tmp_path / "t.parquet")
    (tmp_path / "t.txt").write_text("a")
    with pytest.raises(UnknownNameError, match="media column"):
        TextSource(tmp_path / "t.parquet", media_column="media").check()
    with pytest.raises(InvalidInputError, match="plain text; media are read"):
        TextSource(tmp_path / "t.txt", media_column="media").check()
    with pytest.raises(InvalidInputError, match="cannot be streamed"):
        model.source(text, [HOOK])


def test_another_picture_is_another_text(tmp_path: Path) -> None:
    path = written(tmp_path, sounds=False)
    before = TextSource(path, media_column="media").fingerprint
    (tmp_path / "1.png").write_bytes(png(seed=9))
    assert TextSource(path, media_column="media").fingerprint != before
    without = TextSource(path)
    assert "media" not in json.dumps(without.described)
    made(tmp_path / "x")
    with pytest.raises(MismatchError, match="has images or sounds"):
        capture(media_model("gemma3"), without, [HOOK], tmp_path / "x/s.zarr", context_size=24, append=True)


def test_a_document_of_media_alone_goes_by_their_name() -> None:
    names = [f"{number}.png" for number in range(40)]
    documents = [Document("", media=(Medium("image", name, content=b""),)) for name in names]
    assert not any(document.is_empty for document in documents)
    assert 0 < sum(map(is_held_out, documents)) < 20


def test_export_carries_columns_and_media(store: ActivationStore, tmp_path: Path) -> None:
    export_store(store, tmp_path / "out", "hf-dataset")
    rows = pd.read_parquet(sorted((tmp_path / "out/data").glob("*.parquet"))[0])
    assert {"modality", "medium", *BOX, *SPAN} <= set(rows.columns)
    media = pd.read_parquet(tmp_path / "out/media.parquet")
    assert media["digest"].tolist() == store.media()["digest"].tolist()
    assert json.loads((tmp_path / "out/export.json").read_text())["store"]["media"]["modalities"] == list(MODALITIES)


@pytest.mark.parametrize("memory_bytes", [2**20, 4_000])
def test_passes_balanced_over_modalities(store: ActivationStore, memory_bytes: int) -> None:
    """Each pass has as many rows of each modality as the rarest has, other ones each time, the same for a seed."""
    code, flags = store.column("modality", 0, store.n_rows), store.flags(0, store.n_rows)
    usable = (flags & (RowFlag.BOS | RowFlag.SPECIAL | RowFlag.HELD_OUT)) == 0
    there = np.unique(code[usable])
    smallest = np.bincount(code[usable])[there].min()
    settings: dict[str, Any] = {"passes": 3, "select": Selection(balance="modality"), "memory_bytes": memory_bytes}
    batches = ShuffledBatches(store, HOOK, 16, 5, **settings)
    assert batches.n_rows == len(there) * smallest
    assert batches.in_memory == (memory_bytes == 2**20)
    rows = np.concatenate([batch.rows for batch in batches])
    passes = np.split(rows, 3)
    for own in passes:
        assert usable[own].all()
        assert len(np.unique(own)) == len(own)
        assert np.bincount(code[own])[there].tolist() == [smallest] * len(there)
    assert set(passes[0].tolist()) != set(passes[1].tolist())
    again = [batch.rows for batch in ShuffledBatches(store, HOOK, 16, 5, **settings)]
    np.testing.assert_array_equal(np.concatenate(again), rows)
    for start in (1, 5, len(again) - 1):
        rest = list(ShuffledBatches(store, HOOK, 16, 5, start=start, **settings))
        np.testing.assert_array_equal(np.concatenate([batch.rows for batch in rest]), rows[16 * start :])
        np.testing.assert_array_equal(rest[-1].values, store.read_rows(HOOK, rest[-1].rows))


def test_what_cannot_be_balanced(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(words(8))
    plain = capture(
        tiny_model("gemma3"), TextSource(tmp_path / "t.txt"), [HOOK], tmp_path / "s.zarr", context_size=32
    ).store
    with pytest.raises(InvalidInputError, match="nothing to balance"):
        ShuffledBatches(plain, HOOK, 8, 0, select=Selection(balance="modality"))
    with pytest.raises(UnknownNameError, match="balance"):
        Selection(balance="modalities")  # type: ignore[arg-type]
    live: Any = tiny_model("gemma3").source(TextSource(tmp_path / "t.txt"), [HOOK], context_size=32)
    with pytest.raises(InvalidInputError, match="from a store alone"):
        ShuffledBatches(live, HOOK, 8, 0, select=Selection(balance="modality"))


def test_training_is_balanced_where_the_config_says_so(store: ActivationStore) -> None:
    config = TrainConfig(d_sae=40, k=4, tokens=640, batch_size=32, balance="modality")
    code = store.column("modality", 0, store.n_rows)
    rows = np.concatenate([batch.rows for batch in shuffled_batches(store, HOOK, config)(0)])
    per_pass = ShuffledBatches(store, HOOK, 32, 0, select=Selection(balance="modality", max_norm_ratio=10)).n_rows
    assert per_pass is not None
    whole = rows[: len(rows) // per_pass * per_pass]
    counts = np.bincount(code[whole])
    assert len(set(counts[counts > 0].tolist())) == 1
    assert config.to_dict()["balance"] == "modality"
    assert "balance" not in TrainConfig(d_sae=40, k=4).to_dict()
