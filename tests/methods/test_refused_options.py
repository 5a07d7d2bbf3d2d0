"""Options that a method refuses, each with a part of the sentence that says what to type instead."""

import pytest

import vlmslim

REFUSED = {
    "agilepruner": [
        (dict(average=0.0), "average image"),
        (dict(slope=-1.0), "not negative"),
        (dict(threshold=-1.0), "not negative"),
        (dict(pool="crop"), "'view'"),
    ],
    "aim": [
        (dict(keep=0), "at least one"),
        (dict(keep=1.5), r"a share lies in \(0, 1\]"),
        (dict(keep=True), r"a count \(64\) or a share \(0.11\)"),
        (dict(order="random"), "'raster', 'released'"),
        (dict(newline="drop"), "'within', 'extra'"),
        (dict(start=-1), "a layer is not negative"),
        (dict(start=1.5), r"share of the depth lies in \[0, 1\]"),
        (dict(stop="late"), "finite number or None"),
        (dict(temperature=0.0), "the paper uses 0.1"),
        (dict(iterations=0), "from 1 to 1000"),
        (dict(iterations=2.0), "give an integer"),
        (dict(damping=1.0), r"in \[0, 1\)"),
        (dict(order="released", positions="original"), "use positions='renumbered'"),
    ],
    "atp": [
        (dict(after=()), "names no decoder layer"),
        (dict(after=(-1,)), "from 0 on"),
        (dict(after=(1.0,)), r"share of the depth in \[0, 1\)"),
        (dict(after=(True,)), r"give a list \(number\)"),
        (dict(strides=(1, 2)), "integers from 2 on"),
        (dict(strides=(2.0,)), r"give a list \(integer\)"),
        (dict(mean="some"), "'all', 'visible'"),
        (dict(score="both"), "'text', 'literal'"),
        (dict(at_least=-1), "integer from 0 on"),
        (dict(width=0), "from 1 to 65536"),
        (dict(keep=4), "unknown option of atp 'keep'"),
    ],
    "cdpruner": [
        (dict(relevance="text"), "'clip'"),
        (dict(sign="both"), "'plus'"),
        (dict(theta=1.0), r"in \[0, 1\)"),
        (dict(tokenizer=3), "hub id"),
    ],
    "dart": [
        (dict(keep=4, pivots=(0, 4)), "one visual pivot at least"),
        (dict(keep=4, pivots=(4,)), r"\(4, 4\)"),
        (dict(keep=4, mode="paper"), "'corrected', 'released'"),
        (dict(keep=4, layer=0), "from 1 on"),
    ],
    "drop_visual": [
        (dict(layer=0), "from 1 on"),
        (dict(layer=True), "layer=True"),
        (dict(layer=[]), "at least one"),
        (dict(layer=[1, 1.5]), "layer=1.5"),
        (dict(layer="late"), "layer=.late.: give a finite number"),
        (dict(tau=-0.1), "tau=-0.1"),
        (dict(tau=True), "tau=True"),
        (dict(text="before"), "'after'"),
    ],
    "hiprune": [
        (dict(alpha=1.5), "from 0 to 1"),
        (dict(neighbours="diagonal"), "'grid'"),
        (dict(middle=0), "from 1 on"),
        (dict(middle=1.0), "share of the depth"),
    ],
    "holov": [
        (dict(chunks=0), "at least one chunk"),
        (dict(within="variance"), "'holistic'"),
        (dict(score="norm"), "'cls'"),
        (dict(rectify=True, positions="renumbered"), "positions='original'"),
    ],
    "mmr": [
        (dict(weight=1.5), "from 0 to 1"),
        (dict(scale="max"), "'rank'"),
        (dict(at_once=0), "at least one"),
        (dict(score="loss"), "'norm'"),
        (dict(newline="pool"), "'rows'"),
        (dict(keep=0), "at least one"),
    ],
    "mmtok": [
        (dict(temperature=0.0), "positive"),
        (dict(alpha=-1.0), "positive"),
        (dict(tokenizer=3), "hub id"),
        (dict(newline="all"), "'rows'"),
    ],
    "pyramiddrop": [
        (dict(ratio=0.0), r"in \(0, 1\]"),
        (dict(layer=()), r"such as \(8, 16, 24\)"),
        (dict(layer=(0.5, 1.5)), "share of the depth"),
        (dict(keep=0), "at least one"),
        (dict(layer_positions="kept"), "'renumbered', 'original'"),
    ],
    "recoverable": [
        (dict(keep=0), "at least one"),
        (dict(keep=1.5), "share"),
        (dict(preset="fixed"), "preset"),
        (dict(text_source="first"), "text_source"),
        (dict(centres="N"), "centres"),
        (dict(shares=(0.5, 0.5)), "three shares"),
        (dict(shares=(0.5, 0.5, 0.5)), "sum to 1"),
        (dict(neighbours=(20, 0, 10)), "neighbours"),
        (dict(cluster=0), "cluster"),
        (dict(pad_length=1), "pad_length"),
    ],
    "schedule": [
        (dict(layer=[1, 2], counts=[4]), "one count for each layer"),
        (dict(layer=[], counts=[]), "one count for each layer"),
        (dict(layer=[0], counts=[4]), "from 1 on"),
        (dict(counts=[1, 2, 3]), "a later layer cannot see more"),
        (dict(by="grid"), "'attention', 'random'"),
        (dict(counts=[0.5, 0, 0.1]), "at least one"),
    ],
    "scope": [
        (dict(alpha=-1.0), "positive"),
        (dict(combine="multi"), "'multiply'"),
        (dict(features="keys"), "'tower'"),
        (dict(pool="crop"), "'view'"),
        (dict(mode="faithful"), "'released'"),
        (dict(mode="released", positions="original"), "renumbered"),
    ],
    "sparsevlm": [
        (dict(version="3.0"), "'1.0', '1.5', '2.0'"),
        (dict(version="1.0", keep=5), "scale and bias"),
        (dict(counts=(5,)), "one count for each layer"),
        (dict(heads=0.0), "14 of 32"),
        (dict(layer_positions="kept"), "'renumbered', 'original'"),
        (dict(layer=(0.5, 0.0, 0.6)), "from 1 on"),
    ],
    "todre": [
        (dict(keep=0), "at least one"),
        (dict(keep=True), "keep=True"),
        (dict(objective="maxsum"), "'max_sum'"),
        (dict(pivot="first"), "'auto'"),
        (dict(newline="row"), "'rows'"),
        (dict(tau=2), "None"),
        (dict(layer=1.0), "share of the depth"),
        (dict(kepe=3), "'keep'"),
    ],
    "tokenflex": [
        (dict(keep=50), "use 49 or 64"),
        (dict(keep=64, pool="avg"), "pool='avg'"),
        (dict(keep=64, counts=[50], probabilities=[1.0]), "counts=50.*49 or 64"),
        (dict(keep=64, counts=[64, 16]), "probabilities"),
        (dict(keep=64, probabilities=[0.5, 0.5, 0.0]), "above 0"),
        (dict(keep=0), "at least one"),
    ],
    "tops": [
        (dict(alpha=-1.0), "from 0 on"),
        (dict(normalise="max"), "'minmax'"),
        (dict(raters="some"), "'above_mean'"),
        (dict(attention="next"), "'coming'"),
        (dict(layer_positions="kept"), "'original', 'renumbered'"),
        (dict(layer=(0.5,)), "one part for each layer"),
        (dict(parts=(0.5, 0.0)), r"in \(0, 1\]"),
        (dict(layer=(0.5, 1.5)), "share of the depth"),
        (dict(keep=0), "at least one"),
    ],
    "visionzip": [
        (dict(contextual=1.0), r"in \[0, 1\)"),
        (dict(mode="paper"), "'released'"),
    ],
    "vispruner": [
        (dict(important=1.5), "from 0 to 1"),
        (dict(step=0), "at least one"),
        (dict(rest="random"), "'raster'"),
        (dict(features="keys"), "'projected'"),
    ],
    "vscan": [
        (dict(local=1.5), "part of the budget"),
        (dict(window=0), "one patch on each side"),
        (dict(shallow=-1), "from 0 on"),
        (dict(deep=0.0), "deep=0.0: a share"),
        (dict(layer=1.5), "share of the depth"),
        (dict(score="all"), "'auto', 'cls', 'received'"),
        (dict(layer_positions="kept"), "'renumbered', 'original'"),
    ],
}


@pytest.mark.parametrize(
    ("name", "options", "says"), [(name, *row) for name, rows in REFUSED.items() for row in rows], ids=str
)
def test_refused_options_say_what_to_type(name, options, says):
    with pytest.raises(ValueError, match=says):
        vlmslim.method(name, **options)
