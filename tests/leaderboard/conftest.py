"""Runs that several tests of the leaderboard read."""

from dataclasses import replace

import pytest
from boards import RIGHT
from evaluation_doubles import FakeHarness, write_config

from vlmslim.evaluation.config import load_config
from vlmslim.evaluation.run import run
from vlmslim.evaluation.store import Store
from vlmslim.leaderboard.board import Leaderboard
from vlmslim.leaderboard.published import load_papers


@pytest.fixture(scope="package")
def directory(tmp_path_factory):
    """The output directory of a finished run."""
    config = load_config(write_config(tmp_path_factory.mktemp("run"), methods=["divprune", "fastv"], budgets=[16, 64]))
    scores = {(label, task): n for label, own in RIGHT.items() for task, n in zip(("count", "text"), own, strict=True)}
    run(config, harness=FakeHarness(scores=scores))
    return config.output


@pytest.fixture(scope="package")
def board(directory):
    """The leaderboard of a finished run, on which no difference is significant."""
    return Leaderboard.read(directory)


@pytest.fixture(scope="package")
def decided(tmp_path_factory):
    """60 questions: divprune answers them as the unpatched model does, fastv gets a third right, random a sixth."""
    right = {"none": 54, "divprune-16": 54, "fastv-16": 18, "random-16": 9, "uniform-16": 9}
    scores = {(label, task): count for label, count in right.items() for task in ("count", "text")}
    config = load_config(write_config(tmp_path_factory.mktemp("decided"), methods=["divprune", "fastv"], budgets=[16]))
    run(config, harness=FakeHarness(scores=scores, questions=60))
    return Leaderboard.read(config.output)


@pytest.fixture(scope="package")
def captions(tmp_path_factory):
    """A run with CIDEr on the task text, whose single questions have no scores; CIDEr prefers the worse row."""
    accuracy = {"none": 0.9, "random-16": 0.2, "divprune-16": 0.8}
    cider = {"none": 1.0, "random-16": 2.0, "divprune-16": 0.5}

    class Captions(FakeHarness):
        def evaluate(self, variant, task):
            cell = super().evaluate(variant, task)
            if task == "text":
                cell.results["results"][task]["acc,none"] = cider[variant.label]
                return replace(cell, samples=[s | {"acc": {"pred": "a dog"}} for s in cell.samples])
            return cell

    scores = {(label, "count"): round(60 * fraction) for label, fraction in accuracy.items()}
    config = load_config(write_config(tmp_path_factory.mktemp("captions"), budgets=[16]))
    return run(config, harness=Captions(scores=scores, questions=60))


@pytest.fixture
def finished(tmp_path) -> Store:
    """The store of a finished run, which a test may damage."""
    config = load_config(write_config(tmp_path))
    run(config, harness=FakeHarness())
    return Store(config.output)


@pytest.fixture(scope="package")
def papers():
    """The published tables that vlmslim ships."""
    return load_papers()
