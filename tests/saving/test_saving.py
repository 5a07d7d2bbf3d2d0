"""Patches on disk: written, restored in every way, and refused by models that they do not fit."""

import json
from dataclasses import fields

import pytest
import torch
from doubles import BUDGETED, First, options_of, registered
from tiny import ROWS, batch, tiny

import vlmslim

TRAINED = [name for name in vlmslim.method_names() if "weights" in options_of(name)]


@torch.no_grad()
def logits(model):
    return model(**batch(model, ROWS)).logits


def saved_flex(folder, model=None, **options):
    model = tiny("llava") if model is None else model
    with vlmslim.patch(model, "tokenflex", **dict(weights="random:3", keep=4) | options) as slim:
        slim.save_pretrained(folder)
        return logits(model)


@pytest.mark.parametrize("name", [name for name in vlmslim.method_names() if "clip" not in options_of(name)])
def test_every_method_is_written_and_restored_with_all_its_options(name, tmp_path):
    model = tiny("llava")
    unset = {"weights": "random"} if name in TRAINED else {}
    given = registered(name, 5) if name in BUDGETED else vlmslim.method(name, **unset)
    with vlmslim.patch(model, given) as slim:
        slim.save_pretrained(tmp_path)
        want, parts = logits(model), {k: v.clone() for k, v in slim.trained.state_dict().items()}
    assert (tmp_path / "model.safetensors").exists() == bool(parts) == (name in TRAINED)
    again = tiny("llava")
    with vlmslim.patch(again, str(tmp_path)) as slim:
        assert torch.equal(logits(again), want)
        assert slim.trained.state_dict().keys() == parts.keys()
        assert all(torch.equal(v, parts[k]) for k, v in slim.trained.state_dict().items())
        (restored,) = slim.methods
        for f in fields(given):
            if f.init and f.name != "weights":
                assert getattr(restored, f.name) == getattr(given, f.name), f.name


def test_several_stages(tmp_path):
    stages = [{"method": "divprune", "keep": 8}, {"method": "fastv", "keep": 4, "layer": 2}]
    model = tiny("llava")
    with vlmslim.patch(model, stages) as slim:
        slim.save_pretrained(tmp_path)
        want, description = logits(model), str(slim)
    again = tiny("llava")
    with vlmslim.patch(again, tmp_path) as slim:
        assert str(slim) == description
        assert torch.equal(logits(again), want)
    with pytest.raises(ValueError, match="several methods.*keep"):
        vlmslim.patch(again, tmp_path, keep=4)


def test_a_trained_stage_before_another(tmp_path):
    model = tiny("llava")
    stages = [{"method": "tokenflex", "weights": "random", "keep": 9}, {"method": "fastv", "keep": 4}]
    with vlmslim.patch(model, stages) as slim:
        slim.save_pretrained(tmp_path)
        want = logits(model)
    again = tiny("llava")
    with vlmslim.patch(again, tmp_path):
        assert torch.equal(logits(again), want)


def test_what_is_on_disk(tmp_path):
    model = tiny("llava")
    saved_flex(tmp_path / "deep" / "er", model)
    config = json.loads((tmp_path / "deep" / "er" / "vlmslim.json").read_text())
    assert config["methods"][0]["method"] == "tokenflex" and config["methods"][0]["keep"] == 4
    assert "weights" not in config["methods"][0], "a path of the machine it was trained on"
    assert config["versions"]["vlmslim"] == vlmslim.__version__
    assert config["base"]["shape"]["hidden_size"] == 32
    from safetensors.torch import load_file

    state = load_file(tmp_path / "deep" / "er" / "model.safetensors")
    assert {k.split(".")[0] for k in state} == {"tokenflex"}
    assert sorted(p.name for p in (tmp_path / "deep" / "er").iterdir()) == ["model.safetensors", "vlmslim.json"]


def test_saving_again_replaces_every_file(tmp_path):
    saved_flex(tmp_path)
    want = saved_flex(tmp_path, weights="random:4")
    model = tiny("llava")
    with vlmslim.patch(model, tmp_path):
        assert torch.equal(logits(model), want)
    with vlmslim.patch(tiny("llava"), "divprune", keep=4) as slim:
        slim.save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["vlmslim.json"]


def test_options_replace_saved_ones(tmp_path):
    saved_flex(tmp_path)
    model = tiny("llava")
    with vlmslim.patch(model, tmp_path, keep=9) as slim:
        logits(model)
        assert slim.receipt.summary()["kept"] == 9
    with vlmslim.patch(model, "tokenflex", weights=str(tmp_path), keep=1) as slim:
        logits(model)
        assert slim.receipt.summary()["kept"] == 1


