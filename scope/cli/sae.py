"""`scope sae convert`: a published SAE in the format that every tool reads. And how commands name an SAE."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from scope.cli._command import Outcome, command
from scope.errors import InvalidInputError, UnknownNameError

if TYPE_CHECKING:
    from scope.saes.base import SAE

__all__ = ["SAE_HELP", "DownloadOption", "HookOption", "HookOutOption", "register", "require_hook"]

DTYPES = ("float32", "bfloat16", "float16")
SAE_HELP = "The SAE: a folder in any readable format, hf://OWNER/REPOSITORY/FOLDER@REVISION, or SAELens's RELEASE/ID."
HookOption = Annotated[str | None, typer.Option(help="The hook that the SAE reads, where its files do not say.")]
HookOutOption = Annotated[
    str | None, typer.Option(help="The hook that a transcoder writes, where its files do not say.")
]
DownloadOption = Annotated[
    bool, typer.Option("--allow-download", help="Fetch what is not on this machine from the Hugging Face hub.")
]


def require_hook(sae: "SAE") -> str:
    """The hook that an SAE reads.

    Raises:
        InvalidInputError: it reads several, or does not say which.
    """
    metadata = sae.cfg.metadata
    if metadata.hook_names:
        raise InvalidInputError(
            f"The SAE reads {len(metadata.hook_names)} hooks; this command needs one that reads one."
        )
    if not metadata.hook_name:
        place = dict(metadata.extra).get("hf_hook_name")
        raise InvalidInputError(
            f"The SAE's files do not say which hook it reads{f' (they say {place})' if place else ''}. Give it with "
            "--hook, such as --hook blocks.8.hook_resid_post."
        )
    return metadata.hook_name


def register(app: typer.Typer) -> None:
    """Add the group `scope sae` to `app`."""
    group = typer.Typer(no_args_is_help=True, help="Published SAEs.", rich_markup_mode=None)
    app.add_typer(group, name="sae")

    @command(group, "convert")
    def convert(
        sae: Annotated[str, typer.Argument(help=SAE_HELP)],
        out: Annotated[Path, typer.Argument(help="The folder to make, new or empty.")],
        hook: HookOption = None,
        hook_out: HookOutOption = None,
        dtype: Annotated[
            str | None,
            typer.Option(help="Of the weights: float32, bfloat16 or float16, to which they are rounded."),
        ] = None,
        allow_download: DownloadOption = False,
    ) -> Outcome:
        """Write an SAE of any readable format in SAELens's, which all tools read; without --dtype its outputs stay as
        they are."""
        import torch

        from scope.saes import formats
        from scope.saes.formats.saelens import require_free

        if dtype is not None and dtype not in DTYPES:
            raise UnknownNameError("dtype", dtype, DTYPES)
        require_free(out)
        loaded = formats.load(sae, allow_download=allow_download, hook=hook, hook_out=hook_out)
        if dtype is not None:
            loaded = loaded.to(getattr(torch, dtype))
        format = formats.save_converted(loaded, sae, out)
        metadata = loaded.cfg.metadata
        facts = {
            "sae": str(out),
            "id": loaded.fingerprint[:12],
            "converted_from": format,
            "dtype": str(loaded.dtype).removeprefix("torch."),
            "architecture": loaded.config_as_stored().stored_architecture,
            "d_in": loaded.d_in,
            "d_sae": loaded.d_sae,
            "hook_name": metadata.hook_name,
            "hook_name_out": metadata.hook_name_out,
            "model_name": metadata.model_name,
        }
        text = f"Converted {sae} ({format}, {facts['architecture']}, {loaded.d_sae:,} features) -> {out}"
        if metadata.hook_name is None and not metadata.hook_names:
            text += "\nIts files do not say which hook it reads; commands that need it take --hook."
        return Outcome(facts, text)
