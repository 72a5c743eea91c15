"""Models of random weights, and a benchmark that makes one as it does on a GPU."""

import pytest
import torch
from helpers_models import one_thread as one_thread
from torch.overrides import TorchFunctionMode

from scope.bench import attribute
from scope.bench.attribute import LLAMA, bench_attribute
from scope.bench.embeddings import _gemma
from scope.bench.random_model import SPREAD, random_llama, random_weights
from scope.bench.settings import AttributeBench, EmbeddingsBench
from scope.models import LanguageModel

CPU = torch.device("cpu")
SMALL = {"n_layers": 2, "d_model": 64, "n_heads": 4, "n_key_value_heads": 2, "head_dim": 16}


class Draws(TorchFunctionMode):
    """Notes how many numbers are drawn at a time."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.normal_, torch.Tensor.uniform_):
            self.sizes.append(args[0].numel())
        return func(*args, **(kwargs or {}))


def test_only_what_is_random_is_drawn_and_only_once():
    config = EmbeddingsBench(device="cpu", n_layers=2, d_model=256, d_vocab=512)
    state = torch.random.get_rng_state()
    with Draws() as drawn:
        made = random_weights(lambda: _gemma(config), CPU, torch.bfloat16)
    assert sorted(drawn.sizes) == sorted(weight.numel() for weight in made.parameters() if weight.ndim > 1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_default_dtype() == torch.float32
    assert {weight.dtype for weight in made.parameters()} == {torch.bfloat16}
    plain = dict(_gemma(config).state_dict())
    for name, value in [*made.named_parameters(), *made.named_buffers()]:
        if value.ndim < 2 and name in plain:
            torch.testing.assert_close(value.float(), plain[name].float(), rtol=1e-2, atol=0, msg=name)


def test_the_same_weights_come_each_time(tmp_path):
    one, other = (random_llama(tmp_path, CPU, torch.float32, **SMALL).hf for _ in range(2))
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, other.state_dict()[name]), name
        assert weight.std() == pytest.approx(SPREAD, rel=0.1) if weight.ndim > 1 else bool((weight == 1).all())


def test_a_saved_llama_is_the_model_that_was_made(tmp_path):
    made = random_llama(tmp_path, CPU, torch.float32, save_weights=True, **SMALL)
    loaded = LanguageModel.load(str(tmp_path), device="cpu", dtype="float32")
    tokens = made.tokenize("Ein Satz.")
    assert len(tokens) == 1 + len("Ein Satz.")
    assert made.config._attn_implementation == loaded.config._attn_implementation
    torch.testing.assert_close(made.run(tokens).logits, loaded.run(tokens).logits)


def test_a_circuit_graph_of_what_a_gpu_gets(monkeypatch):
    """The same code at a small size."""
    monkeypatch.setattr(
        attribute, "_model", lambda device, folder: random_llama(folder, device, torch.bfloat16, **{**LLAMA, **SMALL})
    )
    config = AttributeBench(lengths=(6, 20), max_features=30, d_sae=128, k=4, device="cpu")
    figures = bench_attribute(config, lambda _: None)
    assert figures["model"]["dtype"] == "bfloat16"
    assert figures["model"]["gigabytes"] < figures["graphs"][0]["peak_gigabytes"]
    for graph, length in zip(figures["graphs"], (6, 20), strict=True):
        assert (graph["tokens"], graph["features"]) == (length, 30)
        assert graph["active_features"] == 2 * 4 * (length - 1)
        assert graph["kept_nodes"] > 0
        assert graph["estimated_gigabytes"] > 0
