"""Tiny random models of real architectures, saved to a folder with a small tokenizer and loaded from there.

`tiny_folder("gemma3")` and `tiny_model("gemma3")` are cached for the test session. Weights are seeded; every
parameter, norm gains and biases too, is random, so that a missing `1 + w` or a forgotten bias cannot hide.
"""

import atexit
import functools
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from jaxtyping import TypeCheckError
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from scope.errors import InvalidInputError
from scope.models import HookPoint, LanguageModel
from scope.models.bridge import bridge_forward
from scope.models.loading import quiet_transformers

WRONG_TYPE = (InvalidInputError, TypeCheckError)
"""What a value of another type gets: our error, or jaxtyping's where the run-time check is on."""
KINDS = ("gemma3", "llama", "gpt2")
MORE_KINDS = ("gemma2", "gemma3_multimodal", "mistral", "pythia", "pythia_serial", "qwen2", "qwen3")
PER_LAYER_KINDS = ("gemma3n", "gemma4")
"""Models with per-layer embeddings."""
EXPERT_KINDS = ("mixtral", "qwen3_moe", "gemma4_experts")
"""Models with experts."""
TEXT = (
    "The cat sat on the mat and looked at the moon. She thinks that the river is deep, but it is not.\n"
    "In 1905 the old mill by the river burned down; nobody knew why. Le café était fermé à midi.\n"
)


def _sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """Gemma's kind: spaces as ▁, what is not in the vocabulary as byte tokens such as <0xC3>."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    ascii_text = "".join(character for character in TEXT if character.isascii())
    trainer = trainers.BpeTrainer(vocab_size=480, special_tokens=special + byte_tokens, show_progress=False)
    tokenizer.train_from_iterator([ascii_text] * 2, trainer)
    # Training marked the byte tokens as special; only the four above are.
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in special]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )


def _byte_level_tokenizer(bos: bool = True) -> PreTrainedTokenizerFast:
    """GPT-2's kind: byte-level BPE, one special token. Qwen's has no BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    ascii_text = "".join(character for character in TEXT if character.isascii())
    tokenizer.train_from_iterator([ascii_text] * 2, trainer)
    end = "<|endoftext|>"
    start = {"bos_token": end} if bos else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, unk_token=end, **start)


def _rotary_config(d_vocab: int, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": d_vocab,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
        **more,
    }


def _gemma(version: int, d_vocab: int, d_head: int = 12) -> Any:
    layers = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
    config = _rotary_config(d_vocab, head_dim=d_head, query_pre_attn_scalar=12, sliding_window=8, **layers)
    if version == 2:
        return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**config))
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**config))


def _gemma3_multimodal(d_vocab: int) -> Any:
    text = _gemma(3, d_vocab).config.to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=380,
        boi_token_index=381,
        eoi_token_index=382,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def _gemma3n(d_vocab: int, n_streams: int = 3, active_stream: int = 0) -> Any:
    """AltUp streams, sparse and plain MLPs, and two layers that share the keys and values of the first two."""
    config = _rotary_config(
        d_vocab, num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2, head_dim=12,
        sliding_window=8, vocab_size_per_layer_input=d_vocab, hidden_size_per_layer_input=6, altup_num_inputs=n_streams,
        altup_active_idx=active_stream,
        laurel_rank=4, num_kv_shared_layers=2, activation_sparsity_pattern=[0.5, 0.5, 0.0, 0.0],
    )  # fmt: skip
    return transformers.Gemma3nForCausalLM(transformers.Gemma3nTextConfig(**config))


def _gemma4(d_vocab: int, d_head: int = 12, **more: Any) -> Any:
    """Heads of two widths, and layer scalars that are not 1."""
    config = _rotary_config(
        d_vocab, num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2, head_dim=d_head,
        global_head_dim=16, sliding_window=8, vocab_size_per_layer_input=d_vocab, **more,
    )  # fmt: skip
    model = transformers.Gemma4ForCausalLM(transformers.Gemma4TextConfig(**config))
    for index, layer in enumerate(model.model.layers):
        layer.layer_scalar.fill_(0.7 + 0.2 * index)
    return model


