"""What the prompt shows equals what the index holds; direct effects add up to the logit."""

import numpy as np
import pytest
import torch
from helpers_models import TEXT, tiny_model

from activations.capture import capture
from activations.source import RowFlag
from activations.store import ActivationStore
from activations.text import TextSource
from scope.attribution import direct_logit_effects
from scope.attribution.direct import direct_effects
from scope.errors import InvalidInputError, MismatchError, OutOfRangeError
from scope.features import build_index, features_on_prompt
from scope.saes.base import SAEMetadata
from scope.saes.topk import TopKConfig, TopKSAE


def make_sae(model, hook: str, d_sae: int = 96, k: int = 8) -> TopKSAE:
    identity = model.identity
    metadata = SAEMetadata(
        hook_name=hook, weight_hash=identity.weight_hash, tokenizer_hash=identity.tokenizer_hash, model_name=model.name
    )
    config = TopKConfig(d_in=model.d_model, d_sae=d_sae, k=k, metadata=metadata)
    sae = TopKSAE(config, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(0.5, 2, d_sae)[:, None])
        sae.b_dec.copy_(torch.randn(model.d_model, generator=torch.Generator().manual_seed(1)) * 0.1)
    return sae


@pytest.mark.parametrize("hook", ["blocks.1.hook_resid_post", "blocks.2.hook_mlp_out"])
def test_the_prompt_shows_what_the_index_holds(tmp_path, hook):
    model = tiny_model("gemma3")
    (tmp_path / "text.txt").write_text(TEXT)
    text = TextSource([tmp_path / "text.txt"])
    capture(model, text, [hook], tmp_path / "s.zarr", context_size=60)
    store = ActivationStore.open(tmp_path / "s.zarr")
    sae = make_sae(model, hook)
    index = build_index(store, sae, tmp_path / "i.index", model=model)
    # The first window: BOS and 59 tokens.
    first = index.sequences.iloc[0]
    ids = index.tokens(0, int(first["n_rows"]))["token_id"].to_numpy()
    prompt = features_on_prompt(model, sae, torch.from_numpy(ids.astype(np.int64)), index=index)
    held = index.features_in(0, int(first["n_rows"]))
    shown = prompt.table
    assert shown["position"].tolist() == held["row"].tolist()
    # Batches of other shapes round differently; a feature at the edge of the top k may differ, nothing else.
    both = shown.merge(held, left_on=["position", "feature"], right_on=["row", "feature"])
    assert len(both) >= 0.99 * len(shown)
    assert np.allclose(both["value_x"], both["value_y"], rtol=2**-7)
    assert list(prompt.tokens) == index.tokens(0, int(first["n_rows"]))["token"].tolist()


def test_prompt_features():
    model = tiny_model("gemma3")
    sae = make_sae(model, "blocks.1.hook_resid_post")
    prompt = features_on_prompt(model, sae, "The café <bos> was <b>closed</b>")
    assert prompt.flags[0] == RowFlag.BOS
    special = np.flatnonzero(prompt.flags)
    assert len(special) >= 1
    assert all(prompt.at(int(position)).empty for position in special)
    run = model.run("The café <bos> was <b>closed</b>", hooks=[sae.hook_name])
    dense = (sae.encode(run.activations[sae.hook_name]) * sae.decoder_norms).bfloat16().float().detach().numpy()
    dense[special] = 0
    for feature in prompt.features:
        assert np.array_equal(prompt.values_of(int(feature)), dense[:, feature])
    assert len(prompt.table) == np.count_nonzero(dense)
    assert prompt.at(3)["value"].is_monotonic_decreasing
    assert prompt.at(3)["rank"].tolist() == list(range(len(prompt.at(3))))
    assert prompt.next_logits.shape == (len(prompt.tokens), model.d_vocab)
    panel = prompt._repr_html_()
    assert "&lt;" in panel
    assert "<b>" not in panel
    with pytest.raises(OutOfRangeError):
        prompt.at(len(prompt.tokens))
    with pytest.raises(OutOfRangeError):
        prompt.values_of(-1)


def test_prompts_that_cannot_be(tmp_path):
    model = tiny_model("gemma3")
    sae = make_sae(model, "blocks.1.hook_resid_post")
    with pytest.raises(InvalidInputError, match="empty"):
        features_on_prompt(model, sae, "")
    with pytest.raises(InvalidInputError, match="Shorten"):
        features_on_prompt(model, sae, "cat " * 200)
    (tmp_path / "text.txt").write_text(TEXT)
    capture(model, TextSource([tmp_path / "text.txt"]), [sae.hook_name], tmp_path / "s.zarr", context_size=60)
    index = build_index(ActivationStore.open(tmp_path / "s.zarr"), sae, tmp_path / "i.index", model=model)
    with pytest.raises(MismatchError, match="another SAE"):
        features_on_prompt(model, make_sae(model, sae.hook_name, k=7), "The cat", index=index)
    with pytest.raises(MismatchError, match="other weights"):
        features_on_prompt(tiny_model("llama"), sae, "The cat", index=index)


