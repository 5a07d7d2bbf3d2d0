"""Plans, promises and refusals of the vLLM plug-in; vLLM itself is not needed."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from tiny import tiny

import vlmslim
from vlmslim import bundled
from vlmslim.vllm import ARCHITECTURES, overrides
from vlmslim.vllm.plan import command, plan_of

BEFORE = [
    "divprune",
    "random",
    "uniform",
    "pool",
    "globalcom2",
    "bipartite_merge",
    "tokencorr",
    "mmr",
    "scope",
    "holov",
]


def config(family: str = "llava", **spec):
    """The configuration of a tiny model, as --hf-overrides leaves it."""
    found = tiny(family).config
    found.vlmslim = spec
    return found


@pytest.mark.parametrize("name", BEFORE)
@pytest.mark.parametrize("family", ["llava", "next", "onevision"])
def test_methods_before_the_language_model_promise_what_they_keep(name, family):
    plan = plan_of(config(family, method=name, keep=5))
    assert plan.count(16) == 5
    assert plan_of(config(family, method=name, keep=0.5)).count(16) == 8


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ({"method": "fastv", "keep": 5}, "inside the decoder"),
        ({"method": "aim"}, "inside the decoder"),
        ({"method": "todre", "keep": 5}, "inside the decoder"),
        ({"method": "none"}, "changes nothing"),
        ({"method": "doubles:Both"}, "inside the decoder"),
        ({"method": "recoverable"}, "reads the question"),
        ({"method": "mmtok", "keep": 5}, "reads the question"),
        ({"method": "downsample", "keep": 4}, "encodes pictures itself"),
        ({"method": "divprune", "keep": 5, "positions": "original", "rectify": True}, "in every decoder layer"),
        ({"method": "tokencorr"}, "decides itself"),
        ({"method": "agilepruner", "keep": {"auto": 5, "average": 8.0}}, "decides itself"),
        ({"method": "divprune", "keep": 17}, "16 visual tokens"),
        ({"method": "divprune", "kep": 5}, "Did you mean 'keep'"),
        ({"method": "divprun"}, "Did you mean 'divprune'"),
        ({"method": "divprune", "keep": 5, "positions": "kept"}, "positions='kept'"),
        ({"method": "blind"}, "keeps nothing of an image"),
        ({"keep": 5}, "names no method"),
    ],
)
def test_what_vllm_cannot_do_is_refused_before_any_weight_is_read(spec, reason):
    with pytest.raises(ValueError, match=reason):
        plan_of(config(**spec))


def test_a_checkpoint_without_a_method_says_how_to_give_one():
    found = tiny("llava").config
    with pytest.raises(ValueError, match="vlmslim vllm divprune:keep=64"):
        plan_of(found)


def test_an_architecture_for_another_kind_of_checkpoint_is_refused():
    found = config("next", method="divprune", keep=5)
    found.architectures = overrides("divprune", keep=5)["architectures"]  # without a type these are of LLaVA-1.5
    with pytest.raises(ValueError, match="give VlmslimLlavaNextForConditionalGeneration"):
        plan_of(found)


def test_a_method_that_does_not_suit_the_tower_is_refused():
    with pytest.raises(ValueError, match="CLS"):
        plan_of(config("siglip", method="todre", keep=5, layer=None, pivot="cls"))


def test_overrides_name_an_architecture_of_their_own():
    found = overrides("divprune", keep=64)
    assert found == {
        "architectures": ["VlmslimLlavaForConditionalGeneration"],
        "vlmslim": {"method": "divprune", "keep": 64},
        "rope_parameters": {"mrope_section": [1, 1, 1]},  # because positions stay
    }
    assert "rope_parameters" not in overrides("divprune", keep=64, positions="renumbered")
    assert overrides("divprune", "llava_onevision", keep=64)["architectures"][0] in ARCHITECTURES
    with pytest.raises(ValueError, match="Did you mean 'llava_next'"):
        overrides("divprune", "llavanext", keep=64)
    with pytest.raises(ValueError, match="inside the decoder"):
        overrides("fastv", keep=64)


def test_the_digest_tells_methods_options_and_weights_apart(tmp_path):
    digests = [
        plan_of(config(**spec)).digest
        for spec in (
            {"method": "divprune", "keep": 5},
            {"method": "divprune", "keep": 6},
            {"method": "random", "keep": 5},
            {"method": "random", "keep": 5, "seed": 1},
        )
    ]
    for seed in (0, 1):  # one folder, so that only the weights differ
        with vlmslim.patch(tiny("llava"), "tokenflex", keep=4, weights=f"random:{seed}") as slim:
            slim.save_pretrained(tmp_path)
        digests.append(plan_of(config(method=str(tmp_path))).digest)
    assert len(set(digests)) == len(digests)
    assert plan_of(config(method="divprune", keep=5)).digest == digests[0]


def test_a_saved_patch_is_a_method(tmp_path):
    with vlmslim.patch(tiny("llava"), "divprune", keep=5) as slim:
        slim.save_pretrained(tmp_path)
    assert plan_of(config(method=str(tmp_path))).count(16) == 5
    assert overrides(str(tmp_path))["vlmslim"] == {"method": str(tmp_path)}


def test_the_command_serves_a_checkpoint():
    words = command("divprune:keep=64", "bundled/tiny-llava-next")
    assert words[:3] == ["vllm", "serve", bundled.resolve("bundled/tiny-llava-next")]
    assert words[-2:] == ["--video-pruning-rate", "0.01"]  # because positions stay
    assert json.loads(words[words.index("--hf-overrides") + 1]) == overrides("divprune", "llava_next", keep=64)


def test_a_checkpoint_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="the path /nowhere/at/all does not exist"):
        command("divprune:keep=64", "/nowhere/at/all")


def test_the_entry_point_can_be_imported_without_vllm():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["vllm.general_plugins"] == {"vlmslim": "vlmslim.vllm:register"}
    code = "import sys, vlmslim.vllm; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