def _gemma4_experts(d_vocab: int) -> Any:
    """Keys that are values too on full attention, and experts beside the MLP."""
    return _gemma4(
        d_vocab, num_global_key_value_heads=1, attention_k_eq_v=True, hidden_size_per_layer_input=0,
        enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=16,
    )  # fmt: skip


def _gemma4_multimodal(d_vocab: int) -> Any:
    """As Gemma 4 E2B is published: the text model inside a model with a vision tower."""
    text = _gemma4(d_vocab, hidden_size_per_layer_input=6, num_kv_shared_layers=2).config.to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma4Config(
        text_config=text,
        vision_config={**vision, "num_key_value_heads": 2, "head_dim": 8, "patch_size": 4},
        boi_token_id=380, eoi_token_id=381, image_token_id=382, video_token_id=383, boa_token_id=384,
        eoa_token_index=385, audio_token_id=386,
    )  # fmt: skip
    return transformers.Gemma4ForConditionalGeneration(config)


def _diffusion_gemma(d_vocab: int) -> Any:
    """Layer scalars that differ between the encoder and the denoiser, as those alone are not shared."""
    text = _rotary_config(
        d_vocab, num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"], head_dim=12,
        global_head_dim=16, num_global_key_value_heads=1, sliding_window=8, num_experts=4, top_k_experts=2,
        moe_intermediate_size=16,
    )  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.DiffusionGemmaConfig(
        text_config=text,
        vision_config={
            "model_type": "gemma4_vision", **vision, "num_key_value_heads": 2, "head_dim": 8, "patch_size": 4,
        },
        boi_token_id=380, eoi_token_id=381, image_token_id=382, canvas_length=8,
    )  # fmt: skip
    model = transformers.DiffusionGemmaForBlockDiffusion(config)
    for stack, start in ((model.model.encoder.language_model, 0.9), (model.model.decoder, 0.7)):
        for index, layer in enumerate(stack.layers):
            layer.layer_scalar.fill_(start + 0.2 * index)
    sampler = {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 6.0}
    model.generation_config = type(model.generation_config)(
        max_new_tokens=16, max_denoising_steps=5, t_min=0.4, t_max=0.8, sampler_config=sampler
    )
    return model


def _mixtral(d_vocab: int) -> Any:
    config = _rotary_config(d_vocab, num_local_experts=4, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**config))


def _qwen3_moe(d_vocab: int, d_head: int = 12) -> Any:
    """Its second layer has a dense MLP."""
    config = _rotary_config(
        d_vocab, head_dim=d_head, bos_token_id=None, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
        mlp_only_layers=[1],
    )  # fmt: skip
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**config))


def _llama(d_vocab: int) -> Any:
    config = _rotary_config(d_vocab, tie_word_embeddings=False)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))


def _mistral(d_vocab: int) -> Any:
    return transformers.MistralForCausalLM(transformers.MistralConfig(**_rotary_config(d_vocab)))


def _qwen(version: int, d_vocab: int) -> Any:
    config = _rotary_config(d_vocab, bos_token_id=None)
    if version == 2:
        return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**config))
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**config, head_dim=12))


def _gpt2(d_vocab: int) -> Any:
    config = {"vocab_size": d_vocab, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**config, bos_token_id=0, eos_token_id=0))


