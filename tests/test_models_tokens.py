"""Tokens as people read them: spaces kept, characters whole, shares of characters told."""

import helpers_chats
import numpy as np
import pytest
import torch
from helpers_models import KINDS, WRONG_TYPE, real_model, tiny_folder, tiny_model
from helpers_models import one_thread as one_thread

from activations.chats import chat_from
from scope.errors import InvalidInputError, OutOfRangeError
from scope.models import LanguageModel, TokenText
from scope.models.tokens import TokenReader, reader_of

TEXTS = [
    "The cat sat on  the mat.",
    "Le café était fermé à midi.",
    "日本 🙂 \n\ttabs and   spaces",
    " leading, trailing ",
    "<0x41> is no byte, <script> no markup",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_of_a_text_join_to_the_text(kind: str, text: str) -> None:
    model = tiny_model(kind)
    ids = model.tokenize(text)
    tokens = model.token_strings(ids)
    assert [token.id for token in tokens] == ids.tolist()
    assert tokens[0].special
    assert not any(token.special for token in tokens[1:])
    assert "".join(token.new_text for token in tokens[1:]) == text


def test_tokens_read_the_same_without_the_weights() -> None:
    model = tiny_model("gemma3")
    ids = [*sorted(model.special_token_ids), *model.tokenize(TEXTS[1]).tolist()]
    reader = reader_of(str(tiny_folder("gemma3")), expected_hash=model.identity.tokenizer_hash)
    assert reader.token_strings(ids) == model.token_strings(ids)
    assert reader.vocabulary_strings(ids) == model.vocabulary_strings(ids)


def test_a_token_that_is_part_of_a_character_shows_the_character_and_its_share() -> None:
    for kind in ("gemma3", "gpt2"):
        model = tiny_model(kind)
        first, second = (token for token in model.token_strings(model.tokenize("é", prepend_bos=False)) if token.part)
        assert (first.text, first.part, first.new_text) == ("é", (1, 2), "é")
        assert (second.text, second.part, second.new_text) == ("é", (2, 2), "")
        assert (first.display, second.display) == ("é ¹⁄₂", "é ²⁄₂")


class _OddTokenizer:
    """A byte-level vocabulary whose tokens cut through characters, as real ones do."""

    pieces = ("Ġâ", "ĢĻ", "s", "Ã")  # " \xe2", "\x80\x99", "s", "\xc3"
    added_tokens_decoder: dict[int, object] = {}  # noqa: RUF012

    class backend_tokenizer:  # noqa: N801
        decoder = "ByteLevel()"

    def __len__(self) -> int:
        return len(self.pieces)

    def convert_ids_to_tokens(self, token: int) -> str:
        return self.pieces[token]


def test_a_token_may_hold_a_whole_character_and_a_part_of_the_next() -> None:
    reader = TokenReader(_OddTokenizer(), frozenset())
    assert reader.token_strings([0, 1, 2]) == [
        TokenText(0, " ’", " ’", (1, 2), False),
        TokenText(1, "’", "", (2, 2), False),
        TokenText(2, "s", "s", None, False),
    ]
    assert reader.token_strings([3, 2])[0] == TokenText(3, "<0xC3>", "<0xC3>", None, False)
    assert reader.vocabulary_strings([0, 1, 2]) == [" <0xE2>", "<0x80><0x99>", "s"]


def test_vocabulary_strings_need_no_context() -> None:
    model = tiny_model("gemma3")
    (the,) = model.tokenizer.convert_tokens_to_ids(["▁the"])
    (byte,) = model.tokenizer.convert_tokens_to_ids(["<0xE2>"])
    assert model.vocabulary_strings([2, the, byte]) == ["<bos>", " the", "<0xE2>"]
    (the,) = tiny_model("gpt2").tokenizer.convert_tokens_to_ids(["Ġthe"])
    assert tiny_model("gpt2").vocabulary_strings([the]) == [" the"]


def test_rows_that_pad_an_embedding_read_as_their_ids() -> None:
    tokenizer = tiny_model("gemma3").tokenizer
    reader = TokenReader(tokenizer, frozenset(), len(tokenizer) + 8)
    padding = len(tokenizer) + 3
    assert reader.vocabulary_strings([padding]) == [f"<{padding}>"]
    assert [token.text for token in reader.token_strings([5, padding])][1] == f"<{padding}>"


@pytest.mark.parametrize("token", [-1, 10_000])
def test_an_id_out_of_range_is_refused(token: int) -> None:
    model = tiny_model("gemma3")
    for use in (model.token_strings, model.vocabulary_strings, model.run):
        with pytest.raises(OutOfRangeError, match=str(token)):
            use([token, 5])


def test_bos_is_put_in_front_once_and_only_where_there_is_one() -> None:
    model = tiny_model("gemma3")
    ids = model.tokenize("The cat")
    assert ids[0] == 2
    assert torch.equal(model.tokenize("<bos>The cat"), ids)
    assert torch.equal(model.tokenize("The cat", prepend_bos=False), ids[1:])
    (document,) = model.encode_documents(["The cat"])
    assert document.dtype == np.int32
    assert document.tolist() == ids[1:].tolist()
    assert 2 in model.special_token_ids
    qwen = tiny_model("qwen2")
    assert qwen.bos_token_id is None
    assert torch.equal(qwen.tokenize("The cat"), qwen.tokenize("The cat", prepend_bos=False))
    assert not qwen.bos_mask(qwen.tokenize("The cat")[None]).any()


@pytest.mark.parametrize(
    "prompt", ["", [], torch.empty(0, dtype=torch.long), torch.ones(2, 3, dtype=torch.long), torch.ones(3), [[1], [2]]]
)
def test_what_is_no_prompt_is_refused(prompt: object) -> None:
    with pytest.raises(WRONG_TYPE):
        tiny_model("gemma3").run(prompt)  # type: ignore[arg-type]


def test_a_prompt_longer_than_the_context_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="takes 64"):
        tiny_model("gemma3").run("the cat " * 100)
    assert tiny_model("gemma3").run(torch.arange(4, 68)).logits is not None


