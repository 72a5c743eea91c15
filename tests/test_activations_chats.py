"""Conversations in the shapes that files have, and what a store keeps of them."""

import json
from pathlib import Path
from typing import Any

import helpers_chats
import numpy as np
import pytest
from helpers_activations import FakeModel
from helpers_models import one_thread, tiny_model  # noqa: F401

from activations.capture import capture
from activations.chats import CONTENT_KINDS, ROLES, Message, chat_from, message_from, role_code, tools_from
from activations.errors import InvalidInputError, UnknownNameError
from activations.selection import RowSelection
from activations.store import ActivationStore
from activations.text import TextSource

HOOK = "blocks.1.hook_resid_post"
CALL = helpers_chats.called("look", place="é", n=2)


@pytest.mark.parametrize(
    "call",
    [
        CALL,
        {"name": "look", "arguments": {"place": "é", "n": 2}},
        {"function": {"name": "look", "arguments": '{"place": "é", "n": 2}'}},
        {"name": "look", "parameters": {"place": "é", "n": 2}},
    ],
)
def test_calls_in_the_usual_shapes(call: dict[str, Any]) -> None:
    wanted = Message("assistant", "", (CALL,))
    assert message_from({"role": "assistant", "content": None, "tool_calls": [call]}) == wanted
    assert message_from({"role": "assistant", "tool_calls": [call]}) == wanted
    assert message_from({"role": "assistant", "content": None, "function_call": call}) == wanted
    with_id = message_from({"role": "assistant", "content": "x", "tool_calls": [{**call, "id": "c1"}]})
    assert with_id.as_dict == {"role": "assistant", "content": "x", "tool_calls": [{**CALL, "id": "c1"}]}


def test_messages_in_the_usual_shapes() -> None:
    spoken = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}, {"from": "observation", "value": "3"}]
    assert [(m.role, m.content) for m in chat_from(spoken).messages] == [
        ("user", "hi"),
        ("assistant", "ho"),
        ("tool", "3"),
    ]
    assert message_from({"role": "tool", "content": {"sky": "grey"}}).content == '{"sky": "grey"}'
    thought = message_from({"role": "assistant", "content": "4", "reasoning_content": "2+2", "name": "Ada"})
    assert thought.extra == {"reasoning_content": "2+2", "name": "Ada"}
    assert thought.text == "2+2\n4"
    assert message_from({"role": "user", "content": "a\ud800b"}).content == "a\ufffdb"
    assert tools_from(json.dumps(helpers_chats.TOOLS)) == helpers_chats.TOOLS
    assert tools_from(None) == tools_from("") == ()
    assert [ROLES[role_code(name)] for name in ("model", "ipython", "user", "critic")] == [
        "assistant",
        "tool",
        "user",
        "other",
    ]


@pytest.mark.parametrize(
    ("message", "match"),
    [
        ({"role": "assistant", "tool_calls": [{}]}, "a tool call with a function's name"),
        ({"role": "assistant", "tool_calls": {"name": "x"}}, "tool_calls as a list"),
        (
            {"role": "assistant", "tool_calls": [{"name": "x", "arguments": "{"}]},
            "arguments of the call of x are no JSON",
        ),
        ({"role": "assistant", "tool_calls": [{"name": "x", "arguments": "[1]"}]}, "call of x as an object"),
        ({"role": "user", "content": {"a": 1}}, "role and content are text"),
        ({"from": "human"}, "role and content"),
    ],
)
def test_what_is_no_message(message: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        message_from(message)


def test_parquet_and_json_lines_hold_the_same_chats(tmp_path: Path) -> None:
    chats = [helpers_chats.weather_chat(), chat_from([{"role": "user", "content": "hi"}])]
    texts = [
        TextSource(helpers_chats.write_chats(tmp_path / f"c.{kind}", chats), messages_column="messages")
        for kind in ("jsonl", "parquet")
    ]
    for text in texts:
        assert [document.chat for document in text.documents()] == chats
        assert all("tools" not in document.extra for document in text.documents())
    wrong = tmp_path / "w.jsonl"
    wrong.write_text('{"messages": [], "tools": [1]}\n')
    with pytest.raises(InvalidInputError, match="line 1: expected tools as a list of JSON schemas"):
        TextSource(wrong, messages_column="messages").check()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """Chats with calls, in windows of a tiny model."""
    folder = tmp_path_factory.mktemp("chats")
    path = helpers_chats.write_chats(folder / "c.jsonl", [helpers_chats.weather_chat()] * 2)
    text = TextSource(path, messages_column="messages")
    template = helpers_chats.BLOCKS
    return capture(tiny_model("gemma3"), text, [HOOK], folder / "s.zarr", context_size=48, chat_template=template).store


def said(store: ActivationStore, **wanted: str) -> str:
    chosen = np.ones(store.n_rows, bool)
    for column, names in (("role", ROLES), ("kind", CONTENT_KINDS)):
        if column in wanted:
            chosen &= store.column(column, 0, store.n_rows) == names.index(wanted[column])
    return str(tiny_model("gemma3").tokenizer.decode(store.rows(0, store.n_rows).token_id[chosen]))


def test_a_store_says_which_message_role_and_kind_each_row_is(store: ActivationStore) -> None:
    assert said(store, role="tool", kind="tool_response") == '{"sky": "grey", "wind": 3}' * 2
    assert said(store, kind="tool_call").count("get_weather") == 2
    assert said(store, role="user").strip().startswith("How is the weather")
    message = store.column("message", 0, store.n_rows)
    assert set(message.tolist()) == {-1, 0, 1, 2, 3, 4}
    is_bos = store.rows(0, store.n_rows).position == 0
    assert (message[is_bos] == -1).all()
    documents = store.sequences().set_index("sequence")["document"]
    rows = store.rows(0, store.n_rows)
    for document in (0, 1):  # within a document messages follow each other, over the edges of windows
        own = message[(documents[rows.sequence].to_numpy() == document) & (message >= 0)]
        assert (np.diff(own) >= 0).all()


def test_rows_of_one_kind(tmp_path: Path, store: ActivationStore) -> None:
    text = TextSource(
        helpers_chats.write_chats(tmp_path / "c.jsonl", [helpers_chats.weather_chat()] * 2), messages_column="messages"
    )
    calls = RowSelection(kinds=("tool_call",))
    made = capture(
        tiny_model("gemma3"), text, [HOOK], tmp_path / "calls.zarr", context_size=48, selection=calls,
        chat_template=helpers_chats.BLOCKS,
    ).store  # fmt: skip
    kept = np.flatnonzero(store.column("kind", 0, store.n_rows) == CONTENT_KINDS.index("tool_call"))
    np.testing.assert_array_equal(made.read(HOOK, 0, made.n_rows), store.read_rows(HOOK, kept))
    np.testing.assert_array_equal(
        made.column("message", 0, made.n_rows), store.column("message", 0, store.n_rows)[kept]
    )
    assert made.manifest["selection"]["kinds"] == ["tool_call"]
    with pytest.raises(UnknownNameError, match="kind of content"):
        RowSelection(kinds=("calls",))
    assert RowSelection(skip_bos=True).settings is not None
    assert "kinds" not in (RowSelection(skip_bos=True).settings or {})
    plain = tmp_path / "plain.jsonl"
    plain.write_text('{"text": "hi"}\n')
    with pytest.raises(InvalidInputError, match=r"kinds is .*the text is no chats"):
        capture(FakeModel(), TextSource(plain), [HOOK], tmp_path / "p.zarr", selection=calls)
