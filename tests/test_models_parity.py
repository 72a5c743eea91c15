"""The fast path equals TransformerLens's bridge, for every hook name: what is read there, and what an edit there does.

Both with eager attention in float32; equal means within 1e-5 of the largest value.
"""

import os
from typing import Any

import numpy as np
import pytest
import torch
from helpers_models import KINDS, MORE_KINDS, fast_points, real_model, relative_difference, tiny_model
from helpers_models import one_thread as one_thread
from torch import Tensor

from scope.models import HookPoint, LanguageModel

TOKENS = torch.arange(4, 40)
REAL_LAYERS = (0, 5, 8, 17)  # sliding and full attention, the first and the last


def bridge_cache(model: LanguageModel, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """What the bridge itself says, called as its own documentation says."""
    model.bridge.set_use_hook_mlp_in(True)
    try:
        with torch.no_grad():
            logits, cache = model.bridge.run_with_cache(tokens[None])
    finally:
        model.bridge.set_use_hook_mlp_in(False)
    return logits[0], {name: value[0] for name, value in cache.items()}


def in_cache(point: HookPoint, cache: dict[str, Tensor]) -> Tensor:
    return next(cache[name] for name in (point.name, *point.aliases) if name in cache)


@pytest.mark.parametrize("kind", [*KINDS, *MORE_KINDS])
def test_every_activation_equals_the_bridges(kind: str) -> None:
    model = tiny_model(kind, "eager")
    points = fast_points(model)
    result = model.run(TOKENS, hooks=[point.name for point in points])
    logits, cache = bridge_cache(model, TOKENS)
    differences = {
        point.name: relative_difference(result.activations[point.name], in_cache(point, cache)) for point in points
    }
    assert max(differences.values()) <= 1e-5, differences
    assert result.logits is not None
    assert relative_difference(result.logits, logits) <= 1e-5


@pytest.mark.parametrize("kind", [*KINDS, "pythia"])
def test_every_alias_names_the_same_tensor_in_the_bridge(kind: str) -> None:
    model = tiny_model(kind, "eager")
    _, cache = bridge_cache(model, TOKENS)
    for point in fast_points(model):
        for alias in point.aliases:
            if alias in cache:
                assert relative_difference(cache[alias], in_cache(point, cache)) == 0, alias


@pytest.mark.parametrize("kind", [*KINDS, "pythia"])
def test_every_edit_does_what_it_does_in_the_bridge(kind: str) -> None:
    model = tiny_model(kind, "eager")
    last = f"blocks.{model.n_layers - 1}.hook_resid_post"

    def halve_and_shift(value: Tensor, hook: Any) -> Tensor:
        return 0.5 * value + 0.1

    for point in fast_points(model):
        if point.name.endswith("hook_resid_mid"):
            continue  # see test_an_edit_of_resid_mid_changes_the_residual_stream
        edited = model.run(TOKENS, hooks=[last], edits={point.name: halve_and_shift})
        seen: dict[str, Tensor] = {}

        def keep(value: Tensor, hook: Any, seen: dict[str, Tensor] = seen) -> None:
            seen["last"] = value.clone()

        name = next(name for name in (point.name, *point.aliases) if name in model.bridge.hook_dict)
        model.bridge.set_use_hook_mlp_in(name.endswith("hook_mlp_in"))
        with torch.no_grad():
            logits = model.bridge.run_with_hooks(TOKENS[None], fwd_hooks=[(name, halve_and_shift), (last, keep)])
        assert edited.logits is not None
        assert relative_difference(edited.logits, logits[0]) <= 1e-5, point.name
        assert relative_difference(edited.activations[last], seen["last"][0]) <= 1e-5, point.name


@pytest.mark.parametrize("path", ["fast", "bridge"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_of_resid_mid_changes_the_residual_stream(kind: str, path: str) -> None:
    """As in HookedTransformer. The bridge itself would only change what the MLP reads."""
    model = tiny_model(kind, "eager")
    names = ["blocks.1.hook_resid_mid", "blocks.1.hook_mlp_in", "blocks.1.hook_mlp_out", "blocks.1.hook_resid_post"]
    more = ["blocks.0.attn.hook_pattern"] if path == "bridge" else []
    zero = {"blocks.1.hook_resid_mid": lambda value, context: torch.zeros_like(value)}
    seen = model.run(TOKENS, hooks=names + more, edits=zero).activations
    assert seen["blocks.1.hook_resid_mid"].abs().max() == 0
    assert seen["blocks.1.hook_mlp_in"].abs().max() == 0
    torch.testing.assert_close(seen["blocks.1.hook_resid_post"], seen["blocks.1.hook_mlp_out"], rtol=0, atol=0)


@pytest.mark.parametrize("kind", [*KINDS, "pythia"])
def test_the_table_lists_what_the_bridge_has(kind: str) -> None:
    """Without booting one: every name that is listed exists there, with the shape that is listed, and none that
    the bridge calls is missing but those of the rotary embedding, which each layer's attention shows too."""
    model = tiny_model(kind, "eager")
    table = model.hook_names()
    called = set(bridge_cache(model, TOKENS)[1])
    listed = {name for point in table for name in (point.name, *point.aliases)}
    assert {name for name in called - listed if not name.startswith("rotary_emb.")} == set()
    assert listed - set(model.bridge.hook_dict) == set()
    for point in table:
        if point.path == "bridge" and (point.name.startswith("blocks.1.") or not point.name.startswith("blocks")):
            value = model.run(TOKENS, hooks=[point.name], logits=False).activations[point.name]
            assert value.shape == tuple(len(TOKENS) if size == "seq" else size for size in point.shape[1:]), point


@pytest.mark.parametrize("kind", KINDS)
def test_both_paths_share_their_weights_and_leave_each_other_alone(kind: str) -> None:
    model = tiny_model(kind, "eager")
    before = model.run(TOKENS).logits
    own = {parameter.data_ptr() for parameter in model.hf.parameters()}
    assert own <= {parameter.data_ptr() for parameter in model.bridge.parameters()}
    assert type(model.hf.get_submodule(model.layout.layer(0))).__module__.startswith("transformers.")
    with pytest.raises(ZeroDivisionError):  # an edit that fails leaves no hook behind
        model.run(TOKENS, edits={"blocks.1.hook_resid_pre": lambda value, context: 1 / 0})
    after = model.run(TOKENS).logits
    assert before is not None
    assert after is not None
    assert torch.equal(before, after)


def test_a_hook_of_the_bridge_alone_goes_with_the_others() -> None:
    model = tiny_model("gemma3", "eager")
    result = model.run(
        TOKENS,
        hooks=["blocks.2.attn.hook_pattern", "blocks.2.attn.hook_v", "blocks.3.hook_resid_post"],
        edits={"blocks.1.attn.hook_pattern": lambda value, context: torch.zeros_like(value)},
    )
    pattern = result.activations["blocks.2.attn.hook_pattern"]
    torch.testing.assert_close(pattern.sum(-1), torch.ones(pattern.shape[:-1]))
    unedited = model.run(TOKENS, hooks=["blocks.3.hook_resid_post"]).activations["blocks.3.hook_resid_post"]
    assert not torch.allclose(unedited, result.activations["blocks.3.hook_resid_post"])


def test_an_edit_of_the_bridge_counts_for_what_is_read_later() -> None:
    model = tiny_model("gemma3", "eager")
    hook = "blocks.3.hook_resid_post"
    zero = {"blocks.1.attn.hook_pattern": lambda value, context: torch.zeros_like(value)}
    edited = model.run(TOKENS, hooks=[hook], edits=zero, logits=False).activations[hook]
    assert relative_difference(edited, model.run(TOKENS, hooks=[hook], edits=zero).activations[hook]) == 0
    assert not torch.allclose(edited, model.run(TOKENS, hooks=[hook]).activations[hook])


def test_a_bridge_gives_gradients_too_and_installs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformer_lens.model_bridge import TransformerBridge

    boot, settings = TransformerBridge.boot_transformers, []

    def spy(*args: Any, **kwargs: Any) -> Any:
        settings.append(os.environ.get("PIP_NO_INDEX"))
        return boot(*args, **kwargs)

    monkeypatch.setattr(TransformerBridge, "boot_transformers", spy)
    monkeypatch.delenv("PIP_NO_INDEX", raising=False)
    shared = tiny_model("llama", "eager")
    model = LanguageModel(shared.hf, shared.files)
    names = ["embed.hook_in", "blocks.1.attn.hook_pattern", "blocks.1.attn.hook_v"]
    result = model.run(TOKENS, hooks=names, grad=True)
    assert settings == ["1"]
    assert "PIP_NO_INDEX" not in os.environ
    assert result.logits is not None
    result.logits[-1, 7].backward()
    pattern, values = (result.activations[name].grad for name in names[1:])
    assert pattern is not None
    assert pattern.abs().max() > 0
    by_fast_path = model.run(TOKENS, hooks=names[2:], grad=True)
    assert by_fast_path.logits is not None
    by_fast_path.logits[-1, 7].backward()
    torch.testing.assert_close(values, by_fast_path.activations[names[2]].grad)


@pytest.mark.real
def test_the_real_model_equals_the_bridge_at_every_kind_of_hook() -> None:
    model = real_model()
    tokens = model.tokenize("The river is deep, but nobody knows why; 日本 and café cost 42 euros.")
    points = [
        point
        for point in fast_points(model)
        if not point.name.startswith("blocks.") or int(point.name.split(".")[1]) in REAL_LAYERS
    ]
    model.hf.set_attn_implementation("eager")
    try:
        result = model.run(tokens, hooks=[point.name for point in points])
    finally:
        model.hf.set_attn_implementation("sdpa")
    seen: dict[str, Tensor] = {}

    def keep(value: Tensor, hook: Any, name: str) -> None:
        seen[name] = value[0].clone()

    bridge = model.bridge
    bridge.set_use_hook_mlp_in(True)
    names = [next(name for name in (p.name, *p.aliases) if name in bridge.hook_dict) for p in points]
    with torch.no_grad():
        bridge.run_with_hooks(
            tokens[None],
            fwd_hooks=[
                (name, lambda value, hook, key=point.name: keep(value, hook, key))
                for name, point in zip(names, points, strict=True)
            ],
        )
    differences = {p.name: relative_difference(result.activations[p.name], seen[p.name]) for p in points}
    assert max(differences.values()) <= 1e-5, differences
    # The default attention differs from eager in the last digits only.
    rows = model.forward_rows([tokens.numpy().astype(np.int32)], ["blocks.8.hook_resid_post"], "float32", 64).wait()
    ours = torch.from_numpy(rows["blocks.8.hook_resid_post"])
    assert relative_difference(ours, seen["blocks.8.hook_resid_post"]) <= 1e-5
