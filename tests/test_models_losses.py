"""Logit effects and losses: the plain formulas, whatever the chunks."""

import numpy as np
import pytest
import torch
from helpers_models import KINDS, WRONG_TYPE, real_model, tiny_model
from helpers_models import one_thread as one_thread
from torch import Tensor

from scope.errors import InvalidInputError, OutOfRangeError, UnknownNameError
from scope.interventions import ablate, combine, set_
from scope.models import EditContext, losses


def windows(lengths: tuple[int, ...] = (9, 4, 9, 2, 30)) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [np.r_[2, generator.integers(4, 200, length - 1)].astype(np.int32) for length in lengths]


@pytest.mark.parametrize("kind", [*KINDS, "gemma2"])
def test_the_gain_is_what_the_final_norm_multiplies_by(kind: str) -> None:
    model = tiny_model(kind)
    norm = model.hf.get_submodule(model.layout.module(model.layout.family.final_norm))
    x = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0)) * 1000
    centred = x - x.mean() if model.layout.family.centred_norm else x
    bias = getattr(norm, "bias", None)
    normalised = centred / centred.pow(2).mean().sqrt() * model.final_norm_gain
    torch.testing.assert_close(norm(x), normalised if bias is None else normalised + bias)


@pytest.mark.parametrize("kind", KINDS)
def test_logit_effects_are_the_change_of_the_logits(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the final norm's scale frozen, adding a direction changes the logits by its effect / scale, up to a shift
    of all of them."""
    monkeypatch.setattr(losses, "CHUNK_BYTES", 4 * 32 * 50)  # several chunks
    model = tiny_model(kind)
    last = f"blocks.{model.n_layers - 1}.hook_resid_post"
    directions = torch.randn(3, model.d_model, generator=torch.Generator().manual_seed(0))
    effects = model.logit_effects(directions)
    assert effects.shape == (3, model.d_vocab)
    assert effects.mean(-1).abs().max() < 1e-5
    plain = model.run("The cat sat", hooks=[last])
    x = plain.activations[last][-1].double()
    centred = x - x.mean() if model.layout.family.centred_norm else x
    scale = centred.pow(2).mean().sqrt()
    for direction, effect in zip(directions, effects, strict=True):
        # What the norm's scale changes by is undone: only the direct effect is left.
        moved = x + direction
        centred_moved = moved - moved.mean() if model.layout.family.centred_norm else moved
        rescale = centred_moved.pow(2).mean().sqrt() / scale

        def add(value: Tensor, context: EditContext, direction: Tensor = direction) -> Tensor:
            return value + direction

        def undo(value: Tensor, context: EditContext, rescale: Tensor = rescale) -> Tensor:
            bias = getattr(model.hf.get_submodule(model.layout.module(model.layout.family.final_norm)), "bias", 0.0)
            return (value - bias) * rescale + bias

        edited = model.run("The cat sat", edits={last: add, "ln_final.hook_out": undo})
        change = (edited.logits[-1] - plain.logits[-1]).double()  # type: ignore[index]
        torch.testing.assert_close((change - change.mean()) * scale, effect.double(), rtol=1e-3, atol=1e-3)


def test_directions_of_another_width_are_refused() -> None:
    for shape in ((3, 31), (32,), (3, 1)):
        with pytest.raises(WRONG_TYPE):
            tiny_model("llama").logit_effects(torch.zeros(shape))


@pytest.mark.parametrize("batch_size", [1, 20, 4096])
@pytest.mark.parametrize("kind", [*KINDS, "gemma2"])
def test_cross_entropy_is_that_of_the_logits(kind: str, batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(kind)
    monkeypatch.setattr(losses, "CHUNK_BYTES", 4 * model.d_vocab * 7)  # several chunks, cut anywhere
    for window, nats in zip(windows(), model.cross_entropy(windows(), batch_size=batch_size), strict=True):
        tokens = torch.from_numpy(window).long()
        logits = model.run(tokens).logits
        assert logits is not None
        expected = torch.nn.functional.cross_entropy(logits[:-1], tokens[1:], reduction="none")
        np.testing.assert_allclose(nats, expected.numpy(), rtol=1e-4, atol=1e-5)
        assert nats.dtype == np.float32
        assert nats.shape == (len(window) - 1,)


def test_edits_are_in_force_and_know_the_bos_of_every_window() -> None:
    model = tiny_model("gemma3")
    hook = "blocks.1.hook_resid_post"
    edits = combine(set_(hook, torch.full((32,), 0.5), keep_bos=True))
    for window, nats in zip(windows(), model.cross_entropy(windows(), edits, batch_size=40), strict=True):
        logits = model.run(torch.from_numpy(window), edits=edits).logits
        assert logits is not None
        expected = torch.nn.functional.cross_entropy(logits[:-1], torch.from_numpy(window[1:]).long(), reduction="none")
        np.testing.assert_allclose(nats, expected.numpy(), rtol=1e-4, atol=1e-5)
    # Zeros in place of the last residual make every token equally likely.
    nothing = combine(ablate("blocks.3.hook_resid_post"))
    np.testing.assert_allclose(
        np.concatenate(model.cross_entropy(windows(), nothing)), np.log(model.d_vocab), rtol=1e-5
    )


def test_progress_and_refusals() -> None:
    model = tiny_model("gemma3")
    calls: list[tuple[int, int | None]] = []
    model.cross_entropy(windows(), batch_size=20, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (5, 5)
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})
    assert model.cross_entropy([]) == []
    for lengths in ((1,), (9, 65)):
        with pytest.raises(InvalidInputError, match="tokens"):
            model.cross_entropy(windows(lengths))
    with pytest.raises(UnknownNameError):
        model.cross_entropy(windows(), {"blocks.1.hook_resid": lambda value, context: value})
    with pytest.raises(OutOfRangeError, match="Position 5"):
        model.cross_entropy(windows(), combine(ablate("blocks.1.hook_resid_post", 5)))
    with pytest.raises(InvalidInputError, match="through the bridge"):
        model.cross_entropy(windows(), combine(ablate("blocks.1.attn.hook_pattern")))


@pytest.mark.real
def test_the_real_model_predicts_english_and_its_unembedding_names_tokens() -> None:
    model = real_model()
    text = "It was a bright cold day in April, and the clocks were striking thirteen. The people looked up in surprise."
    (nats,) = model.cross_entropy([model.tokenize(text).numpy()])
    assert 2 < nats.mean() < 4
    cat = model.tokenizer.convert_tokens_to_ids("▁cat")
    direction = model.W_U[cat] / model.final_norm_gain
    (effects,) = model.logit_effects(direction[None])
    assert " cat" in model.vocabulary_strings(effects.topk(5).indices)
