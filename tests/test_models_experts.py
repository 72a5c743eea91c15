"""Mixtures of experts: hooks on both paths against the formulas, what edits of the router do, stores, counts."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_models import (
    EXPERT_KINDS,
    TEXT,
    fast_points,
    relative_difference,
    require_both_paths_edit_the_same,
    require_both_paths_read_the_same,
    tiny_model,
)
from helpers_models import one_thread as one_thread
from helpers_saes import make
from torch import Tensor

from activations.capture import capture
from activations.store import ActivationStore
from activations.text import TextSource
from scope.attribution import attribute, router_logit
from scope.errors import InvalidInputError, OutOfRangeError
from scope.interventions import combine, forbid_expert, force_expert, swap_experts
from scope.models import HookPoint, LanguageModel
from scope.saes.base import SAEMetadata

TOKENS = torch.arange(4, 24)
LAYER = 2
MOE = f"blocks.{LAYER}.moe."
NAMES = [f"{MOE}{name}" for name in ("hook_logits", "hook_weights", "hook_experts", "hook_in", "hook_expert_out")]
OUT = f"{MOE}hook_out"


@pytest.mark.parametrize("kind", EXPERT_KINDS)
def test_the_fast_path_equals_the_analysis_path_at_every_hook(kind: str) -> None:
    require_both_paths_read_the_same(tiny_model(kind, "eager"), TOKENS)


@pytest.mark.parametrize("kind", EXPERT_KINDS)
def test_every_edit_does_the_same_on_both_paths(kind: str) -> None:
    model = tiny_model(kind, "eager")
    points = [point for point in fast_points(model) if point.name.startswith(f"blocks.{LAYER}.")]

    def change(point: HookPoint, value: Tensor) -> Tensor:
        return value.flip(-1) if point.name.endswith(("experts", "logits")) else 0.5 * value + 0.1

    require_both_paths_edit_the_same(model, TOKENS, points, change)


@pytest.mark.parametrize("kind", EXPERT_KINDS)
def test_the_hooks_are_the_terms_of_the_formulas(kind: str) -> None:
    model = tiny_model(kind, "eager")
    layer = model.hf.model.layers[LAYER]
    mid, normed = f"blocks.{LAYER}.hook_resid_mid", f"blocks.{LAYER}.ln2.hook_out"
    seen = model.run(TOKENS, hooks=[*NAMES, OUT, mid, normed, f"blocks.{LAYER}.hook_mlp_out"]).activations
    logits, weights, chosen, x, outputs = (seen[name] for name in NAMES)
    probabilities = logits.softmax(-1)
    scale = torch.ones(model.layout.sizes[LAYER].n_experts)
    if kind == "gemma4_experts":
        stream = seen[mid]
        router, experts = layer.router, layer.experts
        unit = stream / (stream.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        torch.testing.assert_close(logits, (unit * router.scale * 32**-0.5) @ router.proj.weight.T)
        torch.testing.assert_close(x, layer.pre_feedforward_layernorm_2(stream))
        scale = router.per_expert_scale
    else:
        experts = layer.mlp.experts
        torch.testing.assert_close(x, seen[normed])
        torch.testing.assert_close(logits, x @ layer.mlp.gate.weight.T)
        torch.testing.assert_close(seen[f"blocks.{LAYER}.hook_mlp_out"], seen[OUT])
    assert torch.equal(chosen, probabilities.topk(2).indices)
    expected = probabilities.gather(-1, chosen)
    if kind != "qwen3_moe":  # whose configuration leaves them as they are
        expected = expected / expected.sum(-1, keepdim=True)
    torch.testing.assert_close(weights, expected * scale[chosen])
    for position in range(len(TOKENS)):
        for slot in range(2):
            expert = int(chosen[position, slot])
            gate, up = (experts.gate_up_proj[expert] @ x[position]).chunk(2)
            made = experts.down_proj[expert] @ (experts.act_fn(gate) * up)
            torch.testing.assert_close(outputs[position, slot], made, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen[OUT], (weights[..., None] * outputs).sum(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", EXPERT_KINDS)
def test_an_edit_of_one_experts_output_is_what_the_sum_loses(kind: str) -> None:
    model = tiny_model(kind)
    seen = model.run(TOKENS, hooks=[*NAMES, OUT]).activations

    def silence(value: Tensor, context: object) -> Tensor:
        new = value.clone()
        new[:, 5, 0] = 0
        return new

    edited = model.run(TOKENS, hooks=[OUT], edits={NAMES[4]: silence}, logits=False).activations[OUT]
    lost = seen[OUT] - edited
    torch.testing.assert_close(lost[5], seen[NAMES[1]][5, 0] * seen[NAMES[4]][5, 0], rtol=1e-3, atol=1e-4)
    assert lost[:5].abs().max() < 1e-4


@pytest.mark.parametrize("kind", EXPERT_KINDS)
def test_a_forbidden_expert_gets_no_token_and_the_next_takes_its_place(kind: str) -> None:
    model = tiny_model(kind)
    before = model.run(TOKENS, hooks=NAMES)
    expert = int(before.activations[NAMES[2]].flatten().mode().values)
    after = model.run(TOKENS, hooks=NAMES, edits=combine(forbid_expert(model, LAYER, expert)))
    chosen = after.activations[NAMES[2]]
    assert (before.activations[NAMES[2]] == expert).any()
    assert not (chosen == expert).any()
    logits = before.activations[NAMES[0]].clone()
    logits[:, expert] = float("-inf")
    assert torch.equal(chosen, logits.topk(2).indices)
    if kind == "mixtral":
        torch.testing.assert_close(after.activations[NAMES[1]].sum(-1), torch.ones(len(TOKENS)))
    untouched = (before.activations[NAMES[2]] != expert).all(-1)
    first = untouched.nonzero()[0].item() if untouched.any() else None
    if first is not None:
        torch.testing.assert_close(after.activations[NAMES[4]][first], before.activations[NAMES[4]][first])
    assert relative_difference(after.logits, before.logits) > 1e-4  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", EXPERT_KINDS)
def test_forced_and_swapped_experts_take_place_and_weight(kind: str) -> None:
    model = tiny_model(kind)
    seen = model.run(TOKENS, hooks=[*NAMES, OUT]).activations
    chosen, weights = seen[NAMES[2]], seen[NAMES[1]]
    forced = model.run(TOKENS, hooks=[*NAMES, OUT], edits=combine(force_expert(model, LAYER, 3, positions=[7])))
    there = forced.activations[NAMES[2]]
    assert (there[7] == 3).any()
    assert torch.equal(there[:7], chosen[:7])
    assert torch.equal(there[7, 0], chosen[7, 0])
    outputs, given = forced.activations[NAMES[4]], forced.activations[NAMES[1]]
    scale = model.hf.model.layers[LAYER].router.per_expert_scale if kind == "gemma4_experts" else torch.ones(4)
    torch.testing.assert_close(given / scale[there], weights / scale[chosen])
    torch.testing.assert_close(forced.activations[OUT], (given[..., None] * outputs).sum(1), rtol=1e-4, atol=1e-5)
    swapped = model.run(TOKENS, hooks=NAMES, edits=combine(swap_experts(model, LAYER, 0, 1))).activations[NAMES[2]]
    expected = torch.where(chosen == 0, 1, torch.where(chosen == 1, 0, chosen))
    assert torch.equal(swapped, expected)
    back = combine(swap_experts(model, LAYER, 0, 1), swap_experts(model, LAYER, 1, 0))
    torch.testing.assert_close(model.run(TOKENS, edits=back).logits, model.run(TOKENS).logits)


@pytest.mark.parametrize("kind", EXPERT_KINDS)
@pytest.mark.parametrize("freeze", [False, True])
def test_a_text_under_edits_of_the_router_is_written_from_a_cache(
    kind: str, freeze: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(kind)
    texts = set()
    for edit in (forbid_expert(model, LAYER, 1), force_expert(model, LAYER, 1), swap_experts(model, LAYER, 0, 1)):
        edits = combine(edit, freeze_attention=freeze)
        widths: list[int] = []
        real = LanguageModel.forward
        monkeypatch.setattr(LanguageModel, "forward", lambda *a, w=widths, r=real: w.append(a[1].shape[1]) or r(*a))
        cached = list(model.stream(TOKENS, 12, edits))
        monkeypatch.undo()
        assert widths[1:] == [1] * (len(cached) - 1)
        again = list(model.stream(TOKENS, 12, edits, cache=False))
        assert [token.token_id for token in cached] == [token.token_id for token in again]
        found, expected = (torch.tensor([token.log_probability for token in some]) for some in (cached, again))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        texts.add(tuple(found.tolist()))
    assert len(texts) == 3


def test_wrong_experts_and_layers_are_refused() -> None:
    model = tiny_model("qwen3_moe")
    with pytest.raises(OutOfRangeError, match="no expert 4"):
        forbid_expert(model, 0, 4)
    with pytest.raises(InvalidInputError, match=r"layers \[0, 2\] do"):
        force_expert(model, 1, 0)
    with pytest.raises(InvalidInputError, match="no experts"):
        swap_experts(tiny_model("llama"), 0, 1, 2)
    with pytest.raises(InvalidInputError, match="itself"):
        swap_experts(model, 0, 1, 1)


def test_a_layer_with_a_dense_mlp_has_its_hooks() -> None:
    model = tiny_model("qwen3_moe")
    names = model.hook_names().names
    assert "blocks.1.mlp.hook_post" in names
    assert "blocks.0.mlp.hook_post" not in names
    assert not any(name.startswith("blocks.1.moe") for name in names)
    experts = model.hook_names("experts")
    assert len(experts) == 12


@pytest.mark.parametrize("kind", EXPERT_KINDS)
def test_router_and_experts_are_gradients_too(kind: str) -> None:
    """A router's logits as the target of a gradient, and as what a gradient reaches."""
    model = tiny_model(kind)
    resid, logits = f"blocks.{LAYER}.hook_resid_pre", NAMES[0]
    result = model.run(TOKENS, hooks=[resid, logits], grad=True)
    result.activations[logits][9, 1].backward()
    gradient = result.activations[resid].grad
    assert gradient is not None
    assert gradient[:10].abs().max() > 0
    assert gradient[10:].abs().max() == 0
    step = 1e-3 * gradient / gradient.norm()

    def nudge(value: Tensor, context: object) -> Tensor:
        return value + step

    moved = model.run(TOKENS, hooks=[logits], edits={resid: nudge}, logits=False).activations[logits]
    change = float(moved[9, 1] - result.activations[logits][9, 1].detach())
    assert change == pytest.approx(float((step * gradient).sum()), rel=0.05)


