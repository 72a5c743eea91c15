"""`scope.attribution.methods`: each method against its definition, computed another way."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_models import one_thread, real_model, tiny_model
from helpers_saes import make

from scope.attribution.baselines import counterfactual, mean, zero
from scope.attribution.comparison import compare_methods, faithfulness
from scope.attribution.methods import ERROR, METHODS, attribute
from scope.attribution.targets import (
    feature,
    log_probability,
    logit,
    logit_difference,
    loss,
    projection,
    single_token,
)
from scope.errors import InvalidInputError, MismatchError, OutOfRangeError, UnknownNameError
from scope.interventions import set_features
from scope.saes.base import SAEMetadata
from scope.saes.formats import load

__all__ = ["one_thread"]

PROMPT = torch.tensor([2, 300, 310, 305, 320, 307])
OTHER = torch.tensor([2, 300, 333, 305, 321, 307])
KINDS = ["gemma3", "llama", "gpt2"]


@pytest.fixture(params=KINDS)
def model(request):
    return tiny_model(request.param)


def sae_at(model, hook, seed=0, k=5):
    return make("topk", d_in=model.d_model, d_sae=40, k=k, seed=seed, metadata=SAEMetadata(hook_name=hook))


def prompts(model):
    if model.name.endswith("gpt2") or model.bos_token_id == 0:
        return torch.tensor([0, 300, 310, 305, 320, 307]), torch.tensor([0, 300, 333, 305, 321, 307])
    return PROMPT, OTHER


def effects_of(result, hook):
    rows = result.table[result.table["hook"] == hook]
    return {(row.position, row.feature): row.effect for row in rows.itertuples()}


@pytest.mark.parametrize("target", [logit(305), logit_difference(305, 310), log_probability(305), loss()])
def test_patching_is_what_an_edit_of_one_feature_does(model, target):
    prompt, _ = prompts(model)
    hook = "blocks.1.hook_resid_post"
    sae = sae_at(model, hook)
    result = attribute(model, prompt, target, sae, "activation_patching", zero(), batch_size=7)
    found = effects_of(result, hook)

    def value(edits=None):
        logits = model.run(prompt, edits=edits).logits.float()
        if target == loss():
            return float(torch.nn.functional.cross_entropy(logits[:-1], prompt[1:]))
        last = logits[-1]
        return {
            "logit of 305": last[305] - last.mean(),
            "logit of 305 minus 310": last[305] - last[310],
            "log-probability of 305": last.log_softmax(-1)[305],
        }[target.name].item()

    clean = value()
    assert result.value == pytest.approx(clean, rel=1e-4, abs=1e-5)
    features = [(p, f) for p, f in found if f != ERROR]
    assert len(features) > 10
    for position, number in features[::6]:
        without = value({hook: set_features(sae, [number], 0.0, positions=[position])})
        assert found[position, number] == pytest.approx(clean - without, abs=2e-5)


def test_one_gradient_gives_all_nodes(model):
    prompt, _ = prompts(model)
    hook = "blocks.1.hook_resid_post"
    sae = sae_at(model, hook)
    result = attribute(model, prompt, logit_difference(305, 310), sae, "gradient_x_activation", zero())
    run = model.run(prompt, saes=sae, splice="with_error", grad=True)
    (run.logits[-1, 305] - run.logits[-1, 310]).backward()
    f = run.features[hook]
    expected = f.grad * f.detach()
    for (position, number), effect in effects_of(result, hook).items():
        if number != ERROR:
            assert effect == pytest.approx(float(expected[position, number]), abs=1e-5)


def test_integrated_gradients_are_complete(model):
    prompt, other = prompts(model)
    saes = [sae_at(model, "blocks.0.hook_resid_post"), sae_at(model, "blocks.1.hook_mlp_out", 1)]
    for baseline in (counterfactual(other), zero()):
        result = attribute(model, prompt, log_probability(305), saes, baseline=baseline, steps=100)
        assert set(result.completeness) == {"blocks.0.hook_resid_post", "blocks.1.hook_mlp_out"}
        for hook, share in result.completeness.items():
            spread = result.value - result.baseline_values[hook]
            assert abs(share - 1) * abs(spread) < 2e-3, (hook, share, spread)


def test_where_the_target_is_linear_all_methods_agree_with_patching(model):
    prompt, other = prompts(model)
    hook = "blocks.1.hook_resid_post"
    sae = sae_at(model, hook)
    direction = torch.randn(model.d_model, generator=torch.Generator().manual_seed(1))
    baseline = counterfactual(other)
    expected = effects_of(
        attribute(model, prompt, projection(hook, direction, 2), sae, "activation_patching", baseline), hook
    )
    assert any(abs(effect) > 1e-3 for effect in expected.values())
    for method in set(METHODS) - {"activation_patching"}:
        found = effects_of(attribute(model, prompt, projection(hook, direction, 2), sae, method, baseline), hook)
        assert found.keys() == expected.keys()
        for node, effect in found.items():
            assert effect == pytest.approx(expected[node], rel=1e-4, abs=1e-5), (method, node)


def test_eap_ig_moves_the_embeddings_of_the_whole_model():
    """With one step the gradient is that at the midpoint of the two prompts' embeddings, computed here by hand."""
    model = tiny_model("llama")
    hook = "blocks.1.hook_resid_post"
    sae = sae_at(model, hook)
    result = attribute(model, PROMPT, logit_difference(305, 310), sae, "eap_ig", counterfactual(OTHER), steps=1)
    clean, there = (model.run(p, hooks=["hook_embed", hook]).activations for p in (PROMPT, OTHER))
    middle = (clean["hook_embed"] + there["hook_embed"]) / 2
    run = model.run(PROMPT, hooks=[hook], edits={"hook_embed": lambda value, context: middle[None]}, grad=True)
    (run.logits[-1, 305] - run.logits[-1, 310]).backward()
    change = sae.encode(clean[hook]) - sae.encode(there[hook])
    expected = change * (run.activations[hook].grad @ sae.W_dec.T)
    for (position, number), effect in effects_of(result, hook).items():
        if number != ERROR and position:
            assert effect == pytest.approx(float(expected[position, number]), abs=1e-5)


