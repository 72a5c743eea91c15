"""Writing from a cache equals running the whole text again, also with interventions, held attention and streaming."""

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers_models import EXPERT_KINDS, KINDS, MORE_KINDS, PER_LAYER_KINDS, one_thread, real_model, tiny_model
from helpers_saes import make

from scope.errors import InvalidInputError, OutOfRangeError
from scope.interventions import ablate, add_direction, combine, patch, project_out, scale, set_features
from scope.models import LanguageModel, attention
from scope.models.edits import Edits
from scope.saes.base import SAEMetadata

__all__ = ["one_thread"]

PROMPT = "The cat sat on the mat and"
HOOK = "blocks.1.hook_resid_post"
MORE = 14
"""New tokens: with the prompt's more than the sliding window of the tiny Gemma, 8."""


def direction(width: int = 32) -> torch.Tensor:
    return 3 * torch.randn(width, generator=torch.Generator().manual_seed(0))


def interventions(model: LanguageModel) -> dict[str, object]:
    sae = make("topk", d_in=model.d_model, metadata=SAEMetadata(hook_name=HOOK))
    other = model.run("The mat sat on the cat and", hooks=[HOOK]).activations[HOOK]
    n = len(model.prompt_tokens(PROMPT))
    return {
        "nothing": None,
        "a direction on all but BOS": combine(add_direction(HOOK, direction(), keep_bos=True)),
        "features": combine(set_features(sae, [3, 7], [5.0, 9.0])),
        "one position of the prompt and one of the new text": combine(scale(HOOK, -2.0, [1, n + 3])),
        "heads and another layer": combine(ablate("blocks.0.attn.hook_z"), project_out(HOOK, direction())),
        "a patch": combine(patch(HOOK, other[:4], [1, 3])),
        "attention as it was": combine(add_direction(HOOK, direction()), freeze_attention=True),
    }


