"""Chats: whose turn a token belongs to, against what transformers says of templates that are marked for it."""

from typing import Any

import helpers_models
import numpy as np
import pytest
from transformers import AutoTokenizer

from activations.source import ROLES, Message
from scope.errors import InvalidInputError
from scope.models.chats import encode_chats, own_template

MARKED = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content | trim }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}"
    "\n{% endfor %}"
)
CHATS = [
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
            [message._asdict() for message in chat],
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
    (encoded,) = model.encode_chats([[Message("user", " the cat "), Message("assistant", "sat on")]], GEMMA)
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
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "changes what messages say"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "changes what messages say"),
        ("{{ messages[0].content }}", "changes what messages say"),
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
