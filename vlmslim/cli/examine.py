"""Commands that find, prove and time methods: methods, doctor, bench."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from vlmslim.cli.shared import METHOD_HELP, Attention, Device, console, fail, mistakes_in_one_line, quiet_transformers


def methods(
    name: Annotated[
        str | None, typer.Argument(help="One method, such as fastv or path/to/file.py:Class: all about it.")
    ] = None,
) -> None:
    """List the compression methods, or print the description and the options of one."""
    from dataclasses import MISSING, is_dataclass
    from inspect import getdoc

    from rich.table import Table
    from rich.text import Text

    from vlmslim.compressor import Compressor
    from vlmslim.registry import listings, method_class, options_of

    if name is not None:
        with mistakes_in_one_line():
            cls = method_class(name)
        typer.echo(f"{getdoc(sys.modules[cls.__module__]) or cls.__name__}\n\n{getdoc(cls)}\n")
        for base in cls.__mro__[1:]:  # options that methods share
            if base is not Compressor and is_dataclass(base):
                typer.echo(f"{base.__name__}: {(getdoc(base) or '').partition('Attributes:')[0].strip()}\n")
        typer.echo("options:")
        for option, default in options_of(cls).items():
            typer.echo(f"  {option}" + ("  (must be given)" if default is MISSING else f" = {default!r}"))
        return
    table = Table("method", "kind", "paper", "what it does", "source", box=None, pad_edge=False)
    for listing in listings():
        paper = f"arXiv {listing.paper}" if listing.paper else "–"
        what, style = (listing.problem, "red") if listing.problem else (listing.summary, "")
        row = (listing.name, listing.kind, paper, what, listing.source)
        table.add_row(*(Text(cell, style) for cell in row))
    console().print(table)


def doctor(
    checkpoint: Annotated[str, typer.Argument(metavar="PRETRAINED", help="A path, a hub id, or bundled/NAME.")],
    method: Annotated[
        list[str] | None,
        typer.Option("--method", "-m", help=f"{METHOD_HELP} Stages with +. Default: the saved one, or all."),
    ] = None,
    keep: Annotated[
        float | None,
        typer.Option(help="Visual tokens per image of methods given without keep. Default: 0.25, or their own."),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="float32 proves most; bfloat16 or float16 have wide tolerances.")
    ] = "float32",
    device: Device = None,
    attention: Attention = "sdpa",
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Every finding, not only failures.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Prove on a checkpoint that methods do what they say and nothing else. Exit status 1: a check failed."""
    quiet_transformers()
    from rich.console import Console

    from vlmslim.doctor import examine, parse
    from vlmslim.loading import default_device, load
    from vlmslim.saving.folder import read

    budget = int(keep) if keep is not None and keep > 1 and keep.is_integer() else keep
    with Console(stderr=True).status("loading") as status, mistakes_in_one_line():
        saved = [checkpoint] if method is None and read(checkpoint) is not None else None
        methods = saved if method is None else [parse(text, budget) for text in method]
        model, processor = load(checkpoint, dtype=dtype, device=device or default_device(), attention=attention)
        report = examine(
            model,
            processor,
            methods,
            keep=budget,
            on_finding=lambda finding: status.update(f"{finding.method}: {finding.check}"),
        )
    if as_json:
        typer.echo(report.to_json())
    else:
        console().print(report.render(verbose))
    raise typer.Exit(0 if report.passed else 1)


def bench(
    checkpoint: Annotated[str | None, typer.Argument(help="A path, a hub id, or bundled/NAME.")] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            help="llava-1.5-7b, llava-1.5-13b, llava-next-7b, llava-onevision-7b, qwen2.5-vl-7b, qwen3-vl-8b, "
            "internvl3-8b or smolvlm-256m: random weights."
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option("--method", "-m", help=f"{METHOD_HELP} Default: random, divprune and fastv."),
    ] = None,
    compare_with: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH:CLASS", help="A peer's method, at the same budgets; repeat it for several."),
    ] = None,
    budgets: Annotated[
        str | None, typer.Option(help="Visual tokens to keep per image, counts or shares. Default: 1/3, 2/9, 1/9.")
    ] = None,
    batch: Annotated[str, typer.Option(help="Batch sizes, comma-separated.")] = "1",
    images: Annotated[int, typer.Option(min=1, help="Images in a prompt.")] = 1,
    image_size: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH; decides tiles, or tokens of any size.")] = None,
    text_tokens: Annotated[int, typer.Option(min=2, help="Words in a prompt.")] = 46,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens generated.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; each one times every method once.")] = 10,
    cpu_time: Annotated[bool, typer.Option("--cpu-time", help="Processor time, for a CPU shared with others.")] = False,
    layers: Annotated[int | None, typer.Option(min=1, help="Decoder layers of --shape, instead of all.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Default: bfloat16 on a GPU, float32 on a CPU.")] = None,
    device: Device = None,
    attention: Attention = "sdpa",
    output: Annotated[
        Path | None,
        typer.Option(help="JSON file, or a folder for a file named after model, card and date; the table goes beside."),
    ] = None,
) -> None:
    """Measure FLOPs, time and memory of methods against the unpatched model and against the ideal.

    The last line of the output is one JSON object with the medians of all rows.
    """
    quiet_transformers()
    from rich.console import Console

    from vlmslim.cost.bench import arguments
    from vlmslim.cost.bench.report import file_in, summary, write
    from vlmslim.cost.bench.run import Workload
    from vlmslim.cost.bench.run import bench as measure
    from vlmslim.io.files import check_file, check_writable
    from vlmslim.registry import parse_method

    if output is not None and output.suffix != ".json" and not output.is_dir():
        fail(f"--output {output}: give a file that ends in .json, or a folder that exists")
    with Console(stderr=True).status("loading") as status, mistakes_in_one_line():
        if output is not None and output.is_dir():
            check_writable(output)
        elif output is not None:
            check_file(output)  # now, not when everything is measured
            check_file(output.with_suffix(".md"))
        stages = [parse_method(text) for text in method or ("random", "divprune", "fastv")]
        peers = [arguments.parse_peer(text) for text in compare_with or ()]
        workload = Workload(
            batches=arguments.parse_batches(batch),
            images=images,
            image_size=arguments.parse_size(image_size),
            text_tokens=text_tokens,
            new_tokens=new_tokens,
            repeats=repeats,
            cpu_time=cpu_time,
        )
        keeps = None if budgets is None else arguments.parse_numbers(budgets)
        name, model = arguments.model_of(
            checkpoint, shape, layers=layers, dtype=dtype, device=device, attention=attention
        )
        record = measure(model, stages, keeps, workload, peers=peers, name=name, progress=status.update)
        if output is not None and output.is_dir():
            output = file_in(output, checkpoint or str(shape), str(model.device))
        text = write(record, output)
    typer.echo(f"{text}\n{summary(record)}")
