"""Saved patches of methods from outside the package: their files move, go and are never fetched."""

import json

import pytest
import torch
from doubles import First
from prompts import ROWS, batch
from tiny import tiny

import vlmslim


@torch.no_grad()
def logits(model):
    return model(**batch(model, ROWS)).logits


@pytest.fixture
def own(tmp_path):
    """A file with a method that has a trained part, and its name."""
    file = tmp_path / "mine" / "halve.py"
    file.parent.mkdir()
    file.write_text(
        "from dataclasses import dataclass\n"
        "from torch import nn\n"
        "from vlmslim import Compressed, Compressor\n"
        "from vlmslim.saving.trained import load_part\n"
        "@dataclass\n"
        "class Halve(Compressor):\n"
        "    weights: str = ''\n"
        "    step: int = 2\n"
        "    def setup(self, model):\n"
        "        self.part = nn.Linear(32, 32)\n"
        "        load_part(self, self.part, model)\n"
        "    def trained(self):\n"
        "        return self.part\n"
        "    def compress(self, image):\n"
        "        return Compressed(self.part(image.features[:: self.step]))\n"
    )
    return file, f"{file}:Halve"


def test_a_method_in_a_file_is_saved_with_its_weights(own, tmp_path):
    file, name = own
    model = tiny("llava")
    with vlmslim.patch(model, name, weights="random:1", step=3) as slim:
        slim.save_pretrained(tmp_path / "saved")
        want = logits(model)
    assert json.loads((tmp_path / "saved" / "vlmslim.json").read_text())["methods"] == [{"method": name, "step": 3}]
    for given, options in ((tmp_path / "saved", {}), (name, {"weights": str(tmp_path / "saved"), "step": 3})):
        with vlmslim.patch(model, given, **options):
            assert torch.equal(logits(model), want)
    file.rename(tmp_path / "elsewhere.py")
    with pytest.raises(ValueError, match=r"the file .*halve.py of its method is gone; put it back, or corr"):
        vlmslim.patch(model, tmp_path / "saved")


def test_two_trained_parts_of_one_name_are_refused(own, tmp_path):
    file, name = own
    other = tmp_path / "other" / "halve.py"
    other.parent.mkdir()
    other.write_text(file.read_text().replace("compress(self", "_unused(self"))
    stages = [{"method": each, "weights": "random:1"} for each in (name, f"{other}")]
    with pytest.raises(ValueError, match="two stages with a trained part have the name halve; rename the class of one"):
        vlmslim.patch(tiny("llava"), stages)


def test_a_file_in_the_folder_moves_with_it(own, tmp_path):
    file, _ = own
    (tmp_path / "saved").mkdir()
    inside = file.rename(tmp_path / "saved" / "halve.py")
    model = tiny("llava")
    with vlmslim.patch(model, f"{inside}", weights="random:1") as slim:
        slim.save_pretrained(tmp_path / "saved")
        want = logits(model)
    (tmp_path / "saved").rename(tmp_path / "moved")
    with vlmslim.patch(model, tmp_path / "moved") as slim:
        assert torch.equal(logits(model), want)


def test_a_repository_on_the_hub_names_no_code_to_run(own, tmp_path, monkeypatch):
    _, name = own
    with vlmslim.patch(tiny("llava"), name, weights="random:1") as slim:
        slim.save_pretrained(tmp_path / "saved")
    monkeypatch.setattr("transformers.utils.cached_file", lambda _, file, **__: str(tmp_path / "saved" / file))
    with pytest.raises(ValueError, match="code that a repository on the hub names is not run"):
        vlmslim.patch(tiny("llava"), "another/patch")


def test_a_saved_method_that_is_gone(tmp_path):
    with vlmslim.patch(tiny("llava"), First()) as slim:
        slim.save_pretrained(tmp_path)
    vlmslim.patch(tiny("llava"), tmp_path).remove()
    path = tmp_path / "vlmslim.json"
    path.write_text(path.read_text().replace("doubles:First", "doublets:First"))
    with pytest.raises(ValueError, match="there is no module doublets; is its package installed?"):
        vlmslim.patch(tiny("llava"), tmp_path)