def test_a_transcoder_is_attributed_where_it_writes():
    model = tiny_model("gemma3")
    metadata = SAEMetadata(hook_name="blocks.1.ln2.hook_out", hook_name_out="blocks.1.hook_mlp_out")
    transcoder = make("transcoder", d_in=32, d_out=32, activation="topk", metadata=metadata)
    result = attribute(model, PROMPT, logit(305), transcoder, "activation_patching", zero())
    assert set(result.table["hook"]) == {"blocks.1.hook_mlp_out"}
    position, number = next((p, f) for p, f in effects_of(result, "blocks.1.hook_mlp_out") if f != ERROR)
    read = model.run(PROMPT, hooks=["blocks.1.ln2.hook_out"]).activations["blocks.1.ln2.hook_out"]
    strength = transcoder.encode(read)[position, number]

    def without(value, context):
        value[0, position] -= strength * transcoder.W_dec[number]

    logits = model.run(PROMPT, edits={"blocks.1.hook_mlp_out": without}).logits[-1]
    clean = model.run(PROMPT).logits[-1]
    drop = float((clean[305] - clean.mean()) - (logits[305] - logits.mean()))
    assert effects_of(result, "blocks.1.hook_mlp_out")[position, number] == pytest.approx(drop, abs=2e-5)


