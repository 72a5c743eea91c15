"""Published dictionaries: each format in its real layout gives what its library's formula gives, written out here."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from scope.cli import app
from scope.errors import (
    IntegrityError,
    InvalidInputError,
    MismatchError,
    MissingDependencyError,
    NonFiniteError,
    OccupiedError,
    UnknownNameError,
)
from scope.saes import formats
from scope.saes.formats import addresses, hooks

D_IN, D_OUT, D_SAE, K = 12, 12, 40, 5
NORMALISED = "blocks.12.ln2.hook_normalized"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape) / shape[-1] ** 0.5


def rows() -> Tensor:
    return 3 * torch.randn(60, D_IN)


def topk_of(z: Tensor, k: int) -> Tensor:
    """A row's k largest entries, by sorting."""
    kept = z >= z.sort(dim=-1, descending=True).values[:, k - 1 : k]
    return z.relu() * kept


def same(sae, x: Tensor, f: Tensor, x_hat: Tensor) -> None:
    """Features and outputs are the reference's, and some features fire while others do not."""
    assert 0 < float((f > 0).float().mean()) < 0.95
    with torch.no_grad():
        torch.testing.assert_close(sae.encode(x), f, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(sae(x), x_hat, rtol=1e-4, atol=1e-4)


def jumprelu_params() -> dict[str, Tensor]:
    """As Gemma Scope stores them: thresholds positive, rows of W_dec of norm 1."""
    W_dec = torch.nn.functional.normalize(random(D_SAE, D_OUT), dim=-1)
    return {
        "W_enc": random(D_IN, D_SAE),
        "W_dec": W_dec,
        "b_enc": random(D_SAE),
        "b_dec": random(D_OUT),
        "threshold": 0.5 + torch.rand(D_SAE),
    }


def jumprelu_of(p: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    z = x @ p["W_enc"] + p["b_enc"]
    f = torch.where(z > p["threshold"], z.clamp_min(0), 0.0)
    return f, f @ p["W_dec"] + p["b_dec"]


# --- Gemma Scope 1


def gemma_scope(folder: Path, p: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **{name: tensor.numpy() for name, tensor in p.items()})
    return folder


@pytest.mark.parametrize(
    ("repository", "hook", "hook_out", "model"),
    [
        ("gemma-scope-2b-pt-res", "blocks.12.hook_resid_post", None, "google/gemma-2-2b"),
        ("gemma-scope-9b-it-res", "blocks.12.hook_resid_post", None, "google/gemma-2-9b-it"),
        ("gemma-scope-2b-pt-mlp", "blocks.12.hook_mlp_out", None, "google/gemma-2-2b"),
        ("gemma-scope-2b-pt-att", "blocks.12.attn.hook_z", None, "google/gemma-2-2b"),
        ("gemma-scope-2b-pt-transcoders", NORMALISED, "blocks.12.hook_mlp_out", "google/gemma-2-2b"),
        ("copied", None, None, None),
    ],
)  # fmt: skip
def test_gemma_scope_1(repository: str, hook: str, hook_out: str, model: str, tmp_path: Path) -> None:
    p, x = jumprelu_params(), rows()
    sae = formats.load(gemma_scope(tmp_path / repository / "layer_12/width_16k/average_l0_82", p))
    same(sae, x, *jumprelu_of(p, x))
    metadata = sae.cfg.metadata
    assert (metadata.hook_name, metadata.hook_name_out, metadata.model_name) == (hook, hook_out, model)
    if hook and hook.endswith("hook_z"):
        with torch.no_grad():
            assert torch.equal(sae(x.view(60, 3, 4)), sae(x).view(60, 3, 4))


def test_gemma_scope_1_of_the_embedding_reads_what_the_model_scales(tmp_path: Path) -> None:
    p, x = jumprelu_params(), rows()
    sae = formats.load(gemma_scope(tmp_path / "gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6", p))
    assert sae.hook_name == "hook_embed"
    scale = D_IN**0.5
    f, x_hat = jumprelu_of(p, x)
    same(sae, scale * x, scale * f, scale * x_hat)


def test_an_archive_with_objects_is_never_unpickled(tmp_path: Path) -> None:
    folder = tmp_path / "one"
    folder.mkdir()
    np.savez(folder / "params.npz", W_enc=np.array([{"not": "an array"}], dtype=object))
    with pytest.raises(IntegrityError, match="cannot be read"):
        formats.load(folder)
    (folder / "params.npz").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(IntegrityError, match="cannot be read"):
        formats.load(folder)


# --- Gemma Scope 2


def gemma_scope_2(folder: Path, p: dict[str, Tensor], **config: object) -> Path:
    folder.mkdir(parents=True)
    stored = {name.lower() if name[0] in "Wb" else name: tensor.contiguous() for name, tensor in p.items()}
    save_file(stored, folder / "params.safetensors")
    if config:
        common = {"architecture": "jump_relu", "model_name": "gemma-v3-270m-pt", "width": D_SAE, "l0": 60}
        (folder / "config.json").write_text(json.dumps({**common, **config}))
    return folder


def test_gemma_scope_2_sae(tmp_path: Path) -> None:
    p, x = jumprelu_params(), rows()
    point = "model.layers.12.output"
    folder = gemma_scope_2(tmp_path / "one", p, hf_hook_point_in=point, hf_hook_point_out=point, type="sae")
    sae = formats.load(folder)
    same(sae, x, *jumprelu_of(p, x))
    assert sae.hook_name == "blocks.12.hook_resid_post"
    assert sae.cfg.metadata.model_name == "google/gemma-3-270m"
    assert sae.cfg.metadata.extra["hf_hook_name"] == point


@pytest.mark.parametrize("affine", [False, True])
def test_gemma_scope_2_transcoder(affine: bool, tmp_path: Path) -> None:
    p, x = jumprelu_params(), rows()
    skip = random(D_IN, D_OUT)
    folder = gemma_scope_2(
        tmp_path / "one",
        {**p, **({"affine_skip_connection": skip} if affine else {})},
        hf_hook_point_in="model.layers.5.pre_feedforward_layernorm.output",
        hf_hook_point_out="model.layers.5.post_feedforward_layernorm.output",
        affine_connection=affine,
    )
    sae, (f, y_hat) = formats.load(folder), jumprelu_of(p, x)
    same(sae, x, f, y_hat + x @ skip if affine else y_hat)
    assert (sae.hook_name, sae.hook_name_out) == ("blocks.5.ln2.hook_out", "blocks.5.hook_mlp_out")


def test_gemma_scope_2_without_a_configuration_goes_by_its_folder(tmp_path: Path) -> None:
    name = "gemma-scope-2-1b-it/{}/layer_7_width_16k_l0_small"
    for kind, hook, hook_out in (
        ("resid_post_all", "blocks.7.hook_resid_post", None),
        ("attn_out", "blocks.7.attn.hook_z", None),
        ("mlp_out", "blocks.7.hook_mlp_out", None),
        ("transcoder_all", "blocks.7.ln2.hook_out", "blocks.7.hook_mlp_out"),
    ):
        metadata = formats.load(gemma_scope_2(tmp_path / name.format(kind), jumprelu_params())).cfg.metadata
        assert (metadata.hook_name, metadata.hook_name_out) == (hook, hook_out)
        assert metadata.model_name == "google/gemma-3-1b-it"


def test_gemma_scope_2_of_several_layers_is_refused_with_the_reason(tmp_path: Path) -> None:
    p = {**jumprelu_params(), "W_dec": random(D_SAE, 3, D_OUT)}
    with pytest.raises(InvalidInputError, match=r"clt of several layers.*\(40, 3, 12\)"):
        formats.load(gemma_scope_2(tmp_path / "one", p, type="clt"))


def test_places_in_a_module_tree_have_hook_names() -> None:
    assert hooks.from_module("model.language_model.layers.3.self_attn.o_proj.input") == "blocks.3.attn.hook_z"
    assert hooks.from_module("model.layers.3.input_layernorm.output") is None
    assert hooks.from_module(None) is None


# --- sparsify


def sparsify(folder: Path, transcode: bool = False, skip: bool = False, **config: object) -> dict[str, Tensor]:
    folder.mkdir(parents=True)
    p = {"encoder.weight": random(D_SAE, D_IN), "encoder.bias": random(D_SAE), "W_dec": random(D_SAE, D_IN)}
    p |= {"b_dec": random(D_IN), **({"W_skip": random(D_IN, D_IN)} if skip else {})}
    save_file(p, folder / "sae.safetensors")
    common = {"activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": D_SAE, "k": K}
    common |= {"multi_topk": False, "skip_connection": skip, "transcode": transcode, "d_in": D_IN}
    (folder / "cfg.json").write_text(json.dumps({**common, **config}))
    run = {"model": "EleutherAI/pythia-160m", "dataset": "EleutherAI/the_pile", "ctx_len": 2048}
    (folder.parent / "config.json").write_text(json.dumps(run))
    return p


def sparsify_of(p: dict[str, Tensor], x: Tensor, transcode: bool) -> tuple[Tensor, Tensor]:
    centred = x if transcode else x - p["b_dec"]
    f = topk_of(centred @ p["encoder.weight"].T + p["encoder.bias"], K)
    y_hat = f @ p["W_dec"] + p["b_dec"]
    return f, y_hat + x @ p["W_skip"].T if "W_skip" in p else y_hat


@pytest.mark.parametrize(
    ("folder", "transcode", "skip", "hook", "hook_out"),
    [
        ("layers.5", False, False, "blocks.5.hook_resid_post", None),
        ("layers.5.mlp", False, False, "blocks.5.mlp.hook_out", None),
        ("layers.5.mlp", True, False, "blocks.5.ln2.hook_out", "blocks.5.mlp.hook_out"),
        ("h.5.mlp", True, True, "blocks.5.ln2.hook_out", "blocks.5.mlp.hook_out"),
        ("embed_tokens", False, False, "hook_embed", None),
        ("renamed", False, False, None, None),
    ],
)
def test_sparsify(folder: str, transcode: bool, skip: bool, hook: str, hook_out: str, tmp_path: Path) -> None:
    path = tmp_path / "run" / folder
    p, x = sparsify(path, transcode, skip), rows()
    sae = formats.load(path)
    same(sae, x, *sparsify_of(p, x, transcode))
    metadata = sae.cfg.metadata
    assert (metadata.hook_name, metadata.hook_name_out) == (hook, hook_out)
    assert (metadata.model_name, metadata.context_size) == ("EleutherAI/pythia-160m", 2048)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"activation": "groupmax"}, "groupmax"),
        ({"signed": True}, "negative"),
        ({"embed_skip": True}, "embedding"),
        ({"skip_connection": True}, "autoencoder with a skip"),
        ({"k": None}, "does not say k"),
    ],
)
def test_what_sparsify_has_and_we_lack_is_refused(changed: dict, reason: str, tmp_path: Path) -> None:
    sparsify(tmp_path / "run/layers.5", **changed)
    with pytest.raises(InvalidInputError, match=reason):
        formats.load(tmp_path / "run/layers.5")


