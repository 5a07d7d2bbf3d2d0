"""Checkpoints by name: loaded with and without a patch, by every command in the same way; and refused."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from compare import close
from prompts import ROWS, batch
from tiny import tiny
from transformers import AutoModelForImageTextToText, CLIPVisionConfig

import vlmslim
from vlmslim import bundled
from vlmslim.loading import load, load_model, located
from vlmslim.saving import folder as saving


@torch.no_grad()
def logits(model):
    return model(**batch(model, ROWS)).logits


def saved_flex(folder, model):
    with vlmslim.patch(model, "tokenflex", weights="random", keep=4) as slim:
        slim.save_pretrained(folder)
        return logits(model)


class Processor:
    """Stands in for one: what matters here is that it is saved along."""

    def save_pretrained(self, folder):
        (folder / "processor.txt").write_text("saved")


@pytest.fixture
def loads_processors(monkeypatch):
    seen = []
    monkeypatch.setattr("transformers.AutoProcessor.from_pretrained", lambda path, **_: seen.append(str(path)) or "it")
    return seen


def test_a_whole_checkpoint_in_one_call(tmp_path, loads_processors):
    model = tiny("llava")
    with vlmslim.patch(model, "tokenflex", weights="random", keep=4) as slim:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # the base is meant to be saved without the patch
            slim.save_pretrained(tmp_path, with_base=True, processor=Processor())
        want = logits(model)
    assert (tmp_path / "base" / "processor.txt").exists()
    assert not any("tmp" in p.name for p in tmp_path.rglob("*"))
    slim = vlmslim.from_pretrained(tmp_path, dtype=torch.float32)
    close(logits(slim.model), want)
    assert slim.processor == "it" and loads_processors == [str(tmp_path / "base")]
    assert not slim.model.training
    slim.remove()
    close(logits(slim.model), logits(tiny("llava")))
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    close(logits(plain), logits(tiny("llava")))
    with pytest.raises((OSError, ValueError)):  # never the unpatched model by accident
        AutoModelForImageTextToText.from_pretrained(tmp_path)


def test_a_patch_beside_its_base(tmp_path, loads_processors):
    tiny("llava").save_pretrained(tmp_path / "base")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    want = saved_flex(tmp_path / "flex", model)
    slim = vlmslim.from_pretrained(tmp_path / "flex")
    close(logits(slim.model), want)
    other = vlmslim.from_pretrained(tmp_path / "flex", "divprune", keep=4)
    assert str(other).startswith("DivPrune")
    third = vlmslim.from_pretrained(tmp_path / "flex", "tokenflex", keep=9)
    logits(third.model)
    assert third.receipt.summary()["kept"] == 9
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="base=.*"):
        vlmslim.from_pretrained(tmp_path / "flex")
    close(logits(vlmslim.from_pretrained(tmp_path / "flex", base=str(tmp_path / "moved")).model), want)


def test_a_base_without_a_name(tmp_path):
    saved_flex(tmp_path, tiny("llava"))
    with pytest.raises(ValueError, match="had no name.*base="):
        vlmslim.from_pretrained(tmp_path)


def test_a_plain_checkpoint(tmp_path, loads_processors):
    tiny("llava").save_pretrained(tmp_path)
    assert vlmslim.from_pretrained(tmp_path).methods == [vlmslim.method("none")]
    slim = vlmslim.from_pretrained(tmp_path, "divprune", keep=4)
    logits(slim.model)
    assert slim.receipt.summary()["kept"] == 4
    with pytest.raises(ValueError, match="base=.*saved patch"):
        vlmslim.from_pretrained(tmp_path, base="elsewhere")
    with pytest.raises(ValueError, match="unknown option"):
        vlmslim.from_pretrained(tmp_path, "divprune", kep=4)


def test_a_bundled_base_is_known_by_its_bundled_name(tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(saving.bundled.resolve("bundled/tiny-llava"))
    with vlmslim.patch(model, "none") as slim:
        slim.save_pretrained(tmp_path)
    assert saving.read(tmp_path).base["name"] == "bundled/tiny-llava"
    slim = vlmslim.from_pretrained(tmp_path)
    assert slim.processor.image_token == "<image>"


# --- what is refused --------------------------------------------------------------------------------------------------


LLAVA = "bundled/tiny-llava"


@pytest.mark.parametrize(
    "name, how, message",
    [
        (LLAVA, {"dtype": "int8"}, "dtype='int8': use float32, bfloat16, float16 or auto"),
        (LLAVA, {"dtype": torch.int8}, "dtype=torch.int8: use float32"),
        (LLAVA, {"dtype": "flaot32"}, "dtype='flaot32': use float32"),
        (LLAVA, {"device": "foo"}, "device='foo': there is no such device; use cpu, cuda or cuda:0"),
        (LLAVA, {"attention": "spda"}, r"attention='spda': use eager, sdpa, .*Did you mean 'sdpa'\?"),
        (LLAVA, {"trust_remote_code": "no"}, "trust_remote_code='no': give True or False"),
        (LLAVA, {"trust_remote_code": 1}, "trust_remote_code=1: give True or False"),
        ("bundled/tiny-lava", {}, "no bundled checkpoint 'bundled/tiny-lava'; there are: bundled/tiny-"),
        ("/nonexist/x", {}, "the path /nonexist/x does not exist"),
        ("{folder}", {}, "the folder .* holds no model: there is no config.json in it"),
        ("{folder}/file", {}, "file is a file; give the folder of a checkpoint"),
        ("{folder}/broken", {}, "broken could not be loaded: "),
        ("{folder}/tower", {}, "^.*/tower holds a clip_vision_model, which is no vision-language model$"),
    ],
)
def test_what_cannot_be_loaded_is_refused_in_one_line(tmp_path, name, how, message):
    (tmp_path / "file").touch()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{}")
    CLIPVisionConfig().save_pretrained(tmp_path / "tower")
    for loader in (load, load_model):
        with pytest.raises((OSError, ValueError), match=message) as error:
            loader(name.format(folder=tmp_path), **how)
        assert "\n" not in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there():
    with pytest.raises(ValueError, match="device='cuda': this PyTorch sees no GPU; use cpu"):
        load(LLAVA, device="cuda")


def test_a_checkpoint_as_every_command_gets_it():
    model, processor = load(LLAVA, dtype="bfloat16", device="cpu", attention="eager")
    assert model.dtype == torch.bfloat16 and not model.training
    assert model.config.get_text_config()._attn_implementation == "eager"
    assert processor.tokenizer.pad_token is not None
    again = load_model(LLAVA, dtype=torch.bfloat16)
    assert all(map(torch.equal, again.parameters(), model.parameters()))


def test_a_tokenizer_without_padding_pads_with_the_end_of_text(monkeypatch):
    bare = SimpleNamespace(tokenizer=SimpleNamespace(pad_token=None, eos_token="</s>"))
    monkeypatch.setattr("transformers.AutoProcessor.from_pretrained", lambda *_, **__: bare)
    assert load(LLAVA)[1].tokenizer.pad_token == "</s>"


def test_the_checkpoint_under_a_saved_patch():
    place = located("bundled/tiny-atp-16")
    assert place.checkpoint == bundled.resolve(LLAVA)
    (stage,) = place.stages
    assert stage["method"] == "atp" and stage["weights"] == bundled.resolve("bundled/tiny-atp-16")
    assert located("bundled/tiny-atp-16", "divprune", options={"keep": 4}).stages == [{"method": "divprune", "keep": 4}]
    (other,) = located("bundled/tiny-atp-16", "atp").stages
    assert other["weights"] == stage["weights"]
    assert not hasattr(load_model("bundled/tiny-atp-16"), "_vlmslim")
    with pytest.raises(ValueError, match="options belong into the stages: keep"):
        located(LLAVA, ["divprune"], options={"keep": 4})
