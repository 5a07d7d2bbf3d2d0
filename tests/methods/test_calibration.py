"""The threshold that `calibrate` finds keeps what was asked for."""

import sys

import calibrate_tokencorr
import numpy as np
import pytest
import torch
import yaml
from doubles import watched
from prompts import Picture, batch
from tiny import BOS, tiny

import vlmslim
from vlmslim.methods.tokencorr import TokenCorr
from vlmslim.methods.tokencorr.calibration import calibrate


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_calibration(family, share):
    model = tiny(family)
    prompts = [batch(model, [[BOS, Picture(seed, size), 5]]) for seed in range(4) for size in ((60, 30), (64, 64))]
    found = calibrate(model, prompts, share, beta=0.1, merge="none")
    assert getattr(model, "_vlmslim", None) is None
    shares = []
    for row in ([BOS, Picture(seed, size), 5] for seed in range(4) for size in ((60, 30), (64, 64))):
        method, seen = watched(TokenCorr, alpha=found.alpha, beta=0.1, merge="none")
        with vlmslim.patch(model, method), torch.no_grad():
            model(**batch(model, [row]))
        ((image, got),) = seen
        for crop in range(1 if image.tiles[1] else 0, len(image.tower)):
            patches = (image.grid[:, 0] == crop).nonzero()[:, 0]
            if len(patches):
                shares.append(float(torch.isin(patches, got.index).double().mean()))
    assert len(shares) == found.crops
    assert np.mean(shares) == pytest.approx(found.kept)
    assert np.std(shares) == pytest.approx(found.spread)
    floor = np.mean([max(1 / 16, found.outliers)])
    assert abs(found.kept - max(share, floor)) < 0.1


def test_what_cannot_be_calibrated_is_refused():
    model = tiny("next")
    with pytest.raises(ValueError, match="share"):
        calibrate(model, [], 1.5)
    with pytest.raises(ValueError, match="no crop"):
        calibrate(model, [], 0.5)


@pytest.fixture
def script(monkeypatch):
    """`scripts/calibrate_tokencorr.py`, run with arguments."""

    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["calibrate_tokencorr.py", *arguments])
        calibrate_tokencorr.main()

    return run


def test_the_script_prints_a_line_for_a_configuration(script, capsys):
    script("bundled/tiny-llava", "--share", "0.3", "--count", "4", "--device", "cpu", "beta=0.1", "merge=none")
    comment, line = capsys.readouterr().out.splitlines()
    assert comment.startswith("#") and "4 crops" in comment
    (stage,) = yaml.safe_load(line)
    assert stage.pop("method") == "tokencorr"
    method = vlmslim.method("tokencorr", **stage)
    assert (method.beta, method.merge) == (0.1, "none")
    assert -1 < method.alpha < 1


def test_the_script_says_what_it_takes(script, tmp_path):
    with pytest.raises(SystemExit, match="NAME=VALUE with one of"):
        script("bundled/tiny-llava", "--share", "0.3", "alpha=0.1")
    with pytest.raises(SystemExit, match="no image files"):
        script("bundled/tiny-llava", "--share", "0.3", "--device", "cpu", "--pictures", str(tmp_path))
