"""Runs the command as `python -m vlmslim`."""

from vlmslim.cli import app

app()
