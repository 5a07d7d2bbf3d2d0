"""Patches on disk: written, restored in every way, and refused by models that they do not fit."""

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from doubles import BUDGETED, First, options_of, registered
from prompts import ROWS, batch
from tiny import tiny

import vlmslim
from vlmslim import bundled

TRAINED = [name for name in vlmslim.method_names() if "weights" in options_of(name)]


@torch.no_grad()
def logits(model):
    return model(**batch(model, ROWS)).logits


def weights_in(folder):
    return [*folder.glob("*.safetensors")]


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Processor:
    def save_pretrained(self, folder):
        (Path(folder) / "processor.txt").write_text("it")


def saved_flex(folder, model=None, **options):
    model = tiny("llava") if model is None else model
    with vlmslim.patch(model, "tokenflex", **dict(weights="random:3", keep=4) | options) as slim:
        slim.save_pretrained(folder)
        return logits(model)


FILES = {"clip", "tokenizer"}  # options whose defaults belong to a checkpoint with a place


@pytest.mark.parametrize("name", [name for name in vlmslim.method_names() if not FILES & {*options_of(name)}])
def test_every_method_is_written_and_restored_with_all_its_options(name, tmp_path):
    model = tiny("llava")
    unset = {"weights": "random"} if name in TRAINED else {}
    given = registered(name, 5) if name in BUDGETED else vlmslim.method(name, **unset)
    with vlmslim.patch(model, given) as slim:
        slim.save_pretrained(tmp_path)
        want, parts = logits(model), {k: v.clone() for k, v in slim.trained.state_dict().items()}
    assert bool(weights_in(tmp_path)) == bool(parts) == (name in TRAINED)
    again = tiny("llava")
    with vlmslim.patch(again, str(tmp_path)) as slim:
        assert torch.equal(logits(again), want)
        assert slim.trained.state_dict().keys() == parts.keys()
        assert all(torch.equal(v, parts[k]) for k, v in slim.trained.state_dict().items())
        (restored,) = slim.methods
        for f in fields(given):
            if f.init and f.name != "weights":
                assert getattr(restored, f.name) == getattr(given, f.name), f.name


@pytest.mark.parametrize("first", [{"method": "divprune"}, {"method": "tokenflex", "weights": "random"}], ids=str)
def test_several_stages(first, tmp_path):
    model = tiny("llava")
    with vlmslim.patch(model, [first | {"keep": 9}, {"method": "fastv", "keep": 4, "layer": 2}]) as slim:
        slim.save_pretrained(tmp_path)
        want, description = logits(model), str(slim)
    again = tiny("llava")
    with vlmslim.patch(again, tmp_path) as slim:
        assert str(slim) == description or "weights" in first
        assert torch.equal(logits(again), want)
    with pytest.raises(ValueError, match="several methods.*keep"):
        vlmslim.patch(again, tmp_path, keep=4)


def test_what_is_on_disk(tmp_path):
    model = tiny("llava")
    saved_flex(tmp_path / "deep" / "er", model)
    config = json.loads((tmp_path / "deep" / "er" / "vlmslim.json").read_text())
    assert config["methods"][0]["method"] == "tokenflex" and config["methods"][0]["keep"] == 4
    assert "weights" not in config["methods"][0], "a path of the machine it was trained on"
    assert config["versions"]["vlmslim"] == vlmslim.__version__
    assert config["base"]["shape"]["hidden_size"] == 32
    from safetensors.torch import load_file

    (file,) = weights_in(tmp_path / "deep" / "er")
    assert {k.split(".")[0] for k in load_file(file)} == {"tokenflex"}
    assert hashlib.sha256(file.read_bytes()).hexdigest() == config["sha256"]
    assert file.name == f"vlmslim-{config['sha256'][:16]}.safetensors"
    assert {path.name for path in file.parent.iterdir()} == {file.name, "vlmslim.json"}


def test_saving_again_replaces_every_file(tmp_path):
    saved_flex(tmp_path)
    want = saved_flex(tmp_path, weights="random:4")
    model = tiny("llava")
    with vlmslim.patch(model, tmp_path):
        assert torch.equal(logits(model), want)
    with vlmslim.patch(tiny("llava"), "divprune", keep=4) as slim:
        slim.save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["vlmslim.json"]


