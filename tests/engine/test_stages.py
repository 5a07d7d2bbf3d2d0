"""Stages act at their places, in order; a stage that cannot act is refused at the patch."""

from dataclasses import dataclass

import pytest
import torch
from doubles import Both, Halve, PairMean, Strided
from snapshots import changes, model_state
from tiny import DEPTH, tiny

import vlmslim
from vlmslim.compressor import Compressor, ScoreAndKeep, Selector


@dataclass
class KeepsMask(Compressor):
    """`retain` without `layers`, the likeliest slip."""

    keep: int = 4

    def retain(self, tokens):
        return tokens.mask


@dataclass
class OnlyLayers(Compressor):
    layers = (1, 2)


@dataclass
class OnlySoft(Compressor):
    def soft_retain(self, tokens):
        return None


@dataclass
class Misspelt(Compressor):
    keep: int = 4

    def compres(self, image):
        return image.pick(torch.arange(self.keep))


@dataclass
class RanksNothing(ScoreAndKeep):
    def scores(self, image):
        return image.features[:, 0]


@dataclass
class NotSettled(Selector):
    def __post_init__(self):
        pass

    def compress(self, image):
        return image.pick(torch.arange(4))


@dataclass
class OneLayer(Halve):
    layers = 2


@dataclass
class NamedLayer(Strided):
    tower_layers = ("last",)


@dataclass
class TooDeep(Halve):
    layers = (DEPTH,)


@dataclass
class Elsewhere(Strided):
    positions = "somewhere"


@pytest.mark.parametrize(
    ("methods", "says"),
    [
        (KeepsMask(), "KeepsMask overrides `retain` but has no `layers`.*layers = "),
        (OnlySoft(), "OnlySoft overrides `retain` but has no `layers`"),
        (OnlyLayers(), r"OnlyLayers has layers=\(1, 2\) but does not override `retain`"),
        (Misspelt(), "Misspelt overrides none of .*patch.model, 'none'"),
        (RanksNothing(), "RanksNothing does not override `score`, so it ranks nothing"),
        (NotSettled(4), "positions='auto': use .*; a __post_init__ first calls super"),
        (OneLayer(), r"OneLayer has layers=2: give a tuple of numbers, such as layers = \(2,\)"),
        (NamedLayer(), r"NamedLayer has tower_layers=\('last',\): give a tuple of numbers"),
        (TooDeep(), "no decoder layer 4 to drop tokens before; use 1 .. 3"),
        ([Strided(), PairMean()], "both work before the language model"),
        ([Halve(), Both()], "both drop tokens before layer 2"),
        (Elsewhere(), "positions='somewhere': use 'renumbered' or 'original'"),
    ],
    ids=str,
)
def test_what_cannot_act_is_refused_and_leaves_nothing_behind(methods, says):
    model = tiny("llava")
    before = model_state(model)
    with pytest.raises(ValueError, match=says):
        vlmslim.patch(model, methods)
    assert changes(before, model_state(model)) == []


def test_stages_come_in_the_order_in_which_they_act():
    last = vlmslim.method("drop_visual", layer=0.9)
    with vlmslim.patch(tiny("llava"), [last, Halve(), "none", vlmslim.method("uniform", keep=4)]) as slim:
        stages = [(stage.name, stage.acts_before_llm, stage.layers) for stage in slim.stages]
    assert stages == [
        ("uniform", True, ()),
        ("none", False, ()),
        ("halve", False, (2,)),
        ("drop_visual", False, (3,)),
    ]
    assert slim.stages[-1].method is not last and last.layer == 0.9, "the user's object is left as it was"


def test_a_method_of_several_stages_lists_them():
    with vlmslim.patch(tiny("llava"), "aim", keep=0.5) as slim:
        assert [stage.name for stage in slim.stages] == ["bipartite_merge", "pagerank_prune"]
        assert slim.stages[1].layers == (3,)
    with vlmslim.patch(tiny("llava"), Both()) as slim:
        assert [(stage.acts_before_llm, stage.layers) for stage in slim.stages] == [(True, (2, 3))]
