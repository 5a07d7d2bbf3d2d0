"""The command `vlmslim`. Each command imports what it needs when it runs, so that help is instant.

evaluate.py    : put questions to methods: run, advise, verify
results.py     : read the results of a run: leaderboard, receipt, compare, report, submit
examine.py     : find, prove and time methods: methods, doctor, bench
pictures.py    : look at kept tokens: show, demo
other_tools.py : hand over to other programs: convert, vllm
shared.py      : how every command ends, options, and the console
"""

from collections.abc import Callable
from typing import Annotated

import typer

from vlmslim.cli.evaluate import advise, run, verify
from vlmslim.cli.examine import bench, doctor, methods
from vlmslim.cli.other_tools import convert, vllm
from vlmslim.cli.pictures import demo, show
from vlmslim.cli.results import compare, leaderboard, receipt, report, submit
from vlmslim.cli.shared import Commands

app = typer.Typer(
    name="vlmslim",
    cls=Commands,
    help="Visual-token compression for LLaVA-style models: compare methods, time them, check them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _options(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error happened.")] = False,
) -> None:
    """Take the options of all commands; `Commands` reads them."""


# In the order of the help.
_COMMANDS: tuple[Callable[..., None], ...] = (
    run,
    leaderboard,
    receipt,
    compare,
    report,
    submit,
    advise,
    verify,
    bench,
    doctor,
    show,
    demo,
    convert,
    methods,
    vllm,
)
for _command in _COMMANDS:
    app.command()(_command)