# --- other files in the folder ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("method", ["divprune", "tokenflex"])
def test_saving_into_the_checkpoint_itself_leaves_every_file_of_it(method, with_base, tmp_path):
    folder = tmp_path / "my-llava"
    shutil.copytree(bundled.resolve("bundled/tiny-llava"), folder)
    (folder / "base").mkdir()
    (folder / "base" / "notes.txt").write_text("mine")
    before = contents(folder)
    slim = vlmslim.from_pretrained(folder, method, keep=16, **({"weights": "random"} if method in TRAINED else {}))
    for _ in range(2):
        slim.save_pretrained(folder, with_base=with_base)
        after = contents(folder)
        assert {path: after.get(path) for path in before} == before
    assert len(weights_in(folder)) == 1 + (method in TRAINED)
    folder.rename(tmp_path / "moved")
    again = vlmslim.from_pretrained(tmp_path / "moved")
    assert str(again).split("(")[0] == str(slim).split("(")[0]


def test_a_file_that_no_patch_wrote_is_refused(tmp_path):
    saved_flex(tmp_path / "there")
    (weights,) = weights_in(tmp_path / "there")
    (tmp_path / "mine").mkdir()
    for name in ("vlmslim.json", weights.name):
        mine = tmp_path / "mine" / name
        mine.write_text("mine")
        with pytest.raises(ValueError, match=f"{name} is (no configuration|there, and vlmslim.json does not name it)"):
            saved_flex(tmp_path / "mine")
        assert contents(tmp_path / "mine") == {Path(name): b"mine"}
        mine.unlink()


def test_files_that_the_user_put_into_the_copy_of_the_base_stay(tmp_path):
    for _ in range(2):
        with vlmslim.patch(tiny("llava"), "divprune", keep=4) as slim:
            slim.save_pretrained(tmp_path, with_base=True, processor=Processor())
        (tmp_path / "base" / "notes.txt").write_text("mine")
    assert [path.name for path in (tmp_path / "base").iterdir()] == ["notes.txt"]
    with vlmslim.patch(tiny("llava"), "divprune", keep=4) as slim:
        slim.save_pretrained(tmp_path)
    assert {str(path) for path in contents(tmp_path)} == {"vlmslim.json", "base/notes.txt"}
    assert {path.name for path in tmp_path.iterdir()} == {"vlmslim.json", "base"}


@pytest.mark.parametrize("place", ["a file", "locked"])
def test_a_folder_that_cannot_be_written_to(place, tmp_path, monkeypatch):
    if place == "a file":
        (tmp_path / "x").write_text("mine")
    else:
        monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(ValueError, match=f"{tmp_path / 'x'} cannot be written to"):
        saved_flex(tmp_path / "x")


class Died(BaseException):
    """Stands for a kill at a step of a save."""


def dying(do, steps, last):
    def done(*arguments, **keywords):
        if next(steps) == last:
            raise Died
        do(*arguments, **keywords)
        if next(steps) == last:
            raise Died

    return done


@pytest.mark.parametrize("step", range(16))
def test_death_at_any_step_leaves_the_old_patch_or_the_new_one(step, tmp_path, monkeypatch, loads_processors):
    """Every rename and deletion is a step, before which or after which the process dies."""
    folder = tmp_path / "x"

    def save(seed):
        model = tiny("llava")
        with vlmslim.patch(model, "tokenflex", weights=f"random:{seed}", keep=4) as slim:
            answers.append(logits(model))
            slim.save_pretrained(folder, with_base=True, processor=Processor())

    answers = []
    save(3)
    with monkeypatch.context() as patched, contextlib.suppress(Died):
        steps = itertools.count()
        for name in ("replace", "rename", "unlink"):
            patched.setattr(os, name, dying(getattr(os, name), steps, step))
        save(4)
    slim = vlmslim.from_pretrained(folder, dtype=torch.float32)
    got = logits(slim.model)
    assert any(torch.allclose(got, want) for want in answers)
    slim.remove()
    slim = vlmslim.from_pretrained(folder, dtype=torch.float32)
    slim.save_pretrained(folder, with_base=True, processor=Processor())  # and saving goes on
    assert torch.allclose(logits(vlmslim.from_pretrained(folder, dtype=torch.float32).model), got)


