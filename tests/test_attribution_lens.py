"""The logit lens equals plain computation: the model's own logits after the last layer, numpy before it, by hand with
an SAE; and it never holds more logits than it says."""

import numpy as np
import pytest
import torch
from helpers_models import TinyDictionary, one_thread, tiny_model  # noqa: F401
from jaxtyping import TypeCheckError

import scope.attribution.lens as lens_module
from scope import logit_lens
from scope.errors import InvalidInputError, MismatchError, OutOfRangeError, UnknownNameError

PROMPT = "The cat sat on the mat and looked at the moon."


def softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def by_hand(model, residual: torch.Tensor) -> np.ndarray:
    """Next-token distributions of residual rows, in numpy: the final norm, the unembedding, the soft cap."""
    x = residual.double().numpy()
    norm = model.hf.get_submodule(model.layout.module(model.layout.family.final_norm))
    weight = norm.weight.double().numpy()
    if model.layout.family.centred_norm:
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + norm.eps) * weight + norm.bias.double().numpy()
    else:
        eps = getattr(norm, "eps", None) or norm.variance_epsilon
        gain = 1 + weight if model.layout.family.gain_offset else weight
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * gain
    logits = x @ model.W_U.double().numpy().T
    cap = model.layout.final_logit_softcapping
    return softmax(logits if cap is None else cap * np.tanh(logits / cap))


@pytest.mark.parametrize("kind", ["gemma3", "gemma2", "llama", "gpt2"])
def test_every_layer_is_what_numpy_says_and_the_last_one_what_the_model_says(kind: str) -> None:
    model = tiny_model(kind)
    assert (model.layout.final_logit_softcapping is not None) == (kind == "gemma2")
    hooks = [f"blocks.{layer}.hook_resid_post" for layer in range(model.n_layers)]
    run = model.run(PROMPT, hooks=hooks)
    follow = [3, 17, 40]
    found = logit_lens(model, PROMPT, k=5, follow=follow)
    assert found.layers == tuple(range(model.n_layers))
    final = run.logits.double().softmax(-1).numpy()
    for layer, hook in enumerate(hooks):
        p = by_hand(model, run.activations[hook])
        assert np.allclose(found.probability[layer], p[:, follow], atol=1e-5)
        assert np.allclose(found.top_probabilities[layer], -np.sort(-p, -1)[:, :5], atol=1e-5)
        assert np.allclose(np.take_along_axis(p, found.top_ids[layer], -1), found.top_probabilities[layer], atol=1e-5)
        assert np.allclose(found.entropy[layer], -(p * np.log(p)).sum(-1), atol=1e-4)
        assert np.allclose(found.kl[layer], (final * np.log(final / p)).sum(-1), atol=1e-4)
        assert (found.rank[layer] == 1 + (p[:, None, :] > p[:, follow, None]).sum(-1)).all()
    assert np.abs(found.probability[-1] - final[:, follow]).max() < 1e-5
    assert found.kl[-1].max() < 1e-5
    assert found.kl[0].min() > 1e-3


def test_with_an_sae_read_in_place() -> None:
    model = tiny_model("gemma3")
    hook = "blocks.1.hook_resid_post"
    sae = TinyDictionary(hook)
    plain, read = logit_lens(model, PROMPT, follow=[5]), logit_lens(model, PROMPT, follow=[5], sae=sae)
    assert (read.sae_layer, read.sae_mode) == (1, "read")
    for layer in (0, 2, 3):
        assert (read.probability[layer] == plain.probability[layer]).all()
    x = model.run(PROMPT, hooks=[hook], logits=False).activations[hook]
    with torch.no_grad():
        reconstruction = sae(x)
    reconstruction[0] = x[0]  # BOS passes through
    assert np.allclose(read.probability[1], by_hand(model, reconstruction)[:, [5]], atol=1e-5)
    assert np.abs(read.probability[1] - plain.probability[1])[1:].max() > 1e-3


@pytest.mark.parametrize("hook", ["blocks.1.hook_resid_post", "blocks.2.hook_resid_pre", "blocks.1.hook_mlp_out"])
def test_with_an_sae_spliced_in(hook: str) -> None:
    model = tiny_model("gemma3")
    sae = TinyDictionary(hook)
    plain = logit_lens(model, PROMPT, follow=[5])
    spliced = logit_lens(model, PROMPT, follow=[5], sae=sae, sae_mode="splice")
    assert spliced.sae_layer == (None if "mlp" in hook else 1)

    def reconstruct(value, context):
        new = sae(value)
        new[context.bos] = value[context.bos]
        return new

    hooks = [f"blocks.{layer}.hook_resid_post" for layer in range(model.n_layers)]
    changed = model.run(PROMPT, hooks=hooks, edits={hook: reconstruct})
    streams = [changed.activations[name] for name in hooks]
    if hook.endswith("resid_pre"):
        streams[1] = model.run(PROMPT, hooks=[hook], edits={hook: reconstruct}, logits=False).activations[hook]
    for layer, stream in enumerate(streams):
        assert np.allclose(spliced.probability[layer], by_hand(model, stream.detach())[:, [5]], atol=1e-5)
    assert (spliced.probability[0] == plain.probability[0]).all()
    # KL is against what the plain model says.
    p, q = model.run(PROMPT).logits.double().softmax(-1), changed.logits.detach().double().softmax(-1)
    assert np.allclose(spliced.kl[-1], (p * (p / q).log()).sum(-1).numpy(), atol=1e-4)
    assert spliced.kl[-1][1:].min() > 1e-4


