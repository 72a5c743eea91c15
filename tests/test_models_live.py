"""A live source gives a store's rows, in bounded memory, and training from it is training from that store."""

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import helpers_chats
import numpy as np
import pandas as pd
import pytest
import torch
from helpers_activations import write_text
from helpers_models import WRONG_TYPE, one_thread, real_model, tiny_folder, tiny_model  # noqa: F401  # a fixture
from helpers_saes import make

from activations.capture import capture
from activations.shuffle import Selection, ShuffledBatches
from activations.source import ActivationSource, RowFlag
from activations.store import ActivationStore
from activations.text import TextSource
from scope.diffing.layers import layer_changes
from scope.diffing.pair import ModelPair
from scope.diffing.settings import ComparisonConfig
from scope.errors import InvalidInputError, NonFiniteError, OutOfRangeError, UnknownNameError
from scope.features import build_index
from scope.models import LanguageModel, LiveActivations
from scope.models.row_groups import GROUPS_AHEAD, RowGroups
from scope.saes.base import SAEMetadata
from scope.training import TrainConfig, train
from scope.training.evaluate import evaluate

RESID, Z = "blocks.2.hook_resid_post", "blocks.1.attn.hook_z"
SETTINGS: dict[str, Any] = {"context_size": 24, "batch_size": 200, "rows_per_group": 128, "dtype": "float32"}
CONFIG = TrainConfig(d_sae=40, k=4, tokens=40 * 64, batch_size=64, log_steps=5, lr=3e-3)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TextSource:
    return TextSource(write_text(tmp_path_factory.mktemp("text") / "text.jsonl", n_documents=40))


