"""Methods of other authors: a file of its own, a file beside the built-in methods, an installed package."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import vlmslim.methods

NORM = '''
"""Norm, arXiv:2401.01234."""
from dataclasses import dataclass
from vlmslim import Compressor

@dataclass
class Norm(Compressor):
    """Keep the tokens with the largest norm. More follows.

    keep : how many
    """

    keep: int = 16

    def compress(self, image):
        return image.pick(image.features.norm(dim=-1).argsort()[-self.keep :].sort().values)
'''
HELPER = """
@dataclass
class Helper(Norm):
    pass
"""


def write(path: Path, text: str = NORM) -> Path:
    """Write a file into a folder that need not be there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture
def built_in(tmp_path, monkeypatch) -> Iterator[Callable[..., Path]]:
    """Adds a file to the built-in methods: its name, and its text."""
    folder = tmp_path / "methods"
    monkeypatch.setattr(vlmslim.methods, "__path__", [*vlmslim.methods.__path__, str(folder)])
    before = set(sys.modules)
    yield lambda name, text=NORM: write(folder / name, text)
    for name in set(sys.modules) - before:
        if name.startswith("vlmslim.methods."):
            del sys.modules[name]


@pytest.fixture
def install(tmp_path, monkeypatch) -> Iterator[Callable[..., None]]:
    """Installs a package: entry points, the text of its module, and its name."""
    before = set(sys.modules)

    def put(points: str, text: str = NORM, package: str = "outside") -> None:
        site = tmp_path / f"site-{package}"
        write(site / f"{package}.py", text)
        info = site / f"vlmslim_{package}-1.0.dist-info"
        write(info / "METADATA", f"Metadata-Version: 2.1\nName: vlmslim-{package}\nVersion: 1.0\n")
        write(info / "entry_points.txt", f"[vlmslim.methods]\n{points}\n")
        monkeypatch.syspath_prepend(str(site))

    yield put
    for name in set(sys.modules) - before:
        if f"site-{name.partition('.')[0]}" in os.listdir(tmp_path):
            del sys.modules[name]
