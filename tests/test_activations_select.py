"""Rows chosen at capture: the model sees whole windows, the store holds the chosen tokens, and chats have roles."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers_activations import BOS, FakeModel, FakePending, tree, write_text
from hypothesis import given, settings
from hypothesis import strategies as st

from activations.batching import chosen_windows, pack_batches
from activations.capture import CaptureReport, capture
from activations.chats import CONTENT_KINDS, ROLES, Message
from activations.errors import InvalidInputError, MismatchError, UnknownNameError
from activations.export import export_store
from activations.plan import PlannedGroup, PlanState, Windowing, plan_groups
from activations.selection import RowSelection, choosing_for
from activations.source import RowFlag
from activations.store import ActivationStore
from activations.text import Document, TextSource

RESID, Z = "blocks.1.hook_resid_post", "blocks.1.attn.hook_z"
SELECTIONS = [
    RowSelection(skip_bos=True),
    RowSelection(skip_special=True),
    RowSelection(every=3),
    RowSelection(every=3, every_in="document", skip_special=True),
    RowSelection(every=40),
    RowSelection(pattern="[b~]"),
    RowSelection(pattern="^a$", every=2),
]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


@pytest.fixture
def text(tmp_path: Path) -> TextSource:
    return TextSource(write_text(tmp_path / "text.jsonl", n_documents=12))


def run(
    text: TextSource | None, out: Path, model: Any = None, hooks: Any = (RESID, Z), **settings: Any
) -> CaptureReport:
    settings = {"context_size": 16, "rows_per_group": 32, "batch_size": 64, **settings}
    return capture(FakeModel() if model is None else model, text, hooks, out, **settings)


def kept_rows(whole: ActivationStore, selection: RowSelection) -> np.ndarray:
    """Rows of a store of all tokens that a selection keeps, token by token, as its docstring says."""
    rows, sequences = whole.rows(0, whole.n_rows), whole.sequences().set_index("sequence")
    kept = []
    for row, (token, sequence, position, flags) in enumerate(zip(*map(np.ndarray.tolist, rows), strict=True)):
        is_bos, is_special = bool(flags & RowFlag.BOS), bool(flags & RowFlag.SPECIAL)
        has_bos = whole.spec.bos_token_id is not None
        number = position - has_bos
        if selection.every_in == "document":
            number += int(sequences["document_offset"][sequence])
        narrow = selection.every > 1 or selection.pattern is not None
        if (
            (is_bos and (selection.skip_bos or narrow))
            or (is_special and selection.skip_special)
            or (selection.every > 1 and number % selection.every)
            or (selection.pattern and not re.search(selection.pattern, FakeModel().token_texts([token])[0]))
        ):
            continue
        kept.append(row)
    return np.array(kept, int)


@pytest.mark.parametrize(
    ("selection", "bos"),
    [*((selection, BOS) for selection in SELECTIONS), *((selection, None) for selection in SELECTIONS[2:4])],
    ids=str,
)
def test_the_store_holds_the_chosen_rows_of_the_whole(
    text: TextSource, tmp_path: Path, selection: RowSelection, bos: int | None
) -> None:
    model = FakeModel(bos_token_id=bos)
    whole = run(text, tmp_path / "whole.zarr", model).store
    report = run(text, tmp_path / "s.zarr", model, selection=selection)
    store, kept = report.store, kept_rows(whole, selection)
    assert store.n_rows == report.rows == len(kept)
    for hook in (RESID, Z):
        np.testing.assert_array_equal(store.read(hook, 0, store.n_rows), whole.read_rows(hook, kept))
        np.testing.assert_array_equal(store.norms(hook, 0, store.n_rows), whole.norms(hook, 0, whole.n_rows)[kept])
    rows, every = store.rows(0, store.n_rows), whole.rows(0, whole.n_rows)
    for column in ("token_id", "position", "flags"):
        np.testing.assert_array_equal(getattr(rows, column), getattr(every, column)[kept])
    # Windows: the same ones in the same order, but those without rows, and all of their tokens are known.
    sequences, of_whole = store.sequences(), whole.sequences()
    there = np.unique(every.sequence[kept])
    np.testing.assert_array_equal(np.searchsorted(there, every.sequence[kept]), rows.sequence)
    assert sequences["document_offset"].tolist() == of_whole["document_offset"][there].tolist()
    assert sequences["n_rows"].tolist() == np.unique(every.sequence[kept], return_counts=True)[1].tolist()
    expected = whole.window_tokens(there.tolist())
    for own, tokens in zip(store.window_tokens(sequences["sequence"].tolist()), expected, strict=True):
        np.testing.assert_array_equal(own, tokens)
    titles = whole.documents().set_index("document")["title"]
    of_kept = [titles[of_whole["document"][s]] for s in there]
    assert store.documents()["title"].tolist() == list(dict.fromkeys(of_kept))
    assert store.documents()["n_tokens"].sum() == ((rows.flags & RowFlag.BOS) == 0).sum()
    assert report.documents + report.empty_documents == 12
    assert store.verify() == []
    assert store.fingerprint != whole.fingerprint
    assert store.info()["selection"] == selection.settings
    assert "rows are" in store._repr_html_()


def test_keeping_all_is_no_selection(text: TextSource, tmp_path: Path) -> None:
    plain = run(text, tmp_path / "a.zarr").store
    assert tree(run(text, tmp_path / "b.zarr", selection=RowSelection()).store.path) == tree(plain.path)
    assert "selection" not in plain.manifest


class Stopping(FakeModel):
    """Fails after some passes."""

    left = 3

    def forward_rows(self, *arguments: Any) -> FakePending:
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("out of memory")
        return super().forward_rows(*arguments)


@pytest.mark.parametrize("selection", [RowSelection(every=3), RowSelection(pattern="b", skip_special=True)], ids=str)
def test_resume_append_and_add_hooks(tmp_path: Path, selection: RowSelection) -> None:
    first, second = (TextSource(write_text(tmp_path / f"t{i}.jsonl", 24, seed=i)) for i in range(2))
    settings: dict[str, Any] = {"selection": selection, "max_tokens": 150}
    expected = run(first, tmp_path / "whole.zarr", **settings).store
    out = tmp_path / "s.zarr"
    with pytest.raises(RuntimeError, match="out of memory"):
        run(first, out, Stopping(), **settings)
    assert ActivationStore.open(out).n_rows < 150
    run(first, out, **settings)
    assert tree(out) == tree(expected.path)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(second, out, Stopping(), append=True, max_tokens=100)
    run(second, out, append=True, max_tokens=100)
    run(second, expected.path, append=True, max_tokens=100)
    assert tree(out) == tree(expected.path)
    store = run(None, out, hooks=["blocks.0.hook_resid_post"]).store
    alone = run(second, tmp_path / "alone.zarr", hooks=store.hooks, selection=selection, max_tokens=100).store
    assert store.n_rows == 250
    for hook in store.hooks:
        np.testing.assert_array_equal(store.read(hook, 150, 250), alone.read(hook, 0, 100))
    numbers = store.sequences()["sequence"].tolist()
    assert numbers == list(range(len(numbers)))
    new = alone.window_tokens(range(len(alone.sequences())))
    for own, other in zip(store.window_tokens(numbers)[-len(new) :], new, strict=True):
        np.testing.assert_array_equal(own, other)
    assert store.verify() == []


def test_nothing_after_the_last_row_of_a_window_is_run(text: TextSource, tmp_path: Path) -> None:
    model = FakeModel()
    report = run(text, tmp_path / "s.zarr", model, selection=RowSelection(every=100))
    assert report.rows > 20
    assert sum(tokens for _, tokens in model.calls) == 2 * report.rows  # each window's BOS and first token


def refused(out: Path, error: type[Exception], match: str, *arguments: Any, **settings: Any) -> None:
    before = tree(out) if out.exists() else None
    with pytest.raises(error, match=match):
        run(*arguments, **settings)
    assert (tree(out) if out.exists() else None) == before


def test_what_is_refused_writes_nothing(text: TextSource, tmp_path: Path) -> None:
    out = tmp_path / "s.zarr"
    for error, match, wrong in [
        (InvalidInputError, "every is 0", {"every": 0}),
        (UnknownNameError, "Did you mean document", {"every_in": "documents"}),
        (InvalidInputError, r"'\(' is no regular expression", {"pattern": "("}),
        (UnknownNameError, "Did you mean assistant", {"roles": ("assistent",)}),
    ]:
        with pytest.raises(error, match=match):
            RowSelection(**wrong)  # type: ignore[arg-type]
    refused(out, InvalidInputError, "No token of text.jsonl is chosen", text, out, selection=RowSelection(pattern="q"))
    refused(out, InvalidInputError, "the text is no chats", text, out, selection=RowSelection(roles=("user",)))
    refused(out, InvalidInputError, "the text is no chats", text, out, chat_template="x")
    run(text, out, selection=RowSelection(every=2))
    refused(out, MismatchError, "another selection: it is None", text, out)
    refused(out, MismatchError, "another selection: .*every is 3", text, out, selection=RowSelection(every=3))
    refused(out, MismatchError, "another selection", None, out, selection=RowSelection(every=3))
    other = TextSource(write_text(tmp_path / "other.jsonl", seed=1))
    refused(out, MismatchError, "another selection", other, out, selection=RowSelection(every=3), append=True)
    run(None, out, hooks=["blocks.0.hook_resid_post"], selection=RowSelection(every=2))


# ---- the plan by itself


class Documents:
    """A text source of given texts."""

    def __init__(self, texts: list[str]) -> None:
        self.all = [Document(text, title=f"title {i}") for i, text in enumerate(texts)]

    def documents(self, start: int = 0) -> Any:
        return iter(self.all[start:])


def listed(group: PlannedGroup, table: str, column: str) -> list[Any]:
    """A column of a planned group's table, arrays as lists."""
    return [
        value.tolist() if isinstance(value, np.ndarray) else value for value in getattr(group, table).get(column, ())
    ]


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    texts=st.lists(st.text(alphabet="abc \x00", max_size=30), max_size=10),
    selection=st.sampled_from(
        [
            RowSelection(pattern="a"),
            RowSelection(every=3),
            RowSelection(every=4, every_in="document"),
            RowSelection(True),
        ]
    ),
    context=st.integers(2, 9),
    rows_per_group=st.sampled_from([1, 2, 4, 16]),
    max_tokens=st.none() | st.integers(1, 40),
)
def test_plans_go_on_from_any_group(
    data: st.DataObject,
    texts: list[str],
    selection: RowSelection,
    context: int,
    rows_per_group: int,
    max_tokens: int | None,
) -> None:
    model = FakeModel()
    choosing = choosing_for(model, selection, None)

    def plan(state: PlanState = PlanState(), size: int = rows_per_group) -> list[PlannedGroup]:  # noqa: B008
        windowing = Windowing(context, BOS, frozenset({BOS}), size, max_tokens)
        source: Any = Documents(texts)
        return list(plan_groups(source, model.encode_documents, windowing, state, choosing=choosing))

    groups, whole = plan(), plan(size=1 << 16)
    if not whole:
        assert not groups
        return
    assert groups[-1].state == whole[-1].state
    for column, values in whole[0].columns.items():
        np.testing.assert_array_equal(np.concatenate([group.columns[column] for group in groups]), values)
    for table in ("sequences", "documents", "windows"):
        for name in getattr(whole[0], table):
            assert list(itertools.chain(*(listed(group, table, name) for group in groups))) == listed(
                whole[0], table, name
            )
    windows = dict(zip(whole[0].windows["sequence"], whole[0].windows["tokens"], strict=True))
    columns = whole[0].columns
    for token, sequence, position in zip(columns["token_id"], columns["sequence"], columns["position"], strict=True):
        assert windows[int(sequence)][int(position)] == token
    if len(groups) > 1:
        index = data.draw(st.integers(0, len(groups) - 2))
        rest = plan(groups[index].state)
        for again, before in zip(rest, groups[index + 1 :], strict=True):
            assert (again.state, again.sequences, again.documents) == (before.state, before.sequences, before.documents)
            assert all(listed(again, "windows", name) == listed(before, "windows", name) for name in before.windows)
            assert all((again.columns[name] == before.columns[name]).all() for name in before.columns)
    # Batches hold each row of a group once, at its place in its window.
    for group in groups:
        numbers = np.unique(group.columns["sequence"])
        tokens = [np.array(windows[int(number)], np.int32) for number in numbers]
        parts = chosen_windows(tokens, group.columns["sequence"], group.columns["position"], 0)
        seen = np.full(group.row_stop - group.row_start, -1)
        for batch in pack_batches(parts, 12):
            kept = np.concatenate(batch.windows)
            seen[batch.rows] = kept if batch.kept is None else kept[batch.kept]
        np.testing.assert_array_equal(seen, group.columns["token_id"])


