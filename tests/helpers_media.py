"""Tiny random models with towers, saved with their processors, and small images and sounds that tests make.

`media_folder("gemma3")` and `media_model("gemma3")` are cached for the test session. The towers are transformers' own,
with random weights: they show that pixels and samples arrive, and nothing about a model.
"""

import functools
import io
import json
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from helpers_models import _root, _rotary_config, _sentencepiece_tokenizer
from PIL import Image

from scope.models import LanguageModel
from scope.models.loading import quiet_transformers

MEDIA_KINDS = ("gemma3", "gemma4")
TOKENS = {
    "gemma3": {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
    "gemma4": {
        "boi_token": "<|image>", "eoi_token": "<image|>", "image_token": "<|image|>",
        "boa_token": "<|audio>", "eoa_token": "<audio|>", "audio_token": "<|audio|>",
    },
}  # fmt: skip
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{% if m.content is string %}{{ m.content | trim }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'image' %}IMAGE{% elif part.type == 'audio' %}AUDIO{% else %}{{ part.text | trim }}{% endif %}"
    "{% endfor %}{% endif %}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
TEMPLATES = {
    "gemma3": TEMPLATE.replace("IMAGE", "<start_of_image>"),
    "gemma4": TEMPLATE.replace("IMAGE", "<|image|>").replace("AUDIO", "<|audio|>"),
}
"""As those of the published models write turns and media, and nothing besides."""
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def _tokenizer(kind: str) -> Any:
    tokenizer = _sentencepiece_tokenizer()
    turns = ["<start_of_turn>", "<end_of_turn>", *(["<|video|>"] if kind == "gemma4" else [])]
    tokenizer.add_special_tokens({"extra_special_tokens": [*turns, *TOKENS[kind].values()]})
    folder = _root() / f"{kind}-words"
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "extra_special_tokens": TOKENS[kind]}))
    return transformers.AutoTokenizer.from_pretrained(folder)


def _text_config(d_vocab: int, **more: Any) -> dict[str, Any]:
    layers = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
    return {**_rotary_config(d_vocab, head_dim=12, sliding_window=8, **layers), "max_position_embeddings": 256, **more}


def _gemma3(tokenizer: Any) -> tuple[Any, Any]:
    """Images of 28 x 28 pixels, 2 x 2 soft tokens each, which is more than a sliding window takes from one side."""
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in TOKENS["gemma3"].items()}
    config = transformers.Gemma3Config(
        text_config=_text_config(len(tokenizer), query_pre_attn_scalar=12),
        vision_config={**VISION, "image_size": 28, "patch_size": 7},
        mm_tokens_per_image=4,
        image_token_index=ids["image_token"], boi_token_index=ids["boi_token"], eoi_token_index=ids["eoi_token"],
    )  # fmt: skip
    images = transformers.Gemma3ImageProcessorPil(size={"height": 28, "width": 28}, do_normalize=True)
    processor = transformers.Gemma3Processor(images, tokenizer, chat_template=TEMPLATES["gemma3"], image_seq_length=4)
    return transformers.Gemma3ForConditionalGeneration(config), processor


def _gemma4(tokenizer: Any) -> tuple[Any, Any]:
    """Images keep their shape, up to 70 soft tokens; sounds have one soft token in 40 ms."""
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in TOKENS["gemma4"].items()}
    text = _text_config(
        len(tokenizer), global_head_dim=16, vocab_size_per_layer_input=len(tokenizer), hidden_size_per_layer_input=6,
        num_kv_shared_layers=2, use_bidirectional_attention="vision",
    )  # fmt: skip
    audio = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "subsampling_conv_channels": [128, 4]}
    config = transformers.Gemma4Config(
        text_config=text,
        vision_config={**VISION, "num_key_value_heads": 2, "head_dim": 8, "patch_size": 4},
        audio_config={**audio, "output_proj_dims": 16},
        boi_token_id=ids["boi_token"], eoi_token_id=ids["eoi_token"], image_token_id=ids["image_token"],
        video_token_id=tokenizer.convert_tokens_to_ids("<|video|>"), boa_token_id=ids["boa_token"],
        eoa_token_index=ids["eoa_token"], audio_token_id=ids["audio_token"],
    )  # fmt: skip
    model = transformers.Gemma4ForConditionalGeneration(config)
    for index, layer in enumerate(model.model.language_model.layers):
        layer.layer_scalar.fill_(0.7 + 0.2 * index)
    parts = {
        "image_processor": transformers.Gemma4ImageProcessorPil(patch_size=4, max_soft_tokens=70).to_dict(),
        "feature_extractor": transformers.Gemma4AudioFeatureExtractor().to_dict(),
    }
    return model, {"processor_class": "Gemma4Processor", **parts}


@functools.cache
def media_folder(kind: str) -> Path:
    """A folder as Hugging Face lays it out: the tiny model, its tokenizer and its processor."""
    tokenizer = _tokenizer(kind)
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(0)
        model, processor = {"gemma3": _gemma3, "gemma4": _gemma4}[kind](tokenizer)
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.data.copy_(torch.randn(parameter.shape) * (parameter.shape[-1] ** -0.5))
            elif "language_model" in name:
                parameter.data.add_(0.3 * torch.randn(parameter.shape))
        folder = _root() / f"{kind}-media"
        model.save_pretrained(folder)
    tokenizer.chat_template = TEMPLATES[kind]
    tokenizer.save_pretrained(folder)
    if isinstance(processor, dict):  # building it needs torchvision, for videos
        (folder / "processor_config.json").write_text(json.dumps(processor, default=str))
    else:
        processor.save_pretrained(folder)
    return folder


@functools.cache
def media_model(kind: str, attention: Any = None) -> LanguageModel:
    """The tiny model as the workbench loads it: float32 on the CPU."""
    return LanguageModel.load(str(media_folder(kind)), device="cpu", dtype="float32", attention=attention)


def picture(width: int = 40, height: int = 28, seed: int = 0) -> Image.Image:
    """Coloured squares."""
    squares = np.random.default_rng(seed).integers(0, 256, (-(-height // 7), -(-width // 7), 3), dtype=np.uint8)
    return Image.fromarray(squares.repeat(7, 0).repeat(7, 1)[:height, :width])


def png(**settings: Any) -> bytes:
    """The same, as a file's bytes."""
    stream = io.BytesIO()
    picture(**settings).save(stream, "PNG")
    return stream.getvalue()


def samples(seconds: float = 0.5, pitch: float = 440.0, rate: int = 16_000) -> np.ndarray:
    """A tone that swells, float32 in [-1, 1]."""
    time = np.arange(round(seconds * rate)) / rate
    return (0.8 * np.sin(2 * np.pi * pitch * time) * time / seconds).astype(np.float32)


def wav(seconds: float = 0.5, pitch: float = 440.0, rate: int = 16_000, channels: int = 1, width: int = 2) -> bytes:
    """The same as a PCM file's bytes; `width` is bytes a sample."""
    tone = samples(seconds, pitch, rate).repeat(channels)
    whole = np.round(tone * (2 ** (8 * width - 1) - 1)).astype("<i4") + (128 if width == 1 else 0)
    raw = whole.view(np.uint8).reshape(-1, 4)[:, :width].tobytes()
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(raw)
    return stream.getvalue()


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
