"""Declared interventions on experts: models without them, terms of the sum, and hooks written by hand do the same."""

import copy
import json
from pathlib import Path

import pytest
import torch
from helpers_models import EXPERT_KINDS, one_thread, tiny_folder, tiny_model
from helpers_saes import make
from test_cli import scope
from torch import Tensor

from scope.errors import InvalidInputError, OutOfRangeError, ScopeError
from scope.features.experts import feature_flips
from scope.interventions import (
    Intervention,
    InterventionSpec,
    ablate,
    ablate_experts,
    combine,
    intervene,
    scale_experts,
    set_experts,
)
from scope.models import LanguageModel
from scope.saes.base import SAEMetadata
from scope.saes.formats import save

__all__ = ["one_thread"]

TOKENS = torch.arange(4, 24)
LAYER = 2
MOE = f"blocks.{LAYER}.moe."
LOGITS, WEIGHTS, CHOSEN, MADE, OUT = (
    f"{MOE}hook_{name}" for name in ("logits", "weights", "experts", "expert_out", "out")
)
CLOSE = {"rtol": 1e-3, "atol": 1e-4}


def spec(*interventions: dict, freeze: bool = False) -> InterventionSpec:
    """As a file has it."""
    content = {"freeze_attention": freeze, "interventions": [{"layer": LAYER, **one} for one in interventions]}
    return InterventionSpec.from_dict(json.loads(json.dumps(content)))


def everywhere(kind: str, experts: list[int], **more: object) -> dict:
    return {"kind": kind, "experts": experts, "keep_bos": False, **more}


def busiest(model: LanguageModel) -> int:
    """An expert that many tokens go to."""
    return int(model.run(TOKENS, hooks=[CHOSEN], logits=False).activations[CHOSEN].flatten().mode().values)


def hf_with_router(model: LanguageModel, change: object) -> Tensor:
    """Logits of transformers' own model with the weights of a layer's router changed."""
    hf = copy.deepcopy(model.hf)
    layer = hf.model.layers[LAYER]
    change(layer)  # type: ignore[operator]
    return hf(input_ids=TOKENS[None]).logits[0]


@pytest.mark.parametrize("kind", EXPERT_KINDS)
def test_a_forbidden_expert_is_a_model_without_it(kind: str) -> None:
    model = tiny_model(kind)
    expert = busiest(model)
    kept = [other for other in range(4) if other != expert]

    def remove(layer: torch.nn.Module) -> None:
        experts, router = (
            (layer.experts, layer.router.proj) if kind == "gemma4_experts" else (layer.mlp.experts, layer.mlp.gate)
        )
        router.weight = torch.nn.Parameter(router.weight[kept])
        experts.gate_up_proj = torch.nn.Parameter(experts.gate_up_proj[kept])
        experts.down_proj = torch.nn.Parameter(experts.down_proj[kept])
        experts.num_experts = 3
        if kind == "gemma4_experts":
            layer.router.per_expert_scale = torch.nn.Parameter(layer.router.per_expert_scale[kept])
        else:
            router.num_experts = 3

    with torch.no_grad():
        expected = hf_with_router(model, remove)
    edits = spec(everywhere("forbid", [expert])).resolve(model)
    torch.testing.assert_close(model.run(TOKENS, edits=edits).logits, expected, **CLOSE)
    assert (expected - model.run(TOKENS).logits).abs().max() > 1e-3


@pytest.mark.parametrize("kind", EXPERT_KINDS)
def test_swapped_experts_are_a_router_with_two_rows_exchanged(kind: str) -> None:
    model = tiny_model(kind)
    one = busiest(model)
    other = (one + 1) % 4

    def exchange(layer: torch.nn.Module) -> None:
        router = layer.router.proj if kind == "gemma4_experts" else layer.mlp.gate
        order = list(range(4))
        order[one], order[other] = other, one
        router.weight = torch.nn.Parameter(router.weight[order])

    with torch.no_grad():
        expected = hf_with_router(model, exchange)
    edits = spec(everywhere("swap", [one, other])).resolve(model)
    torch.testing.assert_close(model.run(TOKENS, edits=edits).logits, expected, **CLOSE)
    assert (expected - model.run(TOKENS).logits).abs().max() > 1e-3


