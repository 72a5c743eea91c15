"""SAEs on disk: round trips, what sae_lens reads and writes, and what a broken folder gets."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from scope.errors import (
    IntegrityError,
    InvalidInputError,
    MismatchError,
    NonFiniteError,
    OccupiedError,
    UnknownNameError,
)
from scope.saes import formats
from scope.saes.base import SAEMetadata
from scope.saes.formats.saelens import read_density
from scope.saes.topk import TopKConfig, TopKSAE

METADATA = SAEMetadata(
    model_name="tiny",
    weight_hash="ab12",
    tokenizer_hash="cd34",
    hook_name="blocks.1.hook_resid_post",
    dataset_path="sample.parquet",
    context_size=256,
    prepend_bos=True,
    store_fingerprint="f" * 64,
    training={"lr": 1e-3, "betas": [0.9, 0.999]},
    scope_version="0.1.0",
    extra={"note": "kept"},
)


@pytest.fixture
def sae() -> TopKSAE:
    generator = torch.Generator().manual_seed(0)
    sae = TopKSAE(TopKConfig(d_in=16, d_sae=48, k=4, metadata=METADATA), generator=generator)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return sae


@pytest.fixture
def saved(sae: TopKSAE, tmp_path: Path) -> Path:
    return formats.save(sae, tmp_path / "saes" / "one")


def test_saving_and_loading_gives_the_same_sae(sae: TopKSAE, tmp_path: Path) -> None:
    density = torch.linspace(0, 1, 48)
    path = formats.save(
        sae, tmp_path / "one", density=density, companions={"train.jsonl": b"{}\n"}, quality={"fvu": 0.1}
    )
    loaded = formats.load(path)
    assert loaded.cfg == sae.cfg
    assert loaded.fingerprint == sae.fingerprint
    x = torch.randn(20, 16)
    assert torch.equal(loaded(x), sae(x))
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["format"] == "sae"
    assert manifest["fingerprint"] == sae.fingerprint
    assert manifest["parents"] == ["f" * 64]
    assert manifest["quality"] == {"fvu": 0.1}
    read = read_density(path)
    assert read is not None
    torch.testing.assert_close(read, density, rtol=1e-5, atol=1e-9)
    assert sorted(file.name for file in path.iterdir()) == sorted(
        ["cfg.json", "manifest.json", "sae_weights.safetensors", "sparsity.safetensors", "train.jsonl"]
    )


def test_saving_again_what_was_loaded_changes_nothing(saved: Path, tmp_path: Path) -> None:
    again = formats.save(formats.load(saved), tmp_path / "again")
    for name in ("cfg.json", "sae_weights.safetensors", "manifest.json"):
        assert (again / name).read_bytes() == (saved / name).read_bytes()


def test_bfloat16_weights_keep_their_dtype(sae: TopKSAE, tmp_path: Path) -> None:
    loaded = formats.load(formats.save(sae.to(torch.bfloat16), tmp_path / "half"))
    assert loaded.dtype == torch.bfloat16
    assert loaded.cfg.dtype == "bfloat16"


def close(ours: torch.Tensor, theirs: torch.Tensor, x: torch.Tensor) -> None:
    assert float(((ours - theirs).norm(dim=-1) / x.norm(dim=-1)).max()) <= 1e-5


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_sae_lens_loads_what_we_save(sae: TopKSAE, saved: Path) -> None:
    from sae_lens import SAE

    theirs = SAE.load_from_disk(str(saved))
    x = 100 * torch.randn(300, 16)
    close(sae.encode(x), theirs.encode(x), x)
    close(sae(x), theirs(x), x)
    assert theirs.cfg.metadata.hook_name == "blocks.1.hook_resid_post"
    assert theirs.cfg.metadata.store_fingerprint == "f" * 64


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("apply_b_dec_to_input", [False, True])
def test_we_load_what_sae_lens_saves(tmp_path: Path, rescale: bool, apply_b_dec_to_input: bool) -> None:
    from sae_lens import TopKSAE as TheirTopKSAE
    from sae_lens import TopKSAEConfig

    torch.manual_seed(1)
    config = TopKSAEConfig(
        d_in=16, d_sae=48, k=4, rescale_acts_by_decoder_norm=rescale, apply_b_dec_to_input=apply_b_dec_to_input
    )
    config.metadata.hook_name = "blocks.3.hook_resid_post"
    theirs = TheirTopKSAE(config)
    for parameter in theirs.parameters():
        parameter.add_(0.3 * torch.randn(parameter.shape))
    theirs.save_model(tmp_path / "theirs")
    ours = formats.load(tmp_path / "theirs")
    x = 100 * torch.randn(300, 16)
    close(ours.encode(x), theirs.encode(x), x)
    close(ours(x), theirs(x), x)
    assert ours.hook_name == "blocks.3.hook_resid_post"


@torch.no_grad()
def test_an_unfinished_scale_is_folded_into_the_weights(sae: TopKSAE, saved: Path) -> None:
    edit_config(saved, normalize_activations="expected_average_only_in")
    (saved / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 0.25}))
    (saved / "manifest.json").unlink()
    x = torch.randn(50, 16)
    torch.testing.assert_close(formats.load(saved)(x), sae(0.25 * x) / 0.25)


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "cfg.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    path = folder / "sae_weights.safetensors"
    weights = {**load_file(path), **changes}
    save_file({name: tensor for name, tensor in weights.items() if tensor is not None}, path)


def test_what_is_no_sae_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="absent"):
        formats.load(tmp_path / "absent")
    with pytest.raises(InvalidInputError, match="SAELens"):
        formats.load(tmp_path)
    (tmp_path / "hyperparams.json").touch()
    with pytest.raises(InvalidInputError, match=r"It holds hyperparams\.json"):
        formats.load(tmp_path)


def test_an_architecture_we_lack_is_named_with_those_we_have(saved: Path) -> None:
    edit_config(saved, architecture="temporal")
    with pytest.raises(UnknownNameError, match=r"temporal.*topk"):
        formats.load(saved)


def test_a_normalisation_that_the_files_do_not_settle_is_refused(saved: Path) -> None:
    for mode in ("layer_norm", "expected_average_only_in"):
        edit_config(saved, normalize_activations=mode)
        with pytest.raises(InvalidInputError, match=mode):
            formats.load(saved)


def test_tensors_that_do_not_fit_are_named(saved: Path) -> None:
    edit_weights(saved, b_enc=None, W_dec=torch.zeros(48, 1))
    with pytest.raises(MismatchError, match=r"W_dec: expected \(48, 16\), found \(48, 1\).*b_enc"):
        formats.load(saved)


def test_non_finite_weights_are_refused_both_ways(sae: TopKSAE, saved: Path, tmp_path: Path) -> None:
    edit_weights(saved, b_dec=torch.full((16,), torch.nan))
    with pytest.raises(NonFiniteError, match="b_dec"):
        formats.load(saved)
    with torch.no_grad():
        sae.W_dec[3, 3] = torch.inf
    with pytest.raises(NonFiniteError, match="W_dec"):
        formats.save(sae, tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def test_weights_that_are_not_the_manifests_are_noticed(saved: Path) -> None:
    edit_weights(saved, b_dec=torch.ones(16))
    with pytest.raises(IntegrityError, match="manifest"):
        formats.load(saved)


def test_truncated_files_are_noticed(saved: Path) -> None:
    os.truncate(saved / "sae_weights.safetensors", 1000)
    with pytest.raises(IntegrityError, match="cannot be read"):
        formats.load(saved)
    os.truncate(saved / "cfg.json", 10)
    with pytest.raises(IntegrityError, match="configuration"):
        formats.load(saved)


def test_a_folder_that_holds_something_is_never_overwritten(sae: TopKSAE, saved: Path, tmp_path: Path) -> None:
    before = (saved / "cfg.json").read_bytes()
    with pytest.raises(OccupiedError):
        formats.save(sae, saved)
    assert (saved / "cfg.json").read_bytes() == before
    (tmp_path / "empty").mkdir()
    formats.save(sae, tmp_path / "empty")


def test_a_failed_save_leaves_nothing(sae: TopKSAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("scope.saes.formats.saelens.write_atomically", full_disk)
    with pytest.raises(OSError, match="No space"):
        formats.save(sae, tmp_path / "one")
    assert list(tmp_path.iterdir()) == []