@pytest.fixture
def loads_processors(monkeypatch):
    monkeypatch.setattr("transformers.AutoProcessor.from_pretrained", lambda *_, **__: "it")


# --- what does not fit ------------------------------------------------------------------------------------------------


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
    (a,), (b,) = weights_in(tmp_path / "a"), weights_in(tmp_path / "b")
    b.replace(a)
    for folder in ("a", "b"):
        with pytest.raises(ValueError, match="safetensors is missing or not the file"):
            vlmslim.patch(tiny("llava"), tmp_path / folder)


def damages():
    """Return texts of a damaged configuration, and what the refusal says."""

    def changed(**entries):
        return lambda text: json.dumps(json.loads(text) | entries)

    def without(key):
        return lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != key})

    base = {"name": "", "commit": None, "shape": {}, "included": True}
    yield from {
        "cut": (lambda text: text[:60], "no configuration of vlmslim"),
        "empty": (lambda text: "{}", "no configuration of vlmslim: format: Field required"),
        "a list": (lambda text: "[]", "no configuration of vlmslim"),
        "not UTF-8": (lambda text: b"\xff\xfe", "no configuration of vlmslim: 'utf-8' codec"),
        "deep": (lambda text: "[" * 100_000, "no configuration of vlmslim: it is nested too deeply"),
        "5,000 digits": (lambda text: text.replace('"format": 1', f'"format": {"9" * 5000}'), "no configuration"),
        "large": (lambda text: text + " " * 2**21, "it has 2"),
        "NaN": (lambda text: text.replace('"format": 1', '"format": NaN'), "NaN is no number"),
        "newer": (changed(format=2), "written by vlmslim"),
        "newer, by whom": (changed(format=2, versions=None), "written by vlmslim of a later version"),
        "format is text": (changed(format="1"), "format: "),
        "no methods": (changed(methods=[]), "methods: List should have at least 1 item"),
        "a method is a word": (changed(methods=["tokenflex"]), "methods.0: "),
        "a method without a name": (changed(methods=[{"keep": 4}]), "methods.0.method: Field required"),
        "base is a word": (changed(base="here"), "base: "),
        "trained is a word": (changed(trained="tokenflex"), "trained: "),
        "no hash": (without("sha256"), "trained parts are named, but not the hash"),
        "hash is a path": (changed(sha256="../../../etc/passwd"), "sha256: "),
        "copy elsewhere": (changed(base=base | {"folder": "../other"}), "base.folder: "),
        "files elsewhere": (changed(base=base | {"files": ["a/../../b"]}), "files lie outside of the copy"),
        "files anywhere": (changed(base=base | {"files": ["/etc/passwd"]}), "base.files.0: "),
        "signature is NaN": (changed(base=base | {"signature": {"x": ["y"]}}), "base.signature.x.0: "),
        **{f"no {key}": (without(key), f"{key}: Field required") for key in ("methods", "trained", "base", "versions")},
    }.items()


@pytest.mark.parametrize(("spoil", "says"), [pytest.param(*value, id=name) for name, value in damages()])
def test_every_damage_to_the_configuration_is_a_sentence(spoil, says, tmp_path):
    saved_flex(tmp_path)
    path = tmp_path / "vlmslim.json"
    damaged = spoil(path.read_text())
    path.write_bytes(damaged if isinstance(damaged, bytes) else damaged.encode())
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))} .*{says}"):
        vlmslim.patch(tiny("llava"), tmp_path)


def test_a_damaged_signature_is_a_sentence(tmp_path):
    saved_flex(tmp_path)
    path = tmp_path / "vlmslim.json"
    config = json.loads(path.read_text())
    config["base"]["signature"]["projector.bias"].pop()
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="the signature of its backbone is damaged"):
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