@pytest.mark.parametrize("kind", EXPERT_KINDS)
def test_forced_experts_trade_logits_with_the_least_likely_chosen(kind: str) -> None:
    model = tiny_model(kind)
    before = model.run(TOKENS, hooks=[LOGITS, CHOSEN]).activations
    hooks = [LOGITS, CHOSEN, WEIGHTS]
    found = model.run(TOKENS, hooks=hooks, edits=spec(everywhere("force", [3])).resolve(model)).activations
    expected = before[LOGITS].clone()
    for place, chosen in enumerate(before[CHOSEN].tolist()):
        if 3 not in chosen:
            last = int(chosen[-1])
            expected[place, 3], expected[place, last] = before[LOGITS][place, last], before[LOGITS][place, 3]
    assert torch.equal(found[LOGITS], expected)
    assert (found[CHOSEN] == 3).any(-1).all()
    both = model.run(TOKENS, hooks=hooks, edits=spec(everywhere("force", [3, 1])).resolve(model)).activations
    assert torch.equal(both[CHOSEN].sort(-1).values, torch.tensor([1, 3]).expand(len(TOKENS), 2).to(both[CHOSEN].dtype))
    assert torch.equal(both[LOGITS].sort(-1).values, before[LOGITS].sort(-1).values)
    if kind == "mixtral":
        torch.testing.assert_close(both[WEIGHTS].sum(-1), torch.ones(len(TOKENS)))


@pytest.mark.parametrize("kind", EXPERT_KINDS)
@pytest.mark.parametrize(("what", "value", "kept"), [("ablate", None, 0.0), ("scale", -2.0, -2.0), ("set", 0.5, None)])
def test_an_experts_output_changes_by_its_weighted_share_of_the_sum(
    kind: str, what: str, value: float | None, kept: float | None
) -> None:
    model = tiny_model(kind)
    hooks = [WEIGHTS, CHOSEN, MADE, OUT]
    plain = model.run(TOKENS, hooks=hooks).activations
    expert = busiest(model)
    given = {} if value is None else {"value": value}
    declared = spec({"kind": what, "experts": [expert], **given, "positions": [3, 9, 11, 12]})
    changed = model.run(TOKENS, hooks=hooks, edits=declared.resolve(model))
    expected = plain[OUT].clone()
    n_changed = 0
    for place in (3, 9, 11, 12):
        for slot in range(2):
            if plain[CHOSEN][place, slot] == expert:
                made = plain[MADE][place, slot]
                new = kept * made if kept is not None else torch.full_like(made, 0.5)
                expected[place] += plain[WEIGHTS][place, slot] * (new - made)
                n_changed += 1
    assert n_changed
    torch.testing.assert_close(changed.activations[OUT], expected, **CLOSE)
    assert torch.equal(changed.activations[CHOSEN], plain[CHOSEN])

    # The rest of the model goes on from that sum: the same as putting it there by hand.
    def by_hand(out: Tensor, context: object) -> Tensor:
        return expected[None]

    torch.testing.assert_close(changed.logits, model.run(TOKENS, edits={OUT: by_hand}).logits, **CLOSE)
    with intervene(model, declared):
        torch.testing.assert_close(model.run(TOKENS).logits, changed.logits)


def test_functions_and_declarations_are_the_same_edits() -> None:
    model = tiny_model("qwen3_moe")
    expert = busiest(model)
    pairs = {
        "ablate": ablate_experts(model, LAYER, expert),
        "scale": scale_experts(model, LAYER, [expert], 3.0),
        "set": set_experts(model, LAYER, expert, torch.full((32,), 3.0)),
    }
    for kind, edits in pairs.items():
        value = {} if kind == "ablate" else {"value": 3.0}
        declared = spec(everywhere(kind, [expert], **value)).resolve(model)
        torch.testing.assert_close(
            model.run(TOKENS, edits=combine(*edits)).logits, model.run(TOKENS, edits=declared).logits
        )
    with pytest.raises(InvalidInputError, match=r"expected a number, or \(32,\)"):
        set_experts(model, LAYER, 0, torch.zeros(3))