# ---- chats


CHATS = [
    [("system", "be kind"), ("user", "hi"), ("assistant", "hello ~ there")],
    [("user", "a long question with many words in it"), ("assistant", "no"), ("critic", "hm"), ("user", "ok")],
    [("assistant", "just me")],
    [],
]


def write_chats(path: Path) -> Path:
    rows = [
        {"messages": [{"role": role, "content": said} for role, said in chat], "title": f"chat {n}", "score": n}
        for n, chat in enumerate(CHATS)
    ]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def spoken(store: ActivationStore, role: str) -> str:
    """What the tokens of a role say, `|` for the end of a turn."""
    token_ids = store.rows(0, store.n_rows).token_id[store.column("role", 0, store.n_rows) == ROLES.index(role)]
    return "".join("|" if token == 1 else chr(token - 3) for token in token_ids.tolist() if token != BOS)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_chats_have_roles(tmp_path: Path, suffix: str) -> None:
    chats = TextSource(write_chats(tmp_path / f"chats.{suffix}"), messages_column="messages")
    report = run(chats, tmp_path / "s.zarr")
    store = report.store
    assert (report.documents, report.empty_documents) == (3, 1)
    assert spoken(store, "assistant") == "hello ~ there|no|just me|"
    assert spoken(store, "user") == "hi|a long question with many words in it|ok|"
    assert spoken(store, "system") == "be kind|"
    assert spoken(store, "other") == "hm|"
    heads = [f"<{role}>" for role, _ in itertools.chain(*CHATS)]
    assert spoken(store, "none") == "".join(heads)
    assert store.manifest["chats"] == {"template": "fake", "roles": list(ROLES), "kinds": list(CONTENT_KINDS)}
    assert store.documents()["title"].tolist() == ["chat 0", "chat 1", "chat 2"]
    assert store.verify() == []
    other = run(chats, tmp_path / "t.zarr", chat_template="another").store
    assert other.fingerprint != store.fingerprint
    export_store(store, tmp_path / "out", "npy", [RESID])
    (path,) = (tmp_path / "out" / "data" / "role").iterdir()
    np.testing.assert_array_equal(np.load(path), store.column("role", 0, store.n_rows))


