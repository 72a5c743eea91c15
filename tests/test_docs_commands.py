"""What the documents tell people to type exists: every command, every option, every file and section that they name."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from scope.cli import app

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(text: str) -> Iterator[list[str]]:
    """The words of each `scope …` in a document's blocks for the shell."""
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.split("&&"):
                words = shlex.split(part.replace("…", ""), comments=True)
                if "scope.cli" in words:
                    words = ["scope", *words[words.index("scope.cli") + 1 :]]
                if words[:1] == ["scope"]:
                    yield words[1:]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_and_their_options_exist(path: Path) -> None:
    for words in commands(path.read_text("utf-8")):
        command: Any = typer.main.get_command(app)
        rest = list(words)
        while hasattr(command, "commands"):
            named = rest and rest[0] in command.commands
            assert named or "make" in command.commands, f"there is no scope {shlex.join(words)}"
            command = command.commands[rest.pop(0) if named else "make"]  # scope graph makes one
        known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
        for word in rest:
            assert not word.startswith("--") or word in known, f"scope {shlex.join(words)}: no {word}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text("utf-8")):
        if target.startswith("http"):
            continue
        name, _, section = target.partition("#")
        found = path.parent / name
        assert found.exists(), target
        if section:
            titles = re.findall(r"^#+ (.+)$", found.read_text("utf-8"), re.MULTILINE)
            assert section in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], target
