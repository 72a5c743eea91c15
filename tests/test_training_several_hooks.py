"""Dictionaries over several hooks, measured and spliced: against brute force, and in a tiny model by hand."""

from typing import Any

import helpers_models
import numpy as np
import pytest
import torch
from helpers_training import one_thread  # noqa: F401  # a fixture
from test_saes_several_hooks import make
from test_training_sweep import Several

from scope.errors import InvalidInputError, MismatchError
from scope.interventions import splice_edits
from scope.models import LanguageModel
from scope.saes import registry
from scope.saes.base import Port, Ports, SAEMetadata
from scope.training.metrics import delta_ce, reconstruction_metrics

pytestmark = pytest.mark.usefixtures("one_thread")
MLP_IN, MLP_OUT = "blocks.{}.hook_mlp_in", "blocks.{}.hook_mlp_out"


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["transcoder", "skip_transcoder", "crosscoder", "clt"])
def test_metrics_equal_brute_force(architecture: str) -> None:
    sae = make(architecture, "topk").for_inference()
    ports = sae.cfg.ports
    generator = torch.Generator().manual_seed(1)
    values = {
        str(port.hook): (1 + n) * torch.randn(600, port.width, generator=generator) + n
        for n, port in enumerate(port for side in ports for port in side)
    }
    outputs = [str(port.hook) for port in ports.outputs or ports.inputs]
    values[outputs[0]][::100] *= 100
    documents = np.arange(600) // 60
    found = reconstruction_metrics(sae, Several(values), documents=documents, held_out_only=False, batch_size=77)

    x = torch.cat([values[str(port.hook)] for port in ports.inputs], dim=1)
    y_hat = sae(x).double()
    norms = [values[hook].norm(dim=-1) for hook in outputs]
    within = torch.stack([norm <= 10 * norm.median() for norm in norms]).all(dim=0)
    assert found.n_within_norm == int(within.sum()) < 600

    def fvus(rows: torch.Tensor) -> list[float]:
        figures, start = [], 0
        for hook in outputs:
            y = values[hook].double()[rows]
            part = y_hat[rows, start : start + y.shape[1]]
            start += y.shape[1]
            figures.append(float((part - y).square().sum() / (y - y.mean(0)).square().sum()))
        return figures

    expected = fvus(within)
    assert found.fvu == pytest.approx(np.mean(expected), rel=1e-5)
    assert found.fvu_all == pytest.approx(np.mean(fvus(torch.ones(600, dtype=torch.bool))), rel=1e-5)
    assert found.fvu_interval is not None
    assert found.fvu_interval[0] < found.fvu < found.fvu_interval[1]
    if len(outputs) > 1:
        assert found.fvu_by_output == pytest.approx(dict(zip(outputs, expected, strict=True)), rel=1e-5)
    else:
        assert "fvu_by_output" not in found.to_dict()
    assert found.l0 == pytest.approx(float((sae.encode(x) > 0).sum(-1).float().mean()))
    values[outputs[0]] = values[outputs[0]][:, 1:]
    with pytest.raises(MismatchError, match=outputs[0]):
        reconstruction_metrics(sae, Several(values), held_out_only=False)