def test_a_store_keeps_what_the_router_chose(tmp_path: Path) -> None:
    model = tiny_model("gemma4_experts")
    (tmp_path / "text.txt").write_text(TEXT * 4)
    capture(
        model, TextSource(tmp_path / "text.txt"), [*NAMES, OUT], tmp_path / "acts.zarr", max_tokens=300,
        context_size=32, dtype="bfloat16",
    )  # fmt: skip
    store = ActivationStore.open(tmp_path / "acts.zarr")
    tokens = store.window_tokens([0])[0]
    seen = model.run(torch.from_numpy(tokens.astype("int64")), hooks=[*NAMES, OUT], logits=False).activations
    chosen = store.read_float32(NAMES[2], 0, len(tokens))
    np.testing.assert_array_equal(chosen, seen[NAMES[2]].numpy())
    for name in (NAMES[0], NAMES[1], NAMES[4], OUT):
        np.testing.assert_allclose(store.read_float32(name, 0, len(tokens)), seen[name].numpy(), rtol=2e-2, atol=2e-2)


def test_a_router_logit_is_attributed_to_features() -> None:
    model = tiny_model("mixtral")
    sae = make("topk", d_in=32, d_sae=60, k=6, seed=1, metadata=SAEMetadata(hook_name="blocks.1.hook_resid_pre"))
    target = router_logit(model, LAYER, 1, position=9)
    exact = attribute(model, TOKENS, target, [sae], "activation_patching")
    logits = model.run(TOKENS, hooks=[NAMES[0]], logits=False).activations[NAMES[0]][9]
    assert exact.value == pytest.approx(float(logits[1] - logits.mean()), rel=1e-4)
    moved = exact.table[exact.table["effect"].abs() > 1e-5]
    assert len(moved)
    assert moved["position"].max() <= 9
    with pytest.raises(OutOfRangeError):
        router_logit(model, LAYER, 4)
