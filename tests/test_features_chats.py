"""Features by role and by kind of content: counts of the index against the store's own columns."""

import json
from pathlib import Path

import helpers_chats
import numpy as np
import pytest
import torch
from helpers_models import one_thread, tiny_model  # noqa: F401
from helpers_saes import make

from activations.capture import capture
from activations.chats import CONTENT_KINDS, ROLES
from activations.source import RowFlag
from activations.store import ActivationStore
from activations.text import TextSource
from scope.errors import InvalidInputError, UnknownNameError
from scope.features.build import build_index
from scope.features.grids import feature_grid
from scope.features.index import FeatureIndex
from scope.saes.base import SAEMetadata

HOOK = "blocks.1.hook_resid_post"


def captured(folder: Path, chats: list, **more) -> ActivationStore:
    text = TextSource(helpers_chats.write_chats(folder / f"{len(chats)}.jsonl", chats), messages_column="messages")
    template = None if more.get("append") else helpers_chats.BLOCKS
    return capture(
        tiny_model("gemma3"),
        text,
        [HOOK],
        folder / "s.zarr",
        context_size=48,
        dtype="float32",
        chat_template=template,
        **more,
    ).store


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("chats")
    store = captured(folder, [helpers_chats.weather_chat()] * 2)
    sae = make("topk", d_in=32, d_sae=40, k=6, seed=1, metadata=SAEMetadata(hook_name=HOOK))
    index = build_index(store, sae, folder / "i.index", model=tiny_model("gemma3"), batch_size=64, segment_firings=200)
    return store, sae, index


def test_rates_by_role_and_kind_are_those_of_the_rows(case) -> None:
    store, sae, index = case
    fires = sae.encode(torch.from_numpy(store.read(HOOK, 0, store.n_rows))).detach().numpy() > 0
    indexed = store.flags(0, store.n_rows) & (RowFlag.BOS | RowFlag.SPECIAL) == 0
    for column, names, table_of in (("role", ROLES, index.by_role), ("kind", CONTENT_KINDS, index.by_kind)):
        code = store.column(column, 0, store.n_rows)
        for feature in range(0, index.d_sae, 7):
            table = table_of(feature).set_index(column)
            assert set(table.index) == {names[one] for one in code[indexed]}
            for name, row in table.iterrows():
                own = indexed & (code == names.index(name))
                assert row["n_rows"] == own.sum()
                assert row["n_firings"] == fires[own, feature].sum()
                assert row["rate_low"] <= row["rate"] <= row["rate_high"]
            assert list(table["rate"]) == sorted(table["rate"], reverse=True)
    assert index.roles == ("none", "system", "user", "assistant", "tool")
    assert index.kinds == ("markup", "text", "tool_call", "tool_response", "tool_definition")
    assert index.info()["roles"] == dict(index.manifest["roles"])
    assert index.chat_template == helpers_chats.BLOCKS
    shown = index.feature(int(index.table["n_firings"].idxmax()))._repr_html_()
    assert "By role" in shown
    assert "By kind" in shown
    assert "tool_response" in shown


def test_the_table_says_where_a_feature_fires_most(case) -> None:
    _, _, index = case
    table = index.table
    for group, table_of in (("role", index.by_role), ("kind", index.by_kind)):
        top, entropy = table[f"top_{group}"], table[f"{group}_entropy"]
        for feature in table["feature"]:
            found = table_of(feature)
            if not found["n_firings"].any():
                assert top[feature] == ""
                continue
            best = found[found[group] == top[feature]].iloc[0]
            assert best["rate_low"] == pytest.approx(found["rate_low"].max())
            p = found["rate"].to_numpy() / found["rate"].sum()
            assert entropy[feature] == pytest.approx(-(p[p > 0] * np.log2(p[p > 0])).sum(), abs=1e-5)
    found = index.query(filters={"top_role": ["tool"], "top_kind": "tool_response"}, sort=[("density", False)]).rows
    wanted = table[(table["top_role"] == "tool") & (table["top_kind"] == "tool_response")]
    assert set(found["feature"]) == set(wanted["feature"])
    assert {"top_role", "top_kind"} <= set(feature_grid(index).columns)


