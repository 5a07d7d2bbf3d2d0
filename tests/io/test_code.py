"""Edits of a method's code that count, and the files that belong to a method."""

import importlib.util
import sys
from pathlib import Path

import pytest

import vlmslim
from vlmslim.compressor import Compressor
from vlmslim.io.code import SourceError, code_hash, outside_files
from vlmslim.registry import method_class, method_names

NORM = '''
"""norm: keep the largest tokens."""

from dataclasses import dataclass

import helper
import torch
from vlmslim.compressor import Compressor


@dataclass
class Norm(Compressor):
    """Keep the largest tokens."""

    keep: int = 16

    def compress(self, image):
        """Rank by norm."""
        order = image.features.norm(dim=-1).argsort(descending=True)
        return image.pick(order[: self.keep])
'''
HELPER = "import far.away\nimport lab\n\n\ndef largest(x):\n    return x.max()\n"


@pytest.fixture
def norm(tmp_path, monkeypatch):
    """Writes a method with a helper beside it, and returns its class as it is now."""
    for folder in (tmp_path / "elsewhere", tmp_path):
        monkeypatch.syspath_prepend(folder)

    def norm(text=NORM, helper=HELPER, inner="", other="") -> type:
        (tmp_path / "elsewhere").mkdir(exist_ok=True)
        (tmp_path / "elsewhere" / "lab.py").write_text(f"import json, pytest, torch\n{other}")
        (tmp_path / "far").mkdir(exist_ok=True)
        (tmp_path / "far" / "away.py").write_text(f"x = 1\n{inner}")
        (tmp_path / "helper.py").write_text(helper)
        path = tmp_path / "norm.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location("norm_of_the_test", path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module.Norm

    yield norm
    for name in ("helper", "far", "far.away", "lab"):
        sys.modules.pop(name, None)


def changed(before: dict, now: dict) -> set[str]:
    return {name for name in before.keys() | now.keys() if before.get(name) != now.get(name)}


@pytest.mark.parametrize(
    "old, new",
    [
        ("keep: int = 16", "keep: int = 16  # of 144"),
        ("keep: int = 16", "keep: int   =   16"),
        ("[: self.keep])", "[\n            : self.keep\n        ])"),
        ('"""Rank by norm."""\n', '"""Rank\n        by the L2 norm."""\n'),
        ('        """Rank by norm."""\n', ""),
        ('"""norm: keep the largest tokens."""\n', '# Words.\n"""Other words."""\n'),
        ("import torch", "import torch\n\n"),
    ],
)
def test_comments_docstrings_and_formatting_do_not_count(norm, old, new):
    before = code_hash([norm()])
    assert old in NORM
    assert code_hash([norm(NORM.replace(old, new))]) == before


@pytest.mark.parametrize(
    "old, new",
    [
        ("descending=True", "descending=False"),
        ("keep: int = 16", "keep: int = 17"),
        ("keep: int = 16", "keep: int | None = None"),
        ("norm(dim=-1)", "norm(dim=-1, keepdim=None)"),
        ("return image.pick(order", "x = [...]\n        return image.pick(order"),
        ("import torch\n", "import torch\n\nDEBUG = True\n"),
        ("class Norm(Compressor):", "class Norm(Compressor, object):"),
    ],
)
def test_every_other_edit_counts(norm, old, new):
    before = code_hash([norm()])
    assert old in NORM
    assert changed(before, code_hash([norm(NORM.replace(old, new))])) == {"norm.py"}


def test_files_beside_a_method_count(norm):
    before = code_hash([norm()])
    assert before.keys() - code_hash([]).keys() == {"norm.py", "helper.py", "far/away.py", "lab.py"}
    assert changed(before, code_hash([norm(helper=HELPER.replace("max", "min"))])) == {"helper.py"}
    assert changed(before, code_hash([norm(inner="y = 2")])) == {"far/away.py"}
    assert changed(before, code_hash([norm(other="z = 3")])) == {"lab.py"}
    assert {name: file.name for name, file in outside_files([norm()]).items()} == {
        "norm.py": "norm.py",
        "helper.py": "helper.py",
        "far/away.py": "away.py",
        "lab.py": "lab.py",
    }


CORE = """
import library
from vlmslim.methods.divprune import DivPrune
from . import scores
from .deep import layers

class Ours(DivPrune):
    def late(self):
        from paper import late
"""
SITE_PACKAGES = {
    "alone.py": "import library\nfrom paper.core import Ours\n\nclass Alone(Ours):\n    pass\n",
    "library/__init__.py": "",
    "paper/__init__.py": "from paper.core import Ours",
    "paper/core.py": CORE,
    "paper/scores.py": "x = 1",
    "paper/late.py": "",
    "paper/unused.py": "",
    "paper/deep/__init__.py": "",
    "paper/deep/layers.py": "from ..scores import x",
}


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """A method in a single installed file; its base is in a package of another author, which uses a library."""
    site = tmp_path / "site-packages"
    for name, text in SITE_PACKAGES.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(text)
    monkeypatch.syspath_prepend(site)
    yield importlib.import_module("alone").Alone
    for name in [name for name in sys.modules if name.partition(".")[0] in ("alone", "paper", "library")]:
        del sys.modules[name]


def test_an_installed_method_brings_its_bases_and_their_package_but_no_library(alone):
    names = code_hash([alone]).keys() - code_hash([]).keys()
    assert names == {
        "alone.py",
        *(name for name in SITE_PACKAGES if name.startswith("paper/") and "unused" not in name),
        *(code_hash([method_class("divprune")]).keys() - code_hash([]).keys()),
    }


def test_every_hash_holds_the_engine_and_each_method_its_own_files():
    engine = code_hash([])
    package = Path(vlmslim.__file__).parent
    contract = ("compressor", "image_tokens", "layer_input", "options/common", "patching")
    files = [*(package / f"{name}.py" for name in contract), *package.glob("engine/**/*.py")]
    assert {file.relative_to(package.parent).as_posix() for file in files} < engine.keys()
    assert any(name.startswith("vlmslim/ops/") for name in engine)  # the engine imports them
    assert not [name for name in engine if name.startswith("vlmslim/methods/")]
    for name in method_names():
        own = code_hash([method_class(name)])
        assert own.items() > engine.items()
        assert own.keys() & {f"vlmslim/methods/{name}.py", f"vlmslim/methods/{name}/__init__.py"}
    assert "vlmslim/methods/_selection.py" in code_hash([method_class("divprune")])
    assert "vlmslim/methods/drop_visual.py" in code_hash([method_class("todre")])
    assert "vlmslim/methods/atp/score_maps.py" in code_hash([method_class("atp")])


def test_a_class_without_a_file_is_refused():
    made: dict = {"Compressor": Compressor, "__name__": "a_notebook"}
    exec("class Typed(Compressor):\n    pass", made)
    with pytest.raises(SourceError, match=r"Typed \(module a_notebook\) has no source file.*put the class into a file"):
        code_hash([made["Typed"]])
