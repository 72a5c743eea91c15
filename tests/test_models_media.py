"""Images and sounds through tiny models with towers: all equals transformers' own processor and pass."""

import functools
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_media import media_folder, media_model, picture, png, samples, wav
from helpers_models import WRONG_TYPE, fast_points, one_thread, relative_difference, tiny_model  # noqa: F401  one_thread is a fixture
from PIL import Image

from activations.documents import Columns, Document, document_from
from activations.media import Medium, PlacedMedium
from scope.errors import InvalidInputError
from scope.models import LanguageModel
from scope.models.bridge import bridge_forward
from scope.models.media import MediaPrompt
from scope.models.media_files import samples_from

SOUNDS = {"gemma3": 0, "gemma4": 1}


def chat(kind: str) -> tuple[Document, list[dict[str, Any]]]:
    """A chat with an image, a second one later, and a sound where the model hears; as a document and as messages."""
    parts: list[dict[str, Any]] = [{"type": "image", "path": "a.png"}, {"type": "text", "text": "the cat sat "}]
    if SOUNDS[kind]:
        parts += [{"type": "audio", "path": "a.wav"}, {"type": "text", "text": "on the mat"}]
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "the moon"},
        {"role": "user", "content": [{"type": "text", "text": "and"}, {"type": "image", "path": "b.png"}]},
    ]
    columns = Columns("messages", chats=True, message_media=True)
    document = document_from({"messages": messages}, columns, "", Path())
    contents = {"a.png": png(), "b.png": png(width=30, height=60, seed=1), "a.wav": wav()}
    media = tuple(Medium(one.kind, one.name, content=contents[one.name]) for one in document.media)
    return Document(document.text, messages=document.messages, media=media), messages