def _pythia(d_vocab: int, parallel: bool = True) -> Any:
    """Rotates a half of each head; its tokenizer has a BOS that it was not trained with, as Pythia's."""
    rotation = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}
    config = transformers.GPTNeoXConfig(
        vocab_size=d_vocab, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=64, use_parallel_residual=parallel, rope_parameters=rotation, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    return transformers.GPTNeoXForCausalLM(config)


_BUILDERS: dict[str, tuple[Callable[..., Any], Callable[[], PreTrainedTokenizerFast]]] = {
    "gemma3": (functools.partial(_gemma, 3), _sentencepiece_tokenizer),
    "llama": (_llama, _sentencepiece_tokenizer),
    "gpt2": (_gpt2, _byte_level_tokenizer),
    "gemma2": (functools.partial(_gemma, 2), _sentencepiece_tokenizer),
    "gemma3_multimodal": (_gemma3_multimodal, _sentencepiece_tokenizer),
    "gemma3n": (_gemma3n, _sentencepiece_tokenizer),
    "gemma4": (
        functools.partial(_gemma4, hidden_size_per_layer_input=6, num_kv_shared_layers=2),
        _sentencepiece_tokenizer,
    ),
    "gemma4_experts": (_gemma4_experts, _sentencepiece_tokenizer),
    "gemma4_multimodal": (_gemma4_multimodal, _sentencepiece_tokenizer),
    "diffusion_gemma": (_diffusion_gemma, _sentencepiece_tokenizer),
    "mixtral": (_mixtral, _sentencepiece_tokenizer),
    "qwen3_moe": (_qwen3_moe, functools.partial(_byte_level_tokenizer, bos=False)),
    "mistral": (_mistral, _sentencepiece_tokenizer),
    "pythia": (_pythia, _byte_level_tokenizer),
    "pythia_serial": (functools.partial(_pythia, parallel=False), _byte_level_tokenizer),
    "qwen2": (functools.partial(_qwen, 2), functools.partial(_byte_level_tokenizer, bos=False)),
    "qwen3": (functools.partial(_qwen, 3), functools.partial(_byte_level_tokenizer, bos=False)),
}


@pytest.fixture(autouse=True)
def one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tiny matrices on several threads cost ten times as much where the cores are busy. Import it to use it."""
    threads = torch.get_num_threads()
    if "real" not in request.keywords:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def _root() -> Path:
    root = Path(tempfile.mkdtemp(prefix="scope-tiny-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return root


@functools.cache
def tiny_folder(kind: str, **sizes: int) -> Path:
    """A folder as Hugging Face lays it out, with the tiny model and its tokenizer; `d_head` makes other heads of
    gemma2, gemma3, gemma4 and qwen3_moe."""
    build, make_tokenizer = _BUILDERS[kind]
    tokenizer = make_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build(len(tokenizer), **sizes)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                spread = 0.3 * torch.randn(parameter.shape)
                offset = kind in ("gemma2", "gemma3", "gemma3_multimodal")  # norms of 1 + weight
                centre = 0.0 if offset or name.endswith("bias") else 1.0
                parameter.data.copy_(centre + spread)
            else:
                parameter.data.copy_(torch.randn(parameter.shape) * (parameter.shape[-1] ** -0.5))
    folder = _root() / "-".join([kind, *(f"{name}-{size}" for name, size in sizes.items())])
    with quiet_transformers():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@functools.cache
def tiny_model(kind: str, attention: Any = None) -> LanguageModel:
    """The tiny model as the workbench loads it: float32 on the CPU."""
    return LanguageModel.load(str(tiny_folder(kind)), device="cpu", dtype="float32", attention=attention)


@functools.cache
def real_model() -> LanguageModel:
    """Gemma 3 270M (marker `real`), float32 on the CPU, loaded once for all tests."""
    return LanguageModel.load("gemma-3-270m", device="cpu", dtype="float32")


def fast_points(model: LanguageModel) -> list[HookPoint]:
    """The hooks of the fast path."""
    return [point for point in model.hook_names() if point.path == "fast"]


def relative_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference over the largest of `theirs`."""
    assert ours.shape == theirs.shape
    return float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max().clamp_min(1e-30))