# --- dictionary_learning


def dictionary(folder: Path, dict_class: str, p: dict[str, Tensor], **trainer: object) -> Path:
    folder.mkdir(parents=True)
    torch.save(p, folder / "ae.pt")
    common = {"dict_class": dict_class, "activation_dim": D_IN, "dict_size": D_SAE, "layer": 3, "device": "cuda:0"}
    common |= {"lm_name": "EleutherAI/pythia-70m-deduped", "submodule_name": "resid_post_layer_3"}
    config = {"trainer": {**common, **trainer}, "buffer": {"d_submodule": D_IN, "ctx_len": 128}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def linear_params() -> dict[str, Tensor]:
    return {"encoder.weight": random(D_SAE, D_IN), "encoder.bias": random(D_SAE), "decoder.weight": random(D_IN, D_SAE)}


def linear_of(p: dict[str, Tensor], x: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, p["encoder.weight"], p.get("encoder.bias"))


def their_dictionary(dict_class: str, x: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Their state dict, and features and reconstruction as their class computes them."""
    p, b = linear_params(), random(D_IN)
    if dict_class == "AutoEncoder":
        p["bias"] = b
        f = linear_of(p, x - b).relu()
    elif dict_class == "AutoEncoderNew":
        p["decoder.bias"] = b
        f = linear_of(p, x).relu()
    elif dict_class == "GatedAutoEncoder":
        del p["encoder.bias"]
        p |= {"decoder_bias": b, "r_mag": random(D_SAE), "gate_bias": random(D_SAE), "mag_bias": random(D_SAE)}
        projected = linear_of(p, x - b)
        f = (projected + p["gate_bias"] > 0) * (p["r_mag"].exp() * projected + p["mag_bias"]).relu()
    elif dict_class == "AutoEncoderTopK":
        p |= {"b_dec": b, "k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(0.3)}
        f = topk_of(linear_of(p, x - b), K)
    elif dict_class == "BatchTopKSAE":
        p |= {"b_dec": b, "k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(0.7)}
        f = linear_of(p, x - b).relu()
        f = f * (f > 0.7)
    else:
        p = jumprelu_params()
        if dict_class == "JumpReluAutoEncoder":
            return p, *jumprelu_of(p, x)
        p |= {"threshold": torch.tensor(0.7), "k": torch.tensor(K), "group_sizes": torch.tensor([10, 30])}
        f = ((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]).relu()
        f = f * (f > 0.7)
        return p, f, f @ p["W_dec"] + p["b_dec"]
    return p, f, f @ p["decoder.weight"].T + b


@pytest.mark.parametrize(
    "dict_class",
    ["AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "AutoEncoderTopK", "JumpReluAutoEncoder", "BatchTopKSAE",
     "MatryoshkaBatchTopKSAE"],
)  # fmt: skip
def test_dictionary_learning(dict_class: str, tmp_path: Path) -> None:
    x = rows()
    p, f, x_hat = their_dictionary(dict_class, x)
    sae = formats.load(dictionary(tmp_path / "trainer_0", dict_class, p))
    same(sae, x, f, x_hat)
    assert sae.hook_name == "blocks.3.hook_resid_post"
    assert (sae.cfg.metadata.model_name, sae.cfg.metadata.context_size) == ("EleutherAI/pythia-70m-deduped", 128)


def test_a_threshold_that_was_never_set_is_a_relu(tmp_path: Path) -> None:
    x = rows()
    p = {**linear_params(), "b_dec": random(D_IN), "k": torch.tensor(K), "threshold": torch.tensor(-1.0)}
    sae = formats.load(dictionary(tmp_path / "one", "BatchTopKSAE", p))
    f = linear_of(p, x - p["b_dec"]).relu()
    same(sae, x, f, f @ p["decoder.weight"].T + p["b_dec"])


def test_a_dictionary_finds_its_hook_in_its_path_or_nowhere(tmp_path: Path) -> None:
    p = their_dictionary("AutoEncoder", rows())[0]
    inside = tmp_path / "pythia70m/mlp_out_layer3/10_32768"
    assert formats.load(dictionary(inside, "AutoEncoder", p, submodule_name=None)).hook_name == "blocks.3.mlp.hook_out"
    sae = formats.load(dictionary(tmp_path / "alone", "AutoEncoder", p, submodule_name=None))
    assert sae.hook_name is None


class Trap:
    """Would make a file if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_is_never_run(tmp_path: Path) -> None:
    folder = dictionary(tmp_path / "one", "AutoEncoder", {})
    torch.save({"encoder.weight": Trap(tmp_path / "sprung")}, folder / "ae.pt")
    with pytest.raises(IntegrityError, match="nothing else in it is run"):
        formats.load(folder)
    (folder / "ae.pt").write_bytes(pickle.dumps(Trap(tmp_path / "sprung"), protocol=2))
    with pytest.raises(IntegrityError, match="nothing else in it is run"):
        formats.load(folder)
    assert not (tmp_path / "sprung").exists()


def test_a_dictionary_that_we_lack_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"CrossCoder.*Readable: AutoEncoder"):
        formats.load(dictionary(tmp_path / "one", "CrossCoder", linear_params()))
    (tmp_path / "one/config.json").unlink()
    with pytest.raises(InvalidInputError, match=r"no config\.json"):
        formats.load(tmp_path / "one")


# --- circuit-tracer


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk"])
@pytest.mark.parametrize("skip", [False, True])
def test_circuit_tracer(activation: str, skip: bool, tmp_path: Path) -> None:
    x = rows()
    p = {"W_enc": random(D_SAE, D_IN), "W_dec": random(D_SAE, D_OUT), "b_enc": random(D_SAE), "b_dec": random(D_OUT)}
    config = {"model_name": "google/gemma-2-2b", "model_kind": "transcoder_set", "scan": "one"}
    config |= {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "mlp.hook_out"}
    z = x @ p["W_enc"].T + p["b_enc"]
    if activation == "jumprelu":
        p["activation_function.threshold"] = torch.full((1, D_SAE), 0.6)
        f = z * (z > 0.6)
    elif activation == "topk":
        config |= {"activation": "topk", "k": K}
        f = topk_of(z, K)
    else:
        f = z.relu()
    y_hat = f @ p["W_dec"] + p["b_dec"]
    if skip:
        p["W_skip"] = random(D_OUT, D_IN)
        y_hat = y_hat + x @ p["W_skip"].T
    save_file(p, tmp_path / "layer_11.safetensors")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    sae = formats.load(tmp_path / "layer_11.safetensors")
    same(sae, x, f, y_hat)
    assert (sae.hook_name, sae.hook_name_out) == ("blocks.11.mlp.hook_in", "blocks.11.mlp.hook_out")


# --- SAELens before version 6


def old_saelens(folder: Path, p: dict[str, Tensor], **config: object) -> Path:
    folder.mkdir(parents=True)
    save_file(p, folder / "sae_weights.safetensors")
    common = {"model_name": "gpt2-small", "hook_point": "blocks.8.hook_resid_pre", "hook_point_layer": 8, "d_in": D_IN}
    common |= {"d_sae": D_SAE, "dtype": "torch.float32", "device": "mps", "prepend_bos": True, "context_size": 128}
    (folder / "cfg.json").write_text(json.dumps({**common, **config}))
    return folder


def test_saelens_before_version_6(tmp_path: Path) -> None:
    p, x = jumprelu_params(), rows()
    del p["threshold"]
    p["scaling_factor"] = torch.ones(D_SAE)
    sae = formats.load(old_saelens(tmp_path / "one", p))
    z = (x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
    same(sae, x, z.relu(), z.relu() @ p["W_dec"] + p["b_dec"])
    assert (sae.hook_name, sae.cfg.metadata.model_name) == ("blocks.8.hook_resid_pre", "gpt2-small")
    topk = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "normalize_activations": "none"}
    sae = formats.load(old_saelens(tmp_path / "two", p, **topk, apply_b_dec_to_input=False))
    f = topk_of(x @ p["W_enc"] + p["b_enc"], K)
    same(sae, x, f, f @ p["W_dec"] + p["b_dec"])
    p["scaling_factor"][3] = 2
    with pytest.raises(InvalidInputError, match="scaling_factor"):
        formats.load(old_saelens(tmp_path / "three", p))
    with pytest.raises(InvalidInputError, match="tanh-relu"):
        formats.load(old_saelens(tmp_path / "four", p, activation_fn_str="tanh-relu"))


# --- what holds for all


def test_broken_foreign_files_are_named(tmp_path: Path) -> None:
    p = jumprelu_params()
    folder = gemma_scope_2(tmp_path / "one", {**p, "b_enc": torch.full((D_SAE,), torch.nan)})
    with pytest.raises(NonFiniteError, match="b_enc"):
        formats.load(folder)
    with pytest.raises(MismatchError, match="w_dec is missing"):
        formats.load(gemma_scope_2(tmp_path / "two", {name: p[name] for name in ("W_enc", "b_enc", "b_dec")}))
    with pytest.raises(MismatchError, match=r"b_dec: expected \(12,\), found \(7,\)"):
        formats.load(gemma_scope_2(tmp_path / "three", {**p, "b_dec": random(7)}))
    (tmp_path / "four").mkdir()
    (tmp_path / "four/weights.bin").touch()
    with pytest.raises(InvalidInputError, match=r"holds weights\.bin.*Gemma Scope 1.*dictionary_learning"):
        formats.load(tmp_path / "four")


def test_hooks_may_be_given_where_the_files_do_not_say(tmp_path: Path) -> None:
    sparsify(tmp_path / "run/renamed", transcode=True)
    sae = formats.load(tmp_path / "run/renamed", hook="blocks.1.ln2.hook_out", hook_out="blocks.1.mlp.hook_out")
    assert (sae.hook_name, sae.hook_name_out) == ("blocks.1.ln2.hook_out", "blocks.1.mlp.hook_out")
    sparsify(tmp_path / "run/layers.5")
    with pytest.raises(MismatchError, match=r"hook_name blocks\.5\.hook_resid_post; blocks\.4"):
        formats.load(tmp_path / "run/layers.5", hook="blocks.4.hook_resid_post")
    with pytest.raises(InvalidInputError, match="writes what it reads"):
        formats.load(tmp_path / "run/layers.5", hook_out="blocks.5.hook_mlp_out")


# --- addresses and releases


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the Hugging Face hub; returns the snapshot of a repository in it."""
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    repository = cache / "models--google--gemma-scope-2-270m-pt"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    return repository / "snapshots" / COMMIT


NAME = "resid_post/layer_12_width_16k_l0_medium"


def in_hub(hub: Path) -> dict[str, Tensor]:
    p = jumprelu_params()
    gemma_scope_2(hub / NAME, p, hf_hook_point_in="model.layers.12.output")
    return p


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real call, which must have been told to stay on this machine."""
    import huggingface_hub

    real = huggingface_hub.snapshot_download

    def offline(*arguments: object, **options: object) -> str:
        assert options["local_files_only"] is True
        return str(real(*arguments, cache_dir=huggingface_hub.constants.HF_HUB_CACHE, **options))

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)


