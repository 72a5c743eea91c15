"""Dream's and LLaDA's layouts: code that comes with a model, hooks, and a loop that fills in masks.

The published files are not ours to ship. `MODULES` has tiny modules of the same form: names of modules and settings,
what is passed by position, and, of Dream, the signature of the loop.
"""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_models import fast_points, tiny_folder
from helpers_models import one_thread as one_thread
from helpers_saes import make
from test_cli_stores import scope

from activations.denoising import STATES, Canvas, DenoisingSettings
from activations.denoising_capture import capture_denoising
from activations.source import RowFlag
from activations.text import TextSource
from scope.errors import InvalidInputError
from scope.features.index import FeatureIndex
from scope.models import LanguageModel
from scope.saes.base import SAEMetadata
from scope.saes.formats import save

MASK = 3
MODULES = """
from types import SimpleNamespace

import torch
from torch import nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel


def attend(q, k, v, heads):
    q, k, v = (one.unflatten(-1, (heads, -1)).transpose(1, 2) for one in (q, k, v))
    return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class DreamConfig(PretrainedConfig):
    model_type = "Dream"

    def __init__(self, **more):
        sizes = dict(vocab_size=394, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                     num_key_value_heads=2, max_position_embeddings=64, mask_token_id=3)
        super().__init__(**{**sizes, **more})


class DreamGenerationConfig(GenerationConfig):
    def __init__(self, **kwargs):
        for name, value in dict(max_new_tokens=6, steps=4, alg="origin", temperature=1.0).items():
            setattr(self, name, kwargs.pop(name, value))
        self._from_model_config, self.transformers_version = True, None

    def validate(self, **kwargs):
        pass


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.num_attention_heads
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(config.hidden_size, config.hidden_size))

    def forward(self, x):
        return self.o_proj(attend(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn, self.mlp = Attention(config), MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size)

    def forward(self, hidden_states, attention_mask=None):
        x = hidden_states + self.self_attn(self.input_layernorm(hidden_states))
        return (x + self.mlp(self.post_attention_layernorm(x)),)


class Base(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Layer(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.RMSNorm(config.hidden_size)


class DreamModel(PreTrainedModel):
    config_class = DreamConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = Base(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.history = []
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids=None, attention_mask=None, position_ids=None):
        x = self.model.embed_tokens(input_ids)
        for layer in self.model.layers:
            x = layer(x, attention_mask=attention_mask)[0]
        return SimpleNamespace(logits=self.lm_head(self.model.norm(x)))

    def _prepare_generation_config(self, generation_config, **kwargs):
        made = DreamGenerationConfig()
        made.update(**kwargs)
        return made

    @torch.no_grad()
    def diffusion_generate(self, inputs, generation_config=None, **kwargs):
        generation_config = self._prepare_generation_config(generation_config, **kwargs)
        max_new_tokens, steps = generation_config.max_new_tokens, generation_config.steps
        mask = self.config.mask_token_id
        x = nn.functional.pad(inputs, (0, max_new_tokens), value=mask)
        self.history = [x.clone()]
        for step in range(steps):
            masked = x == mask
            logits = self(x, "full", None).logits
            logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
            logits[..., mask] = -torch.inf
            drawn = torch.distributions.Categorical(logits=logits).sample()
            confidence = torch.where(masked, logits.softmax(-1).max(-1).values, -torch.inf)
            n = int(masked.sum()) // (steps - step)
            taken = confidence.topk(n, dim=-1).indices
            x = x.scatter(1, taken, drawn.gather(1, taken))
            self.history.append(x.clone())
        return SimpleNamespace(sequences=x)


class LLaDAConfig(PretrainedConfig):
    model_type = "llada"

    def __init__(self, **more):
        sizes = dict(vocab_size=394, d_model=16, mlp_hidden_size=24, n_layers=2, n_heads=2, max_sequence_length=64,
                     mask_token_id=3)
        super().__init__(**{**sizes, **more})

    @property
    def num_attention_heads(self):
        return self.n_heads

    @property
    def num_hidden_layers(self):
        return self.n_layers

    @property
    def hidden_size(self):
        return self.d_model


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.n_heads
        for name in ("q_proj", "k_proj", "v_proj", "attn_out"):
            setattr(self, name, nn.Linear(config.d_model, config.d_model, bias=False))
        self.attn_norm, self.ff_norm = nn.RMSNorm(config.d_model), nn.RMSNorm(config.d_model)
        self.ff_proj = nn.Linear(config.d_model, config.mlp_hidden_size, bias=False)
        self.up_proj = nn.Linear(config.d_model, config.mlp_hidden_size, bias=False)
        self.ff_out = nn.Linear(config.mlp_hidden_size, config.d_model, bias=False)

    def forward(self, x, attention_bias=None):
        normed = self.attn_norm(x)
        x = x + self.attn_out(attend(self.q_proj(normed), self.k_proj(normed), self.v_proj(normed), self.heads))
        normed = self.ff_norm(x)
        return x + self.ff_out(nn.functional.silu(self.ff_proj(normed)) * self.up_proj(normed)), None


class Inner(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.d_model),
            blocks=nn.ModuleList([Block(config) for _ in range(config.n_layers)]),
            ln_f=nn.RMSNorm(config.d_model),
            ff_out=nn.Linear(config.d_model, config.vocab_size, bias=False),
        ))


class LLaDAModelLM(PreTrainedModel):
    config_class = LLaDAConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = Inner(config)
        self.post_init()

    def get_output_embeddings(self):
        return self.model.transformer.ff_out

    def forward(self, input_ids=None):
        inner = self.model.transformer
        x = inner.wte(input_ids)
        for block in inner.blocks:
            x, _ = block(x, attention_bias=None)
        return SimpleNamespace(logits=inner.ff_out(inner.ln_f(x)))
"""
KINDS = {
    "Dream": ("DreamConfig", "AutoModel", "DreamModel"),
    "llada": ("LLaDAConfig", "AutoModelForCausalLM", "LLaDAModelLM"),
}
LAYERS: dict[str, Callable] = {
    "Dream": lambda hf: (hf.model.embed_tokens, hf.model.layers),
    "llada": lambda hf: (hf.model.transformer.wte, hf.model.transformer.blocks),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory):
    """Folders of both models, as published ones look; transformers keeps its copies of the code beside them."""
    from transformers import dynamic_module_utils

    root = tmp_path_factory.mktemp("remote")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(root / "modules"))
        patch.setattr(sys, "path", [*sys.path])
        found = {}
        for kind, (config, auto, model) in KINDS.items():
            folder = root / kind
            folder.mkdir()
            for file in tiny_folder("gemma3").glob("tokenizer*"):
                (folder / file.name).write_bytes(file.read_bytes())
            (folder / "modeling_tiny.py").write_text(MODULES)
            namespace: dict = {"__name__": "tiny_modules"}
            exec(MODULES, namespace)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                made = namespace[model](namespace[config]())
                for parameter in made.parameters():
                    parameter.data.copy_(0.5 * torch.randn(parameter.shape))
            made.save_pretrained(folder)
            settings = json.loads((folder / "config.json").read_text())
            settings["auto_map"] = {"AutoConfig": f"modeling_tiny.{config}", auto: f"modeling_tiny.{model}"}
            (folder / "config.json").write_text(json.dumps(settings))
            found[kind] = folder
        yield found