@pytest.fixture(scope="module")
def store(text: TextSource, tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    out = tmp_path_factory.mktemp("store") / "s.zarr"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the tests: sums of more threads differ in their last digits
    try:
        return capture(tiny_model("gemma3"), text, [RESID, Z], out, **SETTINGS).store
    finally:
        torch.set_num_threads(threads)


def live(text: TextSource, hooks: Any = (RESID, Z), **settings: Any) -> LiveActivations:
    return tiny_model("gemma3").source(text, hooks, **{**SETTINGS, **settings})


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """First rows of the row groups that the model has run on."""
    groups: list[int] = []
    original = RowGroups._launched

    def counting(self: RowGroups, item: Any) -> Any:
        groups.append(item.plan.row_start)
        return original(self, item)

    monkeypatch.setattr(RowGroups, "_launched", counting)
    return groups


@pytest.mark.parametrize(
    ("dtype", "rows_per_group", "max_tokens"),
    [("float32", 128, None), ("float32", 16, 300), ("float32", 4096, None), ("bfloat16", 128, 500)],
)
def test_rows_are_those_of_a_store(
    text: TextSource, tmp_path: Path, dtype: Any, rows_per_group: int, max_tokens: int | None
) -> None:
    settings = {**SETTINGS, "dtype": dtype, "rows_per_group": rows_per_group, "max_tokens": max_tokens}
    store = capture(tiny_model("gemma3"), text, [RESID, Z], tmp_path / "s.zarr", **settings).store
    source = live(text, **settings)
    assert isinstance(source, ActivationSource)
    assert source.fingerprint == store.fingerprint
    assert source.hooks == store.hooks
    assert source.hook_shape(Z) == store.hook_shape(Z)
    batches = list(source.batches([RESID, Z], 77))
    assert [len(batch.rows) for batch in batches[:-1]] == [77] * (len(batches) - 1)
    np.testing.assert_array_equal(np.concatenate([batch.rows for batch in batches]), np.arange(store.n_rows))
    np.testing.assert_array_equal(np.concatenate([batch.flags for batch in batches]), store.flags(0, store.n_rows))
    for hook in (RESID, Z):
        values = torch.cat([batch.activations[hook] for batch in batches])
        bits = values.view(torch.uint16) if dtype == "bfloat16" else values
        np.testing.assert_array_equal(bits.numpy(), store.read(hook, 0, store.n_rows))
        norms = np.concatenate([batch.norms[hook] for batch in batches])
        np.testing.assert_array_equal(norms, store.norms(hook, 0, store.n_rows))


def test_chats_are_written_as_in_a_store(tmp_path: Path) -> None:
    """Rows, fingerprint and index are those of a store of the same chats, roles and kinds included."""
    chats = TextSource(
        helpers_chats.write_chats(tmp_path / "chats.jsonl", [helpers_chats.weather_chat()] * 12),
        messages_column="messages",
    )
    settings = {**SETTINGS, "max_tokens": 900}
    template = {"chat_template": helpers_chats.BLOCKS}
    store = capture(tiny_model("gemma3"), chats, [RESID], tmp_path / "s.zarr", **settings, **template).store
    source = live(chats, [RESID], **settings, **template)
    assert source.fingerprint == store.fingerprint
    assert source.chats == store.manifest["chats"]
    batches = list(source.batches([RESID], 77))
    values = torch.cat([batch.activations[RESID] for batch in batches]).numpy()
    np.testing.assert_array_equal(values, store.read(RESID, 0, store.n_rows))
    sae = make("topk", d_in=32, d_sae=40, k=6, seed=1, metadata=SAEMetadata(hook_name=RESID))
    stored = build_index(store, sae, tmp_path / "stored.index", batch_size=64)
    streamed = build_index(source, sae, tmp_path / "live.index", batch_size=64)
    assert streamed.chat_template == stored.chat_template
    assert streamed.roles == stored.roles
    pd.testing.assert_frame_equal(streamed.table, stored.table)
    pd.testing.assert_frame_equal(streamed.tokens(0, 900), stored.tokens(0, 900))
    assert streamed.by_kind(3).equals(stored.by_kind(3))
    held_out = source.held_out(100)
    assert (held_out.tokens.flags & RowFlag.HELD_OUT).all()
    with pytest.raises(InvalidInputError, match="no chat template"):
        live(chats, [RESID])
    with pytest.raises(InvalidInputError, match="is no chats"):
        live(TextSource(write_text(tmp_path / "text.jsonl", n_documents=2)), [RESID], **template)
    with pytest.raises(InvalidInputError, match="plain text"):
        layer_changes(ModelPair(tiny_model("gemma3"), tiny_model("gemma3")), chats, ComparisonConfig(), None)


def test_it_starts_anywhere_without_computing_what_lies_before(
    text: TextSource, store: ActivationStore, computed: list[int]
) -> None:
    for start in (0, 1, 127, 128, 300, store.n_rows - 1, store.n_rows):
        computed.clear()
        batches = list(live(text).batches([RESID], 50, start))
        assert computed == [first for first in range(0, store.n_rows, 128) if min(first + 128, store.n_rows) > start]
        values = [batch.activations[RESID].numpy() for batch in batches]
        assert sum(map(len, values)) == store.n_rows - start
        if values:
            np.testing.assert_array_equal(np.concatenate(values), store.read(RESID, start, store.n_rows))


def test_names_and_documents(text: TextSource, store: ActivationStore) -> None:
    source = live(text, ["blocks.2.hook_out"])
    assert source.hooks == (RESID,)
    assert source.resolve_hook("blocks.2.hook_out") == RESID
    with pytest.raises(UnknownNameError, match=f"Did you mean {RESID}"):
        source.hook_shape("blocks.2.hook_resid_pots")
    for row in (0, 1, 130, 300, store.n_rows - 1):
        expected = store.document_at(row)
        assert source.document_at(row) == {name: expected[name] for name in source.document_at(row)}
    for row in (-1, store.n_rows):
        with pytest.raises(OutOfRangeError):
            source.document_at(row)


def test_the_model_is_a_bounded_number_of_row_groups_ahead(text: TextSource, computed: list[int]) -> None:
    source = live(text, rows_per_group=32)
    for batch in source.batches([RESID], 32):
        consumed = int(batch.rows[0]) // 32 + 1
        # Besides what was consumed: one that waits, and one that is being computed.
        assert len(computed) <= consumed + GROUPS_AHEAD + 1
    assert len(computed) == consumed > 20


def test_leaving_early_ends_the_threads(text: TextSource) -> None:
    for _ in ShuffledBatches(live(text, rows_per_group=16), RESID, 8, 0, memory_bytes=2**14):
        break
    assert not [one for one in threading.enumerate() if one.name in ("planner", "live model", "reader")]


def test_what_makes_no_sense_is_refused(text: TextSource, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" ")
    for settings, match in (
        ({"context_size": 65}, "takes at most 64"),
        ({"context_size": 1}, "at least 2 tokens"),
        ({"dtype": "int8"}, "dtype"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"rows_per_group": 3}, "power of two"),
        ({"hooks": []}, "No hook was given"),
    ):
        with pytest.raises(WRONG_TYPE, match=match):
            live(text, **settings)
    with pytest.raises(InvalidInputError, match="There is no text"):
        live(TextSource(tmp_path / "empty.txt"))
    with pytest.raises(InvalidInputError, match="batch_size is 0"):
        next(iter(live(text).batches([RESID], 0)))
    with pytest.raises(InvalidInputError, match="leaves no row of LiveActivations"):
        next(iter(ShuffledBatches(live(text), RESID, 5, 0, select=Selection(require_flags=RowFlag.IMAGE))))


@pytest.fixture
def poisoned() -> LanguageModel:
    """A model that gives a NaN in windows with a `~`."""
    model = LanguageModel.load(str(tiny_folder("gemma3")), device="cpu", dtype="float32")
    token = int(model.encode_documents(["~"])[0][-1])
    with torch.no_grad():
        model.hf.get_input_embeddings().weight[token] = torch.nan
    return model