def test_another_backbone_is_refused_and_the_model_stays_as_it_was(tmp_path):
    saved_flex(tmp_path)
    for family in ("siglip", "next"):
        other = tiny(family)
        with pytest.raises(ValueError, match="another backbone.*tower_feature_layer|another backbone.*model_type"):
            vlmslim.patch(other, tmp_path)
        assert not hasattr(other, "_vlmslim")
        vlmslim.patch(other, "none").remove()


def test_weights_of_other_options_are_refused(tmp_path):
    saved_flex(tmp_path)
    with pytest.raises(ValueError, match="other options.*gate.weight"):
        vlmslim.patch(tiny("llava"), tmp_path, expansion=2)


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    saved_flex(tmp_path / "a")
    saved_flex(tmp_path / "b", weights="random:5")
    (tmp_path / "b" / "model.safetensors").replace(tmp_path / "a" / "model.safetensors")
    for folder in ("a", "b"):
        with pytest.raises(ValueError, match="model.safetensors is missing or not the file"):
            vlmslim.patch(tiny("llava"), tmp_path / folder)


@pytest.mark.parametrize("spoil", ["cut", "newer", "empty"])
def test_a_configuration_that_cannot_be_read(spoil, tmp_path):
    saved_flex(tmp_path)
    path = tmp_path / "vlmslim.json"
    text = path.read_text()
    path.write_text({"cut": text[:60], "newer": text.replace('"format": 1', '"format": 2'), "empty": "{}"}[spoil])
    with pytest.raises(ValueError, match="written by vlmslim" if spoil == "newer" else "no configuration of vlmslim"):
        vlmslim.patch(tiny("llava"), tmp_path)


def test_weights_of_another_method_are_refused(tmp_path):
    with vlmslim.patch(tiny("llava"), "divprune", keep=4) as slim:
        slim.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no weights of 'tokenflex', only of nothing"):
        vlmslim.patch(tiny("llava"), "tokenflex", weights=str(tmp_path), keep=4)


def test_an_object_without_a_name_cannot_be_saved(tmp_path):
    class Local(First):
        pass

    with vlmslim.patch(tiny("llava"), Local()) as slim, pytest.raises(ValueError, match="Local has no name to load it"):
        slim.save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_folder_without_a_patch_is_an_unknown_method(tmp_path):
    with pytest.raises(ValueError, match="unknown method"):
        vlmslim.patch(tiny("llava"), str(tmp_path))


def test_saving_the_model_alone_says_how_to_save_the_patch(tmp_path):
    with (
        vlmslim.patch(tiny("llava"), "divprune", keep=4) as slim,
        pytest.warns(UserWarning, match="without its patch.*slim.save_pretrained"),
    ):
        slim.model.save_pretrained(tmp_path)


# --- in lmms-eval -----------------------------------------------------------------------------------------------------


@pytest.fixture
def model_in_lmms_eval(tmp_path):
    pytest.importorskip("lmms_eval")
    from lmms_fixtures import checkpoint

    from vlmslim.evaluation.lmms_model import VlmSlim

    base = checkpoint("llava", tmp_path)
    with vlmslim.from_pretrained(base, "tokenflex", weights="random", keep=4) as slim:
        slim.save_pretrained(tmp_path / "flex")
    return VlmSlim, base, str(tmp_path / "flex")


def test_lmms_eval_takes_a_saved_patch(model_in_lmms_eval):
    make, base, folder = model_in_lmms_eval
    described = {
        "saved": make(folder, device="cpu").receipt["method"],
        "other count": make(folder, keep=9, device="cpu").receipt["method"],
        "other method": make(folder, method="divprune", keep=4, device="cpu").receipt["method"],
        "same method": make(folder, method="tokenflex", keep=9, device="cpu").receipt["method"],
        "none": make(folder, method="none", device="cpu").receipt["method"],
        "plain": make(base, device="cpu").receipt["method"],
    }
    assert "keep=4" in described["saved"] and "TokenFlex" in described["saved"]
    assert "keep=9" in described["other count"] and "TokenFlex" in described["other count"]
    assert "DivPrune" in described["other method"]
    assert "keep=9" in described["same method"]
    assert described["none"] == described["plain"]
    with pytest.raises(ValueError, match="unknown option of tokenflex 'kep'"):
        make(folder, kep=9, device="cpu")
    with pytest.raises(ValueError, match="is larger|use 4 or 9"):
        make(folder, keep=5, device="cpu")


def test_vlmslim_run_describes_the_checkpoint_under_a_saved_patch(model_in_lmms_eval):
    from vlmslim.evaluation.preflight import describe_checkpoint
    from vlmslim.evaluation.schema import ModelConfig

    _, base, folder = model_in_lmms_eval
    patched, plain = (describe_checkpoint(ModelConfig(pretrained=path)) for path in (folder, base))
    assert patched == plain and plain["identity"]


# --- methods from outside ---------------------------------------------------------------------------------------------


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