@pytest.mark.parametrize("kind", [*KINDS, *PER_LAYER_KINDS, *EXPERT_KINDS])
def test_a_text_from_a_cache_is_that_of_running_everything_again(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(kind)
    texts = {}
    for name, edits in interventions(model).items():
        widths: list[int] = []
        real = LanguageModel.forward
        monkeypatch.setattr(LanguageModel, "forward", lambda *a, w=widths, r=real: w.append(a[1].shape[1]) or r(*a))
        cached = list(model.stream(PROMPT, MORE, edits))
        monkeypatch.undo()
        assert widths[1:] == [1] * (len(cached) - 1), name
        again = list(model.stream(PROMPT, MORE, edits, cache=False))
        assert [token.token_id for token in cached] == [token.token_id for token in again], name
        found, expected = (torch.tensor([token.log_probability for token in some]) for some in (cached, again))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        texts[name] = [token.log_probability for token in cached]
    if kind in PER_LAYER_KINDS:  # behind HOOK no layer has keys of its own: no later token sees the patched ones
        assert texts.pop("a patch") == texts["nothing"]
    assert len({tuple(text) for text in texts.values()}) == len(texts)


@pytest.mark.parametrize("kind", [*KINDS, *MORE_KINDS])
def test_each_step_is_the_plain_run_of_the_text_so_far(kind: str) -> None:
    model = tiny_model(kind)
    edits = combine(add_direction(HOOK, direction()))
    found = model.generate(PROMPT, MORE, edits)
    logits = model.run(found.tokens, edits=edits).logits
    expected = logits[found.n_prompt - 1 : -1].argmax(-1)
    assert found.tokens[found.n_prompt :].tolist() == expected.tolist()


def test_part_of_a_text_that_is_being_written() -> None:
    model = tiny_model("llama")
    n = len(model.prompt_tokens(PROMPT))

    def changed(during: str) -> torch.Tensor:
        from dataclasses import replace

        return model.generate(PROMPT, 6, combine(replace(add_direction(HOOK, direction()), during=during))).tokens

    tokens = changed("generated")

    def push(value: torch.Tensor, context: object) -> None:
        value[:, n:] += direction()

    assert tokens.tolist() == model.generate(PROMPT, 6, {HOOK: push}).tokens.tolist()
    assert (
        changed("all").tolist() == model.generate(PROMPT, 6, combine(add_direction(HOOK, direction()))).tokens.tolist()
    )

    def push_prompt(value: torch.Tensor, context: object) -> None:
        value[:, :n] += direction()

    assert changed("prompt").tolist() == model.generate(PROMPT, 6, {HOOK: push_prompt}).tokens.tolist()


def test_a_stream_says_the_text_piece_by_piece_and_ends_where_the_text_does() -> None:
    model = tiny_model("gpt2")
    for seed in range(3):
        stream = list(model.stream(PROMPT, 12, temperature=3.0, seed=seed))
        whole = model.generate(PROMPT, 12, temperature=3.0, seed=seed)
        assert "".join(token.text for token in stream) == whole.text
        assert [token.position for token in stream] == list(range(whole.n_prompt, len(whole.tokens)))
    end = model.tokenizer.eos_token_id
    only = combine(add_direction("hook_unembed", 1e4 * torch.nn.functional.one_hot(torch.tensor(end), 340).float()))
    assert [(token.token_id, token.text) for token in model.stream(PROMPT, 5, only)] == [(end, "")]


def test_what_is_wrong_is_said_before_the_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    monkeypatch.setattr(LanguageModel, "forward", lambda *_, **__: pytest.fail("ran"))
    n = len(model.prompt_tokens(PROMPT))
    with pytest.raises(OutOfRangeError, match=f"the text has {n + 4} tokens"):
        model.stream(PROMPT, 4, combine(ablate(HOOK, [n + 4])))
    with pytest.raises(InvalidInputError, match="do not fit"):
        model.stream(PROMPT, 64)
    with pytest.raises(InvalidInputError, match="bridge"):
        model.stream(PROMPT, 4, combine(ablate("blocks.0.attn.hook_pattern"), freeze_attention=True))


@pytest.mark.parametrize("kind", [*KINDS, "gemma2"])
def test_held_attention_attends_where_the_plain_run_did(kind: str) -> None:
    model = tiny_model(kind, attention="eager")
    layer = "blocks.0.hook_resid_post"
    plain = model.run(PROMPT, hooks=["blocks.2.attn.hook_z"])
    nothing = model.run(PROMPT, edits=combine(scale(layer, 1.0), freeze_attention=True)).logits
    torch.testing.assert_close(nothing, plain.logits, rtol=1e-4, atol=1e-4)
    z = plain.activations["blocks.2.attn.hook_z"]
    edits = combine(scale("blocks.2.attn.hook_v", 2.0), ablate("blocks.2.attn.hook_q"), freeze_attention=True)
    held = model.run(PROMPT, hooks=["blocks.2.attn.hook_z"], edits=edits).activations["blocks.2.attn.hook_z"]
    torch.testing.assert_close(held, 2 * z, rtol=1e-4, atol=1e-4)
    live = model.run(PROMPT, hooks=["blocks.2.attn.hook_z"], edits=dict(edits))
    assert not torch.allclose(live.activations["blocks.2.attn.hook_z"], 2 * z, atol=1e-2)


def test_held_attention_in_a_loss_of_several_windows() -> None:
    model = tiny_model("gemma3")
    windows = [model.tokenize(text).numpy() for text in (PROMPT, "The river is deep", "In 1905 the old mill burned")]
    edits = combine(add_direction(HOOK, direction()), freeze_attention=True)
    together = model.cross_entropy(windows, edits)
    for window, losses in zip(windows, together, strict=True):
        logits = model.run(torch.from_numpy(window), edits=edits).logits[:-1].log_softmax(-1)
        expected = -logits.gather(1, torch.from_numpy(window).long()[1:, None])[:, 0]
        torch.testing.assert_close(torch.from_numpy(losses), expected, rtol=1e-4, atol=1e-4)


def test_two_models_hold_attention_at_the_same_time_each_its_own() -> None:
    models = [tiny_model("llama"), tiny_model("gemma3")]
    edits = combine(add_direction(HOOK, direction()), freeze_attention=True)
    alone = [model.run(PROMPT, edits=edits).logits for model in models]
    both_hold = threading.Barrier(2)

    def meet(value: torch.Tensor, context: object) -> None:
        both_hold.wait(timeout=120)

    with ThreadPoolExecutor(2) as pool:
        first = Edits({"blocks.0.hook_resid_pre": meet, **edits}, freeze_attention=True)
        together = list(pool.map(lambda model: model.run(PROMPT, edits=first).logits, models))
    for found, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(found, expected)


def test_nothing_of_a_held_pass_is_kept_once_it_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    model, kept = tiny_model("llama"), []
    real = attention._weights
    monkeypatch.setattr(attention, "_weights", lambda *a, **o: kept.append(weakref.ref(w := real(*a, **o))) or w)
    model.run(PROMPT, edits=combine(add_direction(HOOK, direction()), freeze_attention=True))
    gc.collect()
    assert len(kept) == model.n_layers
    assert not [weights for weights in kept if weights() is not None]


def test_interventions_stay_in_force_within_their_block_and_nest() -> None:
    model = tiny_model("gemma3")
    outer, inner = combine(scale(HOOK, 3.0)), combine(add_direction("blocks.1.hook_out", direction()))
    window = model.tokenize(PROMPT).numpy()
    both = combine(scale(HOOK, 3.0), add_direction(HOOK, direction()))
    plain = model.run(PROMPT).logits
    with model.intervene(outer):
        torch.testing.assert_close(model.run(PROMPT).logits, model.run(PROMPT, edits={}).logits)
        with model.intervene(inner):
            run, losses, text = model.run(PROMPT).logits, model.cross_entropy([window])[0], model.generate(PROMPT, 5)
        given = model.run(PROMPT, edits=inner).logits
        with pytest.raises(InvalidInputError, match="in force"):
            model.forward_rows([window], [HOOK], "float32", 64)
    assert torch.equal(run, model.run(PROMPT, edits=both).logits)
    assert torch.equal(given, run)
    assert losses.tolist() == model.cross_entropy([window], both)[0].tolist()
    assert text.tokens.tolist() == model.generate(PROMPT, 5, both).tokens.tolist()
    assert torch.equal(model.run(PROMPT).logits, plain)


@pytest.mark.real
def test_the_real_model_writes_the_same_from_its_cache() -> None:
    model = real_model()
    edits = combine(add_direction("blocks.8.hook_resid_post", 200 * direction(640), keep_bos=True))
    for changes in (None, edits):
        cached = model.generate("The opposite of hot is", 8, changes)
        assert (
            cached.tokens.tolist() == model.generate("The opposite of hot is", 8, changes, cache=False).tokens.tolist()
        )
