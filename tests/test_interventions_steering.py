"""Steering: what is pushed, what it costs, and the control beside it."""

import math
from dataclasses import replace
from itertools import chain

import pytest
import torch
from helpers_models import one_thread, tiny_folder, tiny_model
from helpers_saes import make
from test_cli import scope

from scope.errors import InvalidInputError, OutOfRangeError, UnknownNameError
from scope.interventions import Intervention, InterventionSpec
from scope.interventions.steering import steer, steering_direction
from scope.saes.base import SAEMetadata
from scope.saes.formats import save
from scope.workspace import Workspace

__all__ = ["one_thread"]

PROMPT = "The cat sat on"


@pytest.fixture
def model():
    return tiny_model("gemma3")


@pytest.fixture
def sae(model):
    return make("topk", d_in=model.d_model, metadata=SAEMetadata(hook_name="blocks.1.hook_resid_post"))


def _write(path, text):
    path.write_text(text)
    return path


def test_named_interventions_are_kept_by_the_workspace(tmp_path):
    workspace = Workspace(tmp_path)
    assert workspace.interventions() == []
    spec = InterventionSpec(name="no heads", interventions=(Intervention(kind="ablate", layer=1, heads=(0,)),))
    workspace.save_intervention(spec)
    workspace.save_intervention(replace(spec, freeze_attention=True))
    assert workspace.interventions() == ["no heads"]
    assert workspace.intervention("no heads") == replace(spec, freeze_attention=True)
    for name in ("", "../x", "a/b", ".hidden", " x", "x" * 61, "a\n"):
        with pytest.raises(InvalidInputError, match="cannot be a name"):
            workspace.save_intervention(replace(spec, name=name))
    with pytest.raises(UnknownNameError, match="Did you mean"):
        workspace.intervention("no head")
    with pytest.raises(UnknownNameError):
        workspace.intervention("../no heads")


def test_a_push_of_nothing_changes_nothing(model, sae):
    found = steer(model, sae, {3: 0.0}, PROMPT, 6)
    assert found.steered.generation.tokens.tolist() == found.plain.generation.tokens.tolist()
    assert found.plain.kl == found.plain.mean_kl == 0.0
    assert [found.steered.kl, found.random.mean_kl] == pytest.approx([0.0, 0.0], abs=1e-5)
    assert found.changes["change"].abs().max() == 0.0


def test_a_push_is_a_unit_direction_times_its_strength_on_all_but_bos(model, sae):
    found = steer(model, sae, {3: 5.0, 7: -2.0}, PROMPT, 6)
    rows = torch.nn.functional.normalize(sae.W_dec.detach()[[3, 7]], dim=-1)
    direction = 5.0 * rows[0] - 2.0 * rows[1]
    assert found.norm == pytest.approx(float(direction.norm()), rel=1e-5)

    def push(value, context):
        value[:, 1:] += direction

    hook = "blocks.1.hook_resid_post"
    tokens = model.prompt_tokens(PROMPT)
    by_hand = model.run(tokens, edits={hook: push}).logits[-1].log_softmax(-1)
    plain = model.run(tokens).logits[-1].log_softmax(-1)
    assert found.steered.kl == pytest.approx(float((by_hand.exp() * (by_hand - plain)).sum()), rel=1e-3)
    assert found.steered.generation.tokens.tolist() == model.generate(PROMPT, 6, {hook: push}).tokens.tolist()
    assert found.random.generation.tokens.tolist() != found.plain.generation.tokens.tolist()
    n = found.steered.generation.n_prompt
    whole = model.run(found.steered.generation.tokens, edits={hook: push}).logits[n - 1 : -1].log_softmax(-1)
    alone = model.run(found.steered.generation.tokens).logits[n - 1 : -1].log_softmax(-1)
    kls = (whole.exp() * (whole - alone)).sum(-1)
    assert found.steered.token_kls == pytest.approx(kls.tolist(), rel=1e-2, abs=1e-5)
    assert found.steered.mean_kl == pytest.approx(float(kls.mean()), rel=1e-2)
    top = found.changes.iloc[0]
    expected = by_hand.exp() - plain.exp()
    assert top["token_id"] == int(expected.abs().argmax())
    assert top["change"] == pytest.approx(float(expected[top["token_id"]]), abs=1e-6)
    assert found.random.kl > 0
    assert (
        found.random.generation.tokens.tolist()
        == steer(model, sae, {3: 5.0, 7: -2.0}, PROMPT, 6).random.generation.tokens.tolist()
    )


def test_perplexity_is_the_plain_models_of_the_new_tokens(model, sae):
    found = steer(model, sae, {3: 30.0}, PROMPT, 6)
    tokens, n = found.steered.generation.tokens, found.steered.generation.n_prompt
    logits = model.run(tokens).logits[n - 1 : -1].log_softmax(-1)
    losses = -logits.gather(1, tokens[n:, None])[:, 0]
    assert found.steered.perplexity == pytest.approx(math.exp(float(losses.mean())), rel=1e-4)


def test_from_the_command_line_and_what_is_wrong(model, sae, tmp_path):
    save(sae, tmp_path / "sae")
    common = ("steer", "--model", tiny_folder("gemma3"), "--sae", tmp_path / "sae", "--prompt", PROMPT, "--json")
    found = scope(*common, "--feature", 3, "--strength", 20, "--max-new-tokens", 4)
    assert {"plain", "steered", "random", "changes", "norm"} <= found.keys()
    assert found["norm"] == pytest.approx(20.0, rel=1e-4)
    assert found["spec"]["interventions"][0]["kind"] == "add"
    (tmp_path / "heads.yaml").write_text(
        "- {kind: ablate, layer: 1, heads: [0]}\n- {kind: scale, features: [3], value: 2}"
    )
    by_file = scope(*common, "--spec", tmp_path / "heads.yaml", "--max-new-tokens", 4)
    assert "random" not in by_file
    assert by_file["plain"]["text"] == found["plain"]["text"]
    assert (
        "no head 9"
        in scope(
            *common, "--spec", _write(tmp_path / "no.json", '{"kind": "ablate", "layer": 1, "heads": [9]}'), code=2
        )["error"]["message"]
    )
    assert "--spec" in scope(*common, code=2)["error"]["message"]
    named = {"--workspace": tmp_path / "w", "--spec": "kept 1.5"}
    assert "kept 1.5" in scope(*common, *chain(*named.items()), code=2)["error"]["message"]
    Workspace(tmp_path / "w").save_intervention(
        replace(InterventionSpec.load(tmp_path / "heads.yaml"), name="kept 1.5")
    )
    again = scope(*common, *chain(*named.items()), "--max-new-tokens", 4)
    assert again["steered"] == by_file["steered"]
    assert "out of range" in scope(*common, "--feature", 99, "--strength", 1, code=2)["error"]["message"]
    told = scope(*common, "--feature", 3, "--feature", 4, "--strength", 1, code=2)["error"]["message"]
    assert "one for each" in told
    with pytest.raises(InvalidInputError, match="at least one"):
        steering_direction(sae, {})
    with pytest.raises(OutOfRangeError):
        steering_direction(sae, {-1: 1.0})
