"""`model.run`: activations, features, splices, edits and gradients in one pass."""

import threading

import pytest
import torch
from helpers_models import KINDS, WRONG_TYPE, TinyDictionary, tiny_folder, tiny_model
from helpers_models import one_thread as one_thread
from torch import Tensor

from scope.errors import InvalidInputError, MismatchError, UnknownNameError
from scope.models import Dictionary, EditContext, LanguageModel

PROMPT = "The cat sat on the mat"
HOOK = "blocks.1.hook_resid_post"


def zero(value: Tensor, context: EditContext) -> Tensor:
    return torch.zeros_like(value)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_the_models_own(kind: str) -> None:
    model = tiny_model(kind)
    result = model.run(PROMPT, hooks=[HOOK, "hook_unembed", "ln_final.hook_out"])
    assert result.logits is not None
    with torch.no_grad():
        expected = model.hf(input_ids=result.tokens[None], use_cache=False).logits[0]
    torch.testing.assert_close(result.logits, expected)
    last = model.run(PROMPT, logits="last").logits
    assert last is not None
    torch.testing.assert_close(last, expected[-1:])
    assert model.run(PROMPT, logits=False).logits is None
    torch.testing.assert_close(
        result.activations["ln_final.hook_out"] @ model.W_U.T, result.activations["hook_unembed"]
    )


def test_softcapped_logits_are_the_models_own() -> None:
    model = tiny_model("gemma2")
    assert model.layout.final_logit_softcapping == 30
    result = model.run(PROMPT, hooks=["hook_unembed"])
    with torch.no_grad():
        expected = model.hf(input_ids=result.tokens[None], use_cache=False).logits[0]
    assert result.logits is not None
    torch.testing.assert_close(result.logits, expected)
    torch.testing.assert_close(30 * torch.tanh(result.activations["hook_unembed"] / 30), expected)


def test_activations_come_under_the_names_they_were_asked_by() -> None:
    result = tiny_model("gemma3").run(PROMPT, hooks=["blocks.1.hook_out", HOOK, HOOK])
    assert list(result.activations) == ["blocks.1.hook_out", HOOK]
    assert torch.equal(*result.activations.values())
    assert tiny_model("gemma3").run(PROMPT, hooks=HOOK).activations.keys() == {HOOK}
    assert "(13, 32)" not in repr(result)
    assert "RunResult(" in repr(result)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_kind_of_hook(kind: str) -> None:
    """d(logit)/d(activation) equals what a small step along it does to the logit."""
    model = tiny_model(kind)
    names = [
        p.name for p in model.hook_names() if p.path == "fast" and p.name.startswith(("blocks.1.", "hook_e", "ln"))
    ]
    for name in names:
        result = model.run(PROMPT, hooks=[name], grad=True)
        assert result.logits is not None
        token = int(result.logits[-1].argmax())
        result.logits[-1, token].backward()
        gradient = result.activations[name].grad
        assert gradient is not None, name
        direction = gradient / gradient.norm()
        losses = []
        for step in (1e-2, -1e-2):
            edits = {name: lambda value, context, change=step * direction: value + change}
            logits = model.run(PROMPT, edits=edits).logits
            assert logits is not None
            losses.append(float(logits[-1, token]))
        measured = (losses[0] - losses[1]) / 2e-2
        assert measured == pytest.approx(float(gradient.norm()), rel=0.02, abs=2e-3), name


def test_gradients_of_several_hooks_at_once_and_of_the_two_readers_of_a_stream() -> None:
    model = tiny_model("gemma3")
    names = [f"blocks.{layer}.{name}" for layer in (0, 2) for name in ("hook_resid_mid", "hook_mlp_in", "attn.hook_q")]
    together = model.run(PROMPT, hooks=names, grad=True)
    assert together.logits is not None
    together.logits[-1, 7].backward()
    for name in names:
        alone = model.run(PROMPT, hooks=[name], grad=True)
        assert alone.logits is not None
        alone.logits[-1, 7].backward()
        torch.testing.assert_close(together.activations[name].grad, alone.activations[name].grad, msg=name)
    # The stream is read by the MLP and by the residual connection; hook_mlp_in is the first reader alone.
    mid, branch = (together.activations[f"blocks.2.{name}"].grad for name in ("hook_resid_mid", "hook_mlp_in"))
    assert not torch.allclose(mid, branch)
    assert not any(parameter.grad is not None for parameter in model.hf.parameters())
    assert not model.run(PROMPT, hooks=names).activations[names[0]].requires_grad


