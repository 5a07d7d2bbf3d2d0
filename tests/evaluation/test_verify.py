"""`vlmslim verify`: a run that is repeated passes, and every drift that is planted here is found."""

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from evaluation_doubles import rewrite
from method_files import NORM, write
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

pytest.importorskip("lmms_eval", reason="the extra vlmslim[eval] is not installed")

from vlmslim import bundled
from vlmslim.cli import app
from vlmslim.evaluation.conversation import Prompter
from vlmslim.evaluation.store import Store

CHOICE = "image.features.norm(dim=-1).argsort()"
SHAKY = {  # methods that choose other tokens in another call, or in another batch
    "dice": NORM.replace(CHOICE, "torch.tensor(SystemRandom().sample(range(144), 144))"),
    "seeded": NORM.replace(CHOICE, "torch.randperm(144)"),  # lmms-eval seeds torch anew for each cell
}


def call(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def config(folder: Path, name: str, methods: list) -> Path:
    """Write the configuration of a run of a few questions."""
    path = folder / f"{name}.yaml"
    settings = {
        "model": {"pretrained": str(folder / "model"), "device": "cpu"},
        "tasks": ["scenes_detail"],
        "budgets": [16],
        "methods": methods,
        "baselines": False,
        "batch_size": 4,
        "limit": 8,
        "timing": None,
        "output": str(folder / name),
    }
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A copy of the bundled checkpoint, and a finished run of two rows."""
    folder = tmp_path_factory.mktemp("verify")
    shutil.copytree(bundled.resolve("bundled/tiny-llava"), folder / "model")
    done = call("run", config(folder, "plain", ["divprune"]))
    assert done.exit_code == 0, done.output
    assert "Not verified yet" in done.stdout
    return folder


@pytest.mark.slow
def test_another_number_of_workers_gives_the_same_answers(folder, plain):
    if find_spec("ray") is None:  # vlmslim sets the environment of Ray before it imports Ray
        pytest.skip("the extra vlmslim[ray] is not installed")
    shown = call("verify", plain, "--questions", 8, "--workers", 2)
    assert shown.exit_code == 0, shown.output
    assert "the shortest prompts first, with --workers 2. float32: 0 of 16 answers" in shown.stdout


@pytest.fixture
def plain(folder, tmp_path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(folder / "plain", tmp_path / "plain"))


def verified(run: Path) -> tuple[int, list[str]]:
    """Call the command, and return its exit status and its lines."""
    shown = call("verify", run, "--questions", 8)
    assert shown.exit_code in (0, 1), shown.output
    return shown.exit_code, shown.stdout.splitlines()


def about(label: str, lines: list[str]) -> str:
    """Return the line about a row, empty if there is none."""
    return next((line for line in lines if line.startswith(f"{label} on ")), "")


def test_a_run_that_is_repeated_passes_and_its_board_says_so(folder, plain):
    status, lines = verified(plain)
    assert (status, lines[-1]) == (0, "reproduced")
    assert lines[0] == (
        "8 questions of each of 2 cells asked again at batch size 2 instead of 4, the shortest prompts first. "
        "float32: 0 of 16 answers and 0 of 2 scores changed."
    )
    (same,) = [line for line in lines if line.startswith("the same: ")]
    assert same.startswith("the same: versions, checkpoint ") and same.endswith(", code, weights, tasks, seed 0")
    assert any("no published number" in line for line in lines)
    assert "Verified, reproduced: 8 questions" in (plain / "leaderboard.md").read_text()
    more = call("run", config(folder, "more", ["divprune", "uniform"]), "--output", plain)
    assert "1 of 3 cells were made since" in more.stdout


def test_methods_that_are_not_deterministic_are_found(folder):
    for name, text in SHAKY.items():
        write(folder / f"{name}.py", f"import torch\nfrom random import SystemRandom\n{text}")
    methods = [{"method": f"{folder / name}.py:Norm", "label": name} for name in SHAKY]
    assert call("run", config(folder, "shaky", methods)).exit_code == 0
    status, lines = verified(folder / "shaky")
    assert status == 1 and lines[-1] == "not reproduced"
    assert not about("none", lines)
    assert "change from call to call" in about("dice", lines)
    assert "draws random numbers without a seed of its own" in about("seeded", lines)
    assert "Verified, not reproduced: 8 questions" in (folder / "shaky" / "leaderboard.md").read_text()


@pytest.mark.parametrize(
    "smallest, cause", [(1, "something has changed since the run"), (4, "the answers depend on the batch size")]
)
def test_another_preprocessing_is_found(plain, monkeypatch, smallest, cause):
    """Pictures are darker than they were: all of them, or those in smaller batches than the run's."""
    encode = Prompter.encode

    def darker(self, prompts):
        inputs = encode(self, prompts)
        if len(prompts) < smallest or smallest == 1:
            inputs["pixel_values"] = inputs["pixel_values"] * 0.2
        return inputs

    monkeypatch.setattr(Prompter, "encode", darker)
    status, lines = verified(plain)
    assert status == 1
    assert f"; {cause}" in about("none", lines)


def test_other_code_is_found(plain):
    store = Store(plain)
    code = store.cell("divprune-16", "scenes_detail")["code"] | {"vlmslim/methods/divprune.py": "another"}
    rewrite(store, "divprune-16", "scenes_detail", code=code)
    status, lines = verified(plain)
    assert status == 1
    assert "changed since the run: the code of divprune-16 (vlmslim/methods/divprune.py)" in lines


def test_another_revision_of_the_checkpoint_is_found(folder, plain):
    (file,) = (folder / "model").glob("*.safetensors")
    before = file.read_bytes()
    noise = torch.Generator().manual_seed(0)
    weights = {name: w + 0.05 * torch.randn(w.shape, generator=noise) for name, w in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})
    try:
        status, lines = verified(plain)
    finally:
        file.write_bytes(before)
    assert status == 1
    assert any(line.startswith("changed since the run: checkpoint: ") for line in lines)
    assert "; something has changed since the run" in about("none", lines)


@pytest.mark.parametrize(
    "argument, message",
    [("nowhere", "nowhere does not exist; give the output directory of a vlmslim run"), (".", "no readable run.json")],
)
def test_a_directory_without_a_run(argument, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = call("verify", argument)
    assert shown.exit_code == 2 and message in shown.stderr
