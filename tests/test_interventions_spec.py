"""Declared interventions do what hooks written by hand do; what is wrong with them is said before the model runs."""

import json
from dataclasses import replace

import pytest
import torch
from helpers_models import KINDS, one_thread, tiny_model
from helpers_saes import make
from torch import Tensor

from scope.errors import InvalidInputError, MismatchError, OutOfRangeError, ScopeError, UnknownNameError
from scope.interventions import Intervention, InterventionSpec, control, intervene
from scope.models import LanguageModel
from scope.saes.base import SAEMetadata

__all__ = ["one_thread"]

PROMPT = "The cat sat on the mat"
OTHER = "The mat sat on the cat"
HOOK = "blocks.1.hook_resid_post"
Z = "blocks.1.attn.hook_z"
UNIT = torch.nn.functional.normalize(torch.randn(32, generator=torch.Generator().manual_seed(1)), dim=0)
DIRECTION = tuple((2.5 * UNIT).tolist())


def sae_of(model: LanguageModel):
    return make("topk", d_in=model.d_model, metadata=SAEMetadata(hook_name=HOOK))


def firing(model: LanguageModel, sae) -> list[int]:
    """Two features that fire where the tests change them."""
    f = sae.encode(model.run(PROMPT, hooks=[HOOK]).activations[HOOK]).detach()
    first = int(f[4].argmax())
    f[2, first] = -1
    return [first, int(f[2].argmax())]


def spec(**fields) -> InterventionSpec:
    return InterventionSpec(interventions=(Intervention(**fields),))


def by_hand(model: LanguageModel, name: str):
    """(fields of the intervention, hook, what it does to x (batch, seq, ...) but for BOS, written anew)."""
    sae = sae_of(model)
    rows = sae.W_dec.detach()
    norms = rows.norm(dim=-1)
    a, b = firing(model, sae)
    other = model.run(OTHER, hooks=[HOOK, Z, "blocks.1.hook_mlp_out"]).activations

    def features(new):
        def change(x: Tensor) -> Tensor:
            f = sae.encode(x).detach()
            for i in (a, b):
                x = x + (new(f, i) - f[..., i])[..., None] * rows[i]
            return x

        return change

    def heads(new):
        def change(z: Tensor) -> Tensor:
            z[:, :, [0, 2]] = new(z)[:, :, [0, 2]]
            return z

        return change

    on = {"features": (a, b)}
    at = {"layer": 1, "heads": (0, 2)}
    along = {"component": "residual", "layer": 1, "direction": DIRECTION}
    return {
        "ablate features": ({"kind": "ablate", **on}, HOOK, features(lambda f, i: 0.0)),
        "set features": (
            {"kind": "set", **on, "value": (4.0, 9.0)},
            HOOK,
            features(lambda f, i: {a: 4.0, b: 9.0}[i] / norms[i] + 0 * f[..., i]),
        ),
        "scale features": ({"kind": "scale", **on, "value": -2.0}, HOOK, features(lambda f, i: -2 * f[..., i])),
        "add features": (
            {"kind": "add", **on, "value": (2.0, -3.0)},
            HOOK,
            lambda x: x + 2 * rows[a] / norms[a] - 3 * rows[b] / norms[b],
        ),
        "patch features": (
            {"kind": "patch", **on, "prompt": OTHER},
            HOOK,
            features(lambda f, i: sae.encode(other[HOOK]).detach()[None, :, i]),
        ),
        "project features out": (
            {"kind": "project_out", "features": (a,)},
            HOOK,
            lambda x: x - (x @ rows[a] / norms[a])[..., None] * rows[a] / norms[a],
        ),
        "ablate heads": ({"kind": "ablate", **at}, Z, heads(torch.zeros_like)),
        "set heads": ({"kind": "set", **at, "value": 0.5}, Z, heads(lambda z: torch.full_like(z, 0.5))),
        "scale heads": ({"kind": "scale", **at, "value": 3.0}, Z, heads(lambda z: 3 * z)),
        "patch heads": ({"kind": "patch", **at, "prompt": OTHER}, Z, heads(lambda z: other[Z][None].expand_as(z))),
        "ablate the MLP": (
            {"kind": "ablate", "component": "mlp", "layer": 1},
            "blocks.1.hook_mlp_out",
            torch.zeros_like,
        ),
        "patch a hook": (
            {"kind": "patch", "hook": "blocks.1.hook_mlp_out", "prompt": OTHER},
            "blocks.1.hook_mlp_out",
            lambda x: other["blocks.1.hook_mlp_out"][None].expand_as(x),
        ),
        "add a direction": ({"kind": "add", **along, "value": 4.0}, HOOK, lambda x: x + 10 * UNIT),
        "set along": ({"kind": "set", **along, "value": 6.0}, HOOK, lambda x: x + (6 - x @ UNIT)[..., None] * UNIT),
        "scale along": ({"kind": "scale", **along, "value": 3.0}, HOOK, lambda x: x + 2 * (x @ UNIT)[..., None] * UNIT),
        "project out": ({"kind": "project_out", **along}, HOOK, lambda x: x - (x @ UNIT)[..., None] * UNIT),
        "ablate the embedding": ({"kind": "ablate", "component": "embedding"}, "hook_embed", torch.zeros_like),
    }[name]


