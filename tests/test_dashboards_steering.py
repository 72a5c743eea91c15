"""What the steering page and the prompt page's attribution ask of the model, with a tiny real model."""

from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from helpers_models import one_thread, tiny_model
from helpers_saes import make

from dashboards.components.prompt_state import Selection
from dashboards.prompts import Asked, PromptJobs
from dashboards.pushes import METHODS, PushAsked, PushJobs
from dashboards.steering import MAX_PUSHED, Push, Steer, SteerJobs, pushes_text, suggested
from scope.attribution import attribute, direct_logit_effects, logit_difference
from scope.errors import InvalidInputError, OutOfRangeError, UnknownNameError
from scope.features import features_on_prompt
from scope.interventions import Intervention, InterventionSpec, steer
from scope.interventions.words import intervention_words
from scope.saes.base import SAEMetadata
from scope.workspace import Workspace

__all__ = ["one_thread"]

HOOK = "blocks.1.hook_resid_post"
TEXT = Asked("The cat sat on the mat")


class Job(SimpleNamespace):
    partial: Any = None

    def report(self, *told: Any) -> None:
        self.told = [*getattr(self, "told", []), (told, dict(self.partial or {}))]


class Indexed(SimpleNamespace):
    """What a search of an index needs."""

    __hash__ = object.__hash__


class Labels(SimpleNamespace):
    """Labels without a workspace."""

    def lists(self) -> dict[str, list[int]]:
        return {}


@pytest.fixture
def context(tmp_path) -> Any:
    """A workspace on the disk, a tiny model, and an index that knows maxima."""
    model = tiny_model("llama")
    sae = make("topk", d_in=32, metadata=SAEMetadata(hook_name=HOOK))
    table = pd.DataFrame({"max_value": [0.0] + [float(feature) for feature in range(1, 40)]})
    index = SimpleNamespace(
        id="i",
        d_sae=40,
        hook_name=HOOK,
        table=table,
        sae_info={"fingerprint": sae.fingerprint},
        model_info={"name": model.name},
    )
    made = SimpleNamespace(workspace=Workspace(tmp_path), index=lambda id: index, indexes=list, shared={}, worker=None)
    made.chat_template = None
    prompts = PromptJobs(made)
    prompts._models[model.name], prompts._saes[sae.fingerprint] = model, sae
    made.shared["prompt-jobs"], made.model, made.sae = prompts, model, sae
    return made


def test_an_address_says_what_is_pushed_and_what_cannot_be_read_is_left_out() -> None:
    query = {"push": "3:2,7:-99,3:1.5,x:1,4:nan,5", "n": "20", "t": "0.7", "during": "prompt", "freeze": "1"}
    wanted = Steer.of(query)
    assert wanted.pushes == (Push(3, 1.5), Push(7, -10.0), Push(5, 1.0))
    assert (wanted.n_tokens, wanted.temperature, wanted.during, wanted.freeze) == (20, 0.7, "prompt", True)
    assert pushes_text(wanted.pushes) == "3:1.5,7:-10,5:1"
    assert Steer.of({"n": "10000", "t": "9", "during": "never", "seed": "-1"}) == Steer()
    assert Steer.of({"push": "3:0"}).empty
    assert len(Steer.of({"push": ",".join(f"{i}:1" for i in range(40))}).pushes) == MAX_PUSHED
    named = Steer.of({"named": "x", "push": "3:2"})
    assert (named.named, named.pushes, named.empty) == ("x", (), False)


def test_the_pages_job_is_steer_with_multiples_of_maxima_and_tells_each_token(context: Any) -> None:
    jobs, job = SteerJobs(context), Job()
    wanted = Steer((Push(3, 2.0), Push(7, -1.0)), n_tokens=6)
    found = jobs._steer(job, "i", TEXT, wanted, jobs.spec("i", wanted))
    expected = steer(context.model, context.sae, {3: 6.0, 7: -7.0}, TEXT.text, 6)
    assert found.steering.steered.generation.tokens.tolist() == expected.steered.generation.tokens.tolist()
    assert found.steering.steered.token_kls == pytest.approx(expected.steered.token_kls, rel=1e-3, abs=1e-5)
    assert found.steering.norm == pytest.approx(expected.norm, rel=1e-4)
    assert [len(found.tokens[name]) for name in ("plain", "steered", "random")] == [6, 6, 6]
    texts = [texts for (step, *_), texts in job.told if step == "writing"]
    assert [len(text["plain"]) for text in texts] == sorted(len(text["plain"]) for text in texts)
    assert texts[-1]["steered"] == found.steering.steered.generation.text
    assert len(texts) == 3 * 6


def test_what_is_pushed_is_kept_and_named_interventions_of_every_kind_run(context: Any) -> None:
    jobs = SteerJobs(context)
    wanted = Steer((Push(3, 2.0),), during="generated", freeze=True, n_tokens=20)
    jobs.save("i", wanted, " warm ")
    assert jobs.kept() == ["warm"]
    kept = context.workspace.intervention("warm")
    assert kept == jobs.spec("i", wanted, "warm")
    assert (kept.model, kept.interventions[0].sae) == (context.model.name, context.sae.fingerprint[:12])
    by_name = jobs._steer(Job(), "i", TEXT, Steer(named="warm", n_tokens=20), kept)
    by_slider = jobs._steer(Job(), "i", TEXT, wanted, jobs.spec("i", wanted))
    assert by_name.steering.steered.generation.text == by_slider.steering.steered.generation.text
    heads = InterventionSpec(name="heads", interventions=(Intervention(kind="ablate", layer=1, heads=(0,)),))
    context.workspace.save_intervention(heads)
    found = jobs._steer(Job(), "i", TEXT, Steer(named="heads"), jobs.spec("i", Steer(named="heads")))
    assert found.steering.random is None
    assert set(found.tokens) == {"plain", "steered"}


