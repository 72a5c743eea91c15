"""Interventions do what they say, where they say, and nothing else."""

import numpy as np
import pytest
import torch
from helpers_models import KINDS, WRONG_TYPE, TinyDictionary, tiny_model
from helpers_models import one_thread as one_thread
from torch import Tensor

from scope import interventions
from scope.errors import InvalidInputError, MismatchError, OutOfRangeError, UnknownNameError
from scope.interventions import (
    Edit,
    ablate,
    ablate_features,
    add_direction,
    combine,
    patch,
    project_out,
    scale,
    scale_features,
    set_,
    set_features,
    splice,
)
from scope.models import LanguageModel, RunResult

PROMPT = "The cat sat on the mat"
HOOK = "blocks.1.hook_resid_post"
Z = "blocks.1.attn.hook_z"
FEATURES = [3, 17, 40]


def run(*edits: Edit, hook: str = HOOK, kind: str = "gemma3", prompt: str = PROMPT) -> RunResult:
    return tiny_model(kind).run(prompt, hooks=[hook], edits=combine(*edits))


def at(hook: str, result: RunResult) -> Tensor:
    return result.activations[hook]


def trained_like(sae_class: str) -> TinyDictionary:
    """An SAE of the workbench, or one that only satisfies the protocol."""
    if sae_class == "protocol":
        return TinyDictionary(HOOK)
    from scope.saes.base import SAEMetadata
    from scope.saes.topk import TopKConfig, TopKSAE

    config = TopKConfig(d_in=32, d_sae=64, k=20, metadata=SAEMetadata(hook_name=HOOK))
    sae = TopKSAE(config, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(0.5, 2, 64)[:, None])
        sae.b_dec.normal_(generator=torch.Generator().manual_seed(1))
    return sae  # type: ignore[return-value]


@pytest.mark.parametrize("hook", [HOOK, Z, "blocks.1.hook_resid_mid", "blocks.1.mlp.hook_post"])
@pytest.mark.parametrize("kind", KINDS)
def test_ablating_is_setting_to_zero_is_scaling_by_zero(hook: str, kind: str) -> None:
    ways = [ablate(hook, [1, 2]), set_(hook, 0.0, [1, 2]), scale(hook, 0.0, [1, 2])]
    results = [run(way, hook=hook, kind=kind) for way in ways]
    plain = run(hook=hook, kind=kind)
    for result in results:
        assert at(hook, result)[1:3].abs().max() == 0
        torch.testing.assert_close(at(hook, result)[[0, 3, 4]], at(hook, plain)[[0, 3, 4]])
        torch.testing.assert_close(result.logits, results[0].logits)
    assert not torch.allclose(results[0].logits, plain.logits)  # type: ignore[arg-type]


def test_set_takes_a_row_and_can_leave_bos_alone() -> None:
    row = torch.linspace(-1, 1, 32)
    changed = at(HOOK, run(set_(HOOK, row, keep_bos=True)))
    torch.testing.assert_close(changed[1:], row.expand_as(changed[1:]))
    torch.testing.assert_close(changed[0], at(HOOK, run())[0])
    heads = torch.randn(4, 12)
    torch.testing.assert_close(at(Z, run(set_(Z, heads, 3), hook=Z))[3], heads)


def test_steering_moves_by_strength_times_direction() -> None:
    direction = torch.randn(32, generator=torch.Generator().manual_seed(0))
    moved = at(HOOK, run(add_direction(HOOK, direction, 2.5, positions=4))) - at(HOOK, run())
    torch.testing.assert_close(moved[4], 2.5 * direction)
    assert moved[:4].abs().max() == 0


@pytest.mark.parametrize("n", [1, 3])
def test_what_is_projected_out_is_gone_and_the_rest_stays(n: int) -> None:
    directions = torch.randn(n, 32, generator=torch.Generator().manual_seed(0)) * 5
    plain = at(HOOK, run())
    left = at(HOOK, run(project_out(HOOK, directions[0] if n == 1 else directions)))
    assert (left @ directions.T).abs().max() < 1e-4
    removed = plain - left
    basis = torch.linalg.qr(directions.T).Q
    torch.testing.assert_close(removed, (removed @ basis) @ basis.T, rtol=1e-4, atol=1e-5)
    twice = at(HOOK, run(project_out(HOOK, directions), project_out(HOOK, directions)))
    torch.testing.assert_close(twice, left, rtol=1e-4, atol=1e-5)
    flat = torch.randn(48, generator=torch.Generator().manual_seed(1))
    assert (at(Z, run(project_out(Z, flat), hook=Z)).flatten(1) @ flat).abs().max() < 1e-4


