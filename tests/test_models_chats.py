"""Chats: whose turn a token belongs to, against what transformers says of templates that are marked for it."""

import json
from typing import Any

import helpers_chats
import helpers_models
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from activations.chats import CONTENT_KINDS, ROLES, Chat, Message, chat_from
from scope.errors import InvalidInputError
from scope.models.chats import encode_chats, own_template

MARKED = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content | trim }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}"
    "\n{% endfor %}"
)
SAID = [
    [Message("user", "user"), Message("assistant", "the cat sat on the user")],
    [
        Message("system", "She thinks\nthat the river is deep"),
        Message("user", "Le café était fermé? 日本"),
        Message("assistant", "  no: it is é 日本 not \n"),
        Message("user", "<|im_end|> is what I say"),
        Message("assistant", "user"),
        Message("tool", "42"),
        Message("assistant", "assistant"),
    ],
    [Message("critic", "hm"), Message("user", ""), Message("assistant", "In 1905 the old mill burned down")],
]
CHATS = [Chat(tuple(messages)) for messages in SAID]


@pytest.fixture(scope="module", params=["gemma3", "llama", "qwen2"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(helpers_models.tiny_folder(request.param))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


def special_ids(tokenizer: Any) -> frozenset[int]:
    return frozenset(tokenizer.all_special_ids)


def said(tokenizer: Any, encoded: Any, role: str) -> str:
    return tokenizer.decode(encoded.token_id[encoded.role == ROLES.index(role)])


def test_the_assistants_turns_are_those_of_transformers(tokenizer: Any) -> None:
    encoded = encode_chats(tokenizer, special_ids(tokenizer), CHATS, MARKED)
    for chat, own in zip(CHATS, encoded, strict=True):
        reference = tokenizer.apply_chat_template(
            [message.as_dict for message in chat.messages],
            chat_template=MARKED,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        ids, mask = np.array(reference["input_ids"]), np.array(reference["assistant_masks"])
        n_bos = int(ids[0] == tokenizer.bos_token_id)
        np.testing.assert_array_equal(own.token_id, ids[n_bos:])
        np.testing.assert_array_equal(own.role == ROLES.index("assistant"), mask[n_bos:] == 1)
        assert mask.any()
        assert own.token_id.dtype == np.int32
        assert own.role.dtype == np.uint8


def test_every_role_by_hand(tokenizer: Any) -> None:
    _, encoded, other = encode_chats(tokenizer, special_ids(tokenizer), CHATS, MARKED)
    assert said(tokenizer, encoded, "system") == "She thinks\nthat the river is deep<|im_end|>"
    assert said(tokenizer, encoded, "tool") == "42<|im_end|>"
    assert said(tokenizer, encoded, "assistant") == "no: it is é 日本 not<|im_end|>user<|im_end|>assistant<|im_end|>"
    assert said(tokenizer, encoded, "none").count("<|im_start|>") == 7
    assert said(tokenizer, other, "other") == "hm<|im_end|>"
    assert said(tokenizer, other, "user") == ""


GEMMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
)


def test_markup_that_is_no_special_token_belongs_to_nobody() -> None:
    model = helpers_models.tiny_model("gemma3")
    (encoded,) = model.encode_chats([Chat((Message("user", " the cat "), Message("assistant", "sat on")))], GEMMA)
    texts = model.token_texts(encoded.token_id.tolist())
    spoken = {role: "".join(np.array(texts)[encoded.role == code]) for code, role in enumerate(ROLES)}
    assert spoken["user"].strip() == "the cat"
    assert spoken["assistant"].strip() == "sat on"
    assert "end_of_turn" in spoken["none"]
    assert encoded.token_id[0] != model.bos_token_id


def test_chats_are_written_alike_on_any_day(tokenizer: Any) -> None:
    dated = "{{ strftime_now('%Y') }}" + MARKED
    encoded = encode_chats(tokenizer, special_ids(tokenizer), CHATS[:1], dated)
    assert said(tokenizer, encoded[0], "none").startswith("2000")


@pytest.mark.parametrize(
    ("template", "match"),
    [
        ("{% for m in messages %}{{ m.content[:3] }}{% endfor %}", "changes what messages say"),
        ("{% for m in messages %}{{ m.content }} ({{ m.content | length }}){% endfor %}", "changes what messages say"),
        ("{% for m in messages %}{{ m.content | urlencode }}{% endfor %}", "changes what messages say"),
        ("{{ raise_exception('no system turns') }}", "fails on the chat that begins with 'user'.*no system turns"),
        ("{% for %}", "fails on the chat"),
    ],
)
def test_templates_that_do_not_let_roles_be_told(tokenizer: Any, template: str, match: str) -> None:
    with pytest.raises(InvalidInputError, match=match):
        encode_chats(tokenizer, special_ids(tokenizer), CHATS[:1], template)


def test_the_own_template_of_a_tokenizer(tokenizer: Any) -> None:
    class Several:
        chat_template = {"default": "a", "tool_use": "b"}  # noqa: RUF012

    assert own_template(tokenizer) is None
    assert own_template(Several()) == "a"
    assert helpers_models.tiny_model("llama").chat_template is None


# ---- tools


@pytest.fixture(scope="module")
def characters() -> Any:
    return helpers_chats.character_tokenizer()


def runs_of(tokenizer: Any, chat: Chat, template: str, answer: bool = False) -> list[tuple[str, str, int, str]]:
    """Kind, role, message and text of each stretch that has these in common."""
    (encoded,) = encode_chats(tokenizer, special_ids(tokenizer), [chat], template, answer)
    parts: list[list[Any]] = []
    for token, *codes in zip(*encoded[:1], encoded.kind, encoded.role, encoded.message, strict=True):
        text = tokenizer.convert_ids_to_tokens(int(token))
        if parts and parts[-1][0] == codes:
            parts[-1][1] += text
        else:
            parts.append([codes, text])
    return [(CONTENT_KINDS[kind], ROLES[role], int(message), text) for (kind, role, message), text in parts]


def of_kind(runs: list[tuple[str, str, int, str]], *kinds: str) -> list[tuple[str, int, str]]:
    return [(role, message, text) for kind, role, message, text in runs if kind in kinds]


CALLS = {
    "blocks": '{"name": "get_weather", "arguments": {"place": "\\"Old Town\\"", "days": 1}}',
    "headed": '{"name": "get_weather", "parameters": {"place": "\\"Old Town\\"", "days": 1}}',
    "listed": '{"name": "get_weather", "arguments": {"place": "\\"Old Town\\"", "days": 1}}',
    "pythonic": 'get_weather(place="\\"Old Town\\"", days=1)',
    "tagged": '<function=get_weather>\n<parameter=place>\n"Old Town"\n</parameter>\n<parameter=days>\n1\n</parameter>\n'
    "</function>",
}


@pytest.mark.parametrize("name", helpers_chats.WITH_TOOLS)
def test_calls_answers_and_definitions_by_hand(characters: Any, name: str) -> None:
    chat, first = helpers_chats.weather_chat(), 1
    if name == "listed":  # no system's turns
        chat, first = chat._replace(messages=chat.messages[1:]), 0
    runs = runs_of(characters, chat, helpers_chats.TEMPLATES[name])
    assert of_kind(runs, "tool_call") == [("assistant", first + 1, CALLS[name])]
    (answer,) = of_kind(runs, "tool_response")
    assert (answer[0], answer[1], answer[2].replace("\\", "")) == ("tool", first + 2, '{"sky": "grey", "wind": 3}')
    said = of_kind(runs, "text")
    asked = ("user", first, 'How is the weather in "Old Town" {today}?')
    assert said == [*[("system", 0, "Be brief.")] * first, asked, ("assistant", first + 3, "It is grey.")]
    defined = of_kind(runs, "tool_definition")
    if name in ("pythonic", "tagged"):  # which write none
        assert defined == []
    else:
        assert [json.loads(text) for _, _, text in defined] == list(helpers_chats.TOOLS)
        assert {(role, message) for role, message, _ in defined} == {("none", -1)}
    closing = [text for kind, role, _, text in runs if kind == "markup" and role == "assistant"]
    assert closing[-1].endswith("</s>" if name == "listed" else "<|im_end|>")
    written = "".join(text for *_, text in runs)
    assert written == characters.apply_chat_template(
        [message.as_dict for message in chat.messages],
        tools=list(chat.tools),
        chat_template=helpers_chats.TEMPLATES[name],
        tokenize=False,
    ).removeprefix("<s>")


def test_the_systems_words_are_the_systems_where_they_stand_in_the_users_turn(characters: Any) -> None:
    chat = Chat((Message("system", "Be brief."), Message("user", " Hi \n"), Message("assistant", "Be brief.")))
    runs = runs_of(characters, chat, helpers_chats.FOLDED)
    assert of_kind(runs, "text") == [("system", 0, "Be brief."), ("user", 1, "Hi"), ("assistant", 2, "Be brief.")]
    assert of_kind(runs, "markup")[0] == ("none", -1, "<start_of_turn>user\n")
    asked = runs_of(characters, Chat(chat.messages[:2]), helpers_chats.FOLDED, answer=True)
    assert asked[-1] == ("markup", "none", -1, "\n<start_of_turn>model\n")


def test_reasoning(characters: Any) -> None:
    field = chat_from(
        [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4", "reasoning_content": "Two and two"}]
    )
    runs = runs_of(characters, field, helpers_chats.BLOCKS)
    assert of_kind(runs, "reasoning") == [("assistant", 1, "Two and two")]
    assert of_kind(runs, "text") == [("user", 0, "2+2"), ("assistant", 1, "4")]
    assert ("markup", "assistant", 1, "<think>\n") in runs
    # A template that cuts contents at a tag: of the earlier turn it drops the thought, of the last it keeps it.
    thought = "<think>\nHm\n</think>\n\nFour"
    inside = Chat(
        (Message("user", "2+2"), Message("assistant", thought), Message("user", "?"), Message("assistant", thought))
    )
    said = of_kind(runs_of(characters, inside, helpers_chats.BLOCKS), "text")
    assert said == [("user", 0, "2+2"), ("assistant", 1, "Four"), ("user", 2, "?"), ("assistant", 3, thought)]


def test_several_calls_beside_words_and_answers_in_one_turn(characters: Any) -> None:
    calls = [helpers_chats.called("clock"), helpers_chats.called("get_weather", place="</tool_call>", ok=True)]
    chat = chat_from(
        [
            {"role": "user", "content": "<tool_response>no</tool_response>"},
            {"role": "assistant", "content": "Let me see.", "tool_calls": calls},
            {"role": "tool", "content": [1, 2]},
            {"role": "tool", "content": "grey"},
            {"role": "assistant", "content": "Grey."},
        ]
    )
    runs = runs_of(characters, chat, helpers_chats.BLOCKS)
    first, second = of_kind(runs, "tool_call")
    assert [json.loads(text)["name"] for _, _, text in (first, second)] == ["clock", "get_weather"]
    assert json.loads(second[2])["arguments"] == {"place": "</tool_call>", "ok": True}
    assert of_kind(runs, "tool_response") == [("tool", 2, "[1, 2]"), ("tool", 3, "grey")]
    assert of_kind(runs, "text")[0] == ("user", 0, "<tool_response>no</tool_response>")
    turn = "".join(text for _, _, message, text in runs if message == 1)
    assert turn.startswith("Let me see.\n<tool_call>")
    assert turn.endswith("</tool_call><|im_end|>")
    listed = of_kind(runs_of(characters, chat, helpers_chats.LISTED), "tool_call")
    assert [json.loads(text)["name"] for *_, text in listed] == ["clock", "get_weather"]


WORDS = st.text(st.sampled_from('ab {}[]()"\\<>/:.\n\té日'), max_size=12)
VALUES = st.recursive(
    WORDS | st.integers(-9, 99) | st.booleans() | st.none(), lambda inner: st.lists(inner, max_size=2)
)
NAMES = st.sampled_from(["f", "get_weather", "look.up"])
ANSWERS = st.lists(
    st.builds(lambda name, arguments: helpers_chats.called(name, **arguments), NAMES, st.dictionaries(NAMES, VALUES)),
    max_size=2,
)


@st.composite
def conversations(draw: Any) -> Chat:
    messages = [{"role": "user", "content": draw(WORDS)}]
    for _ in range(draw(st.integers(0, 3))):
        calls = draw(ANSWERS)
        messages.append({"role": "assistant", "content": draw(WORDS), **({"tool_calls": calls} if calls else {})})
        messages += [{"role": "tool", "content": draw(WORDS)} for _ in calls]
        messages.append({"role": "user", "content": draw(WORDS)})
    return chat_from({"messages": messages, "tools": draw(st.sampled_from([[], list(helpers_chats.TOOLS)]))})


@settings(max_examples=30, deadline=None)
@given(conversations(), st.sampled_from(["blocks", "listed", "pythonic", "tagged"]), st.booleans())
def test_tokens_are_those_of_the_template_and_each_is_accounted_for(chat: Chat, name: str, answer: bool) -> None:
    tokenizer, template = helpers_chats.character_tokenizer(), helpers_chats.TEMPLATES[name]
    (encoded,) = encode_chats(tokenizer, special_ids(tokenizer), [chat], template, answer)
    reference = tokenizer.apply_chat_template(
        [message.as_dict for message in chat.messages],
        tools=list(chat.tools) or None,
        chat_template=template,
        add_generation_prompt=answer,
        tokenize=True,
        return_dict=False,
    )
    assert encoded.token_id.tolist() == reference[reference[:1] == [tokenizer.bos_token_id] :]
    for number, message in enumerate(chat.messages):
        own = encoded.message == number
        assert set(encoded.role[own].tolist()) <= {ROLES.index(message.role)}
        spoken = "tool_response" if message.role == "tool" else "text"
        said = encoded.token_id[own & (encoded.kind == CONTENT_KINDS.index(spoken))].tolist()
        if name != "listed" or message.role != "assistant":
            assert "".join(tokenizer.convert_ids_to_tokens(said)) == message.content.strip()
        called = "".join(
            tokenizer.convert_ids_to_tokens(
                encoded.token_id[own & (encoded.kind == CONTENT_KINDS.index("tool_call"))].tolist()
            )
        )
        if name in ("blocks", "listed"):
            wanted = "".join(json.dumps(call["function"], ensure_ascii=False) for call in message.tool_calls)
            assert called == wanted
    assert (encoded.role[encoded.message < 0] == 0).all()
    assert (encoded.role[encoded.message >= 0] > 0).all()


def test_the_assistants_turns_with_calls_are_those_of_transformers(tokenizer: Any) -> None:
    for number in (0, 1, 2):
        chat = helpers_chats.weather_chat()
        chat = chat._replace(messages=chat.messages[: 3 + number], tools=chat.tools[:number])
        (own,) = encode_chats(tokenizer, special_ids(tokenizer), [chat], helpers_chats.BLOCKS)
        reference = tokenizer.apply_chat_template(
            [message.as_dict for message in chat.messages],
            tools=list(chat.tools) or None,
            chat_template=helpers_chats.BLOCKS,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        np.testing.assert_array_equal(own.token_id, reference["input_ids"])
        np.testing.assert_array_equal(own.role == ROLES.index("assistant"), np.array(reference["assistant_masks"]) == 1)


@pytest.mark.real
def test_the_real_tokenizer_reads_what_its_template_would_be() -> None:
    model = helpers_models.real_model()
    assert model.chat_template is None  # a base model's
    chat = Chat(
        (Message("system", "Be brief."), Message("user", "東京は? 𓀀"), Message("assistant", "日本の首都です。"))
    )
    (encoded,) = model.encode_chats([chat], helpers_chats.FOLDED)
    reference = model.tokenizer.apply_chat_template(
        [message.as_dict for message in chat.messages],
        chat_template=helpers_chats.FOLDED,
        tokenize=True,
        return_dict=False,
    )
    assert [model.bos_token_id, *encoded.token_id.tolist()] == reference
    for number, message in enumerate(chat.messages):
        own = (encoded.message == number) & (encoded.kind == CONTENT_KINDS.index("text"))
        assert model.tokenizer.decode(encoded.token_id[own]).strip() == message.content
    assert model.tokenizer.decode(encoded.token_id[encoded.role == 0]).count("<start_of_turn>") == 2
