"""What the prompt page and the lens ask of the model, with a tiny real model; and the numbers that follow from it."""

import functools
import json
from types import SimpleNamespace
from typing import Any

import helpers_chats
import helpers_dashboards as fakes
import numpy as np
import pandas as pd
import pytest
import torch
from helpers_models import TinyDictionary, one_thread, tiny_model  # noqa: F401

from dashboards.components.lens_view import LensSelection
from dashboards.components.prompt_heatmap import heatmap_rows
from dashboards.components.prompt_pair import selected_pair
from dashboards.components.prompt_state import PromptView, Selection
from dashboards.components.token_grid import column_window, token_grid
from dashboards.conversations import Said, chat_of, form_turns, prepare, turns_of, words_of
from dashboards.prompts import Analysis, Asked, PromptJobs
from dashboards.pushes import Push
from scope.attribution import logit_lens
from scope.errors import InvalidInputError
from scope.figures.lens import lens_heatmap, lens_lines

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}({{ m.role }}) {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}(assistant) {% endif %}"
)


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> PromptJobs:
    """Jobs that run where they are called, on a tiny model and a random dictionary."""
    model = tiny_model("gemma3")
    sae = SimpleNamespace(hook_name="blocks.1.hook_resid_post", fingerprint="f")
    index = SimpleNamespace(
        sae_info={"fingerprint": "f"}, model_info={"name": "m"}, hook_name=sae.hook_name, chat_template=None
    )
    results: dict[Any, Any] = {}
    worker = SimpleNamespace(result=results.get)
    made = PromptJobs(SimpleNamespace(worker=worker, index=lambda id: index, chat_template=None))  # type: ignore[arg-type]
    made._models["m"], made._saes["f"] = model, sae
    return made


def job() -> Any:
    return SimpleNamespace(report=lambda *_: None)


def test_a_chat_goes_through_the_template_and_begins_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("gemma3")
    chat = Asked(json.dumps([["user", "The cat sat"], ["assistant", "on the mat"], ["user", "  "]]), True)
    with pytest.raises(InvalidInputError, match="no chat template"):
        prepare(model, chat.text, chat.chat)
    monkeypatch.setattr(model.tokenizer, "chat_template", TEMPLATE)
    ids, n_tokens, said = prepare(model, chat.text, chat.chat)
    turns = turns_of(said)
    assert n_tokens == len(ids)
    assert int(ids[0]) == model.bos_token_id
    assert model.tokenizer.decode(ids[1:]).endswith("(assistant) ")
    assert list(turns.values()) == ["user", "assistant"]
    strings = [text.text for text in model.token_strings(ids)]
    for place, words in zip(turns, ("The cat sat", "on the mat"), strict=True):
        assert "".join(strings[place:]).lstrip().startswith(words)