def test_patching_everything_from_another_prompt_gives_its_logits() -> None:
    other = run(prompt="The mat sat on the cat")
    assert len(other.tokens) == len(run().tokens)
    patched = run(patch(HOOK, at(HOOK, other)))
    torch.testing.assert_close(patched.logits, other.logits)
    some = run(patch(HOOK, at(HOOK, other), [2, 5]))
    torch.testing.assert_close(at(HOOK, some)[[2, 5]], at(HOOK, other)[[2, 5]])
    torch.testing.assert_close(at(HOOK, some)[[0, 1, 3, 4]], at(HOOK, run())[[0, 1, 3, 4]])
    with pytest.raises(MismatchError, match="which positions"):
        run(patch(HOOK, at(HOOK, other)), prompt="The cat")


@pytest.mark.parametrize("sae_class", ["scope", "protocol"])
def test_doubling_a_feature_moves_the_residual_by_its_value_times_its_decoder_row(sae_class: str) -> None:
    sae = trained_like(sae_class)
    plain = tiny_model("gemma3").run(PROMPT, hooks=[HOOK], saes=sae)
    values = plain.features[HOOK][:, FEATURES]
    assert values[1:].abs().max() > 0
    doubled = run(scale_features(sae, FEATURES, 2.0))
    expected = values @ sae.W_dec[FEATURES]
    moved = at(HOOK, doubled) - at(HOOK, plain)
    torch.testing.assert_close(moved[1:], expected[1:].detach(), rtol=1e-3, atol=1e-4)
    assert moved[0].abs().max() == 0  # BOS


