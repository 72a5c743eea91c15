"""Models that denoise: hooks against transformers' own hidden states, and the loop against what it says of itself."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_models import fast_points, relative_difference, tiny_model
from helpers_models import one_thread as one_thread
from transformers import LogitsProcessorList

from activations.capture import capture
from activations.denoising import Canvas, DenoisingSettings, commit_steps, states_of
from activations.text import TextSource
from scope.errors import InvalidInputError
from scope.models import LanguageModel

PROMPT = "The cat sat on the"
NOTHING = np.empty(0, np.int32)
SETTINGS = DenoisingSettings()


def _model() -> LanguageModel:
    return tiny_model("diffusion_gemma")


def _canvas(text: str = PROMPT, suffix: str = "", gap: int = 0) -> Canvas:
    model = _model()
    behind = model.tokenize(suffix, prepend_bos=False).numpy() if suffix else NOTHING
    return Canvas(model.tokenize(text).numpy().astype(np.int32), behind.astype(np.int32), gap)


def test_every_hook_has_the_shape_that_is_listed_and_residuals_are_transformers_hidden_states() -> None:
    model = _model()
    prompt, canvas = model.tokenize(PROMPT), torch.arange(10, 18)
    points = [point for point in fast_points(model) if not point.name.startswith("encoder.")]
    encoder = [point for point in fast_points(model) if point.name.startswith("encoder.")]
    seen, logits = model.read_canvas(prompt, canvas, [point.name for point in (*points, *encoder)])
    for point in (*points, *encoder):
        length = len(prompt) if point in encoder else len(canvas)
        assert seen[point.name].shape == (length, *model.hook_shape(point.name)), point.name
    with torch.no_grad():
        theirs = model.hf(input_ids=prompt[None], decoder_input_ids=canvas[None], output_hidden_states=True)
        read = model.hf.model.encoder(input_ids=prompt[None], output_hidden_states=True).hidden_states
    assert torch.equal(logits, theirs.logits[0])
    for prefix, hidden in (("", theirs.hidden_states), ("encoder.", read)):
        assert len(hidden) == model.n_layers + 1
        for layer in range(model.n_layers):
            assert torch.equal(seen[f"{prefix}blocks.{layer}.hook_resid_pre"], hidden[layer][0])
        # transformers gives the last of them behind the final norm
        assert torch.equal(seen[f"{prefix}ln_final.hook_out"], hidden[-1][0])
    last = seen[f"blocks.{model.n_layers - 1}.hook_resid_post"]
    norm = model.hf.get_submodule(model.layout.module("norm"))
    assert relative_difference(norm(last), theirs.hidden_states[-1][0]) < 1e-6
    assert not torch.equal(seen["hook_self_conditioned"], seen["hook_embed"])


def test_the_encoder_is_captured_over_plain_text_like_any_model(tmp_path: Path) -> None:
    model = _model()
    (tmp_path / "a.txt").write_text(PROMPT)
    hook = "encoder.blocks.1.hook_resid_pre"
    store = capture(model, TextSource(tmp_path / "a.txt"), [hook], tmp_path / "s.zarr", dtype="float32",
                    context_size=32).store  # fmt: skip
    with torch.no_grad():
        read = model.hf.model.encoder(input_ids=model.tokenize(PROMPT)[None], output_hidden_states=True).hidden_states
    assert np.allclose(store.read(hook, 0, store.n_rows), read[1][0].numpy(), atol=1e-5)


def test_what_is_watched_is_the_loop_that_transformers_runs() -> None:
    """The same seed gives transformers' own text; and what the sampler accepted follows from its logits."""
    model, canvas = _model(), _canvas()
    hook = "blocks.0.hook_resid_pre"
    blocks = model.denoise(canvas, SETTINGS, 7, [hook], "float32")
    tokens = torch.from_numpy(canvas.prefix.astype(np.int64))[None]
    logits: list[torch.Tensor] = []

    def note(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        logits.append(scores[0].clone())
        return scores

    class Drafts:
        def __init__(self) -> None:
            self.drafts: list[torch.Tensor] = []

        def put(self, value: torch.Tensor) -> None: ...

        def put_draft(self, value: torch.Tensor) -> None:
            self.drafts.append(value[0])

        def end(self) -> None: ...

    streamer: Any = Drafts()
    torch.manual_seed(7)
    theirs = model.hf.generate(tokens, streamer=streamer, logits_processor=LogitsProcessorList([note])).sequences[0]
    assert np.array_equal(np.concatenate([block.final for block in blocks]), theirs[len(canvas.prefix) :].numpy())
    assert [block.offset for block in blocks] == [len(canvas.prefix), len(canvas.prefix) + 8]
    assert sum(len(block.tokens) for block in blocks) == len(streamer.drafts) == len(logits)
    n_steps, bound = 5, 6.0
    for number, block in enumerate(blocks):
        own = logits[number * n_steps : (number + 1) * n_steps]
        expected = []
        for step, scores in enumerate(own):
            scaled = (scores / (0.4 + 0.4 * (n_steps - step) / n_steps)).double().log_softmax(-1)
            entropy = -(scaled.exp() * scaled).sum(-1)
            # accepted while what is less uncertain amounts to no more than the bound
            expected.append([float(entropy[entropy < own_entropy].sum()) <= bound for own_entropy in entropy])
        assert np.array_equal(block.accepted, expected)
        assert np.array_equal(block.final, streamer.drafts[number * n_steps + n_steps - 1].numpy())
    again = model.denoise(canvas, SETTINGS, 7, [hook], "float32")
    assert all(np.array_equal(a.values[hook], b.values[hook]) for a, b in zip(blocks, again, strict=True))
    assert not np.array_equal(model.denoise(canvas, SETTINGS, 8, [], "float32")[0].tokens, blocks[0].tokens)


def test_hooks_see_the_steps_that_are_noted() -> None:
    """The embedding of what a step reads is the hook's, step by step and canvas by canvas."""
    model = _model()
    for block in model.denoise(_canvas(), SETTINGS, 0, ["hook_embed"], "float32"):
        embedded = model.hf.get_submodule(model.layout.module("embed_tokens"))(torch.from_numpy(block.tokens).long())
        assert np.array_equal(block.values["hook_embed"], embedded.flatten(0, 1).numpy())


def test_a_gap_is_filled_between_prefix_and_suffix() -> None:
    model, canvas = _model(), _canvas(suffix=" on the mat", gap=3)
    first, second = model.denoise(canvas, SETTINGS, 0, [], "float32")
    here = slice(3, 3 + len(canvas.suffix))
    assert (first.tokens[:, here] == canvas.suffix).all()
    assert np.array_equal(first.final[here], canvas.suffix)
    assert first.given.nonzero()[0].tolist() == list(range(here.start, here.stop))
    assert (states_of(first.accepted, first.given)[:, here] == 0).all()
    assert (commit_steps(first.accepted, first.given)[here] == -1).all()
    assert first.accepted[:, here].all()
    assert not second.given.any()
    # what the gap is filled with hears of the suffix
    others = model.denoise(_canvas(suffix=" the river", gap=3), SETTINGS, 0, ["blocks.1.hook_resid_post"], "float32")
    ours = model.denoise(canvas, SETTINGS, 0, ["blocks.1.hook_resid_post"], "float32")
    name = "blocks.1.hook_resid_post"
    assert np.array_equal(ours[0].tokens[0, :3], others[0].tokens[0, :3])
    assert not np.allclose(ours[0].values[name][:3], others[0].values[name][:3])


def test_states_and_commit_steps_of_a_history() -> None:
    accepted = np.array([[0, 1, 1, 0, 1], [0, 1, 0, 0, 1], [1, 1, 1, 0, 1]], bool)
    given = np.array([0, 0, 0, 0, 1], bool)
    assert commit_steps(accepted, given).tolist() == [2, 0, 2, -1, -1]
    assert states_of(accepted, given).tolist() == [[1, 2, 2, 1, 0], [1, 3, 3, 1, 0], [2, 3, 2, 1, 0]]


def test_what_makes_no_sense_is_refused() -> None:
    model = _model()
    with pytest.raises(InvalidInputError, match="scope denoise"):
        model.run(PROMPT)
    with pytest.raises(InvalidInputError, match="encoder"):
        model.run(PROMPT, hooks=["blocks.0.hook_resid_post"], logits=False)
    with pytest.raises(InvalidInputError, match="next token"):
        model.cross_entropy([np.arange(4, 9)])
    with pytest.raises(InvalidInputError, match="bridge"):
        _ = model.bridge
    with pytest.raises(InvalidInputError, match="sees the prompt"):
        model.denoise(_canvas(), SETTINGS, 0, ["encoder.hook_embed"], "float32")
    with pytest.raises(InvalidInputError, match="more than a canvas of 8"):
        model.denoise(_canvas(suffix=" on the mat", gap=8), SETTINGS, 0, [], "float32")
    with pytest.raises(InvalidInputError, match=r"80 are to be generated.*room for 64"):
        model.denoise(_canvas(), DenoisingSettings(max_new_tokens=77), 0, [], "float32")
    with pytest.raises(InvalidInputError, match="token by token"):
        tiny_model("llama").denoise(_canvas(), SETTINGS, 0, [], "float32")
    json.dumps(model.denoising_configuration(SETTINGS))
