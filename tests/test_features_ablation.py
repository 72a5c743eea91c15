"""The loss without a feature, on its examples, is that of the model with the feature taken out by hand."""

import numpy as np
import pytest
from helpers_models import TEXT, one_thread, tiny_model
from test_features_prompt import make_sae

from activations.capture import capture
from activations.store import ActivationStore
from activations.text import TextSource
from scope.errors import InvalidInputError, MismatchError, OutOfRangeError
from scope.features import ablation_effect, build_index

__all__ = ["one_thread"]

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablation")
    model = tiny_model("llama")
    texts = [folder / "one.txt", folder / "other.txt"]
    for path, text in zip(texts, (TEXT, TEXT.replace("cat", "dog")), strict=True):
        path.write_text(text)
    capture(model, TextSource(texts), [HOOK], folder / "s.zarr", context_size=30)
    sae = make_sae(model, HOOK)
    index = build_index(ActivationStore.open(folder / "s.zarr"), sae, folder / "i.index", model=model)
    return model, sae, index


def test_changes_of_the_loss_are_those_of_the_feature_taken_out_by_hand(made):
    model, sae, index = made
    feature = int(index.table["n_firings"].argmax())
    told = []
    found = ablation_effect(index, model, sae, feature, n=4, window=(6, 5), progress=lambda *at: told.append(at))
    assert told[-1] == (2 * len(found.examples), 2 * len(found.examples))
    row = sae.W_dec[feature].detach()

    def without(value, context):
        value[:, 1:] -= sae.encode(value[:, 1:]).detach()[..., feature, None] * row

    for place, example in found.examples.iterrows():
        start = index.window_start(int(example["row"]))
        tokens = found.tokens[found.tokens["example"] == place]
        stop = int(tokens["row"].iloc[-1]) + 1
        assert tokens["row"].iloc[0] == max(start + 1, example["row"] - 6)
        ids = index.tokens(start, stop)["token_id"].to_numpy(np.int64)
        assert ids[0] == model.bos_token_id
        (plain,) = model.cross_entropy([ids])
        (ablated,) = model.cross_entropy([ids], {HOOK: without})
        change = ablated - plain
        assert tokens["change"].tolist() == pytest.approx(change[-len(tokens) :].tolist(), abs=1e-4)
        first = int(np.flatnonzero(index.values_on(feature, start, stop) > 0)[0])
        assert np.abs(change[:first]).max(initial=0) < 1e-5
        assert example["change"] == pytest.approx(float(change[first:].mean()), abs=1e-4)
        after = int(example["row"]) - start
        if after < len(change):
            assert example["next_change"] == pytest.approx(float(change[after]), abs=1e-4)
    low, high = found.interval
    assert low <= found.mean_change <= high
    assert found.examples["change"].abs().max() > 1e-4
    assert "ablated" in found._repr_html_()


def test_examples_of_one_document_give_no_interval(made):
    model, sae, index = made
    feature = int(index.table["n_firings"].argmax())
    found = ablation_effect(index, model, sae, feature, n=1)
    assert len(found.examples) == 1
    assert np.isfinite(found.mean_change)
    assert np.isnan(found.interval).all()


def test_what_cannot_be_ablated_is_said(made):
    model, sae, index = made
    with pytest.raises(OutOfRangeError):
        ablation_effect(index, model, sae, 96)
    with pytest.raises(InvalidInputError, match="n is 0"):
        ablation_effect(index, model, sae, 0, n=0)
    with pytest.raises(MismatchError, match="another SAE"):
        ablation_effect(index, model, make_sae(model, HOOK, d_sae=64), 0)
    dead = np.flatnonzero(index.table["dead"].to_numpy(bool))
    if len(dead):
        with pytest.raises(InvalidInputError, match="never fires"):
            ablation_effect(index, model, sae, int(dead[0]))