def test_no_more_logits_at_once_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("gemma3")
    whole = logit_lens(model, PROMPT, follow=[5])
    most, steps = 3, []
    monkeypatch.setattr(lens_module, "CHUNK_BYTES", most * 4 * lens_module.COPIES * model.d_vocab)
    sizes = []
    real = lens_module.residual_logits
    monkeypatch.setattr(
        lens_module, "residual_logits", lambda model, x: (sizes.append(x[..., 0].numel()), real(model, x))[1]
    )
    chunked = logit_lens(model, PROMPT, follow=[5], progress=lambda done, total: steps.append((done, total)))
    assert max(sizes) == most
    assert len(sizes) > model.n_layers
    assert [done for done, _ in steps] == list(range(steps[0][1]))
    for name in ("top_ids", "rank"):
        assert (getattr(whole, name) == getattr(chunked, name)).all()
    for name in ("top_probabilities", "entropy", "kl", "probability"):
        assert np.allclose(getattr(whole, name), getattr(chunked, name), atol=1e-5)


def test_progress_may_end_it() -> None:
    def enough(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        logit_lens(tiny_model("gemma3"), PROMPT, progress=enough)


def test_tables_and_parts() -> None:
    model = tiny_model("llama")
    whole = logit_lens(model, PROMPT, k=4, follow=[9, 11])
    part = logit_lens(model, PROMPT, layers=[2, 0], positions=[7, 3], k=4, follow=[9, 11])
    assert np.allclose(part.probability, whole.probability[[2, 0]][:, [7, 3]], atol=1e-6)
    cells = whole.cells()
    assert len(cells) == model.n_layers * len(whole.tokens)
    one = cells[(cells["layer"] == 1) & (cells["position"] == 3)].iloc[0]
    top = whole.top(1, 3)
    assert (one["top_id"], one["top_token"], one["probability"]) == tuple(top.iloc[0])
    assert one["token"] == whole.tokens[3]
    followed = whole.followed()
    place = followed[(followed["followed_id"] == 11) & (followed["layer"] == 2) & (followed["position"] == 5)].iloc[0]
    assert place["probability"] == whole.probability[2, 5, 1]
    assert place["followed"] == model.vocabulary_strings([11])[0]
    with pytest.raises(OutOfRangeError, match="was not read"):
        part.top(1, 7)
    html = logit_lens(model, "a <b>bold</b> cat")._repr_html_()
    assert "<b>" not in html
    assert "&lt;" in html


def test_a_text_of_one_token_is_followed() -> None:
    model = tiny_model("gemma3")
    words = model.vocabulary_strings(list(range(260, model.d_vocab)))
    word = next(word for word in words if len(word) > 1 and len(model.encode_documents([word])[0]) == 1)
    (ids,) = model.encode_documents([word])
    found = logit_lens(model, PROMPT, follow=[word])
    assert (found.followed_ids, found.followed_tokens) == ((int(ids[0]),), (word,))
    with pytest.raises(InvalidInputError, match="one token"):
        logit_lens(model, PROMPT, follow=["moonlight sonata"])


def test_what_cannot_be() -> None:
    model = tiny_model("gemma3")
    with pytest.raises(OutOfRangeError, match="layer 4"):
        logit_lens(model, PROMPT, layers=[4])
    with pytest.raises(OutOfRangeError, match="position -1"):
        logit_lens(model, PROMPT, positions=[-1])
    with pytest.raises(OutOfRangeError, match="token"):
        logit_lens(model, PROMPT, follow=[model.d_vocab])
    with pytest.raises(OutOfRangeError, match="k is 0"):
        logit_lens(model, PROMPT, k=0)
    with pytest.raises(InvalidInputError, match="empty"):
        logit_lens(model, "")
    with pytest.raises(InvalidInputError, match="takes 64"):
        logit_lens(model, "cat " * 200)
    with pytest.raises(InvalidInputError, match="splice"):
        logit_lens(model, PROMPT, sae=TinyDictionary("blocks.1.hook_mlp_out"))
    with pytest.raises(InvalidInputError, match="splice"):
        logit_lens(model, PROMPT, sae=TinyDictionary("blocks.0.hook_resid_pre"))
    with pytest.raises(MismatchError, match="dimensions"):
        logit_lens(model, PROMPT, sae=TinyDictionary("blocks.1.hook_resid_post", d_in=31))
    with pytest.raises((UnknownNameError, TypeCheckError), match="read"):
        logit_lens(model, PROMPT, sae=TinyDictionary("blocks.1.hook_resid_post"), sae_mode="reed")