@pytest.mark.parametrize("sae_class", ["scope", "protocol"])
def test_ablating_features_is_setting_them_to_zero(sae_class: str) -> None:
    sae = trained_like(sae_class)
    ablated = run(ablate_features(sae, FEATURES))
    for same in (set_features(sae, FEATURES, 0.0), scale_features(sae, torch.tensor(FEATURES), 0.0)):
        torch.testing.assert_close(run(same).logits, ablated.logits)
    set_to = run(set_features(sae, FEATURES, [1.0, 2.0, 3.0], positions=[2]))
    moved = at(HOOK, set_to) - at(HOOK, ablated)
    expected = torch.tensor([1.0, 2.0, 3.0]) @ sae.W_dec[FEATURES]
    torch.testing.assert_close(moved[2], expected.detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("sae_class", ["scope", "protocol"])
def test_without_the_error_term_only_what_the_features_say_is_left(sae_class: str) -> None:
    sae = trained_like(sae_class)
    x = at(HOOK, run())
    features = sae.encode(x).detach()
    features[:, FEATURES] = 0
    left = at(HOOK, run(ablate_features(sae, FEATURES, error_term=False, keep_bos=False)))
    torch.testing.assert_close(left, sae.decode(features).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_splicing_with_the_error_term_changes_no_logit(kind: str) -> None:
    sae = TinyDictionary(HOOK)
    plain = run(kind=kind)
    kept = run(splice(sae, error_term=True), kind=kind)
    assert plain.logits is not None
    assert kept.logits is not None
    assert (kept.logits - plain.logits).abs().max() <= 1e-5 * plain.logits.abs().max()
    by_run = tiny_model(kind).run(PROMPT, saes=sae, splice="without_error")
    torch.testing.assert_close(run(splice(sae, error_term=False), kind=kind).logits, by_run.logits)
    assert not torch.allclose(by_run.logits, plain.logits)  # type: ignore[arg-type]


def test_edits_of_one_hook_are_made_in_order_and_those_of_several_in_model_order() -> None:
    assert at(HOOK, run(set_(HOOK, 1.0), scale(HOOK, 3.0)))[0, 0] == 3
    assert at(HOOK, run(scale(HOOK, 3.0), set_(HOOK, 1.0)))[0, 0] == 1
    assert at(HOOK, run(set_(HOOK, 1.0), scale("blocks.1.hook_out", 5.0)))[0, 0] == 5
    later_first = run(scale("blocks.2.hook_resid_post", 2.0), ablate(HOOK), hook="blocks.2.hook_resid_post")
    earlier_first = run(ablate(HOOK), scale("blocks.2.hook_resid_post", 2.0), hook="blocks.2.hook_resid_post")
    torch.testing.assert_close(later_first.logits, earlier_first.logits)


def test_gradients_go_through_edits() -> None:
    strength = torch.tensor(0.1, requires_grad=True)
    model = tiny_model("llama")
    result = model.run(PROMPT, grad=True, edits={HOOK: lambda value, context: value + strength})
    assert result.logits is not None
    result.logits[-1, 3].backward()
    assert strength.grad is not None
    assert strength.grad != 0


@pytest.mark.parametrize("ids", [-1, 64, [0, 64], [3, -2]])
def test_feature_ids_out_of_range_are_refused_never_wrapped(ids: object) -> None:
    sae = TinyDictionary(HOOK)
    for make in (ablate_features, lambda s, i: scale_features(s, i, 2.0), lambda s, i: set_features(s, i, 1.0)):
        with pytest.raises(OutOfRangeError, match="features 0 to 63"):
            make(sae, ids)


@pytest.mark.parametrize("ids", [[], [3, 3], [1.5], [[1], [2]], [True]])
def test_feature_ids_that_make_no_sense_are_refused(ids: object) -> None:
    with pytest.raises(WRONG_TYPE):
        ablate_features(TinyDictionary(HOOK), ids)  # type: ignore[arg-type]


def test_positions_out_of_range_are_refused_before_the_model_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    for make in (lambda p: ablate(HOOK, p), lambda p: ablate_features(TinyDictionary(HOOK), 3, p)):
        with pytest.raises(OutOfRangeError, match="negative"):
            make(-1)
        with pytest.raises(InvalidInputError, match="No positions"):
            make([])
        with monkeypatch.context() as patched:
            patched.setattr(LanguageModel, "forward", lambda *_, **__: pytest.fail("ran"))
            with pytest.raises(OutOfRangeError, match="Position 7 is out of range: the text has 7 tokens"):
                run(make(np.int64(7)))
    with pytest.raises(OutOfRangeError, match="source has 3"):
        patch(HOOK, torch.zeros(3, 32), 3)
    with pytest.raises(InvalidInputError, match="no token positions"):
        run(ablate("blocks.0.attn.hook_pattern", 2))


def test_edits_for_another_shape_are_refused_before_the_model_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LanguageModel, "forward", lambda *_, **__: pytest.fail("ran"))
    wrong = [
        add_direction(HOOK, torch.zeros(31)),
        add_direction(HOOK, torch.zeros(1)),
        set_(Z, torch.zeros(48)),
        patch(HOOK, torch.zeros(6, 31)),
        project_out(HOOK, torch.ones(31)),
        splice(TinyDictionary(HOOK, d_in=31)),
        ablate_features(TinyDictionary(HOOK, d_in=1), 3),
    ]
    for edit in wrong:
        with pytest.raises(MismatchError):
            run(edit)
    with pytest.raises(UnknownNameError, match="Did you mean"):
        run(ablate("blocks.1.hook_resid_pots"))


def test_what_makes_no_sense_is_refused() -> None:
    for directions in (torch.zeros(32), torch.ones(2, 32), torch.ones(2, 2, 32)):
        with pytest.raises(InvalidInputError, match="independent"):
            project_out(HOOK, directions)
    with pytest.raises(InvalidInputError, match="2 of them"):
        set_features(TinyDictionary(HOOK), [1, 2], [1.0, 2.0, 3.0])
    nameless = TinyDictionary(HOOK)
    nameless.hook_name = None  # type: ignore[assignment]
    with pytest.raises(InvalidInputError, match="which hook"):
        splice(nameless)
    transcoder = TinyDictionary(HOOK)
    transcoder.hook_name_out = "blocks.1.hook_mlp_out"  # type: ignore[assignment]
    with pytest.raises(InvalidInputError, match="writes"):
        splice(transcoder)


def test_edits_stay_in_force_while_the_model_writes() -> None:
    model = tiny_model("gpt2")
    direction = model.W_U[100] * 1e4
    steered = model.generate(PROMPT, 4, edits=combine(add_direction("blocks.2.hook_resid_post", direction)))
    assert steered.tokens[steered.n_prompt :].tolist() == [100] * 4


def test_the_package_lists_what_it_has() -> None:
    assert all(getattr(interventions, name) for name in interventions.__all__)
    with pytest.raises(AttributeError):
        interventions.no_such_thing  # noqa: B018
