"""Two models' activations whose difference is known: what was planted is found, and nothing where nothing was."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_diffing import HOOK, N_SHARED, OWN, WIDTH, PlantedModel, directions, stores_of
from helpers_saes import make, shaken
from helpers_training import one_thread  # noqa: F401  # a fixture

from scope.diffing import feature_changes, scale_features
from scope.diffing.control import FiringCounts
from scope.diffing.pair import BASE, TUNED, PairedStores
from scope.diffing.resampling import middle_95, paired_z, two_sided
from scope.errors import IntegrityError, InvalidInputError, MismatchError
from scope.features.discoveries import discoveries
from scope.saes.crosscoder import Crosscoder, CrosscoderConfig
from scope.saes.topk import TopKConfig, TopKSAE
from scope.training import TrainConfig, train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> PairedStores:
    return stores_of(tmp_path_factory.mktemp("planted"), PlantedModel(), PlantedModel(name="tuned", planted=1.0))


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> PairedStores:
    return stores_of(tmp_path_factory.mktemp("control"), PlantedModel(), PlantedModel(name="same"))


def crosscoder_of(W_dec: torch.Tensor, seed: int = 0) -> Crosscoder:
    """A ReLU crosscoder over two hooks with these decoder rows, and an encoder that reads them."""
    d_sae, width = W_dec.shape
    cfg = CrosscoderConfig(d_in=width, d_sae=d_sae, widths=(width // 2, width // 2), activation="relu")
    made = Crosscoder(cfg, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        made.W_dec.copy_(W_dec)
        made.W_enc.copy_((W_dec / W_dec.norm(dim=-1, keepdim=True)).T)
        made.b_enc.fill_(-0.3)
    return made


def both_rows(stores: PairedStores) -> tuple[torch.Tensor, torch.Tensor]:
    parts = list(stores.paired_rows(HOOK))
    return torch.cat([part.base for part in parts]), torch.cat([part.tuned for part in parts])


def test_latent_scaling_is_the_least_squares_fit(planted: PairedStores) -> None:
    made = shaken(crosscoder_of(torch.randn(12, 2 * WIDTH, generator=torch.Generator().manual_seed(1))), size=0.1)
    assert isinstance(made, Crosscoder)
    with torch.no_grad():
        made.W_dec[:4, WIDTH:] *= 0.3  # longer in the base model
    table = scale_features(made, HOOK, planted).table.set_index("feature")
    x = both_rows(planted)
    with torch.no_grad():
        f = made.encode(torch.cat(x, dim=1)).double()
        decoders = [part.double() for part in made.W_dec.split(WIDTH, dim=-1)]
        biases = [part.double() for part in made.b_dec.split(WIDTH)]
    compared = 0
    for feature in range(12):
        long = int(decoders[1][feature].norm() >= decoders[0][feature].norm())
        regressor = torch.outer(f[:, feature], decoders[long][feature]).flatten()[:, None]
        betas = []
        for model in (0, 1):
            written = f @ decoders[model]
            others = written - torch.outer(f[:, feature], decoders[model][feature])
            for target in (x[model].double() - biases[model] - others, written):
                betas.append(float(torch.linalg.lstsq(regressor, target.flatten()[:, None]).solution))
        (error_short, made_short), (error_long, made_long) = (betas[:2], betas[2:]) if long else (betas[2:], betas[:2])
        if min(error_long, made_long) <= 0:  # the ratio says nothing
            continue
        compared += 1
        assert table.loc[feature, "nu_error"] == pytest.approx(error_short / error_long, rel=1e-3, abs=1e-4)
        assert table.loc[feature, "nu_reconstruction"] == pytest.approx(made_short / made_long, rel=1e-3, abs=1e-4)
    assert compared >= 6


def test_latent_scaling_tells_a_feature_of_one_model_from_both_artefacts(planted: PairedStores) -> None:
    basis = torch.from_numpy(directions()).float()
    shared = torch.cat([basis[:N_SHARED], basis[:N_SHARED]], dim=1)
    nothing = torch.zeros(WIDTH)
    own = torch.cat([nothing, basis[OWN]])
    # Shared direction 0 is not written in the base model: it lies in its error. Direction 1 is written in the base
    # model by one feature and in the other model by another.
    shrunk = torch.cat([nothing, basis[0]])
    decoupled = torch.stack([torch.cat([nothing, basis[1]]), torch.cat([basis[1], nothing])])
    made = crosscoder_of(torch.cat([shared[2:], own[None], shrunk[None], decoupled]))
    table = scale_features(made, HOOK, planted).table
    n = N_SHARED - 2
    assert (table["place"][:n] == "shared").all()
    assert (table["verdict"][:n] == "").all()
    assert table["nu_error"][:n].to_numpy() == pytest.approx(np.ones(n), abs=0.05)
    assert table["place"][n:].tolist() == ["tuned", "tuned", "tuned", "base"]
    assert table["verdict"][n:].tolist() == ["specific", "shrinkage", "decoupling", "decoupling"]
    assert (table["nu_error_low"] <= table["nu_error"] + 1e-9).all()
    assert (table["nu_error"] <= table["nu_error_high"] + 1e-9).all()


def trained_on(stores: PairedStores) -> Crosscoder:
    settings = TrainConfig(arch="crosscoder", d_sae=28, k=4, tokens=300 * 256, batch_size=256, lr=3e-3)
    sae = train(stores.aligned, [f"{BASE}:{HOOK}", f"{TUNED}:{HOOK}"], settings).sae
    assert isinstance(sae, Crosscoder)
    return sae


def test_a_trained_crosscoder_finds_the_direction_that_was_planted(planted: PairedStores) -> None:
    crosscoder = trained_on(planted)
    found = scale_features(crosscoder, HOOK, planted)
    specific = found.specific("tuned")
    assert len(specific) >= 1
    assert not len(found.specific("base"))
    rows = crosscoder.W_dec.detach()[specific["feature"].tolist(), WIDTH:]
    cosines = torch.nn.functional.cosine_similarity(rows, torch.from_numpy(directions()[OWN]).float(), dim=-1)
    assert float(cosines.abs().min()) > 0.9
    place = int(specific["feature"].iloc[0])
    assert len(found.top.of(place)) == 4
    assert found.to_dict()["verdicts"]["tuned"]["specific"] == len(specific)


def test_a_trained_crosscoder_finds_nothing_where_nothing_changed(control: PairedStores) -> None:
    found = scale_features(trained_on(control), HOOK, control)
    assert not len(found.specific("tuned"))
    assert not len(found.specific("base"))


def dictionary() -> TopKSAE:
    basis = torch.from_numpy(directions()).float()[: OWN + 1]
    sae = TopKSAE(TopKConfig(d_in=WIDTH, d_sae=len(basis), k=ACTIVE_OR_MORE))
    with torch.no_grad():
        sae.W_dec.copy_(basis)
        sae.W_enc.copy_(basis.T)
        sae.b_enc.fill_(-0.5)
        sae.b_dec.zero_()
    return sae


ACTIVE_OR_MORE = 4


def test_an_saes_feature_that_came_up_is_the_one_that_changed(planted: PairedStores, control: PairedStores) -> None:
    sae = dictionary()
    changes = feature_changes(sae, HOOK, planted)
    assert changes.changed["feature"].tolist() == [OWN]
    row = changes.table.loc[OWN]
    x = both_rows(planted)
    for which, values in zip(("base", "tuned"), x, strict=True):
        fires = sae.encode(values)[:, OWN] > 0
        assert row[f"rate_{which}"] == pytest.approx(float(fires.double().mean()))
        assert row[f"rate_{which}_low"] <= row[f"rate_{which}"] <= row[f"rate_{which}_high"]
    assert row["log_ratio_low"] > 0
    same = feature_changes(sae, HOOK, control)
    assert not len(same.changed)
    assert (same.table["z"] == 0).all()
    fires = same.table["rate_base"] > 0
    assert (same.table["agreement"][fires] == 1).all()
    assert same.table["decoder_cosine"][fires].to_numpy() == pytest.approx(np.ones(int(fires.sum())), abs=1e-5)
    assert same.drift.fvu_change == 0
    assert same.drift.relative_change == 0


def test_only_what_a_control_has_not_is_beyond_it(planted: PairedStores, control: PairedStores) -> None:
    sae = dictionary()
    tuned, same = feature_changes(sae, HOOK, planted), feature_changes(sae, HOOK, control)
    against_nothing = tuned.against(same.counts)
    assert against_nothing.changed["feature"].tolist() == [OWN]
    row = against_nothing.table.loc[OWN]
    assert row["rate_control"] == pytest.approx(same.table.loc[OWN, "rate_tuned"])
    assert row["excess"] == pytest.approx(row["log_ratio"])  # the control is as the base is
    assert row["excess_low"] <= row["excess"] <= row["excess_high"]
    assert against_nothing.to_dict()["beyond"] == 1
    # A control in which the same came up leaves nothing, however much both differ from the base.
    against_itself = tuned.against(tuned.counts)
    assert against_itself.table["changed"].sum() == 1
    assert not len(against_itself.changed)
    assert (against_itself.table["excess"] == 0).all()


def test_rows_that_differ_are_bounded_by_what_two_reports_know(tmp_path: Path, planted: PairedStores) -> None:
    """Rows on which one of two copies fires are no more than those of each against the base, together."""
    base, tuned = (dictionary().encode(x) > 0 for x in both_rows(planted))
    other = base.roll(1, dims=0)
    between = (tuned ^ other).sum(dim=0)
    assert bool((between <= (base ^ tuned).sum(dim=0) + (base ^ other).sum(dim=0)).all())
    counts = feature_changes(dictionary(), HOOK, planted).counts
    assert counts.discordant.tolist() == (base ^ tuned).sum(dim=0).tolist()
    assert counts.firings.sum(axis=0).tolist() == tuned.sum(dim=0).tolist()
    counts.save(tmp_path / "counts.npz")
    read = FiringCounts.load(tmp_path / "counts.npz")
    assert all(np.array_equal(a, b) for a, b in zip(counts, read, strict=True))
    with pytest.raises(IntegrityError, match="again"):
        FiringCounts.load(tmp_path / "nothing.npz")
    with pytest.raises(MismatchError, match="other rows"):
        feature_changes(dictionary(), HOOK, planted).against(read._replace(rows=read.rows + 1))


def test_a_feature_is_at_home_where_its_rate_is_highest(planted: PairedStores) -> None:
    changes = feature_changes(dictionary(), HOOK, planted)
    sources = np.concatenate([part.sources for part in planted.paired_rows(HOOK)])
    base, tuned = ((dictionary().encode(x) > 0).double() for x in both_rows(planted))
    fires = torch.where(base.sum(dim=0) > 0, base, tuned)
    rates = np.stack([fires[sources == number].mean(dim=0).numpy() for number in range(len(planted.sources))])
    assert len(planted.sources) > 1
    common = np.flatnonzero(fires.sum(dim=0) > 100)
    found = changes.table["source"][common].tolist()
    assert found == [planted.sources[place] for place in rates[:, common].argmax(axis=0)]
    assert (changes.table["lift"][common] >= 0).all()
    counted = changes.to_dict()["by_source"]
    assert sum(row["firing"] for row in counted) == changes.to_dict()["firing"]
    assert sum(row["more_often"] for row in counted) == 1


def test_drift_is_the_change_of_fvu(planted: PairedStores) -> None:
    sae = make("topk", d_in=WIDTH, d_sae=20, k=3)
    drift = feature_changes(sae, HOOK, planted).drift
    fvu = []
    for x in both_rows(planted):
        error = (x - sae(x).detach()).double().square().sum()
        fvu.append(float(error / (x - x.mean(dim=0)).double().square().sum()))
    assert (drift.fvu_base, drift.fvu_tuned) == pytest.approx(tuple(fvu), rel=1e-4)
    assert drift.fvu_change == pytest.approx(fvu[1] - fvu[0], abs=1e-5)
    assert drift.fvu_change_interval[0] <= drift.fvu_change <= drift.fvu_change_interval[1]


def test_a_decoder_row_is_refitted_to_what_is_left(planted: PairedStores) -> None:
    sae = make("topk", d_in=WIDTH, d_sae=20, k=3)
    table = feature_changes(sae, HOOK, planted).table
    refitted = []
    with torch.no_grad():
        for x in both_rows(planted):
            f = sae.encode(x).double()
            left = x.double() - sae(x).double()
            refitted.append(sae.W_dec.double() + (f.T @ left) / f.square().sum(dim=0)[:, None])
    expected = torch.nn.functional.cosine_similarity(*refitted, dim=-1).numpy()
    known = np.isfinite(expected)
    assert table["decoder_cosine"].to_numpy()[known] == pytest.approx(expected[known], abs=1e-4)


def test_dictionaries_of_several_hooks_are_refused(planted: PairedStores) -> None:
    three = CrosscoderConfig(d_in=3 * WIDTH, d_sae=8, widths=(WIDTH,) * 3, activation="relu")
    with pytest.raises(MismatchError, match="two"):
        scale_features(Crosscoder(three), HOOK, planted)
    with pytest.raises(InvalidInputError, match="several hooks"):
        feature_changes(Crosscoder(three), HOOK, planted)


def test_the_paired_test_keeps_its_rate_and_minds_documents() -> None:
    rng = np.random.default_rng(0)
    groups, features = 40, 400
    rows = np.full(groups, 200.0)
    base_only, tuned_only = rng.binomial(200, 0.02, (2, groups, features)).astype(float)
    z = paired_z(base_only, tuned_only, (base_only + tuned_only).sum(axis=0), rows)
    assert np.mean(np.abs(z) > 1.96) < 0.08
    assert discoveries(two_sided(z)).sum() <= 2
    # All of a change in one document is no evidence of a change elsewhere.
    one = np.zeros((groups, 1))
    one[0] = 150.0
    assert abs(paired_z(np.zeros_like(one), one, one.sum(axis=0), rows)[0]) < 2
    assert paired_z(one, one, np.zeros(1), rows)[0] == 0
    low, high = middle_95(np.array([[np.nan, 1.0], [np.nan, 2.0]]))
    assert np.isnan(low[0])
    assert 1 <= low[1] <= high[1] <= 2
