"""Models of random weights, for machines that have no real one: their speed is that of the real shape."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from scope.models import LanguageModel
from scope.models.loading import ModelFiles, quiet_transformers

__all__ = ["random_llama", "random_weights"]

D_VOCAB = 49_152
BYTES = 256
SPREAD = 0.02
"""Standard deviation of weights."""


def random_weights(make: Callable[[], Any], device: torch.device, dtype: torch.dtype) -> Any:
    """A Hugging Face model of random weights, made where it runs and as it runs: the same ones each time.

    Its own initialisation, which draws most numbers twice, is left out; a billion of them take ten seconds on a CPU.

    Args:
        make: makes the model from its configuration.
        device: where its weights are drawn.
        dtype: of its weights.
    """
    before = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        torch.set_default_dtype(dtype)
        try:
            with quiet_transformers(), device, _Undrawn():
                model = make()
        finally:
            torch.set_default_dtype(before)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:  # others are gains and biases, which are constants
                    parameter.normal_(std=SPREAD)
    return model.eval().requires_grad_(False)


class _Undrawn(TorchFunctionMode):
    """Within it tensors are not filled with random numbers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.normal_, torch.Tensor.uniform_):
            return args[0]
        return func(*args, **(kwargs or {}))


def random_llama(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    *,
    save_weights: bool = False,
    compile: bool = False,
    n_layers: int = 24,
    d_model: int = 2048,
    n_heads: int = 32,
    n_key_value_heads: int = 32,
    head_dim: int = 64,
) -> LanguageModel:
    """A llama of random weights, by default of 1.7B parameters, with a tokenizer of bytes.

    A token is a byte, so text has about four times the tokens that a real tokenizer gives; a token costs the same.

    Args:
        folder: where its tokenizer is written, which has to stay as long as the model is used.
        device: where it runs.
        dtype: in which it computes.
        save_weights: whether its weights are written too, for what reads them from there.
        compile: as `LanguageModel.load` takes it.
        n_layers: layers.
        d_model: width of the residual stream.
        n_heads: heads of a layer.
        n_key_value_heads: heads with keys and values of their own.
        head_dim: width of a head.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=D_VOCAB,
        hidden_size=d_model,
        intermediate_size=4 * d_model,
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        num_key_value_heads=n_key_value_heads,
        head_dim=head_dim,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        architectures=["LlamaForCausalLM"],
    )
    hf = random_weights(lambda: LlamaForCausalLM(config), device, dtype)
    if save_weights:
        with quiet_transformers():
            hf.save_pretrained(folder)
    _save_tokenizer(folder)
    return LanguageModel(hf, ModelFiles(folder, "random llama", None, str(folder)), compile)


def _save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    signs = sorted(pre_tokenizers.ByteLevel.alphabet())
    assert len(signs) == BYTES
    vocabulary = {"<s>": 0, "</s>": 1} | {sign: number + 2 for number, sign in enumerate(signs)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
