"""What the pages about a model ask of the worker: as the library says, of tiny models with experts and with tables."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from helpers_family import HOOK, LAYERS, family_workspace
from helpers_models import one_thread as one_thread

from dashboards.components.embeddings_view import EmbeddingsSelection
from dashboards.components.experts_view import ExpertSelection
from dashboards.components.model_view import BYTES, UNITS, short
from dashboards.components.tables import Sorting
from dashboards.context import Context
from dashboards.experts import ExpertEdit, ExpertJobs
from dashboards.glossary import GLOSSARY
from dashboards.model_terms import MODEL_TERMS
from dashboards.models import ModelJobs
from dashboards.pages.feature import _experts_part
from dashboards.prompts import Asked, prompt_jobs
from dashboards.worker import Job, JobState
from scope.attribution import logit, per_layer_writes, table_effects
from scope.errors import UnknownNameError
from scope.features.experts import expert_specialisation, feature_experts
from scope.features.routing import edit_effects, load_by_layer, prompt_routing
from scope.interventions import combine, forbid_expert, force_expert, swap_experts

TEXT = Asked("The cat sat on the mat")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    workspace = family_workspace(tmp_path_factory.mktemp("family"), ("mixtral", "gemma4"))
    ids = {entry.name: entry.id for entry in workspace.indexes()}
    return SimpleNamespace(workspace=workspace, context=Context(workspace), **ids)


def found(family: SimpleNamespace, job: Job) -> Any:
    family.context.worker.wait(job, 60)
    assert job.state is JobState.DONE, job.error
    return job.result


def loaded(family: SimpleNamespace, index: str) -> Any:
    """The model and the SAE that the worker keeps."""
    job = family.context.worker.submit(("loaded", index), lambda job: prompt_jobs(family.context).loaded(job, index))
    return found(family, job)


def test_an_address_says_what_is_done_and_what_cannot_be_read_is_left_out() -> None:
    query = {"do": "swap", "layer": "1", "expert": "3", "other": "0", "at": "5,2,x"}
    assert ExpertEdit.of(query) == ExpertEdit("swap", 1, 3, 0, (5, 2))
    assert ExpertEdit.of({**query, "do": "forbid", "at": ""}) == ExpertEdit("forbid", 1, 3)
    for missing in ({"other": ""}, {"other": "3"}, {"expert": ""}, {"layer": "-1"}, {"do": "explode"}):
        assert ExpertEdit.of({**query, **missing}) is None
    assert EmbeddingsSelection.of({"part": "none", "token": "x", "layer": "2"}) == EmbeddingsSelection(layer=2)
    assert ExpertSelection.read({"by": "tongue", "of": "", "rows": "0"}) == ExpertSelection(rows=24)
    keys = {"Share": "share", "Bits": "information"}
    assert Sorting.of("-share", keys, "-information") == (keys, "share", True)
    assert Sorting.of("share", keys, "-information") == (keys, "share", False)
    assert Sorting.of("; drop", keys, "-information") == (keys, "information", True)


def test_a_model_is_made_of_what_scope_info_says(family: SimpleNamespace) -> None:
    jobs = ModelJobs(family.context)
    for index, d_per_layer, experts in ((family.mixtral, 0, dict.fromkeys(LAYERS, (4, 2))), (family.gemma4, 6, {})):
        facts = found(family, jobs.submit_facts(index))
        model, _ = loaded(family, index)
        assert facts.parameters == model.parameter_count()
        assert (facts.d_per_layer, facts.experts, facts.beside_dense) == (d_per_layer, experts, False)


def test_what_tables_wrote_is_followed_to_the_indexes_features(family: SimpleNamespace) -> None:
    written = found(family, ModelJobs(family.context).submit_written(family.gemma4, TEXT))
    model, sae = loaded(family, family.gemma4)
    own = per_layer_writes(model, TEXT.text, [sae], 16)
    pd.testing.assert_frame_equal(written.report.writes, own.writes)
    pd.testing.assert_frame_equal(written.report.features, own.features)
    assert (written.hook, written.problem) == (HOOK, "")
    assert found(family, ModelJobs(family.context).submit_written(family.mixtral, TEXT)).report is None
    logits = model.run(TEXT.text).logits[-1]
    assert [one.token_id for one in written.next_tokens] == logits.topk(6).indices.tolist()
    assert written.next_tokens[0].probability == pytest.approx(
        float(logits.float().softmax(-1).max()), rel=1e-2
    )  # bfloat16


def test_what_tables_did_for_a_next_token_is_the_librarys(family: SimpleNamespace) -> None:
    jobs, (model, _) = ModelJobs(family.context), loaded(family, family.gemma4)
    effects = found(family, jobs.submit_effects(family.gemma4, TEXT, 305))
    pd.testing.assert_frame_equal(effects.table, table_effects(model, TEXT.text, logit(305)).table)
    assert found(family, jobs.submit_effects(family.mixtral, TEXT, 305)) is None
    lost = jobs.submit_effects(family.gemma4, TEXT, 10**8)
    family.context.worker.wait(lost, 60)
    assert lost.state is JobState.FAILED
    assert EmbeddingsSelection.of({"target": "305"}).target == 305


def test_a_stores_experts(family: SimpleNamespace) -> None:
    jobs = ExpertJobs(family.context)
    assert jobs.stores(family.gemma4) == []
    assert jobs.store(family.gemma4, "") is None
    (only,) = jobs.stores(family.mixtral)
    assert (only.layers, only.layer(9), only.layer(2)) == (LAYERS, LAYERS[0], 2)
    assert jobs.store(family.mixtral, only.entry.id) == only
    with pytest.raises(UnknownNameError):
        jobs.store(family.mixtral, "none")
    store = family.workspace.store(only.entry.id)
    pd.testing.assert_frame_equal(found(family, jobs.submit_load(only)), load_by_layer(store))
    groups = found(family, jobs.submit_groups(only, 1, "language"))
    pd.testing.assert_frame_equal(groups.table, expert_specialisation(store, 1, "language"))
    by_token = found(family, jobs.submit_groups(only, 1, "token"))
    assert by_token.load["group"].nunique() == 16 < by_token.n_groups
    ids = expert_specialisation(store, 1, "token")["top_group"]
    model, sae = loaded(family, family.mixtral)
    reads = model.vocabulary_strings(ids.tolist())
    assert all(text.startswith(read) for text, read in zip(by_token.table["top_group"], reads, strict=True))
    pairs = found(family, jobs.submit_pairs(only, family.mixtral, 1))
    pd.testing.assert_frame_equal(pairs, feature_experts(store, sae, 1))


def test_a_feature_leads_to_a_store_that_has_what_its_sae_reads(
    family: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = ExpertJobs(family.context).stores(family.mixtral)[0]
    other = known._replace(entry=replace(known.entry, id="other"), hooks=known.hooks[:1])
    assert HOOK not in other.hooks
    monkeypatch.setattr(ExpertJobs, "stores", lambda *_: [other, known])
    feature = SimpleNamespace(id=3, fires=True)
    parts = _experts_part(family.context, family.mixtral, feature)
    links = [one.href for part in parts for one in part._traverse() if getattr(one, "href", None)]
    assert len(links) == 1
    assert f"store={known.entry.id}" in links[0]


def test_a_prompts_routing_and_what_edits_of_it_change(family: SimpleNamespace) -> None:
    jobs = ExpertJobs(family.context)
    model, sae = loaded(family, family.mixtral)
    routed = found(family, jobs.submit_routing(family.mixtral, TEXT))
    pd.testing.assert_frame_equal(routed.routing, prompt_routing(model, TEXT.text))
    assert routed.dense is None
    assert "".join(routed.tokens[1:]) == TEXT.text
    assert found(family, jobs.submit_routing(family.gemma4, TEXT)).routing is None
    for edit, done in (
        (ExpertEdit("forbid", 0, 1), forbid_expert(model, 0, 1)),
        (ExpertEdit("force", 1, 2, None, (3,)), force_expert(model, 1, 2, (3,))),
        (ExpertEdit("swap", 0, 0, 3, (2, 4)), swap_experts(model, 0, 0, 3, (2, 4))),
    ):
        effects = found(family, jobs.submit_effects(family.mixtral, TEXT, edit, 5))
        own = edit_effects(model, TEXT.text, combine(done), sae, 5)
        pd.testing.assert_frame_equal(effects.next_tokens, own.next_tokens)
        pd.testing.assert_frame_equal(effects.flips, own.flips)
        assert (effects.position, effects.kl) == (5, own.kl)


@pytest.mark.parametrize(
    ("value", "units", "words"),
    [
        (394, UNITS, "394"),
        (52_000, UNITS, "52.0K"),
        (999_499, UNITS, "999K"),
        (999_950, UNITS, "1.00M"),
        (268_098_176, UNITS, "268M"),
        (1_500_000_000, BYTES, "1.50 GB"),
    ],
)
def test_counts_have_three_digits_and_a_unit(value: int, units: Any, words: str) -> None:
    assert short(value, units) == words


def test_each_term_of_these_pages_is_defined() -> None:
    assert MODEL_TERMS.keys() <= GLOSSARY.keys()
    assert all(GLOSSARY[term].definition for term in MODEL_TERMS)
