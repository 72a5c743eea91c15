"""`--embeddings host`, on every command that loads a model: it gets there, and what is computed is the same."""

import inspect
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from helpers_models import TEXT, one_thread, tiny_folder, tiny_model
from helpers_saes import make
from test_attribution_per_layer import transcoders
from test_cli import scope

from dashboards.context import Context
from dashboards.prompts import prompt_jobs
from scope.cli import app
from scope.cli._model import EmbeddingPlace
from scope.errors import MissingDependencyError
from scope.models import LanguageModel, placement
from scope.saes.base import SAE, SAEMetadata
from scope.saes.formats import save
from scope.workspace import Workspace

__all__ = ["one_thread"]

HOOK = "blocks.1.hook_resid_post"
PROMPT = "The cat sat on the mat and looked at the"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A text, a store, an SAE and transcoders of the tiny Gemma 4."""
    folder = tmp_path_factory.mktemp("made")
    with open(folder / "text.jsonl", "w") as file:
        file.writelines(json.dumps({"text": TEXT[n:], "title": f"page-{n}"}) + "\n" for n in range(40))
    model = tiny_model("gemma4")
    for layer, transcoder in enumerate(transcoders(model)):
        save(transcoder, folder / "transcoders" / f"layer_{layer}")
    save(make("topk", d_in=model.d_model, metadata=SAEMetadata(hook_name=HOOK)), folder / "sae")
    scope(
        *("capture", "--model", tiny_folder("gemma4"), "--data", folder / "text.jsonl", "--hook", HOOK),
        *("--out", folder / "acts.zarr", "--context-size", 32, "--device", "cpu", "--embeddings", "host"),
    )
    return {"folder": folder, "model": str(tiny_folder("gemma4")), "token": model.vocabulary_strings([305])[0]}


def commands(made: dict[str, Any], out: Path) -> dict[str, tuple[object, ...]]:
    """Arguments of each command that loads a model, as far as that."""
    folder, model = made["folder"], ("--model", made["model"])
    text, store, sae = ("--data", folder / "text.jsonl"), folder / "acts.zarr", folder / "sae"
    prompt = (*model, "--prompt", PROMPT)
    live = (*model, *text, "--context-size", 32)
    return {
        "capture": ("capture", *live, "--hook", HOOK, "--out", out / "a.zarr"),
        "train": ("train", *live, "--hook", HOOK, "--d-sae", 64, "--k", 4, "--out", out / "t"),
        "index": ("index", sae, *live, "--out", out / "i"),
        "index of a store": ("index", store, sae, *model, "--out", out / "j"),
        "evaluate": ("evaluate", "--transcoders", folder / "transcoders", *live, "--tokens", 64),
        "finetune": ("finetune", store, sae, *model, "--out", out / "f"),
        "attribute": ("attribute", *prompt, "--sae", sae, "--target", made["token"], "--steps", 3),
        "components": ("attribute", *prompt, "--method", "components", "--target", made["token"]),
        "graph": ("graph", *prompt, "--transcoders", folder / "transcoders", "--out", out / "g", "--max-features", 9),
        "steer": ("steer", *prompt, "--sae", sae, "--feature", 3, "--strength", 9, "--max-new-tokens", 4),
        "diff": ("diff", made["model"], made["model"], *text, "--out", out / "d"),
        "quantisation": ("quantisation", made["model"], made["model"], *text, "--out", out / "q"),
        "info": ("info", made["model"]),
        "denoise": ("denoise", *model, *text, "--hook", HOOK, "--out", out / "n"),
    }


NAMES = (
    "capture", "train", "index", "index of a store", "evaluate", "finetune", "attribute", "components", "graph",
    "steer", "diff", "quantisation", "info", "denoise",
)  # fmt: skip


class LoadedError(MissingDependencyError):
    """Ends a command where it has loaded its model."""

    def __init__(self) -> None:
        super().__init__("nothing", "nothing", "this test")


@pytest.mark.parametrize("name", NAMES)
def test_a_command_loads_its_model_as_it_was_told(
    name: str, made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[object] = []

    def load(*_: object, **settings: object) -> None:
        told.append(settings["embeddings"])
        raise LoadedError

    monkeypatch.setattr(LanguageModel, "load", load)
    asked = commands(made, tmp_path)[name]
    for place in ("host", "device"):
        scope(*asked, "--embeddings", place, code=1)
    scope(*asked, code=1)
    assert told == ["host", "device", "device"]
    assert "'device', 'host'" in scope(*asked, "--embeddings", "hots", code=2).stderr


@pytest.mark.parametrize("name", ["attribute", "graph", "steer"])
def test_saes_are_brought_to_the_models_device(
    name: str, made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[object] = []
    elsewhere = torch.device("meta")

    def to(sae: SAE, device: object) -> SAE:
        if device == "cpu":  # where it is loaded
            return sae
        told.append(device)
        raise LoadedError

    monkeypatch.setattr(LanguageModel, "load", lambda *_, **__: SimpleNamespace(device=elsewhere))
    monkeypatch.setattr(SAE, "to", to)
    asked = commands(made, tmp_path)[name]
    scope(*asked, code=1)
    assert told == [elsewhere]
    if name == "graph":
        with pytest.raises(AttributeError, match="SimpleNamespace"):  # at the model's first use: none was moved
            scope(*asked, "--dictionaries", "host")
        assert told == [elsewhere]


def test_every_command_with_a_model_takes_it() -> None:
    """But for those that read a tokenizer alone, and those of `scope bench`, whose models are their own."""
    assert get_args(EmbeddingPlace) == get_args(placement.EmbeddingPlace)
    groups = [group.typer_instance for group in app.registered_groups if group.name != "bench"]
    lacking = set()
    for typed in [one for group in (app, *groups) for one in group.registered_commands]:
        parameters = inspect.signature(typed.callback).parameters  # type: ignore[arg-type]
        if {"model", "base"} & set(parameters) and "embeddings" not in parameters:
            lacking.add(typed.name)
    assert lacking <= {"fertility", "load"}


ANSWERS = ("attribute", "components", "graph", "steer", "evaluate")


@pytest.mark.parametrize("name", ANSWERS)
def test_the_answer_is_the_same(name: str, made: dict[str, Any], tmp_path: Path) -> None:
    require_the_same_answers(name, made, tmp_path, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ANSWERS)
def test_the_answer_is_the_same_on_a_gpu(name: str, made: dict[str, Any], tmp_path: Path) -> None:
    require_the_same_answers(name, made, tmp_path, "cuda")


@pytest.mark.gpu
def test_the_graph_is_the_same_with_its_transcoders_on_the_host(made: dict[str, Any], tmp_path: Path) -> None:
    answers = []
    for place in ("device", "host"):
        where = ("--device", "cuda", "--dictionaries", place, "--json")
        made_of = scope(*commands(made, tmp_path)["graph"], *where)
        links = json.loads((tmp_path / "g").read_text())["links"]
        held = scope("graph", "verify", tmp_path / "g", *where)
        answers.append({**made_of, "links": links, "verified": held})
    require_near(*answers)


def require_the_same_answers(name: str, made: dict[str, Any], out: Path, device: str) -> None:
    """What a command says, and the edges of the graph that it writes, with tables on the device and on the host."""
    answers = []
    for place in ("device", "host"):
        answer = scope(*commands(made, out)[name], "--device", device, "--embeddings", place, "--json")
        answer.pop("seconds", None)
        if name == "graph":
            answer["written"] = json.loads((out / "g").read_text())["links"]
        answers.append(answer)
    if device == "cpu":
        assert answers[0] == answers[1]
    else:
        require_near(*answers)


def require_near(one: Any, other: Any) -> None:
    """Two answers that say the same, their floats up to rounding: sums on a GPU are not of one order."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        one, other = list(one.values()), list(other.values())
    if isinstance(one, list):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            require_near(*pair)
    elif isinstance(one, float):
        assert other == pytest.approx(one, rel=1e-5, nan_ok=True)
    else:
        assert one == other


def test_the_dashboard_loads_models_as_it_was_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []
    model = tiny_model("gemma4")
    monkeypatch.setattr(LanguageModel, "load", lambda name, **settings: told.append(settings["embeddings"]) or model)
    context = Context(Workspace(tmp_path), embeddings="host")
    job = context.worker.submit("load", lambda job: prompt_jobs(context).model(job, "a model"))
    context.worker.wait(job, 20)
    assert told == ["host"]
    served: dict[str, object] = {}
    monkeypatch.setattr("dashboards.serve", lambda *_, **options: served.update(options))
    scope("serve", tmp_path, "--embeddings", "host")
    assert served["embeddings"] == "host"