def load(folder: Path) -> LanguageModel:
    return LanguageModel.load(str(folder), device="cpu", dtype="float32", trust_remote_code=True)


@pytest.mark.parametrize("kind", KINDS)
def test_code_that_comes_with_a_model_is_run_only_if_that_is_allowed(folders: dict, kind: str) -> None:
    with pytest.raises(InvalidInputError, match=r"modeling_tiny\.py.*trust_remote_code=True") as error:
        LanguageModel.load(str(folders[kind]), device="cpu")
    assert kind in str(error.value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.input", lambda *_: pytest.fail("nobody is asked at the terminal"))
        with pytest.raises(InvalidInputError, match="trust_remote_code=True"):
            LanguageModel.load(str(_of_a_known_type(folders[kind])), device="cpu")
    assert type(load(folders[kind]).hf).__name__ == KINDS[kind][2]


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_are_what_the_layers_pass_on(folders: dict, kind: str) -> None:
    model = load(folders[kind])
    prompt, canvas = torch.arange(10, 14), torch.tensor([MASK, MASK, 20, MASK])
    points = fast_points(model)
    seen, logits = model.read_canvas(prompt, canvas, [point.name for point in points])
    for point in points:
        assert seen[point.name].shape == (8, *model.hook_shape(point.name)), point.name
    embed, layers = LAYERS[kind](model.hf)
    x = embed(torch.cat([prompt, canvas])[None])
    for number, layer in enumerate(layers):
        assert torch.equal(seen[f"blocks.{number}.hook_resid_pre"], x[0])
        x = layer(x)[0]
        assert torch.equal(seen[f"blocks.{number}.hook_resid_post"], x[0])
    written = seen["blocks.1.hook_attn_out"] + seen["blocks.1.hook_mlp_out"]
    assert torch.allclose(seen["blocks.1.hook_resid_pre"] + written, x[0], atol=1e-5)
    assert torch.equal(logits, seen["hook_unembed"])
    with pytest.raises(InvalidInputError, match="scope denoise"):
        model.run(prompt)


def test_dreams_own_loop_is_watched_and_fills_a_gap(folders: dict, tmp_path: Path) -> None:
    model, hook = load(folders["Dream"]), "blocks.1.hook_resid_post"
    canvas = Canvas(np.arange(10, 14, dtype=np.int32), np.array([30, 31], np.int32), 3)
    (block,) = model.denoise(canvas, DenoisingSettings(max_new_tokens=4, max_steps=3), 5, ["hook_embed"], "float32")
    torch.manual_seed(5)
    inputs = torch.tensor([[10, 11, 12, 13, MASK, MASK, MASK, 30, 31]])
    theirs = model.hf.diffusion_generate(inputs, max_new_tokens=4, steps=3).sequences[0]
    history = torch.cat(model.hf.history).numpy()
    assert np.array_equal(block.tokens, history[:-1])
    assert np.array_equal(block.final, theirs.numpy())
    assert block.given.tolist() == [True] * 4 + [False] * 3 + [True] * 2 + [False] * 4
    embedded = model.hf.model.embed_tokens(torch.from_numpy(block.tokens).long()).flatten(0, 1)
    assert np.array_equal(block.values["hook_embed"], embedded.numpy())
    configuration = model.denoising_configuration(DenoisingSettings(max_steps=3))
    told = {"alg": "origin", "temperature": 1.0, "steps": 3, "max_new_tokens": 6, "mask_token_id": MASK}
    assert configuration.items() >= told.items()
    json.dumps(configuration)
    with pytest.raises(InvalidInputError, match=r"56 are to be generated.*room for 64"):
        model.require_canvas(canvas, DenoisingSettings(max_new_tokens=56))
    (tmp_path / "p.jsonl").write_text(json.dumps({"text": "The cat", "suffix": " the moon", "gap": 3}))
    store = capture_denoising(model, TextSource(tmp_path / "p.jsonl"), [hook], tmp_path / "s.zarr").store
    columns = {name: store.column(name, 0, store.n_rows) for name in store.token_columns}
    masked = np.isin(columns["state"], [STATES.index("masked"), STATES.index("committing")])
    assert np.array_equal(masked, columns["token_id"] == MASK)
    commit, step = columns["commit_step"], columns["step"]
    assert (columns["state"][step == commit] == STATES.index("committing")).all()
    settled = columns["state"] == STATES.index("committed")
    assert np.array_equal(columns["token_id"][settled], columns["final_id"][settled])
    assert not (columns["flags"][masked] & RowFlag.SPECIAL).any()  # the mask is special, what stands there is not


def _of_a_known_type(folder: Path) -> Path:
    """A copy whose model type transformers knows, but not as a language model: its class is in the folder's code."""
    copy = folder.with_name(f"{folder.name}-known")
    shutil.copytree(folder, copy)
    settings = json.loads((copy / "config.json").read_text())
    own = {"AutoModelForCausalLM": next(iter(reversed(settings["auto_map"].values())))}
    (copy / "config.json").write_text(json.dumps({**settings, "model_type": "vit", "auto_map": own}))
    return copy


def test_a_tokenizer_in_python_is_refused(folders: dict) -> None:
    model = load(folders["Dream"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **__: object())
        with pytest.raises(InvalidInputError, match="written in Python"):
            _ = model.tokenizer


def test_an_index_has_token_texts_where_the_models_code_is_allowed(folders: dict, tmp_path: Path) -> None:
    hook, folder = "blocks.1.hook_resid_post", folders["Dream"]
    (tmp_path / "p.jsonl").write_text(json.dumps({"text": "The cat"}))
    options = ("--model", folder, "--data", tmp_path / "p.jsonl", "--hook", hook, "--device", "cpu")
    scope("denoise", *options, "--out", tmp_path / "s.zarr", "--trust-remote-code")
    save(make("topk", d_in=16, d_sae=24, k=4, seed=1, metadata=SAEMetadata(hook_name=hook)), tmp_path / "sae")
    scope("index", tmp_path / "s.zarr", tmp_path / "sae", "--out", tmp_path / "with.index", "--trust-remote-code")
    scope("index", tmp_path / "s.zarr", tmp_path / "sae", "--out", tmp_path / "without.index")
    found = {name: FeatureIndex.open(tmp_path / f"{name}.index").table["top_token"] for name in ("with", "without")}
    ids = {name: texts[texts != ""].str.fullmatch(r"<\d+>") for name, texts in found.items()}
    assert not ids["with"].any()
    assert ids["without"].all()


def test_llada_has_no_loop_to_look_into(folders: dict) -> None:
    with pytest.raises(InvalidInputError, match="no generation loop of its own"):
        load(folders["llada"]).denoising_configuration(DenoisingSettings())
