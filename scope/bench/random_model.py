"""A model of random weights, for machines that have no real one: its speed is that of the real shape."""

from pathlib import Path

import torch

__all__ = ["save_random_llama"]

D_VOCAB = 49_152
BYTES = 256


def save_random_llama(
    folder: Path,
    device: torch.device,
    *,
    n_layers: int = 24,
    d_model: int = 2048,
    n_heads: int = 32,
    n_key_value_heads: int = 32,
    head_dim: int = 64,
) -> None:
    """Save a llama of random bfloat16 weights, by default of 1.7B parameters, with a tokenizer of bytes.

    A token is a byte, so text has about four times the tokens that a real tokenizer gives; a token costs the same.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    signs = sorted(pre_tokenizers.ByteLevel.alphabet())
    assert len(signs) == BYTES
    vocabulary = {"<s>": 0, "</s>": 1} | {sign: number + 2 for number, sign in enumerate(signs)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
