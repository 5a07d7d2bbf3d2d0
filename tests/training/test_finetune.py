"""The training loop: it learns, resumes to the same loss, and runs in several processes."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

pytest.importorskip("pydantic", reason="the extra vlmslim[train] is not installed")

from training_data import training_data

import vlmslim
from vlmslim.training.config import override
from vlmslim.training.conversations import Collator, Item
from vlmslim.training.finetune import (
    Settings,
    answer_loss,
    finetune,
    learning_rate_factor,
    load,
    parse_arguments,
    prepare,
    read_settings,
)

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
FEW = dict(counts=[4, 9], probabilities=[0.5, 0.5])
SMALL = dict(pictures=6, questions=2, steps=4, batch=2, workers=0, device="cpu", log_every=1, save_every=2, method=FEW)
SAY_YES = [{"from": "human", "value": "Say yes."}, {"from": "gpt", "value": "yes"}]


def small(**options) -> Settings:
    return Settings(**SMALL | options)


def train(settings, out, data=None, **options):
    model, processor = load(settings)
    slim = vlmslim.patch(model, "tokenflex", weights=f"random:{settings.seed}", keep=9, **settings.method)
    finetune(slim, processor, data or training_data(settings), settings, out, **options)
    return slim


def column(out, name="loss"):
    """Step -> one number of the log."""
    with (out / "log.csv").open(newline="") as file:
        return {int(line["step"]): float(line[name]) for line in csv.DictReader(file)}


@pytest.mark.slow
def test_an_interrupted_run_resumes_to_the_same_loss(tmp_path):
    settings = small(accumulate=2)
    train(settings, tmp_path / "whole")
    train(settings, tmp_path / "pieces", stop=2)
    log = tmp_path / "pieces" / "log.csv"  # as if the run had been killed one step after its last checkpoint
    log.write_text(log.read_text() + log.read_text().splitlines()[-1].replace("2", "3", 1) + "\n")
    assert list(column(tmp_path / "pieces")) == [1, 2, 3]
    slim = train(settings, tmp_path / "pieces")
    assert list(column(tmp_path / "whole")) == [1, 2, 3, 4]
    assert column(tmp_path / "whole") == column(tmp_path / "pieces")
    seconds = list(column(tmp_path / "pieces", "seconds").values())
    assert seconds == sorted(seconds)  # the clock goes on as well
    with vlmslim.patch(load(settings)[0], tmp_path / "whole" / "final") as again:
        for key, value in again.trained.state_dict().items():
            assert torch.equal(value, slim.trained.state_dict()[key])
    with pytest.raises(ValueError, match="other values of lr, seed"):
        train(small(accumulate=2, lr=0.5, seed=1), tmp_path / "whole")


@pytest.mark.slow
def test_training_learns_and_leaves_the_backbone_alone(tmp_path):
    settings = small(pictures=2, steps=25, lr=5e-3, precision="no", method=dict(counts=[9], probabilities=[1.0]))
    before = {k: v.clone() for k, v in load(settings)[0].state_dict().items()}
    slim = train(settings, tmp_path)
    losses = list(column(tmp_path).values())
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    assert all(torch.equal(v, before[k]) for k, v in slim.model.state_dict().items())


def test_accumulated_batches_are_those_of_single_ones(tmp_path):
    seen = {1: [], 2: []}
    one = dict(questions=1, batch=1, method=dict(counts=[1], probabilities=[1.0]))
    for accumulate, steps in ((1, 4), (2, 2)):

        def loss(answers, batch, step, into=seen[accumulate]):
            into.append((step, batch["where"][0]))
            return answer_loss(answers, batch, step)

        train(small(accumulate=accumulate, steps=steps, **one), tmp_path / str(accumulate), loss=loss)
        assert list(column(tmp_path / str(accumulate))) == list(range(1, steps + 1))
    assert [where for _, where in seen[1]] == [where for _, where in seen[2]]
    assert [step for step, _ in seen[2]] == [0, 0, 1, 1]


def test_batches_without_pictures_and_bad_losses(tmp_path):
    data = [Item("record seven", None, (SAY_YES,))]
    train(small(steps=1, batch=1), tmp_path / "text", data)
    assert list(column(tmp_path / "text")) == [1]
    infinite = lambda answers, batch, step: (answers.loss * float("inf"), {})  # noqa: E731
    with pytest.raises(RuntimeError, match="step 0.*record seven"):
        train(small(steps=1, batch=1), tmp_path / "nan", data, loss=infinite)
    assert not (tmp_path / "nan" / "final").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tuned_decoder_is_trained_in_fp32_and_saved_with_the_patch(dtype, tmp_path):
    settings = small(train_decoder=True, dtype=dtype, steps=1, batch=1, lr=0.01)
    model, processor = load(settings)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with vlmslim.patch(model, "divprune", keep=9) as slim:
        finetune(slim, processor, training_data(settings), settings, tmp_path)
    trained = {k: v for k, v in model.state_dict().items() if "vision_tower" not in k}
    assert all(v.dtype == torch.float32 and not torch.equal(v, before[k].float()) for k, v in trained.items())
    tower = {k: v for k, v in model.state_dict().items() if "vision_tower" in k}
    assert all(v.dtype == before[k].dtype and torch.equal(v, before[k]) for k, v in tower.items())
    again = vlmslim.from_pretrained(tmp_path / "final").model
    assert all(torch.equal(v, trained.get(k, before[k]).to(v.dtype)) for k, v in again.state_dict().items())


@pytest.mark.parametrize("picture", [Image.new("RGB", (50, 50)), None], ids=["picture", "text alone"])
def test_every_trained_parameter_gets_a_gradient(picture):
    """Zero where a batch does not need it: several processes wait for each other's gradients of everything."""
    model, processor = load(small())
    words = "<image>What is it?" if picture else "Say yes."
    inputs = Collator(processor)([Item("it", picture, ([SAY_YES[0] | {"value": words}, SAY_YES[1]],))])
    with vlmslim.patch(model, "tokenflex", weights="random", keep=9, **FEW) as slim:
        tuned = prepare(slim, small(train_decoder=True))
        tuned(**{k: v for k, v in inputs.items() if k not in ("skipped", "where")}).loss.backward()
    without = [name for name, p in tuned.named_parameters() if p.requires_grad and p.grad is None]
    assert not without and any(p.requires_grad for p in model.parameters())