@pytest.mark.parametrize("name", ["blocks.1.hook_resid_pre", HOOK, "blocks.1.hook_resid_mid", "blocks.1.attn.hook_z"])
def test_what_is_recorded_is_what_the_model_goes_on_with(name: str) -> None:
    def in_place(value: Tensor, context: EditContext) -> None:
        value.zero_()

    for edit in (zero, in_place, lambda value, context: value.mul_(0)):
        result = tiny_model("llama").run(PROMPT, hooks=[name], edits={name: edit})
        assert result.activations[name].abs().max() == 0


def test_edits_of_several_hooks_are_made_in_model_order() -> None:
    model = tiny_model("llama")
    names = ["blocks.2.hook_resid_post", "hook_embed", "blocks.1.attn.hook_v", "blocks.1.hook_resid_mid"]
    seen: list[str] = []

    def note(value: Tensor, context: EditContext) -> None:
        seen.append(context.name)
        assert context.tokens.shape == value.shape[:2]
        assert context.bos.sum() == 1

    model.run(PROMPT, edits=dict.fromkeys(names, note))
    assert seen == ["hook_embed", "blocks.1.attn.hook_v", "blocks.1.hook_resid_mid", "blocks.2.hook_resid_post"]
    both = model.run(PROMPT, hooks=[HOOK], edits={"blocks.1.hook_out": zero, HOOK: lambda value, context: value + 1})
    assert torch.equal(both.activations[HOOK], torch.ones_like(both.activations[HOOK]))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda value, context: torch.zeros(32), "shape"),
        (lambda value, context: value[:, :, :1], "shape"),
        (lambda value, context: 0, "int"),
    ],
)
def test_an_edit_that_returns_another_shape_is_refused(edit: object, message: str) -> None:
    with pytest.raises(MismatchError, match=message):
        tiny_model("llama").run(PROMPT, edits={HOOK: edit})  # type: ignore[dict-item]
    with pytest.raises(WRONG_TYPE):
        tiny_model("llama").run(PROMPT, edits={HOOK: 3})  # type: ignore[dict-item]


def test_features_come_from_the_sae_of_the_hook() -> None:
    model = tiny_model("gemma3")
    one, two = TinyDictionary(HOOK), TinyDictionary("blocks.2.attn.hook_z", d_in=48, seed=1)
    assert isinstance(one, Dictionary)
    result = model.run(PROMPT, hooks=[HOOK], saes=[one, two])
    assert result.features[HOOK].shape == (len(result.tokens), one.d_sae)
    torch.testing.assert_close(result.features[HOOK], one.encode(result.activations[HOOK]))
    assert result.features["blocks.2.attn.hook_z"].shape == (len(result.tokens), two.d_sae)
    assert model.run(PROMPT, saes=one).features.keys() == {HOOK}
    other = TinyDictionary(HOOK, seed=2)
    assert model.run(PROMPT, saes={"a": one, "b": other}).features.keys() == {"a", "b"}


def test_an_sae_that_does_not_fit_is_refused() -> None:
    model = tiny_model("gemma3")
    for d_in in (31, 1):
        with pytest.raises(MismatchError, match=f"{d_in} dimensions"):
            model.run(PROMPT, saes=TinyDictionary(HOOK, d_in=d_in))
    with pytest.raises(UnknownNameError):
        model.run(PROMPT, saes=TinyDictionary("blocks.77.hook_resid_post"))
    with pytest.raises(InvalidInputError, match="names"):
        model.run(PROMPT, saes=[TinyDictionary(HOOK), TinyDictionary(HOOK)])
    with pytest.raises(InvalidInputError, match="one SAE"):
        model.run(PROMPT, saes={"a": TinyDictionary(HOOK), "b": TinyDictionary(HOOK)}, splice="with_error")
    with pytest.raises(InvalidInputError, match="no row per token"):
        model.run(PROMPT, saes=TinyDictionary("blocks.0.attn.hook_pattern"))
    with pytest.raises(WRONG_TYPE, match="with_error"):
        model.run(PROMPT, saes=TinyDictionary(HOOK), splice="with error")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [HOOK, "blocks.1.hook_resid_mid", "blocks.1.attn.hook_z", "blocks.1.hook_mlp_out"])