@pytest.mark.parametrize("kind", EXPERT_KINDS)
def test_experts_that_take_a_forbidden_ones_place_are_those_that_are_changed(kind: str) -> None:
    """An output is changed by what is chosen in the end, in whatever order the interventions are declared."""
    model = tiny_model(kind)
    expert = busiest(model)
    others = [other for other in range(4) if other != expert]
    ablated, forbidden = everywhere("ablate", others), everywhere("forbid", [expert])
    for order in ([ablated, forbidden], [forbidden, ablated]):
        found = model.run(TOKENS, hooks=[OUT], edits=spec(*order).resolve(model)).activations[OUT]
        assert found.abs().max() == 0
    # Beside edits of other kinds they compose as their hooks follow each other.
    mlp = {"kind": "scale", "component": "attention", "value": 0.5, "keep_bos": False}
    both = spec(mlp, everywhere("ablate", list(range(4)))).resolve(model)
    by_hand = combine(ablate(OUT), *spec(mlp).resolve(model).values())
    torch.testing.assert_close(model.run(TOKENS, edits=both).logits, model.run(TOKENS, edits=by_hand).logits)


@pytest.mark.parametrize("kind", EXPERT_KINDS)
@pytest.mark.parametrize("freeze", [False, True])
def test_a_text_is_written_under_them_from_a_cache(kind: str, freeze: bool) -> None:
    model = tiny_model(kind)
    expert = busiest(model)
    one = {"kind": "ablate", "experts": [expert], "during": "generated"}
    other = {"kind": "force", "experts": [(expert + 1) % 4], "positions": [21, 23], "layer": 0}
    edits = spec(one, other, freeze=freeze).resolve(model)
    cached, again = (list(model.stream(TOKENS, 8, edits, cache=cache)) for cache in (True, False))
    assert [token.token_id for token in cached] == [token.token_id for token in again]
    found, expected, plain = (
        torch.tensor([token.log_probability for token in some])
        for some in (cached, again, list(model.stream(TOKENS, 8)))
    )
    torch.testing.assert_close(found, expected, **CLOSE)
    assert found[0] == pytest.approx(float(plain[0]), abs=1e-5)
    assert (found[1:] - plain[1 : len(found)]).abs().max() > 1e-4


def test_features_flip_where_an_expert_is_forbidden() -> None:
    model = tiny_model("gemma4_experts")
    hook = f"blocks.{LAYER}.hook_resid_post"
    sae = make("topk", d_in=32, d_sae=60, k=6, seed=1, metadata=SAEMetadata(hook_name=hook))
    edits = spec(everywhere("forbid", [busiest(model)])).resolve(model)
    table = feature_flips(model, sae, TOKENS, edits)
    before, after = (
        sae.encode(model.run(TOKENS, hooks=[hook], edits=some).activations[hook]) for some in (None, edits)
    )
    expected = int(((before > 0) != (after > 0))[int(model.bos_mask(TOKENS[None])[0, 0]) :].sum())
    assert len(table) == expected > 0


@pytest.mark.parametrize(
    ("kind", "fields", "problem", "words"),
    [
        ("qwen3_moe", [everywhere("forbid", [4])], OutOfRangeError, "no expert 4"),
        ("qwen3_moe", [everywhere("ablate", [-1])], OutOfRangeError, "no expert -1"),
        ("qwen3_moe", [everywhere("ablate", [0], layer=1)], InvalidInputError, r"layers \[0, 2\] do"),
        ("qwen3_moe", [everywhere("ablate", [0], layer=9)], OutOfRangeError, "no layer 9"),
        ("llama", [everywhere("force", [0], layer=1)], InvalidInputError, "has no experts"),
        ("mixtral", [everywhere("force", [0, 1, 2])], InvalidInputError, "3 experts are forced"),
        ("mixtral", [everywhere("forbid", [0, 1, 2])], InvalidInputError, "at most 2"),
        ("mixtral", [everywhere("forbid", [0]), everywhere("forbid", [1, 2])], InvalidInputError, "at most 2"),
        ("mixtral", [everywhere("swap", [1, 1])], InvalidInputError, "itself"),
        ("mixtral", [everywhere("scale", [1, 1], value=2.0)], InvalidInputError, "all different"),
    ],
)
def test_what_does_not_fit_is_said_before_the_model_runs(
    kind: str, fields: list[dict], problem: type[ScopeError], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LanguageModel, "forward", lambda *_, **__: pytest.fail("ran"))
    with pytest.raises(problem, match=words):
        spec(*fields).resolve(tiny_model(kind))