def test_baselines_put_nodes_where_they_say(model):
    prompt, other = prompts(model)
    hook = "blocks.1.hook_resid_post"
    sae = sae_at(model, hook)
    nothing = attribute(model, prompt, logit(305), sae, "activation_patching", counterfactual(prompt))
    assert nothing.table.empty
    texts = [prompt, other]
    result = attribute(model, prompt, logit(305), sae, "gradient_x_activation", mean(model, [sae], texts))
    rows = torch.cat([model.run(p, hooks=[hook]).activations[hook][1:] for p in texts])
    expected = sae.encode(rows).mean(0) * sae.decoder_norms
    shown = result.table[result.table["feature"] != ERROR]
    assert (shown["position"] > 0).all()
    np.testing.assert_allclose(
        shown["baseline_strength"], expected.detach().numpy()[shown["feature"]], rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("method", METHODS)
def test_several_prompts_share_passes_and_none_is_another_ones(method, monkeypatch):
    model = tiny_model("gemma3")
    saes = [sae_at(model, "blocks.0.hook_resid_post"), sae_at(model, "blocks.2.hook_resid_post", 1)]
    targets = [logit(305), feature(sae_at(model, "blocks.3.hook_resid_post", 3), 4, position=1)]
    prompts = ["The cat sat", "He looked at the moon and the cat", "a", "The moon"]
    runs = []
    forward = type(model).hidden_states
    with monkeypatch.context() as patched:
        patched.setattr(
            type(model), "hidden_states", lambda self, ids, *rest: runs.append(len(ids)) or forward(self, ids, *rest)
        )
        together = attribute(model, prompts, targets, saes, method, steps=2, batch_size=12)
    if method != "activation_patching":
        assert max(runs) == (8 if "integrated" not in method and method != "eap_ig" else 12)
    assert [len(found) for found in together] == [2] * 4
    for prompt, found in zip(prompts, together, strict=True):
        for target, one in zip(targets, found, strict=True):
            alone = attribute(model, prompt, target, saes, method, steps=2)
            assert (one.tokens, one.target) == (alone.tokens, alone.target)
            assert one.value == pytest.approx(alone.value, rel=1e-4, abs=1e-6)
            assert one.baseline_values == pytest.approx(alone.baseline_values, rel=1e-4, abs=1e-6)
            for hook in (sae.hook_name for sae in saes):
                assert effects_of(one, hook) == pytest.approx(effects_of(alone, hook), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_targets_share_passes_and_none_is_another_ones(method, monkeypatch):
    """Whatever hook each is read at, and however the runs fall into batches."""
    model = tiny_model("gemma3")
    saes = [sae_at(model, "blocks.0.hook_resid_post"), sae_at(model, "blocks.2.hook_resid_post", 1)]
    late = sae_at(model, "blocks.3.hook_resid_post", 3)
    targets = [logit(305), feature(saes[1], 4, position=3), feature(late, 7), log_probability(310, 2), logit(306)]
    baseline = counterfactual(OTHER)
    runs = []
    forward = type(model).hidden_states
    with monkeypatch.context() as patched:
        patched.setattr(
            type(model), "hidden_states", lambda self, ids, *rest: runs.append(len(ids)) or forward(self, ids, *rest)
        )
        together = attribute(model, PROMPT, targets, saes, method, baseline, steps=3, batch_size=4)
    expected = {"gradient_x_activation": [4, 4], "eap_ig": [4, 4, 4, 4, 3]}  # the first are the values themselves
    assert expected.get(method) in (None, [n for n in runs if n > 1])
    if method == "activation_patching":  # every target is read off the same runs: one clean, one for each node, and
        changed = sum(len(effects_of(together[-1], hook)) for hook in (sae.hook_name for sae in saes))
        assert sum(runs) <= changed + 4 + len(targets)  # the prompt's and the baseline's nodes, each target's value
    alone = [attribute(model, PROMPT, one, saes, method, baseline, steps=3) for one in targets]
    for one, other in zip(together, alone, strict=True):
        assert (one.target, one.method, one.value) == (other.target, other.method, pytest.approx(other.value, rel=1e-5))
        assert one.baseline_values == pytest.approx(other.baseline_values, rel=1e-4)
        for hook in (sae.hook_name for sae in saes):
            assert effects_of(one, hook) == pytest.approx(effects_of(other, hook), rel=1e-3, abs=1e-5)


def test_a_feature_as_a_target_is_its_strength_where_it_fires():
    model = tiny_model("gemma3")
    sae = sae_at(model, "blocks.1.hook_resid_post")
    x = model.run(PROMPT, hooks=[sae.hook_name]).activations[sae.hook_name]
    features = sae.encode(x)
    number = int(features[3].argmax())
    found = attribute(model, PROMPT, feature(sae, number, 3), sae_at(model, "blocks.0.hook_resid_post", 2))
    assert found.value == pytest.approx(float(features[3, number] * sae.decoder_norms[number]), rel=1e-4)


def test_bad_input_is_answered_before_anything_runs():
    model = tiny_model("gemma3")
    sae = sae_at(model, "blocks.1.hook_resid_post")
    with pytest.raises(UnknownNameError, match="integrated_gradients"):
        attribute(model, PROMPT, logit(305), sae, "integrated_gradient")
    with pytest.raises(OutOfRangeError, match="6 tokens"):
        attribute(model, PROMPT, logit(305, position=6), sae)
    with pytest.raises(OutOfRangeError, match="vocabulary"):
        attribute(model, PROMPT, logit(model.d_vocab), sae)
    with pytest.raises(InvalidInputError, match=r"a target is one token\. Give the first of them: ' "):
        single_token(model, " xylophone quartz")
    with pytest.raises(InvalidInputError, match="With a space in front it is one: ' the'"):
        single_token(model, "the")
    with pytest.raises(OutOfRangeError):
        feature(sae, 40)
    with pytest.raises(MismatchError, match="has 3 dimensions"):
        attribute(model, PROMPT, projection(sae.hook_name, torch.ones(3)), sae)
    with pytest.raises(MismatchError, match="line up"):
        attribute(model, PROMPT, logit(305), sae, baseline=counterfactual(PROMPT[:4]))
    with pytest.raises(MismatchError, match="width"):
        attribute(model, PROMPT, logit(305), make("topk", d_in=12, metadata=SAEMetadata(hook_name=sae.hook_name)))
    with pytest.raises(InvalidInputError, match="No SAE"):
        attribute(model, PROMPT, logit(305), [])


def test_methods_beside_patching_and_what_top_nodes_keep():
    model = tiny_model("llama")
    hook = "blocks.1.hook_resid_post"
    sae = sae_at(model, hook)
    direction = torch.randn(model.d_model, generator=torch.Generator().manual_seed(1))
    linear = projection(hook, direction, 3)
    table = compare_methods(model, PROMPT, linear, sae, counterfactual(OTHER)).set_index("method")
    assert set(table.index) == set(METHODS)
    assert table["pearson"].min() > 0.999
    assert table["top_overlap"].min() == 1.0
    np.testing.assert_allclose(table["slope"], 1.0, rtol=1e-3)
    few = compare_methods(model, PROMPT, logit(305), sae, zero(), ["gradient_x_activation"], max_nodes=10)
    assert few["n"].tolist() == [10, 10]

    attribution = attribute(model, PROMPT, linear, sae, "activation_patching", zero())
    curve = faithfulness(model, PROMPT, linear, sae, attribution, zero(), sizes=[0, 2, 5, 1000])
    whole = curve[(curve["nodes"] == "attributed") & (curve["errors"] == "kept")].set_index("size")
    n = int((attribution.table["feature"] != ERROR).sum())
    assert whole.index.tolist() == [0, 2, 5, n]
    assert whole["faithfulness"][0] == 0.0
    assert whole["faithfulness"][n] == pytest.approx(1.0, abs=1e-4)
    assert whole["value"][n] == pytest.approx(attribution.value, rel=1e-4)
    # The target is linear: what two nodes keep is the sum of their effects.
    best = attribution.table[attribution.table["feature"] != ERROR].nlargest(2, "effect")["effect"].sum()
    assert whole["value"][2] - whole["value"][0] == pytest.approx(best, rel=1e-3)
    random = curve[(curve["nodes"] == "random") & (curve["errors"] == "kept")].set_index("size")
    assert whole["value"][2] > random["value"][2]
    bare = curve[(curve["nodes"] == "attributed") & (curve["errors"] == "ablated")].set_index("size")
    errors = attribution.table[(attribution.table["feature"] == ERROR) & (attribution.table["position"] == 3)]["effect"]
    assert whole["value"][5] - bare["value"][5] == pytest.approx(errors.sum(), rel=1e-3)
    with pytest.raises(InvalidInputError, match="sizes"):
        faithfulness(model, PROMPT, linear, sae, attribution, zero(), sizes=[-1])


@pytest.mark.real
def test_methods_come_near_patching_on_the_real_model():
    model = real_model()
    sae = load(Path(__file__).parents[1] / "data" / "gemma-3-270m-topk-8192")
    target, other = logit_difference(" cold", " small"), counterfactual("The opposite of big is")
    table = compare_methods(model, "The opposite of hot is", target, sae, other).set_index("method")
    assert set(table.index) == set(METHODS)
    assert table["pearson"][["gradient_x_activation", "integrated_gradients", "eap_ig"]].min() > 0.7
    assert table["completeness"]["integrated_gradients"] == pytest.approx(1.0, abs=0.02)