def test_chat_messages_go_through_the_chat_template() -> None:
    model = tiny_model("gemma3")
    messages = [{"role": "user", "content": "The cat"}]
    with pytest.raises(InvalidInputError, match="no chat template"):
        model.run(messages)
    fresh = LanguageModel(model.hf, model.files)
    fresh.tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    assert torch.equal(fresh.prompt_tokens(messages), model.tokenize("user: The cat\n"))


def test_a_template_of_ones_own_writes_chat_messages() -> None:
    model = tiny_model("gemma3")
    messages = [{"role": "system", "content": "Hm."}, {"role": "user", "content": "cat"}]
    expected = model.tokenizer.apply_chat_template(
        messages, chat_template=helpers_chats.FOLDED, add_generation_prompt=True, tokenize=True
    )["input_ids"]
    run = model.run(messages, chat_template=helpers_chats.FOLDED, logits="last")
    assert run.tokens.tolist() == list(expected)
    generated = model.generate(messages, 2, chat_template=helpers_chats.FOLDED)
    assert generated.tokens[: len(expected)].tolist() == list(expected)
    streamed = list(model.stream(messages, 2, chat_template=helpers_chats.FOLDED))
    assert [token.token_id for token in streamed] == generated.tokens[len(expected) :].tolist()
    with pytest.raises(InvalidInputError, match=r"begins with 'Hm\.'"):
        model.run(messages, chat_template="{{ raise_exception('no system') }}")
    for prompt in ("The cat", [2, 5]):
        with pytest.raises(InvalidInputError, match="no list of chat messages"):
            model.run(prompt, chat_template=helpers_chats.FOLDED)
    # What a capture reads is what a run reads, also where a template writes the day.
    dated = "{{ strftime_now('%d %b') }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    (captured,) = model.encode_chats([chat_from(messages)], dated)
    assert model.prompt_tokens(messages, dated).tolist()[1:] == captured.token_id.tolist()


@pytest.mark.real
def test_the_real_tokenizers_tokens_join_to_the_text() -> None:
    model = real_model()
    for text in [*TEXTS, "𓀀𓂀 hieroglyphs", "<table>\n\n\n  code"]:
        tokens = model.token_strings(model.tokenize(text))
        assert "".join(token.new_text for token in tokens[1:]) == text
    parts = [token.part for token in model.token_strings(model.tokenize("𓀀", prepend_bos=False))]
    assert parts == [(1, 4), (2, 4), (3, 4), (4, 4)]
    every_tenth = model.vocabulary_strings(range(0, model.d_vocab, 10))
    assert all(every_tenth)
    assert not any("▁" in text for text in every_tenth)
