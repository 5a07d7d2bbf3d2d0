"""Whole runs of lmms-eval with our model: receipts, metrics, the stock class's answers, the command line."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("lmms_eval", reason="the extra vlmslim[eval] is not installed")

from lmms_eval.tasks import TaskManager
from lmms_fixtures import COLOURS, FAMILIES, checkpoint, metrics, run_lmms_eval, stock_answers, write_task
from lmms_requests import forced
from loguru import logger

from vlmslim.evaluation.conversation import Prompter
from vlmslim.evaluation.lmms_model import VlmSlim, VlmSlimChat

# --- whole runs -------------------------------------------------------------------------------------------------------


FUNCTIONS = """
def images(doc):
    return [doc["image"]]

def score(doc, results):
    return {"hit": float(results[0].strip() == doc["answer"])}

def messages(doc):
    content = [{"type": "text", "text": "Hello <image>."}, {"type": "image", "url": doc["image"]}]
    return [{"role": "user", "content": content}]
"""


@pytest.fixture(scope="session")
def tasks(folder) -> Path:
    """A directory of task files: quiz, quiz_messages and quiz_choice."""
    path = folder / "tasks"
    path.mkdir()
    (path / "utils.py").write_text(FUNCTIONS)
    short = {"generation_kwargs": {"max_new_tokens": 6, "do_sample": False}, "metric_list": metrics("hit")}
    score = "process_results: !function utils.score"
    write_task(path, "quiz", score, **short)
    write_task(path, "quiz_messages", score, "doc_to_messages: !function utils.messages", **short)
    write_task(path, "quiz_choice", output_type="multiple_choice", doc_to_choice="choices")
    return path


@pytest.fixture
def evaluate(tasks, monkeypatch, tmp_path):
    """Runs lmms-eval on the test tasks, offline."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    manager = TaskManager("ERROR", include_path=str(tasks), include_defaults=False)

    return partial(run_lmms_eval, manager=manager)


def test_a_run_leaves_a_receipt_and_an_unpatched_model(make, evaluate):
    lm = make(method="random", keep=4, batch_size=4)
    model = lm.model
    results, _ = evaluate(lm, ["quiz", "quiz_choice"])
    assert lm.receipt["kept"] == 4 and lm.receipt["visual_tokens"] == 16 and lm.receipt["had_effect"]
    assert lm.receipt["images"] == 12 + 12  # the choices of a question share a prefill
    assert results["throughput"]["avg_kept"] == 4
    assert results["results"]["quiz_choice"]["acc,none"] is not None
    assert not hasattr(lm, "model")  # lmms-eval lets go of it ...
    again = VlmSlim(model, processor=lm.processor, method="divprune", keep=2)  # ... and it can be used again
    assert again.model is model and "DivPrune" in again.receipt["method"]


def test_answers_of_the_cache_bring_no_receipt(make):
    """A rerun with lmms-eval's `--use_cache` asks the model nothing; zeros would look like a result."""
    model, lines = make(method="divprune", keep=4), []
    sink = logger.add(lines.append, format="{message}")
    assert model.generate_until([]) == []
    model.clean()
    logger.remove(sink)
    assert any("came from lmms-eval's cache" in line for line in lines)
    assert not any(line.startswith("receipt:") for line in lines)


def test_multiple_choice_takes_the_likeliest_choice(make, evaluate):
    lm = make(batch_size=8)
    losses = [[forced(lm, i, colour, one=True)[0] for colour in COLOURS] for i in range(12)]
    results, answers = evaluate(lm, ["quiz_choice"])
    np.testing.assert_allclose([[loss for loss, _ in row] for row in answers["quiz_choice"]], losses, atol=1e-4)
    hits = [np.argmin(row) == i % 4 for i, row in enumerate(losses)]
    assert results["results"]["quiz_choice"]["acc,none"] == pytest.approx(np.mean(hits))
    assert results["results"]["quiz_choice"]["acc_stderr,none"] > 0


def test_messages_that_a_task_builds_are_honoured_by_both_protocols(make, evaluate, monkeypatch):
    prompts, render = [], Prompter.render

    def spy(self, messages):
        prompts.append(render(self, messages))
        return prompts[-1]

    monkeypatch.setattr(Prompter, "render", spy)
    both = [evaluate(make(cls=cls, batch_size=4), ["quiz_messages"])[1] for cls in (VlmSlim, VlmSlimChat)]
    assert both[0] == both[1]
    assert {prompt.text for prompt in prompts} == {"USER: Hello <image>. ASSISTANT:"}


@pytest.mark.parametrize("family", FAMILIES)
def test_unpatched_it_answers_as_the_stock_class(make, evaluate, folder, family, monkeypatch):
    expected = stock_answers(monkeypatch, checkpoint(family, folder), ["quiz"], evaluate.keywords["manager"])
    assert len({answer for (answer,) in expected["quiz"]}) > 5
    for method in ({}, {"method": "uniform", "keep": 1.0}):
        assert evaluate(make(family, batch_size=4, **method), ["quiz"])[1] == expected


# --- command line -----------------------------------------------------------------------------------------------------


def command(*arguments, launcher=("-m",), **env) -> str:
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | env
    line = [sys.executable, "-W", "ignore", *launcher, "lmms_eval", *map(str, arguments)]
    done = subprocess.run(line, env=env, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def arguments(folder, tasks, *extra) -> list:
    model = f"pretrained={checkpoint('llava', folder)},method=divprune,keep=4"
    return ["--model", "vlmslim", "--model_args", model, "--include_path", tasks, "--batch_size", 4, *extra]


@pytest.mark.slow
def test_the_command_line(folder, tasks, tmp_path):
    names = ["--tasks", "quiz,quiz_choice", "--limit", 5, "--verbosity", "DEBUG", "--output_path", tmp_path]
    out = command(*arguments(folder, tasks, *names), HF_DATASETS_CACHE=str(tmp_path / "cache"))
    assert "quiz_choice" in out and '"kept": 4.0' in out
    assert list(tmp_path.rglob("*results.json"))


@pytest.mark.slow
def test_two_processes_give_the_results_of_one(folder, tasks, tmp_path, make, evaluate):
    # `--cpu` would start a single process; accelerate starts several on a CPU only in this way.
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m"]
    env = {"ACCELERATE_USE_CPU": "true", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    names = ["--tasks", "quiz,quiz_choice", "--limit", 7, "--output_path", tmp_path, "--log_samples"]
    out = command(*arguments(folder, tasks, *names), launcher=launcher, **env)
    assert '"images": 40' in out  # 7 + 28 requests and 1 + 4 that even out the shares, counted over both processes
    expected, answers = evaluate(make(method="divprune", keep=4, batch_size=4), ["quiz", "quiz_choice"], limit=7)
    (file,) = tmp_path.rglob("*_results.json")
    results = json.loads(file.read_text())["results"]
    for name, metric in (("quiz", "hit,none"), ("quiz_choice", "acc,none")):
        assert results[name][metric] == expected["results"][name][metric]
        (file,) = tmp_path.rglob(f"*_samples_{name}.jsonl")
        samples = {s["doc_id"]: s["filtered_resps"] for s in map(json.loads, file.read_text().splitlines())}
        if name == "quiz":
            # lmms-eval logs a list of one answer as the answer
            assert [[samples[i]] if isinstance(samples[i], str) else samples[i] for i in range(7)] == answers[name]
        else:
            losses = [[loss for loss, _ in row] for row in answers[name]]
            np.testing.assert_allclose([[float(loss) for loss, _ in samples[i]] for i in range(7)], losses, atol=1e-4)