NAMES = (
    "ablate features", "set features", "scale features", "add features", "patch features", "project features out",
    "ablate heads", "set heads", "scale heads", "patch heads", "ablate the MLP", "patch a hook", "add a direction",
    "set along", "scale along", "project out", "ablate the embedding",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("positions", [None, (2, 4)])
def test_a_declared_intervention_is_the_hook_written_by_hand(
    name: str, kind: str, positions: tuple[int, ...] | None
) -> None:
    model = tiny_model(kind)
    fields, hook, change = by_hand(model, name)

    def edit(value: Tensor, context: object) -> Tensor:
        new = change(value.clone())
        kept = value.clone()
        for place in positions or range(1, value.shape[1]):
            kept[:, place] = new[:, place]
        return kept

    declared = InterventionSpec.from_dict(json.loads(json.dumps(spec(**fields, positions=positions).to_dict())))
    edits = declared.resolve(model, sae_of(model))
    expected = model.run(PROMPT, edits={hook: edit}).logits
    found = model.run(PROMPT, edits=edits).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert (expected - model.run(PROMPT).logits).abs().max() > 1e-3
    with intervene(model, declared, sae_of(model)):
        torch.testing.assert_close(model.run(PROMPT).logits, found)
    if "patch" not in name or positions:
        assert (
            model.generate(PROMPT, 6, edits).tokens.tolist()
            == model.generate(PROMPT, 6, edits, cache=False).tokens.tolist()
        )


@pytest.mark.parametrize("kind", KINDS)
def test_features_of_a_transcoder_change_what_it_writes(kind: str) -> None:
    model = tiny_model(kind)
    metadata = SAEMetadata(hook_name="blocks.1.ln2.hook_out", hook_name_out="blocks.1.hook_mlp_out")
    sae = make("transcoder", d_in=32, d_out=32, metadata=metadata)
    read = model.run(PROMPT, hooks=["blocks.1.ln2.hook_out"]).activations["blocks.1.ln2.hook_out"]
    f = sae.encode(read).detach()
    feature = int(f[1:].sum(0).argmax())
    edits = spec(kind="ablate", features=(feature,)).resolve(model, sae)

    def edit(value: Tensor, context: object) -> None:
        value[0, 1:] -= f[1:, feature, None] * sae.W_dec[feature].detach()

    expected = model.run(PROMPT, edits={"blocks.1.hook_mlp_out": edit}).logits
    torch.testing.assert_close(model.run(PROMPT, edits=edits).logits, expected, rtol=1e-4, atol=1e-4)
    assert (
        model.generate(PROMPT, 6, edits).tokens.tolist()
        == model.generate(PROMPT, 6, edits, cache=False).tokens.tolist()
    )


def test_multiples_of_a_maximum_and_a_control_of_the_same_norm() -> None:
    model, sae = tiny_model("llama"), sae_of(tiny_model("llama"))
    largest = {3: 5.0, 7: 0.5}
    declared = spec(kind="add", sae="demo", features=(3, 7), value=(2.0, 4.0), unit="maximum", during="generated")

    def maxima(name: str, feature: int) -> float:
        assert name == "demo"
        return largest[feature]

    edits = declared.resolve(model, {"demo": sae}, maxima)
    plain = spec(kind="add", features=(3, 7), value=(10.0, 2.0), during="generated").resolve(model, sae)
    x = torch.zeros(1, 5, 32)
    context = _context(model, HOOK, 5, n_prompt=2)
    moved = edits[HOOK](x, context)
    torch.testing.assert_close(moved, plain[HOOK](x, context))
    assert moved[:, :2].abs().max() == 0
    pushed = control(declared, model, {"demo": sae}, maxima, seed=1).edits[HOOK](x, context)
    torch.testing.assert_close(pushed.norm(dim=-1), moved.norm(dim=-1))
    assert torch.nn.functional.cosine_similarity(pushed[0, 4], moved[0, 4], dim=0).abs() < 0.9
    assert control(spec(kind="ablate", hook=HOOK), model) is None
    with pytest.raises(InvalidInputError, match="index"):
        declared.resolve(model, sae)


def _context(model: LanguageModel, hook: str, n: int, n_prompt: int | None = None):
    from scope.models import EditContext

    tokens = torch.ones(1, n, dtype=torch.int64)
    return EditContext(hook, tokens, torch.zeros(1, n, dtype=torch.bool), 0, n_prompt)


@pytest.mark.parametrize(
    ("fields", "problem", "words"),
    [
        ({"kind": "ablate", "hook": "blocks.1.hook_resid_pots"}, UnknownNameError, "Did you mean"),
        ({"kind": "ablate", "layer": 9, "heads": (0,)}, OutOfRangeError, "no layer 9"),
        ({"kind": "ablate", "layer": 1, "heads": (4,)}, OutOfRangeError, "no head 4"),
        ({"kind": "ablate", "features": (40,)}, OutOfRangeError, "features 0 to 39"),
        ({"kind": "ablate", "features": (3,), "sae": "other"}, UnknownNameError, "other"),
        ({"kind": "ablate", "hook": HOOK, "positions": (7,)}, OutOfRangeError, "the text has 7 tokens"),
        ({"kind": "ablate", "hook": HOOK, "positions": (-1,)}, OutOfRangeError, "negative"),
        ({"kind": "ablate", "hook": HOOK, "positions": (64,)}, OutOfRangeError, "takes 64 tokens"),
        ({"kind": "add", "hook": HOOK, "direction": (1.0, 2.0), "value": 1.0}, MismatchError, "2 entries"),
        ({"kind": "patch", "hook": HOOK, "prompt": "The cat", "positions": (4,)}, OutOfRangeError, "patched from has"),
    ],
)
def test_what_does_not_fit_the_model_is_said_before_it_runs(
    fields: dict, problem: type[ScopeError], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("gemma3")
    monkeypatch.setattr(LanguageModel, "forward", lambda *_, **__: pytest.fail("ran"))
    with pytest.raises(problem, match=words):
        model.run(PROMPT, edits=spec(**fields).resolve(model, {"demo": sae_of(model)}))


def test_another_model_or_sae_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("gemma3")
    monkeypatch.setattr(LanguageModel, "forward", lambda *_, **__: pytest.fail("ran"))
    ablate = Intervention(kind="ablate", features=(3,))
    with pytest.raises(MismatchError, match="gpt-9"):
        InterventionSpec(interventions=(ablate,), model="gpt-9").resolve(model, sae_of(model))
    for name in (model.name, model.files.load_name):
        InterventionSpec(interventions=(ablate,), model=name).resolve(model, sae_of(model))
    with pytest.raises(MismatchError, match="width of 12"):
        spec(kind="ablate", features=(3,)).resolve(model, make("topk", metadata=SAEMetadata(hook_name=HOOK)))
    with pytest.raises(MismatchError, match="abcdef012345"):
        InterventionSpec(interventions=(replace(ablate, sae="abcdef012345"),)).resolve(model, sae_of(model))
    with pytest.raises(InvalidInputError, match="give their SAE"):
        spec(kind="ablate", features=(3,)).resolve(model)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"kind": "ablat", "hook": HOOK}, "ablate"),
        ({"kind": "ablate", "hok": HOOK}, "hook"),
        ({"kind": "ablate"}, "none of them"),
        ({"kind": "ablate", "hook": HOOK, "features": [1]}, "features and hook"),
        ({"kind": "set", "hook": HOOK}, "needs a value"),
        ({"kind": "ablate", "hook": HOOK, "value": 1}, "takes no value"),
        ({"kind": "set", "hook": HOOK, "value": float("nan")}, "finite"),
        ({"kind": "set", "hook": HOOK, "value": "1"}, "finite"),
        ({"kind": "ablate", "component": "mlp"}, "layer goes with"),
        ({"kind": "ablate", "component": "mpl", "layer": 1}, "mlp"),
        ({"kind": "ablate", "component": {"mlp": 1}, "layer": 1}, "is text"),
        ({"kind": "add", "hook": HOOK, "value": 1.0}, "needs features, or a direction"),
        ({"kind": "ablate", "hook": HOOK, "direction": [1.0]}, "project_out"),
        ({"kind": "project_out", "hook": HOOK, "direction": [0.0, 0.0]}, "zero"),
        ({"kind": "patch", "hook": HOOK}, "prompt"),
        ({"kind": "ablate", "features": [1.5]}, "whole numbers"),
        ({"kind": "add", "features": [1, 2], "value": [1.0]}, "1 values"),
        ({"kind": "scale", "features": [1], "value": 1.0, "unit": "maximum"}, "unit maximum"),
        ([], "at least one"),
        ("ablate", "mapping"),
        ({"interventions": {}}, "list"),
        ({"name": "x"}, "interventions"),
    ],
)
def test_what_is_no_intervention_is_refused_with_the_words_for_it(content: object, words: str) -> None:
    with pytest.raises(InvalidInputError, match=words):
        InterventionSpec.from_dict(content)