@pytest.mark.parametrize("kind", ["gemma3", "llama", "gpt2"])
def test_direct_effects_add_up_to_the_centred_logit(kind):
    model = tiny_model(kind)
    sae = make_sae(model, f"blocks.{model.n_layers - 1}.hook_resid_post")
    prompt = features_on_prompt(model, sae, "The cat sat on the mat and")
    position, target = len(prompt.tokens) - 2, 17
    effects = direct_logit_effects(model, sae, prompt, position, target)
    assert effects["effect"].abs().is_monotonic_decreasing
    assert (effects["position"] == position).all()

    residual = torch.from_numpy(prompt.final_residual[position])[None]
    reconstruction = sae.b_dec.detach()[None].clone()
    for row in effects.itertuples():
        direction = sae.W_dec.detach()[row.feature]
        reconstruction += row.strength * direction / direction.norm()
    rest = torch.cat([sae.b_dec.detach()[None], residual - reconstruction])
    others = direct_effects(model, rest, residual.expand(2, -1), target)
    logits = torch.from_numpy(prompt.next_logits[position])
    unembedding = model.W_U.float()
    centred = logits[target] - logits.mean()
    norm = model.hf.get_submodule(model.layout.module(model.layout.family.final_norm))
    bias = getattr(norm, "bias", None)
    constant = 0.0 if bias is None else float(bias @ (unembedding[target] - unembedding.mean(0)))
    total = effects["effect"].sum() + float(others.sum()) + constant
    assert total == pytest.approx(float(centred), abs=1e-4)
    assert abs(effects["effect"].sum()) > 1e-2


@pytest.mark.parametrize("kind", ["gemma3", "gpt2"])
def test_an_effect_is_what_the_logit_moves_by_while_the_scale_is_held(kind):
    model = tiny_model(kind)
    sae = make_sae(model, f"blocks.{model.n_layers - 1}.hook_resid_post")
    prompt = features_on_prompt(model, sae, "The cat sat on the mat and")
    table = direct_logit_effects(model, sae, prompt, None, 5)
    assert set(table["position"]) == set(prompt.table["position"])
    one = table.iloc[0]
    position, feature = int(one["position"]), int(one["feature"])
    direction = torch.nn.functional.normalize(sae.W_dec.detach()[feature], dim=0)
    small = 1e-3 * float(np.linalg.norm(prompt.final_residual[position]))
    # Along the residual stream the scale changes to first order as well; take that part out.
    last = f"blocks.{model.n_layers - 1}.hook_resid_post"

    def centred(amount: float) -> tuple[float, float]:
        from scope.models.losses import final_norm_scale

        def push(value, context):
            value[0, position] += amount * direction
            return value

        run = model.run("The cat sat on the mat and", hooks=[last], edits={last: push})
        scale = float(final_norm_scale(model, run.activations[last][position]))
        logits = run.logits[position]
        bias = getattr(model.hf.get_submodule(model.layout.module(model.layout.family.final_norm)), "bias", None)
        pull = model.W_U[5] - model.W_U.mean(0)
        constant = 0.0 if bias is None else float(bias @ pull)
        return float(logits[5] - logits.mean()) - constant, scale

    (before, scale), (after, scale_after) = centred(0.0), centred(small)
    moved = (after * scale_after - before * scale) / scale
    expected = one["effect"] / one["strength"] * small
    assert moved == pytest.approx(expected, rel=0.02, abs=1e-4)


def test_effects_that_cannot_be():
    model = tiny_model("gemma3")
    sae = make_sae(model, "blocks.1.hook_resid_post")
    prompt = features_on_prompt(model, sae, "The cat")
    with pytest.raises(OutOfRangeError, match="token"):
        direct_logit_effects(model, sae, prompt, 1, model.d_vocab)
    with pytest.raises(OutOfRangeError, match="position"):
        direct_logit_effects(model, sae, prompt, -1, 3)
    with pytest.raises(MismatchError, match="80 at"):
        direct_logit_effects(model, make_sae(model, sae.hook_name, d_sae=80), prompt, 1, 3)
    with pytest.raises(MismatchError, match="residual stream"):
        direct_effects(model, torch.zeros(1, 5), torch.zeros(1, model.d_model), 3)


def test_likeliest_tokens_are_those_of_the_logits_without_holding_them(monkeypatch):
    from scope.models import losses

    model = tiny_model("gemma2")
    sae = make_sae(model, "blocks.1.hook_resid_post")
    whole = features_on_prompt(model, sae, "The cat sat on the mat and")
    lean = features_on_prompt(model, sae, "The cat sat on the mat and", logits=False)
    assert lean.next_logits is None
    assert lean.table.equals(whole.table)
    monkeypatch.setattr(losses, "CHUNK_BYTES", 3 * 8 * model.d_vocab)
    seen = []
    ids, probabilities = losses.likeliest_tokens(
        model, torch.from_numpy(lean.final_residual), 4, lambda done, total: seen.append((done, total))
    )
    assert seen == [(start, len(lean.tokens)) for start in range(0, len(lean.tokens), 3)]
    expected = torch.from_numpy(whole.next_logits).softmax(-1)
    best = expected.topk(4, dim=-1)
    assert torch.allclose(probabilities, best.values, atol=1e-5)
    assert torch.allclose(expected.gather(1, ids), best.values, atol=1e-5)