def test_experts_forbidden_at_different_tokens_may_be_many() -> None:
    model = tiny_model("mixtral")
    apart = [everywhere("forbid", [0, 1], positions=[3]), everywhere("forbid", [2, 3], positions=[4])]
    chosen = model.run(TOKENS, hooks=[CHOSEN], edits=spec(*apart).resolve(model)).activations[CHOSEN]
    assert set(chosen[3].tolist()) == {2, 3}
    assert set(chosen[4].tolist()) == {0, 1}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kind": "force", "hook": "blocks.1.hook_resid_post"}, "is for experts"),
        ({"kind": "forbid", "experts": [1]}, "layer goes with"),
        ({"kind": "swap", "layer": 1, "experts": [1]}, "two experts"),
        ({"kind": "patch", "layer": 1, "experts": [1], "prompt": "a"}, "not for them"),
        ({"kind": "add", "layer": 1, "experts": [1], "value": 1.0}, "add"),
        ({"kind": "set", "layer": 1, "experts": [1]}, "needs a value"),
        ({"kind": "forbid", "layer": 1, "experts": [1], "value": 1.0}, "takes no value"),
        ({"kind": "ablate", "layer": 1, "experts": [0.5]}, "whole numbers"),
        ({"kind": "ablate", "layer": 1, "experts": [0], "heads": [0]}, "heads and experts"),
    ],
)
def test_what_is_no_intervention_on_experts_is_refused(fields: dict, words: str) -> None:
    with pytest.raises(InvalidInputError, match=words):
        InterventionSpec.from_dict(fields)


def test_it_is_written_as_it_is_read() -> None:
    one = Intervention(kind="swap", layer=3, experts=(1, 17), positions=(4,), during="generated")
    assert Intervention.from_dict(json.loads(json.dumps(one.to_dict()))) == one


def test_a_spec_on_experts_and_the_features_that_flip_from_the_command_line(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    hook = f"blocks.{LAYER}.hook_resid_post"
    save(make("topk", d_in=32, d_sae=60, k=6, seed=1, metadata=SAEMetadata(hook_name=hook)), tmp_path / "sae")
    declared = spec(everywhere("forbid", [busiest(model)]), {"kind": "scale", "experts": [0], "value": 2.0})
    declared.save(tmp_path / "spec.json")
    asked = ("steer", "--model", tiny_folder("mixtral"), "--prompt", "The cat sat on the mat", "--max-new-tokens", 4)
    found = scope(*asked, "--spec", tmp_path / "spec.json", "--flips", tmp_path / "sae", "--json")
    assert found["spec"] == declared.to_dict()
    flips = found["flips"]
    assert flips["begin"] + flips["cease"] == len(flips["features"]) > 0
    assert sum(row["before"] == 0 for row in flips["features"]) == flips["begin"]
    told = scope(*asked, "--spec", tmp_path / "spec.json", "--flips", tmp_path / "sae").stdout
    assert f"{flips['begin']} begin to fire, {flips['cease']} cease to." in told
    (tmp_path / "wrong.json").write_text('{"kind": "forbid", "layer": 2, "experts": [9]}')
    save(make("topk", d_in=31, metadata=SAEMetadata(hook_name=hook)), tmp_path / "narrow")
    told = scope(*asked, "--spec", tmp_path / "spec.json", "--flips", tmp_path / "narrow", code=2).stderr
    assert "31" in told
    assert "Writing" not in told
    assert "no expert 9" in scope(*asked, "--spec", tmp_path / "wrong.json", code=2).stderr
