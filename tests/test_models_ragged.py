"""Windows one after another in a row without padding: the same rows as padded batches give."""

from typing import Any

import numpy as np
import pytest
import torch
from helpers_models import tiny_folder, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from activations.batching import Window, even_cuts, pack_batches
from scope.models import LanguageModel
from scope.models import ragged as module
from scope.models.ragged import Lengths, attend_ragged, ragged

KINDS = ["gpt2", "llama", "mistral", "qwen3", "gemma3", "gemma3n", "gemma4", "qwen3_moe"]
HOOKS = ["blocks.0.hook_resid_post", "blocks.1.attn.hook_z", "blocks.1.hook_resid_post"]


def varlen_reference(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, also_starts: Tensor, longest: int, also_longest: int,
    scale: float | None, window_size: tuple[int, int],
) -> Tensor:  # fmt: skip
    """What `torch.nn.attention.varlen.varlen_attn` computes, window by window."""
    assert starts is also_starts
    assert longest == also_longest == int(starts.diff().max())
    left, right = window_size
    assert right == 0
    parts = []
    for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        q, k, v = (tensor[start:end].transpose(0, 1)[None] for tensor in (query, key, value))
        behind = torch.arange(end - start)[:, None] - torch.arange(end - start)
        seen = (behind >= 0) & ((behind <= left) | (left < 0))
        parts.append(scaled_dot_product_attention(q, k, v, seen, scale=scale)[0].transpose(0, 1))
    return torch.cat(parts)


def without_padding(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Have a model on the CPU run windows unpadded; the list fills with how many a call of attention was given."""
    given: list[int] = []

    def kernel(*arguments: Any, **settings: Any) -> Tensor:
        given.append(len(arguments[3]) - 1)
        return varlen_reference(*arguments, **settings)

    monkeypatch.setattr(module, "_kernel", lambda: kernel)
    monkeypatch.setattr(model, "pads", False)
    return given


def windows(seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 60, int(length)).astype(np.int32) for length in rng.integers(1, 24, 9)]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_equal_those_of_padded_batches(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(kind)
    hooks = [hook for hook in HOOKS if hook in model.hook_table.names]
    expected = model.forward_rows(windows(), hooks, "float32", 1000).wait()
    given = without_padding(model, monkeypatch)
    for batch_size in (7, 40, 1000):
        given.clear()
        rows = model.forward_rows(windows(), hooks, "float32", batch_size).wait()
        for name, values in expected.items():
            np.testing.assert_allclose(rows[name], values, rtol=1e-4, atol=1e-5)
        assert len(given) == 2 * len(even_cuts([len(window) for window in windows()], batch_size))
        assert sum(given) == 2 * len(windows()), "two layers ran"


def test_outside_attention_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("gemma3")
    prompt = torch.tensor([3, 4, 5, 6, 7, 8])
    before = model.run(prompt).logits
    given = without_padding(model, monkeypatch)
    model.forward_rows(windows(), HOOKS[:1], "float32", 1000).wait()
    assert given
    torch.testing.assert_close(model.run(prompt).logits, before, rtol=0, atol=0)


def test_an_error_ends_it() -> None:
    with pytest.raises(ZeroDivisionError), ragged([2, 3], torch.device("cpu")):
        raise ZeroDivisionError
    assert module._here.lengths is None


def test_positions_begin_anew_with_each_window() -> None:
    with ragged([2, 3], torch.device("cpu")) as positions:
        assert positions.tolist() == [[0, 1, 0, 1, 2]]
        assert module._here.lengths.starts.tolist() == [0, 2, 5]


def test_a_cpu_pads() -> None:
    assert tiny_model("gemma3").pads


@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 60))
def test_even_cuts_are_fewest_and_as_even_as_can_be(lengths: list[int], batch_size: int) -> None:
    cuts = even_cuts(lengths, batch_size)
    parts = [lengths[start:end] for start, end in zip([0, *cuts], cuts, strict=False)]
    assert [length for part in parts for length in part] == lengths
    assert all(len(part) == 1 or sum(part) <= batch_size for part in parts)
    assert all(parts)
    fewest, largest = best_partition(tuple(lengths), batch_size)
    assert len(parts) == fewest
    assert max(map(sum, parts), default=0) == largest


def best_partition(lengths: tuple[int, ...], batch_size: int) -> tuple[int, int]:
    """Fewest parts and their smallest largest sum, by dynamic programming over every cut."""
    best = {0: (0, 0)}
    for end in range(1, len(lengths) + 1):
        best[end] = min(
            (best[start][0] + 1, max(best[start][1], sum(lengths[start:end])))
            for start in range(end)
            if end - start == 1 or sum(lengths[start:end]) <= batch_size
        )
    return best[len(lengths)]


def test_batches_without_padding_keep_the_order() -> None:
    parts = [Window(np.full(length, length, np.int32), row, 0) for length, row in ((3, 0), (9, 3), (4, 12))]
    batches = pack_batches(parts, 12, padded=False)
    assert [[len(window) for window in batch.windows] for batch in batches] == [[3, 9], [4]]
    assert np.concatenate([batch.rows for batch in batches]).tolist() == list(range(16))


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "key_value_heads", "d_head"), [(4, 4, 64), (4, 1, 256), (8, 2, 16)])
@pytest.mark.parametrize("sliding_window", [None, 1, 5])
def test_the_kernel_is_causal_attention_within_windows(
    heads: int, key_value_heads: int, d_head: int, sliding_window: int | None
) -> None:
    torch.manual_seed(0)
    sizes = [1, 17, 130, 3]
    starts = torch.tensor([0, *sizes]).cumsum(0).int().cuda()
    query = torch.randn(1, heads, sum(sizes), d_head, device="cuda", dtype=torch.bfloat16)
    key, value = torch.randn(2, 1, key_value_heads, sum(sizes), d_head, device="cuda", dtype=torch.bfloat16)
    found = attend_ragged(Lengths(starts, max(sizes)), query, key, value, 0.3, sliding_window)
    groups, here = heads // key_value_heads, starts.cpu()
    wide = [query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)]
    q, k, v = (tensor[0].transpose(0, 1).double().cpu() for tensor in wide)
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    expected = varlen_reference(q, k, v, here, here, max(sizes), max(sizes), 0.3, window)
    torch.testing.assert_close(found[0].double().cpu(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["llama", "gemma3", "gemma4", "qwen3_moe"])
def test_a_gpu_needs_no_padding(kind: str) -> None:
    """Against the same weights in bfloat16 on the CPU, and in float32, which says how far rounding goes."""
    folder = str(tiny_folder(kind, **({} if kind == "llama" else {"d_head": 16})))  # FlashAttention: multiples of 8
    model = LanguageModel.load(folder, device="cuda", dtype="bfloat16")
    hooks = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
    assert not model.pads
    rows = model.forward_rows(windows(), hooks, "float32", 1000).wait()
    exact = LanguageModel.load(folder, device="cpu", dtype="float32").forward_rows(windows(), hooks, "float32", 1000)
    rounded = LanguageModel.load(folder, device="cpu", dtype="bfloat16").forward_rows(windows(), hooks, "float32", 1000)
    for name, values in exact.wait().items():
        error = np.abs(rows[name] - values).mean()
        assert error < 2 * np.abs(rounded.wait()[name] - values).mean()