def test_a_method_with_nothing_to_train(tmp_path):
    model, processor = load(small())
    with vlmslim.patch(model, "divprune", keep=9) as slim, pytest.raises(ValueError, match="nothing to train"):
        finetune(slim, processor, [], small(), tmp_path)


def test_the_learning_rate_warms_up_and_falls():
    rates = [learning_rate_factor(step, 100, 0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))
    assert 0 < rates[-1] < 0.01 and learning_rate_factor(0, 1, 0.03) == 1


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("steps: 3\nmethod: {counts: [4]}\n")
    return path


def test_settings_are_read(config):
    assert read_settings(config, ["lr=0.1"]).lr == 0.1
    assert read_settings(config, ["method.pool=mean", "precision=no", "lr=5e-4"]) == Settings(
        steps=3, method={"counts": [4], "pool": "mean"}, precision="no", lr=5e-4
    )
    assert read_settings(config, ["steps=0", "epochs=2"]).epochs == 2


@pytest.mark.parametrize(
    "wrong, says",
    [
        ("stepz=3", "no setting 'stepz'"),
        ("steps", "'steps' sets nothing"),
        ("steps=many", "steps='many': .*integer"),
        ("batch=0", "batch=0: .*greater than 0"),
        ("epochs=2", "steps=3 leaves epochs without effect"),
        ("precision=fp8", "precision='fp8': .*'bf16', 'fp16' or 'no'"),
    ],
)
def test_wrong_settings_are_refused(wrong, says, config, monkeypatch, capsys):
    with pytest.raises(ValueError, match=says):
        read_settings(config, [wrong])
    monkeypatch.setattr(sys, "argv", ["train.py", "--out", "out", wrong])
    with pytest.raises(SystemExit):
        parse_arguments("Train.", config)
    assert "error: " in capsys.readouterr().err
    config.write_text("stepz: 3\n")
    with pytest.raises(ValueError, match="no setting stepz"):
        read_settings(config)


def test_settings_are_replaced_whole_or_by_the_option():
    given = {"lr": 1.0, "method": {"keep": 4, "pool": "resize"}}
    changed = override(given, ["lr=5e-4", "method.keep=9", "method.weights=random:3"])
    assert changed == {"lr": 5e-4, "method": {"keep": 9, "pool": "resize", "weights": "random:3"}}
    assert override(given, ["method={keep: 1}"])["method"] == {"keep": 1}
    assert given == {"lr": 1.0, "method": {"keep": 4, "pool": "resize"}}
    for wrong, says in (("lr", "'lr' sets nothing"), ("lr.a=1", "lr has no options"), ("rl=1", "no setting 'rl'")):
        with pytest.raises(ValueError, match=says):
            override(given, [wrong])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "how", "processes", "options"),
    [
        ("train_tokenflex.py", "--cpu", 1, ["script.warm_start=2"]),
        ("train_tokenflex.py", "--multi_gpu", 2, ["script.warm_start=2", "--train-decoder"]),
        ("train_atp.py", "--cpu", 1, []),
        ("train_atp.py", "--multi_gpu", 2, []),
    ],
)
def test_accelerate_launch_with_two_processes_on_the_cpu(script, how, processes, options, tmp_path):
    """With `--cpu` accelerate starts one process, whatever is asked; with `--multi_gpu` and this variable it is two."""
    command = [sys.executable, "-m", "accelerate.commands.launch", how, "--num_processes", "2", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += [str(SCRIPTS / script), "--out", str(tmp_path), "device=cpu", "workers=0", "log_every=1", *options]
    command += ["pictures=8", "questions=2", "steps=2", "batch=1"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert list(column(tmp_path)) == [1, 2]
    assert torch.load(tmp_path / "last.pt", weights_only=True)["processes"] == processes
    slim = vlmslim.from_pretrained(tmp_path / "final")
    assert [f"train_{name}.py" for name in slim.trained] == [script]