def test_a_nan_stops_the_run_and_is_named(text: TextSource, store: ActivationStore, poisoned: LanguageModel) -> None:
    source = poisoned.source(text, [RESID], **SETTINGS)
    with pytest.raises(NonFiniteError, match=rf"The hook {RESID} gave a NaN or Inf at row \d+, in the document") as one:
        train(source, RESID, CONFIG)
    row = int(str(one.value).split("at row ")[1].split(",")[0])
    assert f"in the document {store.document_at(row)['title']!r}" in str(one.value)
    tokens = store.rows(0, store.n_rows)
    window = tokens.token_id[tokens.sequence == tokens.sequence[row]]
    assert poisoned.encode_documents(["~"])[0][-1] in window


def test_values_too_large_for_the_dtype_are_refused(text: TextSource) -> None:
    model = LanguageModel.load(str(tiny_folder("gemma3")), device="cpu", dtype="float32")
    with torch.no_grad():
        model.hf.get_input_embeddings().weight.mul_(1e6)
    source = model.source(text, ["blocks.0.hook_resid_pre"], **{**SETTINGS, "dtype": "float16"})
    with pytest.raises(NonFiniteError, match="a value too large for float16"):
        next(source.batches(["blocks.0.hook_resid_pre"], 10))


# ---- training


def test_training_from_it_is_training_from_the_store(
    text: TextSource, store: ActivationStore, computed: list[int], tmp_path: Path
) -> None:
    """Over several passes, each another full shuffle: the model runs once, and the weights are those of the store."""
    from_store = train(store, RESID, CONFIG)
    from_live = train(live(text), RESID, CONFIG, tmp_path / "sae")
    assert CONFIG.tokens > store.n_rows
    assert computed == list(range(0, store.n_rows, 128))
    for name, weights in from_store.sae.state_dict().items():
        torch.testing.assert_close(from_live.sae.state_dict()[name], weights, rtol=0, atol=0)
    metadata = from_live.sae.cfg.metadata
    assert metadata.store_fingerprint == store.fingerprint
    assert metadata.dataset_path == "text.jsonl"
    assert (metadata.model_name, metadata.context_size, metadata.prepend_bos) == (store.spec.model, 24, True)


def test_a_stopped_run_goes_on_to_the_same_weights(text: TextSource, tmp_path: Path) -> None:
    """Also where the text does not fit into the buffer."""
    config = replace(CONFIG, checkpoint_steps=5, shuffle_bytes=2**15)
    whole = train(live(text), RESID, config)

    def crash(done: int, total: int | None) -> None:
        if done == 12 * 64:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        train(live(text), RESID, config, tmp_path / "sae", progress=crash)
    resumed = train(live(text), RESID, config, tmp_path / "sae")
    assert resumed.resumed_at == 10
    assert resumed.sae.fingerprint == whole.sae.fingerprint


def test_it_is_measured_on_its_held_out_documents(
    text: TextSource, store: ActivationStore, computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("gemma3")
    sae = train(store, RESID, CONFIG).sae
    expected = evaluate(sae, store, model, ce_tokens=60, baselines=False).to_dict()
    figures = evaluate(sae, live(text), model, ce_tokens=60, baselines=False).to_dict()
    assert figures.keys() == expected.keys()
    for name, value in expected.items():
        assert figures[name] == pytest.approx(value, rel=1e-4), name
    held_out = live(text).held_out(max_rows=50)
    assert held_out.n_rows == 50
    assert ((held_out.tokens.flags & RowFlag.HELD_OUT) > 0).all()
    assert held_out.documents()["held_out"].all()
    monkeypatch.setattr(LanguageModel, "device_rows", None)
    tokens = live(text).held_out_tokens(max_rows=50)
    np.testing.assert_array_equal(tokens.tokens.token_id, held_out.tokens.token_id)
    pd.testing.assert_frame_equal(tokens.sequences(), held_out.sequences())
    pd.testing.assert_frame_equal(tokens.documents(), held_out.documents())
    with pytest.raises(InvalidInputError, match="is held out"):
        live(_without_held_out(text)).held_out()


def _without_held_out(text: TextSource) -> TextSource:
    from activations.documents import is_held_out

    class Training(TextSource):
        def documents(self, start: int = 0) -> Any:
            return (replace(one, text="") if is_held_out(one) else one for one in super().documents(start))

    return Training(text.paths)


@pytest.mark.real
def test_the_real_model_trains_an_sae_without_a_store(tmp_path: Path) -> None:
    hook = "blocks.8.hook_resid_post"
    text = tmp_path / "text"
    text.mkdir()
    for number in (9, 10, 11):  # the last one is held out
        (text / f"part {number}.txt").write_text("The cat sat on the mat, and the dog slept. " * 8)
    source = real_model().source(TextSource(text), hook, context_size=48, dtype="bfloat16")
    report = train(source, hook, TrainConfig(d_sae=64, k=8, tokens=320, batch_size=32))
    assert report.fvu < 1
    assert evaluate(report.sae, source, real_model(), ce_tokens=30).cross_entropy is not None