def require_both_paths_read_the_same(model: LanguageModel, tokens: torch.Tensor) -> None:
    """At every fast hook the analysis path sees what the fast path does, in the shape that is listed; and the logits
    are those of transformers."""
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str, value: torch.Tensor) -> None:
        seen[name] = value[0].clone()

    handlers = {point: (lambda value, name=point.name: keep(name, value)) for point in fast_points(model)}
    with torch.no_grad():
        logits = bridge_forward(model, tokens[None], handlers, True)
    result = model.run(tokens, hooks=[point.name for point in fast_points(model)])
    differences = {name: relative_difference(value, seen[name]) for name, value in result.activations.items()}
    assert max(differences.values()) <= 1e-5, {name: d for name, d in differences.items() if d > 1e-5}
    for name, value in result.activations.items():
        assert value.shape == (len(tokens), *model.hook_shape(name)), name
    assert result.logits is not None
    assert logits is not None
    assert relative_difference(result.logits, logits[0]) <= 1e-5
    with torch.no_grad():
        assert relative_difference(result.logits, model.hf(tokens[None]).logits[0]) <= 1e-5


def require_both_paths_edit_the_same(
    model: LanguageModel,
    tokens: torch.Tensor,
    points: Iterable[HookPoint],
    change: Callable[[HookPoint, torch.Tensor], torch.Tensor],
) -> None:
    """An edit at each of some hooks does the same on both paths, and something at all."""
    plain = model.run(tokens).logits
    assert plain is not None
    for point in points:
        handler = functools.partial(change, point)
        with torch.no_grad():
            ours = model.forward(tokens[None], {point: handler}, True)
            theirs = bridge_forward(model, tokens[None], {point: handler}, True)
        assert ours is not None
        assert theirs is not None
        assert relative_difference(ours, theirs) <= 1e-5, point.name
        assert relative_difference(ours[0], plain) > 1e-4, f"an edit at {point.name} changed nothing"


@functools.cache
def tiny_gguf() -> Path:
    """The tiny Llama as a GGUF file (float32), with the byte-level tokenizer."""
    return write_gguf(_root() / "tiny.gguf", tiny_model("llama").hf)


def write_gguf(path: Path, model: Any, encoded: Any = None) -> Path:
    """A Llama as a GGUF file with the byte-level tokenizer; `encoded` gives, by name of the parameter, bytes and
    quantisation of those that are not float32."""
    tokenizer = tiny_model("gpt2").tokenizer
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    writer = gguf.GGUFWriter(path, "llama")
    config = model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config.vocab_size)
    for name, tensor in model.state_dict().items():
        layer = re.match(r"model\.layers\.(\d+)\.(.*)\.weight", name)
        new = f"blk.{layer[1]}.{names[layer[2]]}" if layer else names[name.removesuffix(".weight")]
        if encoded and name in encoded:
            content, kind = encoded[name]
            writer.add_tensor(f"{new}.weight", content, raw_dtype=kind)
        else:
            writer.add_tensor(f"{new}.weight", tensor.numpy())
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    tokens += [f"<unused{place}>" for place in range(config.vocab_size - len(tokens))]
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class TinyDictionary(torch.nn.Module):
    """A random ReLU dictionary that satisfies `scope.models.Dictionary` and nothing more."""

    def __init__(self, hook_name: str, d_in: int = 32, d_sae: int = 64, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.hook_name, self.d_in, self.d_sae = hook_name, d_in, d_sae
        self.W_enc = torch.nn.Parameter(torch.randn(d_in, d_sae, generator=generator) * 0.1)
        self.W_dec = torch.nn.Parameter(torch.randn(d_sae, d_in, generator=generator) * 0.1)
        self.b_dec = torch.nn.Parameter(torch.randn(d_in, generator=generator) * 0.1)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu((x - self.b_dec) @ self.W_enc)

    def decode(self, f: torch.Tensor) -> torch.Tensor:
        return f @ self.W_dec + self.b_dec

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decode(self.encode(x))
