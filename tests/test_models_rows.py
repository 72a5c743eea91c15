"""`forward_rows`: the rows of real tokens, in order, whatever the batching; and nothing runs past the last layer."""

import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from helpers_models import KINDS, tiny_model
from helpers_models import one_thread as one_thread
from transformers import masking_utils

from activations.source import bf16_to_float32
from scope.errors import InvalidInputError, OutOfRangeError, UnknownNameError
from scope.models import LanguageModel
from scope.models.rows import pack_windows
from scope.models.unpacked import unpacked

HOOKS = ("hook_embed", "blocks.0.attn.hook_z", "blocks.1.hook_resid_mid", "blocks.1.hook_resid_post")
LENGTHS = (5, 12, 1, 12, 12, 7, 12)


def windows(seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [np.r_[2, generator.integers(4, 200, length - 1)].astype(np.int32) for length in LENGTHS]


@pytest.mark.parametrize("batch_size", [1, 16, 30, 1000])
@pytest.mark.parametrize("kind", [*KINDS, "pythia"])
def test_rows_are_what_each_window_gives_alone(kind: str, batch_size: int) -> None:
    model = tiny_model(kind)
    between = "blocks.1.attn.hook_v" if model.layout.parallel else HOOKS[2]
    hooks = (*HOOKS[:2], between, HOOKS[3])
    rows = model.forward_rows(windows(), hooks, "float32", batch_size).wait()
    assert set(rows) == {*hooks, *(f"norm/{hook}" for hook in hooks)}
    alone = [model.run(torch.from_numpy(window), hooks=hooks, logits=False).activations for window in windows()]
    for hook in hooks:
        expected = torch.cat([activations[hook] for activations in alone]).numpy()
        np.testing.assert_allclose(rows[hook], expected, rtol=1e-4, atol=1e-5)
        norms = np.linalg.norm(expected.reshape(len(expected), -1), axis=1)
        np.testing.assert_allclose(rows[f"norm/{hook}"], norms, rtol=1e-5)
        assert rows[f"norm/{hook}"].dtype == np.float32


def test_positions_are_a_row_per_token_though_the_model_computes_them_once() -> None:
    rows = tiny_model("gpt2").forward_rows(windows(), ["hook_pos_embed"], "float32", 1000).wait()["hook_pos_embed"]
    assert rows.shape == (sum(LENGTHS), 32)
    np.testing.assert_array_equal(rows[:5], rows[5:10])


def test_storage_dtypes() -> None:
    model = tiny_model("gemma3")
    hook = "blocks.1.hook_resid_post"
    exact = model.forward_rows(windows(), [hook], "float32", 64).wait()
    half = model.forward_rows(windows(), [hook], "bfloat16", 64).wait()
    assert half[hook].dtype == np.uint16
    np.testing.assert_array_equal(bf16_to_float32(half[hook]), torch.from_numpy(exact[hook]).bfloat16().float().numpy())
    np.testing.assert_array_equal(half[f"norm/{hook}"], exact[f"norm/{hook}"])  # taken before rounding
    assert model.forward_rows(windows(), [hook], "float16", 64).wait()[hook].dtype == np.float16


def test_float16_overflow_stays_an_infinity_for_capture_to_find() -> None:
    model = tiny_model("llama")
    weight = model.hf.get_submodule("model.layers.0.mlp.down_proj").weight
    before = weight.clone()
    try:
        weight.mul_(1e7)
        rows = model.forward_rows(windows(), ["blocks.0.hook_resid_post"], "float16", 64).wait()
    finally:
        weight.copy_(before)
    assert np.isinf(rows["blocks.0.hook_resid_post"]).any()
    assert np.isfinite(rows["norm/blocks.0.hook_resid_post"]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_runs_past_the_last_hook(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(kind)
    reached: list[str] = []

    def reach(name: str) -> object:
        return lambda *_: reached.append(name)

    later = [model.layout.layer(1, model.layout.family.ln2), model.layout.layer(2), model.layout.head]
    handles = [model.hf.get_submodule(path).register_forward_pre_hook(reach(path)) for path in later]
    try:
        for hooks in (["blocks.1.hook_attn_out"], ["blocks.1.hook_attn_out", "blocks.0.hook_resid_pre"]):
            model.forward_rows(windows(), hooks, "float32", 64).wait()
            model.run(torch.arange(4, 9), hooks=hooks, logits=False)
        late = {"blocks.2.hook_resid_post": lambda value, context: value * 0}
        model.run(torch.arange(4, 9), hooks=["blocks.1.hook_attn_out"], edits=late, logits=False)
        assert reached == []
        model.run(torch.arange(4, 9), hooks=["blocks.1.hook_attn_out"])
        assert reached == later
        reached.clear()
        model.run(torch.arange(4, 9), hooks=["ln_final.hook_out"], logits=False)
        assert reached == later[:-1]
    finally:
        for handle in handles:
            handle.remove()


def test_no_hooks_stay_behind_and_nothing_can_be_trained() -> None:
    model = tiny_model("llama")
    model.forward_rows(windows(), HOOKS, "float32", 64).wait()
    for module in model.hf.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_batches_hold_what_fits_and_longer_windows_run_alone() -> None:
    batches = pack_windows(windows(), 24)
    assert sorted(index for batch in batches for index in batch) == list(range(len(LENGTHS)))
    for batch in batches:
        padded = len(batch) * max(LENGTHS[index] for index in batch)
        assert padded <= 24 or len(batch) == 1
    assert [len(batch) for batch in pack_windows(windows(), 3)] == [1] * 7
    with pytest.raises(InvalidInputError, match="batch_size"):
        pack_windows(windows(), 0)


def test_wrong_hooks_are_refused_before_the_model_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("gemma3")
    monkeypatch.setattr(type(model), "forward", lambda *_, **__: pytest.fail("ran"))
    with pytest.raises(UnknownNameError):
        model.forward_rows(windows(), ["blocks.1.hook_resid"], "float32", 64)
    with pytest.raises(InvalidInputError):
        model.forward_rows(windows(), ["blocks.1.attn.hook_pattern"], "float32", 64)
    for length in (0, 65):
        with pytest.raises(InvalidInputError, match="from 1 to 64"):
            model.forward_rows([np.ones(length, np.int32)], HOOKS, "float32", 64)
    for token in (-1, 100_000):
        with pytest.raises(OutOfRangeError, match=str(token)):
            model.forward_rows([np.array([2, token], np.int32)], HOOKS, "float32", 64)


def test_rows_do_not_depend_on_what_ran_before() -> None:
    model = tiny_model("gemma3")
    first = model.forward_rows(windows(), HOOKS, "bfloat16", 32).wait()
    model.forward_rows(windows(1), HOOKS, "bfloat16", 40).wait()
    model.run(torch.arange(4, 30), edits={"blocks.0.hook_resid_mid": lambda value, context: value * 0})
    again = model.forward_rows(windows(), HOOKS, "bfloat16", 32).wait()
    for name, values in first.items():
        np.testing.assert_array_equal(values, again[name])


def test_no_windows_give_no_rows() -> None:
    rows = tiny_model("gemma3").forward_rows([], ["blocks.1.hook_resid_post"], "bfloat16", 64).wait()
    assert rows["blocks.1.hook_resid_post"].shape == (0, 32)


@pytest.mark.gpu
def test_rows_of_a_gpu_equal_those_of_the_cpu() -> None:
    from helpers_models import tiny_folder

    from scope.models import LanguageModel

    model = LanguageModel.load(str(tiny_folder("gemma3")), device="cuda", dtype="float32")
    pending = [model.forward_rows(windows(seed), HOOKS, "float32", 30) for seed in range(4)]
    for seed, rows in enumerate(pending):
        expected = tiny_model("gemma3").forward_rows(windows(seed), HOOKS, "float32", 30).wait()
        for name, values in rows.wait().items():
            np.testing.assert_allclose(values, expected[name], rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [*KINDS, "gemma4"])
def test_on_a_gpu_the_host_waits_for_no_batch(kind: str) -> None:
    """Not Gemma 3n, whose sparse MLPs copy a number to the device, nor experts, whose counts are read on the host."""
    model = LanguageModel.load(str(tiny_model(kind).files.folder), device="cuda", dtype="float32")
    hooks = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
    model.forward_rows(windows(0), hooks, "bfloat16", 30).wait()
    torch.cuda.set_sync_debug_mode("error")
    try:
        pending = model.forward_rows(windows(0), hooks, "bfloat16", 30)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(pending.wait()) == 2 * len(hooks)


def test_windows_are_not_looked_through_for_packed_texts() -> None:
    two_texts = torch.tensor([[0, 1, 2, 0, 1]])
    seen = []
    with unpacked():
        with unpacked():
            assert masking_utils.find_packed_sequence_indices(two_texts) is None
        assert masking_utils.find_packed_sequence_indices(two_texts) is None
        elsewhere = threading.Thread(target=lambda: seen.append(masking_utils.find_packed_sequence_indices(two_texts)))
        elsewhere.start()
        elsewhere.join()
    for found in (*seen, masking_utils.find_packed_sequence_indices(two_texts)):
        assert found.tolist() == [[0, 0, 0, 1, 1]]
    assert len(seen) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_layers_see_what_the_plain_model_sees(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler's place is taken by a function that counts: what it makes of a layer is its own business."""
    compiled: list[str] = []

    def count(forward: Callable[..., object], dynamic: bool) -> Callable[..., object]:
        assert dynamic
        layer = next(path for path, module in plain.hf.named_modules() if module is forward.__self__)

        def run(*args: object, **kwargs: object) -> object:
            compiled.append(layer)
            return forward(*args, **kwargs)

        return run

    plain = tiny_model(kind)
    expected = plain.forward_rows(windows(), HOOKS, "float32", 64).wait()
    monkeypatch.setattr(torch, "compile", count)
    model = LanguageModel(plain.hf, plain.files, compile=True)
    rows = model.forward_rows(windows(), HOOKS, "float32", 64).wait()
    for name, values in expected.items():
        np.testing.assert_array_equal(rows[name], values)
    assert not compiled, "both layers have a hook inside"
    model.forward_rows(windows(), ["blocks.1.hook_resid_post"], "float32", 1000).wait()
    assert compiled == [model.layout.layer(0), model.layout.layer(1)]
    assert model.identity.compute_dtype == "float32, compiled"
    assert plain.identity.compute_dtype == "float32"
    plain.forward_rows(windows(), ["blocks.1.hook_resid_post"], "float32", 1000)
    assert len(compiled) == 2, "the layers are as they were"


@pytest.mark.gpu
def test_compiled_capture_on_a_gpu_is_the_model_up_to_rounding() -> None:
    plain = tiny_model("llama")
    model = LanguageModel.load(str(plain.files.folder), device="cuda", dtype="float32", compile=True)
    hooks = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
    rows = model.forward_rows(windows(), hooks, "float32", 30).wait()
    for hook in hooks:
        expected = plain.forward_rows(windows(), [hook], "float32", 30).wait()[hook]
        np.testing.assert_allclose(rows[hook], expected, atol=1e-3 * np.abs(expected).max())