@pytest.mark.usefixtures("no_network")
def test_an_address_on_the_hub(hub: Path) -> None:
    p, x = in_hub(hub), rows()
    address = f"hf://google/gemma-scope-2-270m-pt/{NAME}"
    for name in (address, f"{address}@main", f"{address}@{COMMIT}"):
        sae = formats.load(name)
        same(sae, x, *jumprelu_of(p, x))
        assert sae.cfg.metadata.extra["source"] == f"{address}@{COMMIT}"
    with pytest.raises(UnknownNameError, match=r"Did you mean hf://.*l0_medium.*--allow-download"):
        formats.load(f"{address[:-6]}large")
    with pytest.raises(UnknownNameError, match=r"Did you mean hf://google/gemma-scope-2-270m-pt.*--allow-download"):
        formats.load(f"hf://google/gemma-scope-2-270m-it/{NAME}")


@pytest.mark.parametrize("address", ["hf://google", "hf://a/b/../../c", "hf:///b", "hf://a/b/c@x@y"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(InvalidInputError, match="hf://OWNER/REPOSITORY"):
        formats.load(address)


def test_a_download_fetches_only_what_the_formats_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict = {}
    p = jumprelu_params()
    gemma_scope_2(tmp_path / COMMIT / NAME, p)

    def download(repository: str, **options: object) -> str:
        asked.update(options, repository=repository)
        return str(tmp_path / COMMIT)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    formats.load(f"hf://google/gemma-scope-2-270m-pt/{NAME}@main", allow_download=True)
    assert (asked["repository"], asked["revision"]) == ("google/gemma-scope-2-270m-pt", "main")
    assert asked["local_files_only"] is False
    assert f"{NAME}/params.safetensors" in asked["allow_patterns"]
    assert not any("*" in pattern for pattern in asked["allow_patterns"])


RELEASES = {
    "gemma-scope-2-270m-pt-res": {
        "conversion_func": "gemma_3",
        "repo_id": "google/gemma-scope-2-270m-pt",
        "saes": [{"id": "layer_12_width_16k_l0_medium", "path": NAME}, {"id": "other/id", "path": "elsewhere"}],
    }
}


@pytest.mark.usefixtures("no_network")
def test_a_release_of_saelens(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "_releases", lambda: RELEASES)
    p, x = in_hub(hub), rows()
    same(formats.load("gemma-scope-2-270m-pt-res/layer_12_width_16k_l0_medium"), x, *jumprelu_of(p, x))
    with pytest.raises(UnknownNameError, match="Did you mean gemma-scope-2-270m-pt-res"):
        formats.load("gemma-scope-2-270m-res/layer_12_width_16k_l0_medium")
    with pytest.raises(UnknownNameError, match="Did you mean layer_12_width_16k_l0_medium"):
        formats.load("gemma-scope-2-270m-pt-res/layer_12_width_16k_l0_small")
    with pytest.raises(UnknownNameError, match=r"elsewhere.*--allow-download"):
        formats.load("gemma-scope-2-270m-pt-res/other/id")


@pytest.mark.usefixtures("no_network")
def test_the_factor_of_a_release_is_folded_in(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {"id": "one", "path": "one", "norm_scaling_factor": 0.25}
    release = {"old": {"conversion_func": None, "repo_id": "google/gemma-scope-2-270m-pt", "saes": [entry]}}
    monkeypatch.setattr(addresses, "_releases", lambda: release)
    p, x = jumprelu_params(), rows()
    del p["threshold"]
    old_saelens(hub / "one", p, normalize_activations="expected_average_only_in", apply_b_dec_to_input=False)
    f = (0.25 * x @ p["W_enc"] + p["b_enc"]).relu()
    same(formats.load("old/one"), x, f / 0.25, (f @ p["W_dec"] + p["b_dec"]) / 0.25)


@pytest.mark.usefixtures("no_network")
def test_the_dashboard_finds_the_published_sae_of_an_index(hub: Path, tmp_path: Path) -> None:
    from dashboards.prompts import _load_sae
    from scope.workspace import Workspace

    in_hub(hub)
    address = f"hf://google/gemma-scope-2-270m-pt/{NAME}"
    sae, workspace = formats.load(address), Workspace(tmp_path / "workspace")
    info = {"fingerprint": sae.fingerprint, "hook_name": sae.hook_name, "metadata": sae.cfg.metadata.to_dict()}
    assert _load_sae(workspace, info).fingerprint == sae.fingerprint
    assert workspace.sae(address).fingerprint == sae.fingerprint
    assert workspace.sae(str(hub / NAME)).hook_name == sae.hook_name
    with pytest.raises(UnknownNameError):
        _load_sae(workspace, {**info, "metadata": {"source": str(hub / NAME)}})


@pytest.mark.usefixtures("no_network")
def test_a_workspace_takes_in_dictionaries_of_every_format(hub: Path, tmp_path: Path) -> None:
    """Listed by id with the same output, once, and left where they were."""
    from scope.workspace import Workspace

    in_hub(hub)
    old_saelens(tmp_path / "saelens", {name: part for name, part in jumprelu_params().items() if name != "threshold"})
    p = jumprelu_params()
    places = {
        f"hf://google/gemma-scope-2-270m-pt/{NAME}": Path(NAME).name,
        str(tmp_path / "saelens"): "saelens",
        str(gemma_scope(tmp_path / "gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82", p)): "average_l0_82",
    }
    workspace = Workspace(tmp_path / "workspace")
    for place, name in places.items():
        command = ["workspace", "add", place, "--workspace", str(workspace.path), "--json"]
        answers = [CliRunner().invoke(app, command) for _ in range(2)]
        assert [answer.exit_code for answer in answers] == [0, 0], answers[0].output
        first, second = (json.loads(answer.stdout.splitlines()[-1]) for answer in answers)
        assert first == second
        sae, x = formats.load(place), rows()
        assert first["id"] == sae.fingerprint[:12]
        with torch.no_grad():
            assert torch.equal(workspace.sae(name)(x), sae(x))
        assert workspace.sae(name).hook_name == sae.hook_name
    assert sorted(entry.name for entry in workspace.saes()) == sorted(places.values())
    other = gemma_scope(tmp_path / "layer_1/average_l0_82", jumprelu_params())
    with pytest.raises(OccupiedError, match="average_l0_82"):
        workspace.add(other)
    hook = "blocks.1.hook_resid_post"
    assert workspace.add(other, name="another", hook=hook).name == "another"
    assert workspace.sae("another").hook_name == hook
    with pytest.raises(InvalidInputError, match="folder"):
        workspace.add(gemma_scope(tmp_path / "layer_2/average_l0_1", jumprelu_params()), name="../away")
    with pytest.raises(InvalidInputError, match="stays where it is"):
        workspace.add(workspace.path / "saes" / "another", name="again")
    with pytest.raises(UnknownNameError, match="allow-download"):
        workspace.add("hf://google/gemma-scope-2-270m-pt/elsewhere")


def test_without_saelens_a_missing_folder_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> dict:
        raise MissingDependencyError("sae-lens", "peers", "Looking up a release of SAELens")

    monkeypatch.setattr(addresses, "_releases", missing)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnknownNameError, match=r"folder 'saes/one'.*scope-workbench\[peers\]"):
        formats.load("saes/one")


def test_the_list_of_releases_is_read_without_importing_sae_lens_or_wandb() -> None:
    code = (
        "import importlib.util, sys\n"
        "if importlib.util.find_spec('sae_lens') is None: raise SystemExit(0)\n"
        "from scope.saes.formats import addresses\n"
        "entry = addresses._releases()['gemma-scope-2b-pt-res']\n"
        "assert entry['repo_id'] == 'google/gemma-scope-2b-pt-res' and len(entry['saes']) > 100\n"
        "assert not {'sae_lens', 'wandb', 'transformer_lens', 'torch'} & set(sys.modules), sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- the command line


def scope(*arguments: object, code: int = 0) -> dict:
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return dict(json.loads(result.stdout.splitlines()[-1]))


def test_convert_writes_what_every_tool_reads(tmp_path: Path) -> None:
    x = rows()
    p, f, x_hat = their_dictionary("GatedAutoEncoder", x)
    folder = dictionary(tmp_path / "theirs", "GatedAutoEncoder", p, submodule_name=None)
    hook = "blocks.2.hook_resid_post"
    done = scope("sae", "convert", folder, tmp_path / "ours", "--hook", hook)
    assert (done["converted_from"], done["architecture"], done["hook_name"]) == ("dictionary_learning", "gated", hook)
    sae = formats.load(tmp_path / "ours")
    same(sae, x, f, x_hat)
    assert sae.fingerprint[:12] == done["id"]
    assert json.loads((tmp_path / "ours/cfg.json").read_text())["metadata"]["hook_name"] == hook
    stored = {"W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag"}
    assert set(load_file(tmp_path / "ours/sae_weights.safetensors")) == stored
    assert "OccupiedError" in json.dumps(scope("sae", "convert", folder, tmp_path / "ours", code=2))


def test_convert_rounds_to_a_dtype_when_asked(tmp_path: Path) -> None:
    x = rows()
    folder = dictionary(tmp_path / "theirs", "AutoEncoder", their_dictionary("AutoEncoder", x)[0], submodule_name=None)
    hook = ("--hook", "blocks.2.hook_resid_post")
    half = scope("sae", "convert", folder, tmp_path / "half", *hook, "--dtype", "bfloat16")
    back = scope("sae", "convert", tmp_path / "half", tmp_path / "back", "--dtype", "float32")
    assert (half["dtype"], back["dtype"]) == ("bfloat16", "float32")
    exact, rounded = formats.load(folder, hook=hook[1]).weights(), formats.load(tmp_path / "back").weights()
    for name, tensor in exact.items():
        assert torch.equal(rounded[name], tensor.to(torch.bfloat16).float())
    assert "UnknownNameError" in json.dumps(scope("sae", "convert", folder, tmp_path / "x", "--dtype", "int8", code=2))


def test_info_tells_what_a_foreign_sae_is(tmp_path: Path) -> None:
    folder = gemma_scope(tmp_path / "gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82", jumprelu_params())
    facts = scope("info", folder)
    assert (facts["kind"], facts["stored_as"], facts["architecture"]) == ("sae", "gemma_scope", "jumprelu")
    assert facts["metadata"]["hook_name"] == "blocks.12.hook_resid_post"
    assert "UnknownNameError" in json.dumps(scope("info", "hf://nobody/nothing/here", code=2))