def theirs(kind: str) -> tuple[Any, Any]:
    """transformers' own inputs for that chat, and its hidden states."""
    model = media_model(kind)
    processor = model.media._processor
    text = processor.apply_chat_template(chat(kind)[1], tokenize=False, add_generation_prompt=True)
    given: dict[str, Any] = {"images": [[picture(), picture(width=30, height=60, seed=1)]], "text": [text]}
    if SOUNDS[kind]:
        given["audio"] = [samples_from(wav(), "", 16_000)]
    inputs = processor(**given, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        output = model.hf(**inputs, output_hidden_states=True)
    return inputs, output


@pytest.mark.parametrize("kind", ["gemma3", "gemma4"])
def test_a_prompt_with_media_equals_transformers(kind: str) -> None:
    model = media_model(kind)
    prompt = model.media_prompt(chat(kind)[0])
    inputs, output = theirs(kind)
    assert prompt.tokens.tolist() == inputs["input_ids"][0].tolist()
    assert prompt.inputs is not None
    for name, tensor in prompt.inputs.tensors.items():
        assert torch.equal(tensor.float(), inputs[name].float()), name
    hooks = [f"blocks.{layer}.hook_resid_post" for layer in range(3)]
    result = model.run(prompt, hooks=hooks)
    for layer, hook in enumerate(hooks):
        assert relative_difference(result.activations[hook], output.hidden_states[layer + 1][0]) <= 1e-5
    assert result.logits is not None
    assert relative_difference(result.logits, output.logits[0]) <= 1e-5


@pytest.mark.parametrize("kind", ["gemma3", "gemma4"])
def test_the_fast_path_equals_a_run_at_every_hook_in_batches_too(kind: str) -> None:
    model = media_model(kind)
    prompt = model.media_prompt(chat(kind)[0])
    window = prompt.tokens.numpy().astype(np.int32)
    placed = [
        PlacedMedium(one.kind, one.name, int(np.flatnonzero(soft)[0]), int(soft.sum()), one.content)
        for number, one in enumerate(prompt.media)
        if (soft := (prompt.columns["medium"] == number) & (prompt.columns["modality"] > 0)).any()
    ]
    hooks = [point.name for point in model.hook_names() if point.path == "fast" and point.row_shape is not None]
    result = model.run(prompt, hooks=hooks)
    plain = model.tokenize("the river is deep, but it is not").numpy().astype(np.int32)
    for windows, media, own in (([window], [placed], 0), ([plain, window], [[], placed], len(plain))):
        rows = model.forward_rows(windows, hooks, "float32", 4096, media).wait()
        for hook in hooks:
            ours = torch.from_numpy(rows[hook][own : own + len(window)])
            assert relative_difference(ours, result.activations[hook]) <= 1e-5, hook
    alone = model.forward_rows([plain], hooks[:3], "float32", 4096).wait()
    for hook in hooks[:3]:
        assert relative_difference(torch.from_numpy(rows[hook][: len(plain)]), torch.from_numpy(alone[hook])) <= 1e-5


@pytest.mark.parametrize("kind", ["gemma3", "gemma4"])
def test_tokens_of_an_image_see_each_other_and_nothing_else_looks_ahead(kind: str) -> None:
    """A change of the last soft token's input reaches the first one of the same image, and no token before it."""
    model = media_model(kind)
    prompt = model.media_prompt(chat(kind)[0])
    soft = np.flatnonzero((prompt.columns["medium"] == 0) & (prompt.columns["modality"] == 1))
    entry, last = "blocks.0.hook_resid_pre", "blocks.3.hook_resid_post"

    def pushed(value: torch.Tensor, context: Any) -> torch.Tensor:
        value = value.clone()
        value[0, soft[-1]] += 1.0
        return value

    before = model.run(prompt, hooks=[last]).activations[last]
    after = model.run(prompt, hooks=[last], edits={entry: pushed}).activations[last]
    changed = (before - after).abs().amax(-1) > 1e-6
    assert changed[soft].all()
    assert not changed[: soft[0]].any()


def test_boxes_are_where_the_pixels_are() -> None:
    """Repainting one patch changes that soft token's embedding most."""
    for kind in ("gemma3", "gemma4"):
        model = media_model(kind)
        outer = model.hf.model
        for size in ((56, 56), (90, 30)):
            image = picture(*size)
            own = model.media._process("image", image)
            for number in (1, own.n_tokens // 2, own.n_tokens - 2):
                x0, y0, x1, y1 = (own.places[name][number] for name in ("x0", "y0", "x1", "y1"))
                assert 0 <= x0 < x1 <= 1
                assert 0 <= y0 < y1 <= 1
                painted = image.copy()
                box = [round(x0 * size[0]), round(y0 * size[1]), round(x1 * size[0]), round(y1 * size[1])]
                painted.paste(255 - np.asarray(image).mean().astype(int).item(), tuple(box))
                other = model.media._process("image", painted)
                with torch.no_grad():
                    both = [
                        outer.get_image_features(**one.tensors, return_dict=True).pooler_output[0]
                        for one in (own, other)
                    ]
                difference = (both[0] - both[1]).norm(dim=-1)
                assert int(difference.argmax()) == number, (kind, size, number)


def test_spans_of_a_sound_cover_it() -> None:
    model = media_model("gemma4")
    for seconds in (0.2, 0.5, 1.23):
        places = model.media._process("audio", samples(seconds)).places
        assert places["start_s"][0] == 0
        np.testing.assert_allclose(places["start_s"][1:], places["end_s"][:-1])
        assert seconds - 0.08 <= places["end_s"][-1] <= seconds
        assert len(places["end_s"]) <= model.max_medium_tokens("audio", seconds)


def test_samples_of_every_width_rate_and_channel_are_the_same_sound() -> None:
    reference = samples(0.5)
    for width, tolerance in ((1, 0.01), (2, 1e-4), (3, 1e-6), (4, 1e-6)):
        found = samples_from(wav(width=width, channels=2), "a.wav", 16_000)
        assert found.dtype == np.float32
        assert np.abs(found - reference).max() <= tolerance
    slower = samples_from(wav(rate=48_000), "a.wav", 16_000)
    assert len(slower) == len(reference)
    assert np.abs(slower - reference)[800:-800].max() <= 0.01
    with pytest.raises(InvalidInputError, match=r"b\.wav cannot be read.*PCM WAV"):
        samples_from(b"RIFF", "b.wav", 16_000)


def test_text_alone_is_read_as_ever() -> None:
    model = media_model("gemma3")
    prompt = model.media_prompt(Document("the cat sat"))
    assert prompt.inputs is None
    assert prompt.tokens.tolist() == model.tokenize("the cat sat").tolist()
    assert isinstance(prompt, MediaPrompt)


def test_what_cannot_be_read_is_named() -> None:
    model = media_model("gemma3")
    with pytest.raises(InvalidInputError, match=r"'a\.wav'.*takes no audio"):
        model.media_prompt(Document("<audio>", media=(Medium("audio", "a.wav", content=wav()),)))
    with pytest.raises(InvalidInputError, match=r"x\.png cannot be read"):
        model.media_prompt([{"role": "user", "content": [{"type": "image", "path": "nowhere/x.png"}]}])
    with pytest.raises(InvalidInputError, match="holds <image_soft_token>"):
        model.media_prompt(Document("a <image_soft_token>", media=(Medium("image", "a.png", content=png()),)))
    with pytest.raises(InvalidInputError, match="marks <image>, <image>"):
        model.media_prompt(Document("<image> <image>", media=(Medium("image", "a.png", content=png()),)))
    plain = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
    with pytest.raises(InvalidInputError, match="template that writes media"):
        model.encode_media([chat("gemma3")[0]], plain)
    with pytest.raises(InvalidInputError, match="takes text alone"):
        tiny_model("llama").media_prompt("x")
    half = io.BytesIO()
    Image.new("RGB", (400, 400)).save(half, "JPEG")
    with pytest.raises(InvalidInputError, match=r"half\.jpg cannot be read"):
        model.media_prompt(Document("", media=(Medium("image", "half.jpg", content=half.getvalue()[:300]),)))
    with pytest.raises(InvalidInputError, match="too short"):
        media_model("gemma4").media_prompt(Document("", media=(Medium("audio", "a.wav", content=wav(0.005)),)))
    with pytest.raises(InvalidInputError, match=r"30\.0 s\. Cut it"):
        media_model("gemma4").max_medium_tokens("audio", 31.0)


@pytest.mark.parametrize("kind", ["gemma3", "gemma4"])
def test_the_analysis_path_sees_the_same_and_patterns_too(kind: str) -> None:
    """At every fast hook; and on local layers an image's tokens look at each other in both directions. Gemma 4's global
    layers look back alone."""
    model = media_model(kind, "eager")
    prompt = model.media_prompt(chat(kind)[0])
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str, value: torch.Tensor) -> None:
        seen[name] = value[0].clone()

    points = fast_points(model)
    handlers = {point: functools.partial(keep, point.name) for point in points}
    with torch.no_grad():
        logits = bridge_forward(model, prompt.tokens[None], handlers, True, prompt.inputs)
    local, full = "blocks.0.attn.hook_pattern", "blocks.1.attn.hook_pattern"
    result = model.run(prompt, hooks=[point.name for point in points])
    differences = {name: relative_difference(value, seen[name]) for name, value in result.activations.items()}
    assert max(differences.values()) <= 1e-5, {name: d for name, d in differences.items() if d > 1e-5}
    assert result.logits is not None
    assert logits is not None
    assert relative_difference(result.logits, logits[0]) <= 1e-5
    patterns = model.run(prompt, hooks=[local, full]).activations  # (head, seq, seq) each
    soft = np.flatnonzero((prompt.columns["medium"] == 0) & (prompt.columns["modality"] == 1))
    everything_ahead = torch.ones(patterns[local].shape[-2:], dtype=torch.bool).triu(1)
    ahead = everything_ahead.clone()
    ahead[soft[0] : soft[-1] + 1, soft[0] : soft[-1] + 1] = False
    other = np.flatnonzero((prompt.columns["medium"] == (2 if SOUNDS[kind] else 1)) & (prompt.columns["modality"] == 1))
    ahead[other[0] : other[-1] + 1, other[0] : other[-1] + 1] = False
    assert (patterns[local][..., soft[0], soft[1:]] > 0).any()
    assert patterns[local][..., ahead].abs().max() == 0
    assert patterns[full][..., everything_ahead if kind == "gemma4" else ahead].abs().max() == 0


def test_other_ways_to_run_take_text() -> None:
    model: Any = media_model("gemma3")
    with pytest.raises(WRONG_TYPE):
        model.generate(model.media_prompt(chat("gemma3")[0]))


def test_a_folder_without_a_processor(tmp_path: Path) -> None:
    for path in media_folder("gemma3").iterdir():
        if path.name != "processor_config.json":
            (tmp_path / path.name).symlink_to(path)
    model = LanguageModel.load(str(tmp_path), device="cpu", dtype="float32")
    with pytest.raises(InvalidInputError, match="holds no processor"):
        model.media_prompt("x")