def test_examples_of_a_role_and_a_kind(case) -> None:
    store, _, index = case
    role, kind = (store.column(name, 0, store.n_rows) for name in ("role", "kind"))
    every = {"n": store.n_rows, "distinct": False, "per_sequence": store.n_rows}
    seen = 0
    for feature in index.table.nlargest(6, "n_firings")["feature"]:
        fired = index.firings(feature)["row"].to_numpy()
        for asked, holds in (
            ({"role": "assistant"}, role == ROLES.index("assistant")),
            ({"kind": "tool_response"}, kind == CONTENT_KINDS.index("tool_response")),
            ({"role": "assistant", "kind": "text"}, (role == ROLES.index("assistant")) & (kind == 1)),
            ({"role": "none", "document": 1}, (role == 0) & np.isin(np.arange(store.n_rows), index.document_rows(1))),
        ):
            examples = index.examples_in(feature, **asked, **every)
            assert [example.row for example in examples] == fired[holds[fired]].tolist()
            assert all(index.firings(feature)["row"][example.rank] == example.row for example in examples)
            seen += len(examples)
    assert seen > 20
    with pytest.raises(UnknownNameError, match="role"):
        index.examples_in(0, role="narrator")
    with pytest.raises(UnknownNameError, match="kind"):
        index.examples_in(0, kind="reasoning")  # no chat of this text has any


def test_conditions_name_roles_and_kinds(case) -> None:
    store, sae, index = case
    fires = sae.encode(torch.from_numpy(store.read(HOOK, 0, store.n_rows))).detach().numpy() > 0
    indexed = store.flags(0, store.n_rows) & (RowFlag.BOS | RowFlag.SPECIAL) == 0
    role, kind = (store.column(name, 0, store.n_rows) for name in ("role", "kind"))
    is_assistant, is_call = role == ROLES.index("assistant"), kind == CONTENT_KINDS.index("tool_call")
    for a, b, on_a, on_b in (
        ("role:assistant", None, is_assistant, ~is_assistant),
        ("kind:tool_call", "role:user", is_call, role == ROLES.index("user")),
        ("role:assistant & kind:tool_call", "role:assistant & kind:text", is_call, is_assistant & (kind == 1)),
        ("role:assistant & regex:(?s).", None, is_assistant, ~is_assistant),
        ("feature:3 & kind:tool_call", None, is_call & fires[:, 3], ~(is_call & fires[:, 3])),
    ):
        if "feature:3" in a and not (is_call & fires[:, 3] & indexed).any():
            continue
        found = index.contrast(a, b, n=index.d_sae)
        assert (found.n_rows_a, found.n_rows_b) == ((on_a & indexed).sum(), (on_b & indexed).sum()), a
        for row in found.table.itertuples():
            assert row.rate_a == pytest.approx(fires[on_a & indexed, row.feature].mean()), a
            assert row.rate_b == pytest.approx(fires[on_b & indexed, row.feature].mean()), a
    with pytest.raises(UnknownNameError, match="role"):
        index.contrast("role:narrator")
    with pytest.raises(InvalidInputError, match="No row"):
        index.contrast("role:developer")


def test_an_index_of_chats_grows_and_shows_its_rows_roles(case, tmp_path: Path) -> None:
    _, sae, index = case
    own = captured(tmp_path, [helpers_chats.weather_chat()] * 2)
    build_index(own, sae, tmp_path / "i.index", batch_size=64)
    grown_store = captured(tmp_path, [helpers_chats.weather_chat()], append=True)
    grown = build_index(grown_store, sae, tmp_path / "i.index", batch_size=64)
    whole = build_index(grown_store, sae, tmp_path / "whole.index", batch_size=64)
    assert grown.n_rows > index.n_rows
    for feature in (0, 9, 20):
        assert grown.by_role(feature).equals(whole.by_role(feature))
        assert grown.by_kind(feature).equals(whole.by_kind(feature))
    assert grown.verify() == []
    tokens = grown.tokens(0, grown.n_rows)
    assert tokens["role"].tolist() == [ROLES[code] for code in grown_store.column("role", 0, grown.n_rows)]
    assert tokens["kind"].tolist() == [CONTENT_KINDS[code] for code in grown_store.column("kind", 0, grown.n_rows)]
    np.testing.assert_array_equal(tokens["message"], grown_store.column("message", 0, grown.n_rows))


def test_plain_text_has_no_roles(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": "The cat sat on the mat. " * 4}) + "\n")
    store = capture(
        tiny_model("gemma3"), TextSource(tmp_path / "t.jsonl"), [HOOK], tmp_path / "s.zarr", context_size=32
    ).store
    sae = make("topk", d_in=32, d_sae=40, k=6, seed=1, metadata=SAEMetadata(hook_name=HOOK))
    index = build_index(store, sae, tmp_path / "i.index")
    assert index.roles == index.kinds == ()
    assert "roles" not in index.info()
    assert isinstance(index, FeatureIndex)
    assert "top_role" not in index.table
    for ask in (
        lambda: index.by_role(0),
        lambda: index.by_kind(0),
        lambda: index.contrast("role:user"),
        lambda: index.examples_in(0, role="user"),
    ):
        with pytest.raises(InvalidInputError, match="text is no chats"):
            ask()
    assert "role" not in index.tokens(0, 2)