def test_a_splice_replaces_the_activation_but_for_bos(name: str) -> None:
    model = tiny_model("gemma3")
    sae = TinyDictionary(name, d_in=48 if name.endswith("z") else 32)
    plain = model.run(PROMPT, hooks=[name], saes=sae)
    spliced = model.run(PROMPT, hooks=[name], saes=sae, splice="without_error")
    x = plain.activations[name].flatten(1)
    expected = torch.cat([x[:1], sae(x[1:])]).view(plain.activations[name].shape)
    torch.testing.assert_close(spliced.activations[name], expected)
    torch.testing.assert_close(spliced.features[name], plain.features[name])
    assert not torch.allclose(spliced.logits[-1], plain.logits[-1])  # type: ignore[index]
    kept = model.run(PROMPT, hooks=[name], saes=sae, splice="with_error")
    torch.testing.assert_close(kept.logits, plain.logits, rtol=0, atol=1e-5 * float(plain.logits.abs().max()))  # type: ignore[union-attr]


def test_gradients_go_through_the_features_of_a_splice() -> None:
    """With the error term, d(logit)/d(feature) is d(logit)/d(activation) along the feature's decoder row."""
    model = tiny_model("gemma3")
    sae = TinyDictionary(HOOK)
    plain = model.run(PROMPT, hooks=[HOOK], grad=True)
    plain.logits[-1, 5].backward()  # type: ignore[index]
    spliced = model.run(PROMPT, saes=sae, splice="with_error", grad=True)
    spliced.logits[-1, 5].backward()  # type: ignore[index]
    gradient = plain.activations[HOOK].grad
    assert gradient is not None
    features = spliced.features[HOOK].grad
    assert features is not None
    torch.testing.assert_close(features[1:], (gradient @ sae.W_dec.T)[1:], rtol=1e-3, atol=1e-6)
    assert features[0].abs().max() == 0  # BOS passes by


def test_generation_follows_the_likeliest_token_with_edits_at_every_step() -> None:
    model = tiny_model("gpt2")
    plain = model.generate(PROMPT, 6)
    tokens = model.tokenize(PROMPT)
    for _ in range(len(plain.tokens) - plain.n_prompt):
        logits = model.run(tokens).logits
        assert logits is not None
        tokens = torch.cat([tokens, logits[-1].argmax()[None]])
    assert torch.equal(plain.tokens, tokens)

    favourite = 100

    def push(value: Tensor, context: EditContext) -> Tensor:
        return value + 1000 * (torch.arange(value.shape[-1]) == favourite)

    pushed = model.generate(PROMPT, 3, edits={"hook_unembed": push})
    assert pushed.tokens[pushed.n_prompt :].tolist() == [favourite] * 3
    assert pushed.text == model.tokenizer.decode([favourite] * 3)
    end = model.generate(PROMPT, 5, edits={"hook_unembed": lambda v, c: v + 1000 * (torch.arange(340) == 0)})
    assert end.tokens[end.n_prompt :].tolist() == [0]


def test_sampling_is_seeded_and_bad_settings_are_refused() -> None:
    model = tiny_model("gpt2")
    one, two = (model.generate(PROMPT, 8, temperature=2.0, seed=3).tokens for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.equal(one, model.generate(PROMPT, 8, temperature=2.0, seed=4).tokens)
    for settings in ({"temperature": -1.0}, {"max_new_tokens": 0}, {"max_new_tokens": 60}):
        with pytest.raises(InvalidInputError):
            model.generate(PROMPT, **settings)


def test_two_threads_do_not_see_each_others_hooks() -> None:
    model = tiny_model("gemma3")
    expected = model.run(PROMPT, hooks=[HOOK]).activations[HOOK]
    wrong: list[Tensor] = []

    def work(edit: bool) -> None:
        for _ in range(20):
            result = model.run(PROMPT, hooks=[HOOK], edits={"blocks.0.hook_resid_mid": zero} if edit else None)
            if not edit and not torch.equal(result.activations[HOOK], expected):
                wrong.append(result.activations[HOOK])

    threads = [threading.Thread(target=work, args=(edit,)) for edit in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_bfloat16_model_takes_float32_edits_and_saes() -> None:
    model = LanguageModel.load(str(tiny_folder("llama")), device="cpu", dtype="bfloat16")
    result = model.run(PROMPT, saes=TinyDictionary(HOOK), splice="without_error", hooks=[HOOK])
    assert result.features[HOOK].dtype == torch.float32
    assert result.activations[HOOK].dtype == torch.bfloat16
    edited = model.run(PROMPT, hooks=[HOOK], edits={HOOK: lambda value, context: torch.ones(value.shape)})
    assert edited.activations[HOOK].dtype == torch.bfloat16