def test_interventions_on_experts_are_told_in_words() -> None:
    at = {"layer": 3, "positions": (2, 5)}
    for one, words in (
        (
            Intervention(kind="forbid", experts=(17,), **at),
            "Send no token to expert 17 of layer 3, at positions 2, 5.",
        ),
        (Intervention(kind="force", layer=3, experts=(1, 2)), "Send every token to experts 1, 2 of layer 3."),
        (
            Intervention(kind="swap", layer=3, experts=(1, 2), during="generated"),
            "Swap experts 1 and 2 of layer 3, on the new text.",
        ),
        (Intervention(kind="scale", layer=0, experts=(4,), value=2.0), "Scale expert 4 of layer 0 by 2.0."),
    ):
        assert intervention_words(one) == words


def test_pushes_that_make_no_sense_are_said_before_anything_is_queued(context: Any) -> None:
    jobs = SteerJobs(context)
    for wanted, problem, words in (
        (Steer(), InvalidInputError, "Nothing is pushed"),
        (Steer((Push(0, 1.0),)), InvalidInputError, "never fires"),
        (Steer((Push(40, 1.0),)), OutOfRangeError, "0 to 39"),
        (Steer(named="none"), UnknownNameError, "none"),
    ):
        with pytest.raises(problem, match=words):
            jobs.submit("i", TEXT, wanted)
    with pytest.raises(InvalidInputError, match="cannot be a name"):
        jobs.save("i", Steer((Push(3, 1.0),)), "../up")


def test_a_next_token_is_attributed_by_every_method(context: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs, model, sae = PushJobs(context), context.model, context.sae
    features = features_on_prompt(model, sae, TEXT.text)
    monkeypatch.setattr(PromptJobs, "analysed", lambda *_: SimpleNamespace(features=features))
    a, b = 30, 70
    direct = jobs._push(Job(), "i", TEXT, PushAsked(a, b)).table.set_index(["position", "feature"])["effect"]
    one, other = (
        direct_logit_effects(model, sae, features, None, token).set_index(["position", "feature"])["effect"]
        for token in (a, b)
    )
    pd.testing.assert_series_equal(direct.sort_index(), (one - other).sort_index(), check_names=False)
    for method in METHODS:
        if method == "direct":
            continue
        found = jobs._push(Job(), "i", TEXT, PushAsked(a, b, method, after=4))
        expected = attribute(model, TEXT.text, logit_difference(a, b, 4), sae, method)
        assert (found.method, found.after) == (method, 4)
        assert found.value == pytest.approx(expected.value, rel=1e-4)
        whole = expected.table[expected.table["feature"] >= 0]
        assert found.table["effect"].tolist() == pytest.approx(whole["effect"].tolist(), rel=1e-4, abs=1e-6)
        assert found.table.loc[found.table["position"] > 4, "effect"].abs().max() < 1e-5
        if method == "integrated_gradients":  # alone in promising that nothing is lost
            (before,) = expected.baseline_values.values()
            total = float(expected.table["effect"].sum())
            assert found.completeness == pytest.approx(total / (expected.value - before), rel=1e-4)
        else:
            assert found.completeness is None
    exact, job = jobs._push(Job(), "i", TEXT, PushAsked(a, None, "activation_patching")), Job()
    assert exact.after == len(features.tokens) - 1
    jobs._push(job, "i", TEXT, PushAsked(a, None, "activation_patching"))
    assert any(told[0] == "intervening on each firing" for told, _ in job.told)
    with pytest.raises(InvalidInputError, match="the same"):
        jobs._push(Job(), "i", TEXT, PushAsked(a, a))
    with pytest.raises(UnknownNameError, match="vocabulary"):
        jobs._push(Job(), "i", TEXT, PushAsked(10**6))
    with pytest.raises(InvalidInputError, match="Shorten it"):
        jobs._push(Job(), "i", Asked("cat " * 300), PushAsked(a, None, "integrated_gradients"))


def test_features_that_are_about_the_words_of_a_search_come_first() -> None:
    tokens = [["the", "of"], ["a", " Paris"], ["Parisian", "x"], ["x", "y", " Paris"], [" Paris", "French"], ["z"]]
    labels = pd.DataFrame({"feature": [5], "label": ["about Paris"], "label_source": ["own"], "starred": [False]})
    index = Indexed(table=pd.DataFrame({"top_tokens": tokens}), labels=Labels(version=1, table=lambda: labels))
    assert suggested(index, [0, 1, 2, 3, 4, 5], " paris ") == [5, 4, 1, 3, 2, 0]  # type: ignore[arg-type]


def test_an_address_says_how_a_next_token_is_attributed() -> None:
    query = {"target": "5", "against": "6", "method": "integrated_gradients", "after": "3"}
    assert Selection.of(query).push == PushAsked(5, 6, "integrated_gradients", 3)
    assert Selection.of({**query, "method": "no such"}).push == PushAsked(5, 6)
    assert Selection.of({"against": "6"}).push is None
