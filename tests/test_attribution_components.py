"""`logit_components`: sums that are the model's own logits, and parts that are what hooks see."""

import pytest
import torch
from helpers_models import one_thread, real_model, tiny_model
from helpers_saes import make
from test_attribution_dense import cross_layer
from test_attribution_graph import prompt_of, transcoders

from scope.attribution.components import logit_components
from scope.errors import InvalidInputError, OutOfRangeError
from scope.models.losses import final_norm_gain, final_norm_scale
from scope.saes.base import SAEMetadata

__all__ = ["one_thread"]

KINDS = ["gemma3", "llama", "gpt2", "gemma2", "pythia", "qwen3", "gemma4", "gemma4_experts"]


def raw_logits(model, prompt, at=-1):
    """Before soft-capping."""
    hidden = model.run(prompt, hooks=["ln_final.hook_out"]).activations["ln_final.hook_out"][at]
    return model.hf.get_submodule(model.layout.head)(hidden).detach()


def direction_of(model, prompt, token, at):
    """g of the module's docstring, from the residual stream alone."""
    last = f"blocks.{model.n_layers - 1}.hook_resid_post"
    state = model.run(prompt, hooks=[last]).activations[last][at]
    g = (model.W_U[token] - model.W_U.mean(0)) * final_norm_gain(model) / final_norm_scale(model, state)
    return g - g.mean() if model.layout.family.centred_norm else g


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at", [-1, 4])
def test_parts_add_up_to_the_logit_and_each_is_what_its_hook_sees(kind, at):
    model = tiny_model(kind)
    prompt = prompt_of(model)
    logits = raw_logits(model, prompt, at)
    found = logit_components(model, prompt, 300, position=at)
    assert found.value == pytest.approx(float(logits[300] - logits.mean()), rel=1e-3, abs=1e-3)
    assert found.table["effect"].sum() == pytest.approx(found.value, abs=1e-5)
    rounding = found.table.set_index("component")["effect"]["rounding"]
    assert abs(rounding) < 1e-3 * max(1.0, found.table["effect"].abs().max())
    versus = logit_components(model, prompt, 300, 310, position=at)
    assert versus.value == pytest.approx(float(logits[300] - logits[310]), rel=1e-3, abs=1e-3)
    names = ["hook_attn_out", "hook_mlp_out", *(["hook_ple_out"] if model.layout.d_per_layer else [])]
    hooks = [f"blocks.{i}.{name}" for i in range(model.n_layers) for name in names]
    seen = model.run(prompt, hooks=hooks).activations
    g = direction_of(model, prompt, 300, at)
    whole = found.by_component().set_index(["component", "layer"])["effect"]
    for layer in reversed(range(model.n_layers)):
        g = g * getattr(model.hf.get_submodule(model.layout.layer(layer)), "layer_scalar", 1.0)
        attention = whole["attention", layer] + whole.get(("bias", layer), 0.0)
        assert attention == pytest.approx(float(seen[f"blocks.{layer}.hook_attn_out"][at] @ g), rel=1e-3, abs=1e-3)
        expected = float(seen[f"blocks.{layer}.hook_mlp_out"][at] @ g)
        assert whole["mlp", layer] == pytest.approx(expected, rel=1e-3, abs=1e-3)
        if model.layout.d_per_layer:
            expected = float(seen[f"blocks.{layer}.hook_ple_out"][at] @ g)
            both = whole["table", layer] + whole["projection", layer]
            assert both == pytest.approx(expected, rel=1e-3, abs=1e-3)
    assert len(found.heads()) == model.n_layers * model.layout.n_heads


@pytest.mark.parametrize("kind", ["gemma3", "gpt2", "gemma4"])
def test_dictionaries_split_what_they_write(kind):
    model = tiny_model(kind)
    prompt = prompt_of(model)
    plain = logit_components(model, prompt, 300)
    split = {"mlp": transcoders(model), "clt": [cross_layer(model)], "some": transcoders(model, layers=[1])}
    split["stream"] = [make("topk", d_in=model.d_model, metadata=SAEMetadata(hook_name="blocks.1.hook_resid_post"))]
    for name, dictionaries in split.items():
        found = logit_components(model, prompt, 300, dictionaries=dictionaries)
        assert found.value == pytest.approx(plain.value, rel=1e-5)
        rounding = found.table.set_index("component")["effect"]["rounding"]
        assert abs(rounding) < 1e-3 * max(1.0, found.table["effect"].abs().max())
        kinds = set(found.table["component"])
        assert {"feature", "error", "attention"} <= kinds
        assert ("mlp" in kinds) == (name in ("some", "stream"))
        assert ("embedding" in kinds) == (name != "stream")
    sae = split["stream"][0]
    state = model.run(prompt, hooks=["blocks.1.hook_resid_post"]).activations["blocks.1.hook_resid_post"][-1]
    features, W_dec = sae.encode(state).detach(), sae.W_dec.detach()
    g = direction_of(model, prompt, 300, -1)
    rows = found.table[found.table["component"] == "feature"]
    later = 1.0
    for layer in range(2, model.n_layers):
        later *= float(getattr(model.hf.get_submodule(model.layout.layer(layer)), "layer_scalar", 1.0))
    for row in rows.itertuples():
        expected = later * float(features[row.feature] * (W_dec[row.feature] @ g))
        assert row.effect == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert len(rows) == int((features > 0).sum())


def test_what_cannot_be_decomposed_is_said():
    model = tiny_model("gemma3")
    prompt = prompt_of(model)
    sae = make("topk", d_in=model.d_model, metadata=SAEMetadata(hook_name="blocks.1.hook_attn_out"))
    with pytest.raises(InvalidInputError, match="hook_attn_out"):
        logit_components(model, prompt, 300, dictionaries=[sae])
    with pytest.raises(InvalidInputError, match="Two dictionaries"):
        logit_components(model, prompt, 300, dictionaries=transcoders(model, layers=[1, 1]))
    with pytest.raises(OutOfRangeError, match="Position 40"):
        logit_components(model, prompt, 300, position=40)


@pytest.mark.real
def test_on_the_real_model():
    model = real_model()
    prompt = "The opposite of hot is"
    logits = model.run(prompt).logits[-1]
    cold, small = (int(model.tokenize(word, prepend_bos=False)[0]) for word in (" cold", " small"))
    found = logit_components(model, prompt, " cold", " small")
    assert found.value == pytest.approx(float(logits[cold] - logits[small]), abs=2e-3)
    assert abs(found.table.set_index("component")["effect"]["rounding"]) < 1e-2
    assert len(found.heads()) == 18 * 4
    torch.testing.assert_close(found.table["effect"].sum(), found.value, atol=1e-4, rtol=0)