def dictionary(architecture: str, activation: str, layers: list[int], d_model: int = 32) -> Any:
    ports = Ports(
        tuple(Port(MLP_IN.format(i), d_model) for i in layers),
        () if architecture == "crosscoder" else tuple(Port(MLP_OUT.format(i), d_model) for i in layers),
    )
    names, names_out = (tuple(str(port.hook) for port in side) for side in ports)
    metadata = (
        SAEMetadata(hook_name=names[0], hook_name_out=names_out[0])
        if len(layers) == 1
        else SAEMetadata(hook_names=names, hook_names_out=names_out or None)
    )
    config = registry.config_of(architecture)
    cfg = config.for_training(d_sae=66, k=5, activation=activation, metadata=metadata, **config.shape_of(ports))
    sae: Any = registry.get(architecture)(cfg, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.b_dec.normal_(generator=torch.Generator().manual_seed(1))
        if architecture == "skip_transcoder":
            sae.W_skip.normal_(generator=torch.Generator().manual_seed(2))
    return sae


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return helpers_models.tiny_model("gemma3")


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["transcoder", "skip_transcoder"])
def test_a_transcoder_takes_the_mlps_place(model: LanguageModel, architecture: str) -> None:
    sae = dictionary(architecture, "topk", [1])
    tokens = torch.tensor([2, 17, 5, 40, 9])
    run = model.run(tokens, hooks=[MLP_IN.format(1), MLP_OUT.format(1)])
    written = sae(run.activations[MLP_IN.format(1)])
    written[0] = run.activations[MLP_OUT.format(1)][0]  # BOS is left alone
    expected = model.run(tokens, edits={MLP_OUT.format(1): lambda value, context: written[None].clone()})
    found = model.run(tokens, hooks=[MLP_OUT.format(1)], edits=splice_edits(sae))
    torch.testing.assert_close(found.activations[MLP_OUT.format(1)], written)
    torch.testing.assert_close(found.logits, expected.logits)
    assert not torch.allclose(found.logits, run.logits)


@torch.no_grad()
def test_a_cross_layer_transcoder_takes_all_its_mlps_places(model: LanguageModel) -> None:
    layers = [0, 1, 2]
    sae = dictionary("clt", "relu", layers)
    tokens = torch.tensor([2, 17, 5, 40, 9])
    edits: dict[str, Any] = {}
    read: list[torch.Tensor] = []
    for layer in layers:  # layer by layer: read in the model as it is so far, write, go on
        read.append(
            model.run(tokens, hooks=[MLP_IN.format(layer)], edits=dict(edits)).activations[MLP_IN.format(layer)]
        )
        plain = model.run(tokens, hooks=[MLP_OUT.format(layer)], edits=dict(edits)).activations[MLP_OUT.format(layer)]
        features = [(x @ sae.W_enc.chunk(3, dim=1)[i] + sae.b_enc.chunk(3)[i]).relu() for i, x in enumerate(read)]
        written = sae.b_dec.chunk(3)[layer] + sum(
            f @ sae.W_dec.chunk(3, dim=0)[i].chunk(3, dim=1)[layer] for i, f in enumerate(features)
        )
        written[0] = plain[0]
        edits[MLP_OUT.format(layer)] = lambda value, context, new=written: new[None].clone()
    expected = model.run(tokens, edits=edits).logits
    torch.testing.assert_close(model.run(tokens, edits=splice_edits(sae)).logits, expected, rtol=1e-4, atol=1e-4)


def test_cross_entropy_with_a_transcoder_and_with_a_cross_layer_one(model: LanguageModel) -> None:
    windows = [np.array([2, 17, 5, 40, 9], np.int32), np.array([2, 7, 7, 30], np.int32)]
    for sae in (dictionary("transcoder", "jumprelu", [1]), dictionary("clt", "jumprelu", [0, 2])):
        hooks = [str(port.hook) for port in sae.cfg.ports.outputs]
        means = {hook: torch.full((32,), 0.1) for hook in hooks}
        found = delta_ce(model, sae, windows, means)
        spliced = model.cross_entropy(windows, splice_edits(sae))
        assert found.ce_sae == pytest.approx(float(np.concatenate(spliced).mean()), rel=1e-5)
        assert found.ce_sae != pytest.approx(found.ce, rel=1e-6)
        assert found.ce_mean != pytest.approx(found.ce_sae, rel=1e-6)


def test_what_cannot_be_spliced_in_is_refused(model: LanguageModel) -> None:
    with pytest.raises(InvalidInputError, match="crosscoder"):
        splice_edits(dictionary("crosscoder", "topk", [0, 1]))
    with pytest.raises(InvalidInputError, match="TopK"):
        splice_edits(dictionary("clt", "topk", [0, 1]))
    swapped = dictionary("transcoder", "relu", [1])
    object.__setattr__(
        swapped.cfg, "metadata", SAEMetadata(hook_name=MLP_OUT.format(1), hook_name_out=MLP_IN.format(1))
    )
    with pytest.raises(InvalidInputError, match="before"):
        model.run(torch.tensor([2, 3, 4]), edits=splice_edits(swapped))
