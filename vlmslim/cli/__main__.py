"""Runs the command as `python -m vlmslim.cli`."""

from vlmslim.cli import app

app()
