"""The command line on chats with tools: rows of one kind, features by role."""

from pathlib import Path

import helpers_chats
import helpers_models
from helpers_models import one_thread  # noqa: F401
from helpers_saes import make
from test_cli_stores import HOOK, scope
from typer.testing import CliRunner

from activations.store import ActivationStore
from scope.cli import app
from scope.saes.base import SAEMetadata
from scope.saes.formats import load, save


def test_from_chats_to_features_by_role(tmp_path: Path) -> None:
    chats = helpers_chats.write_chats(tmp_path / "chats.jsonl", [helpers_chats.weather_chat()] * 2)
    template = tmp_path / "template.jinja"
    template.write_text(helpers_chats.BLOCKS)
    model = helpers_models.tiny_folder("gemma3")
    options = ("capture", "--model", model, "--data", chats, "--hook", HOOK, "--context-size", 48)
    options += ("--messages-column", "messages", "--chat-template", template)
    calls = scope(*options, "--kinds", "tool_call", "--out", tmp_path / "calls.zarr")
    whole = scope(*options, "--out", tmp_path / "s.zarr")
    assert 0 < calls["rows"] < whole["rows"]
    assert ActivationStore.open(tmp_path / "calls.zarr").manifest["selection"]["kinds"] == ["tool_call"]
    assert "Did you mean tool_call" in scope(*options, "--kinds", "tool_cal", "--out", tmp_path / "x.zarr", code=2)
    sae = make("topk", d_in=32, d_sae=40, k=6, seed=1, metadata=SAEMetadata(hook_name=HOOK))
    save(sae, tmp_path / "sae")
    index = tmp_path / "i.index"
    scope("index", tmp_path / "s.zarr", tmp_path / "sae", "--model", model, "--out", index)
    found = scope("roles", index)["conditions"]
    assert {"role:assistant", "role:tool", "kind:tool_call", "kind:markup"} <= set(found)
    listed = found["kind:tool_call"]
    assert listed
    assert all(one["rate_a"] > one["rate_b"] for one in listed)
    one = scope("roles", index, "--feature", listed[0]["feature"])
    assert {row["role"] for row in one["roles"]} == {"none", "system", "user", "assistant", "tool"}
    rates = {row["kind"]: row["rate"] for row in one["kinds"]}
    assert rates["tool_call"] == listed[0]["rate_a"]
    said = CliRunner().invoke(app, ["roles", str(index), "--feature", "3"]).stdout
    assert "per 1,000" in said
    assert "tool_response" in said
    trained = ("--hook", HOOK, "--d-sae", 32, "--k", 4, "--tokens", 512, "--batch-size", 64, "--evaluate-tokens", 0)
    stored = scope("train", tmp_path / "s.zarr", *trained, "--out", tmp_path / "stored")
    text = ("--model", model, "--data", chats, "--context-size", 48, "--messages-column", "messages")
    streamed = scope("train", *text, "--chat-template", template, *trained, "--out", tmp_path / "streamed")
    assert load(streamed["sae"]).cfg.metadata.store_fingerprint == load(stored["sae"]).cfg.metadata.store_fingerprint
    only_calls = tmp_path / "calls.index"
    scope("index", tmp_path / "calls.zarr", tmp_path / "sae", "--model", model, "--out", only_calls)
    assert set(scope("roles", only_calls, "--feature", 0)["kinds"][0]) > {"kind", "rate", "rate_low", "rate_high"}