def test_only_the_assistants_turns(tmp_path: Path) -> None:
    chats = TextSource(write_chats(tmp_path / "chats.jsonl"), messages_column="messages")
    whole = run(chats, tmp_path / "whole.zarr").store
    store = run(chats, tmp_path / "s.zarr", selection=RowSelection(roles=("assistant",))).store
    kept = np.flatnonzero(whole.column("role", 0, whole.n_rows) == ROLES.index("assistant"))
    assert spoken(store, "assistant") == "hello ~ there|no|just me|"
    assert store.n_rows == len(kept)
    np.testing.assert_array_equal(store.read(Z, 0, store.n_rows), whole.read_rows(Z, kept))
    export_store(store, tmp_path / "out", "safetensors")
    windows = pq.read_table(tmp_path / "out" / "windows.parquet").to_pydict()
    assert windows["sequence"] == store.sequences()["sequence"].tolist()
    assert windows["tokens"] == [tokens.tolist() for tokens in store.window_tokens(windows["sequence"])]
    assert list(map(len, windows["tokens"])) == list(map(len, windows["roles"]))
    (tmp_path / "more.jsonl").write_text((tmp_path / "chats.jsonl").read_text().replace("just me", "me again"))
    more = TextSource(tmp_path / "more.jsonl", messages_column="messages")
    grown = run(more, store.path, append=True).store
    assert spoken(grown, "assistant") == "hello ~ there|no|just me|hello ~ there|no|me again|"
    assert grown.verify() == []
    plain = TextSource(write_text(tmp_path / "plain.jsonl"))
    refused(store.path, MismatchError, "holds chats", plain, store.path, append=True)
    refused(tmp_path / "p.zarr", InvalidInputError, "no chats", plain, tmp_path / "p.zarr", chat_template="x")
    run(plain, tmp_path / "p.zarr")
    refused(tmp_path / "p.zarr", MismatchError, "holds plain text", more, tmp_path / "p.zarr", append=True)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ('{"messages": "hi"}', "line 1: 'messages' holds str; expected a list of messages"),
        ('{"messages": [{"role": "user"}]}', "line 1: expected messages with role and content"),
        (
            '{"messages": [{"role": "user", "content": 3}]}',
            "line 1: expected a message whose role and content are text",
        ),
        ('{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "role and content are text"),
        ('{"chat": []}', "no text column 'messages'"),
    ],
)
def test_messages_that_are_none(tmp_path: Path, content: str, match: str) -> None:
    (tmp_path / "chats.jsonl").write_text(content + "\n")
    with pytest.raises(InvalidInputError, match=match):
        TextSource(tmp_path / "chats.jsonl", messages_column="messages").check()


def test_messages_in_other_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hi")
    with pytest.raises(InvalidInputError, match="plain text; chats are read from parquet and jsonl"):
        TextSource(tmp_path / "a.txt", messages_column="messages").check()
    pq.write_table(pa.table({"messages": ["hi"]}), tmp_path / "a.parquet")
    with pytest.raises(InvalidInputError, match="holds string; expected lists of messages"):
        TextSource(tmp_path / "a.parquet", messages_column="messages").check()
    (tmp_path / "b.jsonl").write_text(
        '{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]}\n'
    )
    (document,) = TextSource(tmp_path / "b.jsonl", messages_column="messages").documents()
    assert document.messages == (Message("user", "ab"),)


def test_a_model_without_a_chat_template(tmp_path: Path) -> None:
    class Silent(FakeModel):
        chat_template = None  # type: ignore[assignment]

    chats = TextSource(write_chats(tmp_path / "chats.jsonl"), messages_column="messages")
    refused(tmp_path / "s.zarr", InvalidInputError, "has no chat template", chats, tmp_path / "s.zarr", Silent())
    assert run(chats, tmp_path / "s.zarr", Silent(), chat_template="mine").rows > 0