def test_files_of_json_yaml_and_toml_say_the_same(tmp_path) -> None:
    declared = InterventionSpec(
        name="n",
        model="m",
        freeze_attention=True,
        interventions=(
            Intervention(kind="add", sae="demo", features=(1, 2), value=(1.0, 2.0), unit="maximum"),
            Intervention(kind="ablate", layer=1, heads=(0,), positions=(3,), during="generated", keep_bos=False),
        ),
    )
    declared.save(tmp_path / "a.json")
    (tmp_path / "a.yaml").write_text(
        "name: n\nmodel: m\nfreeze_attention: true\ninterventions:\n"
        "- {kind: add, sae: demo, features: [1, 2], value: [1.0, 2.0], unit: maximum}\n"
        "- {kind: ablate, layer: 1, heads: [0], positions: [3], during: generated, keep_bos: false}\n"
    )
    (tmp_path / "a.toml").write_text(
        'name = "n"\nmodel = "m"\nfreeze_attention = true\n'
        '[[interventions]]\nkind = "add"\nsae = "demo"\nfeatures = [1, 2]\nvalue = [1.0, 2.0]\nunit = "maximum"\n'
        '[[interventions]]\nkind = "ablate"\nlayer = 1\nheads = [0]\npositions = [3]\nduring = "generated"\n'
        "keep_bos = false\n"
    )
    for ending in ("json", "yaml", "toml"):
        assert InterventionSpec.load(tmp_path / f"a.{ending}") == declared
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "bad.yaml").write_text("a: [")
    for name in ("bad.json", "bad.yaml"):
        with pytest.raises(InvalidInputError, match="cannot be read"):
            InterventionSpec.load(tmp_path / name)
    with pytest.raises(UnknownNameError):
        InterventionSpec.load(tmp_path / "none.json")
