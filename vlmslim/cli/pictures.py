"""Commands that show which visual tokens a method keeps: show, demo."""

from pathlib import Path
from typing import Annotated

import typer

from vlmslim.cli.shared import METHOD_HELP, Attention, Device, fail, mistakes_in_one_line, quiet_transformers


def show(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="A path, a hub id, bundled/NAME, or a saved patch.")
    ],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Pictures or videos, in this order.")],
    question: Annotated[str, typer.Option("--question", "-q", help="The text after the pictures.")],
    method: Annotated[
        list[str] | None, typer.Option("--method", "-m", help=f"{METHOD_HELP} Stages with +. Default: the saved one.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="A .png or a .html file.")] = Path("kept.png"),
    new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 32,
    size: Annotated[int, typer.Option(min=32, max=2048, help="Pixels of the longer side of a picture.")] = 320,
    dtype: Annotated[str, typer.Option(help="Default: that of the checkpoint.")] = "auto",
    device: Device = None,
    attention: Attention = "sdpa",
) -> None:
    """Draw which visual tokens each method keeps of pictures, and what the model then answers."""
    quiet_transformers()
    from rich.console import Console

    from vlmslim.doctor import parse
    from vlmslim.io.files import check_file
    from vlmslim.loading import default_device, load
    from vlmslim.pictures.ask import ask, readable
    from vlmslim.pictures.show import check_format, write
    from vlmslim.saving.folder import read

    with Console(stderr=True).status("loading") as status, mistakes_in_one_line():
        check_format(output)
        check_file(output)
        names = method or ([checkpoint] if read(checkpoint) is not None else [])
        if not names:
            fail("no method given; name one or several, such as -m divprune:keep=64")
        methods = [(name, parse(name)) for name in names]
        media = [readable(path) for path in images]
        model, processor = load(checkpoint, dtype=dtype, device=device or default_device(), attention=attention)
        status.update("asking")
        answers = ask(model, processor, question, media, methods, new_tokens=new_tokens)
        status.update("drawing")
        write(output, question, answers, processor, size)
    for answer in answers:
        typer.echo(f"{answer.method}: {answer.text}")
    typer.echo(output)


def demo(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="A path, a hub id, or bundled/NAME.")
    ] = "bundled/tiny-llava",
    host: Annotated[str, typer.Option(help="Address to listen on. The default is this machine alone.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Default: the first free one from 7860 on.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Default: that of the checkpoint.")] = "auto",
    device: Device = None,
    attention: Attention = "sdpa",
) -> None:
    """Ask about pictures in a browser: answers, kept tokens and costs of two methods beside the unpatched model."""
    quiet_transformers()
    from rich.console import Console

    with Console(stderr=True).status("loading"), mistakes_in_one_line():
        from vlmslim.demo.page import serve
        from vlmslim.loading import default_device, load

        model, processor = load(checkpoint, dtype=dtype, device=device or default_device(), attention=attention)
    with mistakes_in_one_line():
        serve(model, processor, checkpoint, host=host, port=port)
