"""Commands that hand a checkpoint or a method over to other programs: convert, vllm."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from vlmslim.cli.shared import mistakes_in_one_line, quiet_transformers


def convert(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="A folder or a hub id, in the format of LLaVA's authors.")
    ],
    folder: Annotated[Path, typer.Argument(metavar="DST", help="A new folder.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
) -> None:
    """Write a checkpoint of LLaVA's authors in the form of transformers, for other tools. vlmslim needs none."""
    quiet_transformers()
    from vlmslim.originals.convert import convert

    with mistakes_in_one_line():
        convert(source, folder, revision=revision)
    typer.echo(f"{folder} holds {source} in the form of transformers")


def vllm(
    method: Annotated[str, typer.Argument(help="As divprune:keep=64, or a folder that save_pretrained wrote.")],
    model: Annotated[
        str, typer.Option(help="A LLaVA-1.5, LLaVA-NeXT or LLaVA-OneVision checkpoint: a folder or a hub id.")
    ] = "llava-hf/llava-1.5-7b-hf",
) -> None:
    """Print the command that serves a checkpoint in vLLM with a method (experimental)."""
    quiet_transformers()
    from vlmslim.vllm.plan import command

    with mistakes_in_one_line():
        typer.echo(shlex.join(command(method, model)))
