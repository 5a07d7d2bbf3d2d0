"""Substitutes on models without what the papers read: named by the patch, and listed in docs/models.md."""

import re

import method_table
import pytest
import torch
from clip_fixtures import Words
from tiny import tiny
from zoo import Pic, batch, build, words

import vlmslim
from vlmslim.methods._substitutes import SUBSTITUTES

CHOSEN = [  # method, its substitute without a CLS token, and the options that choose the same
    ("scope", "received", {"score": "received"}),
    ("vscan", "received", {"score": "received"}),
    ("prunesid", "loading", {"score": "loading"}),
    ("globalcom2", "distance", {"score": "distance"}),
    ("todre", "random pivot", {"pivot": "random"}),
    ("cdpruner", "embeddings", {"relevance": "llm"}),
]


@pytest.mark.parametrize(("method", "name", "options"), CHOSEN)
@torch.no_grad()
def test_a_patch_names_what_it_reads_instead(method, name, options):
    """The substitute is what the option of that name chooses; who chooses it himself has none."""
    model = build("qwen3_vl")
    inputs = batch("qwen3_vl", model, [[1, Pic(3, 64, 64), *words(6, 2)]])
    given = {"keep": 0.4} | ({"tokenizer": Words()} if method == "cdpruner" else {})
    with vlmslim.patch(model, method, **given) as slim:
        assert slim.substitutes == (name,)
        found = model(**inputs).logits
    with vlmslim.patch(model, method, **given, **options) as slim:
        assert slim.substitutes == ()
        assert torch.equal(model(**inputs).logits, found)


def test_stages_name_theirs_together():
    with vlmslim.patch(tiny("onevision"), ["visionzip", {"method": "fastv", "keep": 0.2}]) as slim:
        assert slim.substitutes == ("received", "late merge")
    with vlmslim.patch(tiny("llava"), ["visionzip", {"method": "fastv", "keep": 0.2}]) as slim:
        assert slim.substitutes == ()


def test_layers_of_windows_are_named():
    model = build("qwen2_5_vl")  # of three layers, the last one alone sees everything
    with vlmslim.patch(model, "hiprune") as slim:
        assert slim.substitutes == ("full attention",)
    with vlmslim.patch(model, "vispruner") as slim:  # reads the last layer
        assert slim.substitutes == ("received",)


def test_clip_is_not_compared_with_features_of_several_layers():
    """VipLlava's projector reads five layers side by side, which the head of a CLIP cannot read."""
    model = build("vipllava")
    with vlmslim.patch(model, "cdpruner", tokenizer=Words()) as slim:
        assert slim.substitutes == ("embeddings",)
    with pytest.raises(ValueError, match="relevance='clip' needs a projector that reads one layer of a CLIP tower"):
        vlmslim.patch(model, "cdpruner", relevance="clip", tokenizer=Words())


def test_the_page_explains_every_word_of_its_table():
    page = method_table.PAGE.read_text()
    cells = re.findall(r"\| (yes|no): ([^|]+?) (?=\|)", page.split(method_table.BEGIN)[1].split("| yes: |")[0])
    for verdict, known in (("yes", SUBSTITUTES), ("no", method_table.MEANINGS)):
        used = {word for said, listed in cells for word in listed.split(", ") if said == verdict}
        assert used == set(known), "every word of the table is explained, and every explained word is in it"
