"""Every quantisation of GGUF that can be read goes through the same loader, with the weights that it stands for."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf.quants import dequantize, quantize
from helpers_models import one_thread, tiny_model, write_gguf  # noqa: F401  # a fixture
from test_cli import scope

from scope.models import LanguageModel

pytestmark = pytest.mark.usefixtures("one_thread")
WIDTH, LAYERS = 256, 5
LARGEST = 8.0
QUANTISATIONS = [
    kind
    for kind in gguf.GGMLQuantizationType
    if kind.name.startswith(("Q2", "Q3", "Q4", "Q5", "Q6", "Q8_0", "IQ", "TQ", "BF16", "F16", "MXFP4"))
]


def blocks_of(kind: Any, weight: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Bytes of a matrix: quantised where the gguf package can, else random blocks that stand for small numbers."""
    try:
        return quantize(weight, kind)
    except NotImplementedError:
        size, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    n = weight.size // size
    blocks = rng.integers(0, 256, (n, n_bytes), dtype=np.uint8)
    while True:
        with np.errstate(all="ignore"):
            values = dequantize(blocks, kind)
            bad = ~(np.isfinite(values).all(axis=1) & (np.abs(values).max(axis=1) < LARGEST))
        if not bad.any():
            return blocks.reshape(len(weight), -1)
        blocks[bad] = rng.integers(0, 256, (int(bad.sum()), n_bytes), dtype=np.uint8)


def random_llama() -> Any:
    """Wide enough for blocks of 256 weights."""
    config = transformers.LlamaConfig(
        vocab_size=len(tiny_model("gpt2").tokenizer), hidden_size=WIDTH, intermediate_size=WIDTH,
        num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hf = transformers.LlamaForCausalLM(config)
        for parameter in hf.parameters():
            if parameter.ndim == 2:
                parameter.data.normal_(std=WIDTH**-0.5)
    return hf


def test_a_coarser_file_is_further_from_its_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCOPE_CACHE", str(tmp_path / "cache"))
    hf = random_llama()
    for name in ("F32", "Q8_0", "Q4_0"):
        kind = gguf.GGMLQuantizationType[name]
        weights = {
            key: tensor.numpy() for key, tensor in hf.state_dict().items() if "layers" in key and tensor.ndim == 2
        }
        encoded = {key: (quantize(weight, kind), kind) for key, weight in weights.items()}
        write_gguf(tmp_path / f"{name}.gguf", hf, encoded if name != "F32" else None)
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 20)
    found = scope(
        *("quantisation", tmp_path / "F32.gguf", tmp_path / "Q8_0.gguf", tmp_path / "Q4_0.gguf"),
        *("--data", tmp_path / "text.txt", "--out", tmp_path / "out"),
        *("--layer-tokens", 200, "--context-size", 32, "--json"),
    )["reports"]
    assert all(len(report["conclusions"]) == 2 for report in found.values())
    changes = [[row["change"] for row in found[name]["layers"] if row["source"] == "all"] for name in ("Q8_0", "Q4_0")]
    assert all(0 < fine < coarse for fine, coarse in zip(*changes, strict=True))
    assert max(changes[0]) < 0.05


def test_a_file_quantised_again_stands_for_its_coarser_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCOPE_CACHE", str(tmp_path / "cache"))
    hf = random_llama()
    source = write_gguf(tmp_path / "F32.gguf", hf)
    found = scope("bench", "requantise", source, "Q4_0", "--out", tmp_path / "Q4_0.gguf", "--json")
    assert found["tensors"]["Q8_0"] == 2  # token embeddings and unembedding
    assert found["tensors"]["Q4_0"] == 7 * LAYERS
    assert found["bytes"] < source.stat().st_size / 4
    finest = scope("bench", "requantise", source, "F16", "--out", tmp_path / "F16.gguf", "--json")
    assert "Q8_0" not in finest["tensors"]
    before, after = (
        LanguageModel.load(str(file), device="cpu", dtype="float32") for file in (source, tmp_path / "Q4_0.gguf")
    )
    assert before.identity.tokenizer_hash == after.identity.tokenizer_hash
    kind = gguf.GGMLQuantizationType.Q4_0
    for name, weight in before.hf.state_dict().items():
        new = after.hf.get_parameter(name)
        if "layers" in name and weight.ndim == 2 and "q_proj" not in name and "k_proj" not in name:
            expected = np.asarray(dequantize(quantize(weight.numpy(), kind), kind), np.float32)
            assert np.array_equal(new.numpy(), expected.reshape(weight.shape))
        elif weight.ndim == 1:
            assert torch.equal(new, weight)
        else:
            assert 0 < float((new - weight).norm() / weight.norm()) < 0.2
    for kind_name, out, words in (
        ("Q4_K", "x.gguf", "Q4_0"),
        ("Q8_0", "x.bin", ".gguf"),
        ("Q8_0", "Q4_0.gguf", "exists"),
    ):
        refused = scope("bench", "requantise", source, kind_name, "--out", tmp_path / out, "--json", code=2)
        assert words in refused["error"]["message"]


def test_each_quantisation_loads_as_the_weights_that_it_stands_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCOPE_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    hf = random_llama()
    # q and k are stored with their rows in another order; the other matrices as they are.
    matrices = [
        name
        for name, tensor in hf.state_dict().items()
        if tensor.ndim == 2 and "q_proj" not in name and "k_proj" not in name
    ]
    assert len(QUANTISATIONS) >= 20
    assert len(matrices) >= len(QUANTISATIONS)
    encoded = {}
    for name, kind in zip(matrices, QUANTISATIONS, strict=False):
        content = blocks_of(kind, hf.get_parameter(name).detach().numpy(), rng)
        encoded[name] = (content, kind)
    loaded = LanguageModel.load(str(write_gguf(tmp_path / "mixed.gguf", hf, encoded)), device="cpu", dtype="float32")
    for name, (content, kind) in encoded.items():
        expected = torch.from_numpy(np.asarray(dequantize(content, kind), np.float32))
        found = loaded.hf.get_parameter(name)
        torch.testing.assert_close(found, expected.reshape(found.shape), rtol=0, atol=0, msg=f"{kind.name} in {name}")
    logits = loaded.run("The cat").logits
    assert logits is not None
    assert torch.isfinite(logits).all()