def test_a_chat_with_calls_and_tools(jobs: PromptJobs, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = helpers_chats.weather_chat()
    text = json.dumps({"messages": [one.as_dict for one in chat.messages], "tools": list(chat.tools)})
    assert chat_of(text) == chat
    turns, tools = form_turns(text)
    assert [turn[:2] for turn in turns] == [[one.role, one.content] for one in chat.messages]
    assert json.loads(turns[2][2]) == list(chat.messages[2].tool_calls)
    assert json.loads(tools) == list(chat.tools)
    model = tiny_model("gemma3")
    found = prepare(model, text, True, helpers_chats.BLOCKS)
    strings = [one.text for one in model.token_strings(found.prompt)]
    words = [words_of(one) for one in found.said]
    assert len(words) == len(strings) == found.n_tokens
    named = {name: "".join(strings[n] for n, one in enumerate(words) if one == name) for name in set(words)}
    assert named["tool"] == '{"sky": "grey", "wind": 3}'
    assert named["assistant · call"].startswith('{"name": "get_weather"')
    assert named["definition of a tool"].count('"function": {') == 2
    assert list(turns_of(found.said).values()) == [
        "system",
        "definition of a tool",
        "user",
        "assistant · call",
        "tool",
        "assistant",
    ]
    # The dashboard's own template comes first, then that of the index's chats, then the tokenizer's.
    monkeypatch.setattr(model.tokenizer, "chat_template", TEMPLATE)
    asked = Asked('[["user", "hi"]]', True)
    index = jobs.context.index("i")
    written = []
    for own, of_index in ((None, None), (None, helpers_chats.BLOCKS), (helpers_chats.FOLDED, helpers_chats.BLOCKS)):
        jobs.context.chat_template, index.chat_template = own, of_index
        written.append(model.tokenizer.decode(jobs._prepared(model, "i", asked).prompt))
    assert [text.split("hi")[0].strip() for text in written] == [
        "<bos>(user)",
        "<bos><|im_start|>user",
        "<bos><start_of_turn>user",
    ]


@pytest.mark.parametrize(
    "text", ["{", "3", '{"messages": 3}', '[["user"]]', '[{"role": "assistant", "tool_calls": [{}]}]']
)
def test_what_is_no_chat(text: str) -> None:
    with pytest.raises(InvalidInputError, match="The chat cannot be read"):
        chat_of(text)
    form_turns(text)


def test_turns_and_their_parts() -> None:
    said = [Said("none", "markup", -1), Said("assistant", "text", 0), Said("assistant", "markup", 0)]
    said += [Said("assistant", "tool_call", 0), Said("assistant", "markup", 0), Said("none", "markup", -1)]
    said += [Said("tool", "markup", 1), Said("tool", "tool_response", 1), Said("tool", "tool_response", 2)]
    assert turns_of(said) == {1: "assistant", 2: "assistant · call", 6: "tool", 8: "tool"}
    assert [words_of(one) for one in said[:3]] == ["markup", "assistant", "assistant · markup"]


def test_a_prompt_that_is_too_long_is_refused_with_the_numbers(jobs: PromptJobs) -> None:
    with pytest.raises(InvalidInputError, match=r"takes up to 64 .* Shorten it by \d+"):
        jobs._analyse(job(), "i", Asked("cat " * 200))
    with pytest.raises(InvalidInputError, match="takes up to 64"):
        jobs._lens(job(), "i", Asked("cat " * 200), "", (), None)


def test_distributions_are_those_of_the_model(jobs: PromptJobs) -> None:
    model = tiny_model("gemma3")
    last = f"blocks.{model.n_layers - 1}.hook_resid_post"
    texts = (Asked("The cat sat on"), Asked("The moon"))
    p = []
    for asked in texts:
        run = model.run(asked.text, hooks=[last])
        features = SimpleNamespace(final_residual=run.activations[last].numpy())
        jobs.context.worker.result = {  # type: ignore[method-assign]
            **getattr(jobs.context.worker.result, "__self__", {}),
            ("analyse", "i", asked): SimpleNamespace(features=features),
        }.get
        p.append(run.logits[-1].double().softmax(-1))
    found = jobs._distributions(job(), "i", (texts[0], -1), (texts[1], -1))
    ids = torch.tensor(found.table["token_id"].tolist())
    assert np.allclose(found.table["a"], p[0][ids], atol=1e-6)
    assert np.allclose(found.table["b"], p[1][ids], atol=1e-6)
    assert set(p[0].topk(10).indices.tolist()) <= set(ids.tolist())
    m = (p[0] + p[1]) / 2
    divergence = sum(float((one * (one / m).log2()).sum()) for one in p) / 2
    assert found.divergence == pytest.approx(divergence, abs=1e-6)
    assert 0 < found.divergence < 1


@functools.cache
def fake_index() -> fakes.FakeIndex:
    return fakes.FakeIndex(repeats=2)


def view(**selection: Any) -> PromptView:
    index = fake_index()
    features = fakes.fake_features_on_prompt(fakes.FakeModel(index), None, "The opposite of hot is")
    push = Push(2, "cold", fakes.fake_direct_logit_effects(None, None, features, None, 2))
    return PromptView(index, Analysis(Asked("x"), features, []), push, Selection(**selection))


def test_the_heatmap_is_ordered_by_its_measure_over_the_tokens_that_count() -> None:
    for sort, column in (("strength", "value"), ("corrected", "corrected"), ("effect", "effect")):
        shown, n = heatmap_rows(view(sort=sort, rows=12))
        table = view(sort=sort).firings
        sizes = table[column].abs().groupby(table["feature"]).max()
        assert n == len(sizes)
        assert [sizes[feature] for feature in shown] == sorted(sizes, reverse=True)[:12]
    pinned, n = heatmap_rows(view(sort="strength", at=(3,), pins=(95, 94), rows=200))
    here = view().firings[view().firings["position"] == 3]
    assert pinned[:2] == [95, 94]
    assert n == len(here)
    assert set(pinned) == set(here["feature"]) | {95, 94}


def test_the_measure_falls_back_where_no_token_is_chosen() -> None:
    with_target = view()
    assert with_target.sort == "effect"
    without = PromptView(with_target.index, with_target.analysis, None, Selection(sort="effect"))
    assert without.measure.column == "value"
    total = without.analysis.features.table.groupby("position")["value"].sum()
    assert np.allclose(without.across()[1:], total)


def test_the_pair_that_is_looked_at() -> None:
    pairs = pd.DataFrame({"position_a": [0, 1, 2, -1], "position_b": [0, 1, -1, 2], "same": [True, True, False, False]})
    assert selected_pair(Selection(), pairs, 3, 3) == (2, 2)
    assert selected_pair(Selection(token=1), pairs, 3, 3) == (1, 1)
    assert selected_pair(Selection(token=2), pairs, 3, 3) == (2, 1)
    assert selected_pair(Selection(token2=2), pairs, 3, 3) == (1, 2)
    assert selected_pair(Selection(token=99), pairs, 3, 3) == (2, 2)


def test_columns_are_turned_by_the_block() -> None:
    assert column_window(10, None, 3, 96) == range(10)
    assert column_window(300, None, 200, 96) == range(192, 288)
    assert column_window(300, 250, 0, 96) == range(250, 300)
    assert column_window(300, 999, 5, 96) == range(96)
    grid = token_grid(
        ["<b>"], [0], [{"id": 1, "name": "<i>", "v": [1.0]}], what="feature", corner="", caption="c", scale=1
    )
    assert json.loads(grid.to_plotly_json()["props"]["data-grid"])["cols"][0]["t"] == "<b>"


def test_the_lens_selection_follows_the_last_layers_likeliest() -> None:
    lens = logit_lens(tiny_model("gemma3"), "The cat sat")
    assert LensSelection(token=1).followed(lens) == tuple(lens.top_ids[-1, 1, :3])
    assert LensSelection(follow=(5,)).followed(lens) == (5,)
    assert LensSelection().shown_token(lens) is None
    assert LensSelection(show="rank", follow=(5, 6)).shown_token(lens) == 5
    assert LensSelection(show="rank", of=9).shown_token(lens) == 9


def test_figures_of_the_lens() -> None:
    model = tiny_model("gemma3")
    sae = TinyDictionary("blocks.1.hook_resid_post")
    plain, read = (
        logit_lens(model, "a <b>cat</b> sat", follow=[5, 6], positions=[2, 3], sae=one) for one in (None, sae)
    )
    grid = lens_heatmap(plain.cells())
    assert np.allclose(grid.data[0].z, plain.top_probabilities[..., 0])
    assert "<b" not in json.dumps(grid.data[0].to_plotly_json(), default=str).replace("<br>", "")
    one = read.followed()
    lines = lens_lines(one[one["position"] == 3], "rank", plain=plain.followed(), sae_layer=read.sae_layer)
    assert len(lines.data) == 4
    assert list(lines.data[2].y) == read.rank[:, 1, 0].tolist()
    assert lines.layout.yaxis.type == "log"
