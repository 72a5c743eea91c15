"""`scope labels`: what people call an SAE's features: import, export, list, set."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scope.cli._command import Outcome, command, progress_bar, say

if TYPE_CHECKING:
    from scope.features.labels import FeatureLabels
    from scope.features.neuronpedia import SAEAddress

__all__ = ["register"]

Folder = Annotated[Path, typer.Option("--workspace", help="The workspace folder.")]
Which = Annotated[str, typer.Option("--sae", help="The SAE: its id or name, that of an index of it, or a path.")]
WORKSPACE = Path("workspace")


def register(app: typer.Typer) -> None:
    """Add the group of commands to `app`."""
    group = typer.Typer(name="labels", help="Labels, notes, stars and lists of features.", no_args_is_help=True)
    app.add_typer(group)
    _register_import(group)
    _register_export(group)

    @command(group, "list")
    def list_labels(sae: Which, workspace: Folder = WORKSPACE) -> Outcome:
        """The labels of an SAE, one's own before imported ones."""
        table = _labelled(workspace, sae)[0].table()
        lines = [
            f"{row['feature']:>8}  {'*' if row['starred'] else ' '} {row['label'] or '-'}"
            + (f"  ({row['label_source']})" if row["label_source"] not in ("", "own") else "")
            + (f"  [{', '.join(row['lists'])}]" if row["lists"] else "")
            for row in table.to_dict("records")
        ]
        text = "\n".join(lines) or f"No labels yet. Set one with: scope labels set 7 'a label' --sae {sae}"
        return Outcome({"labels": table.to_dict("records")}, text)

    @command(group, "set")
    def set_label(
        feature: Annotated[int, typer.Argument(help="The feature's id.")],
        sae: Which,
        text: Annotated[str | None, typer.Argument(help="The label; '' takes one's own away.")] = None,
        notes: Annotated[str | None, typer.Option(help="Notes; '' takes them away.")] = None,
        star: Annotated[bool | None, typer.Option("--star/--no-star", help="Whether it is starred.")] = None,
        add_to: Annotated[list[str] | None, typer.Option(help="A list to put it into. May be repeated.")] = None,
        remove_from: Annotated[list[str] | None, typer.Option(help="A list to take it out of.")] = None,
        workspace: Folder = WORKSPACE,
    ) -> Outcome:
        """Label a feature, note something, star it, put it into lists."""
        from scope.errors import InvalidInputError

        if text is None and notes is None and star is None and not add_to and not remove_from:
            raise InvalidInputError("Nothing to set. Give a label, --notes, --star, --add-to or --remove-from.")
        labels, _ = _labelled(workspace, sae)
        label = labels.set(feature, text, notes, star)
        for name in add_to or ():
            label = labels.add_to_list(feature, name)
        for name in remove_from or ():
            label = labels.remove_from_list(feature, name)
        said = label.text or "no label"
        return Outcome({"feature": feature, **label.__dict__}, f"Feature {feature}: {said}")


def _labelled(workspace: Path, sae: str) -> "tuple[FeatureLabels, SAEAddress]":
    """The labels of an SAE that is named as other commands name it: by id or name, by its folder, by an address."""
    from scope.errors import UnknownNameError
    from scope.workspace import Workspace

    try:
        return Workspace(workspace).labelled(sae)
    except UnknownNameError:
        if not Path(sae).is_dir():
            raise
        return Workspace(workspace).labelled(str(Path(sae).resolve()))


def _register_import(group: typer.Typer) -> None:
    @command(group, "import")
    def import_labels(
        files: Annotated[
            list[Path],
            typer.Argument(
                help="Neuronpedia's explanations (.jsonl, .jsonl.gz, .json, folders of them), or what "
                "`scope labels export` wrote as .jsonl or .json."
            ),
        ],
        sae: Which,
        workspace: Folder = WORKSPACE,
        source: Annotated[str | None, typer.Option(help="Which source of the export, where it has several.")] = None,
        allow_mismatch: Annotated[bool, typer.Option(help="Take labels of another model or hook.")] = False,
    ) -> Outcome:
        """Take in Neuronpedia's explanation exports (one's own labels stay and go on showing), or one's own export."""
        from scope.features.neuronpedia import import_explanations

        labels, address = _labelled(workspace, sae)
        if len(files) == 1 and (own := _own_export(files[0])):
            return _restore(labels, own, files[0], allow_mismatch)
        with progress_bar("Reading") as progress:
            report = import_explanations(
                labels, files, address, source=source, allow_mismatch=allow_mismatch, progress=progress
            )
        if report.skipped_long:
            say(f"{report.skipped_long:,} explanations are longer than a label may be and were left out.")
        lines = [f"{report.labels:,} labels of {report.features:,} features taken in."]
        lines += [f"{count:>8,}  {name}" for name, count in report.sources.items()]
        return Outcome({**report._asdict(), "sae": labels.sae}, "\n".join(lines))


def _own_export(file: Path) -> list[dict[str, Any]]:
    """The records of a file that `scope labels export` wrote; none where it is something else."""
    if file.suffix not in (".jsonl", ".json") or not file.is_file():
        return []
    try:
        text = file.read_text("utf-8")
        content = json.loads(text) if file.suffix == ".json" else [json.loads(line) for line in text.splitlines()[:1]]
        if not isinstance(content, list) or not content or not {"sae", "label_source"} <= set(content[0]):
            return []
        return content if file.suffix == ".json" else [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, TypeError):
        return []


def _restore(labels: "FeatureLabels", records: list[dict[str, Any]], file: Path, allow_mismatch: bool) -> Outcome:
    from scope.errors import MismatchError

    others = {str(record.get("sae")) for record in records} - {labels.sae}
    if others and not allow_mismatch:
        raise MismatchError(
            f"{file} has labels of the SAE {min(others)[:12]}, and this is {labels.sae[:12]}. Take them anyway with "
            "--allow-mismatch."
        )
    count = labels.restore(records)
    return Outcome({"features": count, "sae": labels.sae}, f"What is said of {count:,} features taken in.")


def _register_export(group: typer.Typer) -> None:
    @command(group, "export")
    def export_labels(
        sae: Which,
        out: Annotated[Path, typer.Option(help="The file to write: .jsonl, .json, .csv or .parquet.")],
        workspace: Folder = WORKSPACE,
    ) -> Outcome:
        """Write labels, notes, stars and lists, with the SAE's fingerprint, to a file."""
        from scope.errors import InvalidInputError
        from scope.features.grids import write_grid

        labels, _ = _labelled(workspace, sae)
        table = labels.table()
        table.insert(0, "sae", labels.sae)
        records = table.to_dict("records")
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.suffix == ".jsonl":
            out.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")
        elif out.suffix == ".json":
            out.write_text(json.dumps(records, ensure_ascii=False, indent=1) + "\n", "utf-8")
        elif out.suffix in (".csv", ".parquet"):
            write_grid(table, out)
        else:
            raise InvalidInputError(f"{out} ends with {out.suffix!r}; expected .jsonl, .json, .csv or .parquet.")
        return Outcome({"labels": len(table), "out": str(out)}, f"{out} holds what is said of {len(table):,} features.")
