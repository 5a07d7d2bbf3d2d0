"""`vlmslim run` through the real lmms-eval, on a tiny random LLaVA and a dozen questions."""

import json
import os
import re
import subprocess
import sys

import pytest
import yaml

pytest.importorskip("lmms_eval", reason="the extra vlmslim[eval] is not installed")

from lmms_fixtures import checkpoint, metrics, write_task

from vlmslim.cost.flops import DecoderShape, kv_bytes
from vlmslim.engine.families import encoder_layers
from vlmslim.evaluation.answering import Answerer
from vlmslim.evaluation.config import RunConfig, load_config
from vlmslim.evaluation.effect import check_effect
from vlmslim.evaluation.errors import CellError, ConfigError
from vlmslim.evaluation.export import export_cells
from vlmslim.evaluation.harness import Harness
from vlmslim.evaluation.run import run
from vlmslim.evaluation.store import Store
from vlmslim.evaluation.tasks import Tasks
from vlmslim.evaluation.variants import Variant
from vlmslim.registry import build

UTILS = """
def images(doc):
    return [doc["image"].convert("RGB")]


def score(doc, results):
    return {"length": float(len(results[0])), "acc": float(len(results[0]) % 2)}
"""
LABELS = ["none", "random-4", "divprune-4", "fastv-4", "divprune-8+fastv-4"]
STAGES = [{"method": "divprune", "keep": 8}, {"method": "fastv", "keep": 4}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of 16 visual tokens, and a group of two tasks."""
    folder = tmp_path_factory.mktemp("micro")
    tasks = folder / "tasks"
    tasks.mkdir()
    (tasks / "utils.py").write_text(UTILS)
    words = {"max_new_tokens": 6, "until": ["\n\n"], "do_sample": False}
    score = "process_results: !function utils.score"
    write_task(tasks, "micro_words", score, generation_kwargs=words, metric_list=metrics("length", "acc"))
    write_task(tasks, "micro_choice", output_type="multiple_choice", doc_to_choice="choices")
    (tasks / "micro.yaml").write_text(yaml.safe_dump({"group": "micro", "task": ["micro_words", "micro_choice"]}))
    config = {
        "model": {"pretrained": checkpoint("llava", folder), "device": "cpu"},
        "tasks": ["micro"],
        "include_path": [str(tasks)],
        "budgets": [4],
        "baselines": ["random"],
        "methods": ["divprune", "fastv", {"stages": STAGES}],
        "batch_size": 4,
        "limit": 6,
        "timing": {"prompts": 3, "repeats": 2, "new_tokens": 2},
        "output": str(folder / "whole"),
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="module")
def whole(folder):
    """A run without an interruption."""
    return run(load_config(folder / "config.yaml"))


def answers(output) -> dict:
    """Every answer of a run."""
    store = Store(output)
    pairs = [
        (row["label"], task["task"]) for row in store.run["config"]["rows"] for task in store.run["config"]["tasks"]
    ]
    return {pair: [sample["filtered_resps"] for sample in store.samples(*pair)] for pair in pairs}


def test_the_leaderboard(whole):
    assert [row.label for row in whole.rows] == LABELS
    assert whole.tasks == ["micro_words", "micro_choice"]
    rows = {row.label: row for row in whole.rows}
    for row in whole.rows:
        assert row.scores["micro_choice"].questions == 6
        assert row.scores["micro_choice"].stderr is not None
        assert row.times.ttft_ms > 0 and row.times.decode_ms > 0
    assert (rows["none"].times.ttft_ratio, rows["none"].times.decode_ratio, rows["none"].flops_ratio) == (1, 1, 1)
    assert (rows["none"].cost.kept, rows["none"].cost.equivalent, rows["none"].cost.requested) == (16, 16, 16)
    assert (rows["divprune-4"].cost.kept, rows["divprune-4"].cost.equivalent) == (4, 4)
    assert rows["fastv-4"].cost.equivalent == (16 + 16 + 4 + 4) / 4
    assert rows["divprune-8+fastv-4"].cost.equivalent == (8 + 8 + 4 + 4) / 4
    assert rows["divprune-4"].flops_ratio < rows["fastv-4"].flops_ratio < 1


def test_kv_bytes_equal_theory(whole, folder):
    store = Store(folder / "whole")
    shape = DecoderShape(**store.run["config"]["checkpoint"]["shape"])
    for label in LABELS:
        receipt = store.cell(label, "micro_words")["receipt"]
        lengths = [v + receipt["text_tokens"] for v in receipt["visual_tokens_per_layer"]]
        assert receipt["kv_bytes"] == pytest.approx(kv_bytes(shape, lengths, 4))


def test_methods_change_answers(whole, folder):
    given = answers(folder / "whole")
    assert given["none", "micro_words"] != given["divprune-4", "micro_words"]


@pytest.mark.parametrize("task", ["micro_words", "micro_choice"])
def test_methods_that_take_turns_answer_as_each_alone_and_share_the_tower(folder, whole, tmp_path, task):
    """Also `downsample`, which runs the tower itself, and a method that reads two layers of the tower."""
    config = load_config(folder / "config.yaml", output=tmp_path / "turns")
    more = [{"method": "hiprune", "keep": 4}, {"method": "downsample", "keep": 4}]
    variants = [*config.variants(), *(Variant(stage["method"], (stage,)) for stage in more)]
    loaded, runs = Harness(config), []
    loaded.load()
    encoder_layers(loaded.model.model)[-1].register_forward_hook(lambda *_: runs.append(1))
    together = loaded.answer(variants, task)
    shared, runs[:] = len(runs), []
    alone = [loaded.answer([variant], task)[variant.label] for variant in variants]
    assert shared < len(runs) / 2
    for variant, one in zip(variants, alone, strict=True):
        ours = together[variant.label]
        assert [ours.results[i] for i in range(6)] == [one.results[i] for i in range(6)]
        a, b = (x.receipt.summary() | {"selection_ms": None} for x in (ours, one))
        assert a == b and ours.method_flops == one.method_flops
        if variant.label in LABELS:
            stored = [sample["filtered_resps"] for sample in Store(folder / "whole").samples(variant.label, task)]
            graded = [sample["filtered_resps"] for sample in loaded.cell(variant, task, ours).samples]
            assert json.loads(json.dumps(graded)) == stored


def test_the_model_is_left_unpatched(folder, whole, monkeypatch):
    config = load_config(folder / "config.yaml", output=folder / "failing")
    loaded = []
    answer = Answerer.answer

    def failing(self, batch):
        loaded.append(self.model)
        if str(self.model._vlmslim).startswith("DivPrune"):
            raise MemoryError("no space")
        return answer(self, batch)

    monkeypatch.setattr(Answerer, "answer", failing)
    with pytest.raises(CellError, match="divprune-4 on micro_words failed: RequestError: .*MemoryError: no space"):
        run(config)
    assert len({id(model) for model in loaded}) == 1  # loaded once
    store = Store(config.output)
    assert [label for label in LABELS if store.cell(label, "micro_words")] == ["none", "random-4", "fastv-4"]
    assert getattr(loaded[0], "_vlmslim", None) is None


def test_an_interrupted_run_resumes_to_the_same_answers(folder, whole, monkeypatch):
    config = load_config(folder / "config.yaml", output=folder / "interrupted")
    answer = Answerer.answer

    def interrupted(self, batch):
        if batch.answers and str(self.model._vlmslim).startswith("DivPrune"):
            raise KeyboardInterrupt
        return answer(self, batch)

    with monkeypatch.context() as patched:
        patched.setattr(Answerer, "answer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    done = {p: p.stat().st_mtime_ns for p in config.output.rglob("cells/*/*.json")}
    assert len(done) == len(LABELS)  # all on the first task
    board = run(config)
    assert all(p.stat().st_mtime_ns == when for p, when in done.items())
    assert answers(folder / "interrupted") == answers(folder / "whole")
    assert [row.scores for row in board.rows] == [row.scores for row in whole.rows]
    assert [row.cost.flops for row in board.rows] == [row.cost.flops for row in whole.rows]


def test_unknown_tasks_name_the_nearest(folder):
    text = (folder / "config.yaml").read_text().replace("- micro\n", "- micro_wrods\n")
    (folder / "typo.yaml").write_text(text)
    with pytest.raises(ConfigError, match="no task 'micro_wrods'. Did you mean 'micro_words'?"):
        run(load_config(folder / "typo.yaml", output=folder / "typo"))


def test_unknown_metrics_are_told_before_anything_is_evaluated(folder):
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["tasks"] = [{"task": "micro_words", "metric": "lenght"}]
    (folder / "metric.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(
        ConfigError, match="micro_words reports no metric 'lenght'. Did you mean 'length'. It has length, acc"
    ):
        run(load_config(folder / "metric.yaml", output=folder / "metric"))


def test_the_own_entry_of_a_task_says_more_than_its_groups(folder):
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["tasks"] = [{"task": "micro", "group": "OCR"}, {"task": "micro_words", "metric": "acc"}]
    (folder / "own.yaml").write_text(yaml.safe_dump(config))
    leaves = {leaf.task: leaf for leaf in Tasks(load_config(folder / "own.yaml")).leaves}
    assert list(leaves) == ["micro_words", "micro_choice"]
    assert (leaves["micro_words"].metric, leaves["micro_choice"].group) == ("acc", "OCR")


def test_everything_is_opened_before_the_first_cell(folder, tmp_path):
    """Weights of another model, and data that are not there, in the last row and the last task."""
    text = (folder / "tasks" / "micro_words.yaml").read_text()
    (tmp_path / "lost.yaml").write_text(
        text.replace("questions.parquet", "gone.parquet").replace("micro_words", "lost")
    )
    (tmp_path / "utils.py").write_text(UTILS)
    config = load_config(folder / "config.yaml", output=tmp_path / "out")
    other = {"method": "tokenflex", "keep": 4, "weights": "bundled/tiny-tokenflex"}
    config = RunConfig.model_validate(
        config.model_dump()
        | {"tasks": ["micro_words", "lost"], "methods": ["divprune", other], "baselines": False}
        | {"include_path": [folder / "tasks", tmp_path], "model": config.model.arguments()}
    )
    with pytest.raises(ConfigError) as refused:
        run(config)
    flex, lost = str(refused.value).splitlines()
    assert flex.startswith("tokenflex-4") and "was trained for another backbone" in flex
    assert lost.startswith("tasks: lost cannot be opened: ") and "gone.parquet" in lost
    assert not (tmp_path / "out" / "run.json").exists() and not (tmp_path / "out" / "cells").exists()


def test_pictures_that_are_swapped_under_the_same_questions_are_noticed(folder, tmp_path):
    config = load_config(folder / "config.yaml")
    before = Tasks(config).definition("micro_words")
    data = folder / "tasks" / "questions.parquet"
    kept = data.read_bytes()
    data.write_bytes(kept[:5000] + bytes([kept[5000] ^ 1]) + kept[5001:])
    try:
        now = Tasks(config).definition("micro_words")
    finally:
        data.write_bytes(kept)
    assert {part for part in now if now[part] != before[part]} == {"data in questions.parquet"}
    assert "functions in utils.py" in now


def test_a_stage_that_does_nothing_after_one_that_keeps_all_is_noticed(folder, tmp_path, monkeypatch):
    stages = [{"method": "divprune", "keep": 1.0}, {"method": "fastv", "keep": 4}]
    config = load_config(folder / "config.yaml", output=tmp_path / "idle")
    loaded = Harness(config)
    variant = Variant("idle", tuple(stages))
    assert loaded.evaluate(variant, "micro_words").receipt["had_effect"]
    fastv = type(build(stages[1]))
    monkeypatch.setattr(fastv, "retain", lambda self, tokens: tokens.image >= 0)
    monkeypatch.setattr(fastv, "known_counts", lambda self, tokens: None)
    for task in ("micro_words", "micro_choice"):
        with pytest.raises(RuntimeError, match=r"stage 2 \(fastv, before layer 2\) acted on 0 of"):  # the model's own
            check_effect(loaded.evaluate(variant, task).receipt)
    assert getattr(loaded.model, "_vlmslim", None) is None
    everything = Variant("all", ({"method": "divprune", "keep": 1.0}, {"method": "fastv", "keep": 16}))
    assert not loaded.evaluate(everything, "micro_words").receipt["had_effect"]


def test_the_work_of_the_method_is_counted(folder, whole):
    """DivPrune multiplies 16 tokens with each other; a random subset takes no matrix product."""
    store = Store(folder / "whole")
    hidden = store.run["config"]["checkpoint"]["shape"]["hidden"]
    for task in ("micro_words", "micro_choice"):
        counted = {label: store.cell(label, task)["method_flops"] for label in LABELS}
        assert counted["none"] == counted["random-4"] == 0
        assert counted["divprune-4"] == 2 * 16 * 16 * hidden
        assert counted["divprune-8+fastv-4"] > counted["divprune-4"] and counted["fastv-4"] > 0


@pytest.fixture(scope="module")
def exported(folder, whole):
    config = load_config(folder / "config.yaml")
    return export_cells(config, folder / "plain")


def test_every_cell_is_exported(exported):
    assert [path.stem for path in exported] == [f"{a}__{b}" for a in LABELS for b in ("micro_words", "micro_choice")]
    plain = yaml.safe_load(exported[-1].read_text())
    assert plain["model"] == "vlmslim"
    assert plain["limit"] == 6
    assert plain["seed"] == [0, 0, 0, 0]


@pytest.mark.slow
def test_exported_cells_give_the_same_numbers(folder, exported, tmp_path):
    chosen = [path for path in exported if path.stem in ("divprune-8+fastv-4__micro_words", "random-4__micro_choice")]
    merged = tmp_path / "both.yaml"  # lmms-eval takes a list of configurations, which loads the libraries once
    merged.write_text(yaml.safe_dump([yaml.safe_load(path.read_text()) for path in chosen]))
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "lmms_eval", "--config", str(merged)]
    done = subprocess.run(line, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    store = Store(folder / "whole")
    for path in chosen:
        label, task = path.stem.split("__")
        (results,) = (folder / "plain" / "results" / path.stem).rglob("*_results.json")
        theirs = json.loads(results.read_text())["results"][task]
        ours = store.cell(label, task)["lmms_eval"]["results"][task]
        assert {k: v for k, v in theirs.items() if "," in k} == {k: v for k, v in ours.items() if "," in k}
        (samples,) = (folder / "plain" / "results" / path.stem).rglob("*_samples_*.jsonl")
        given = [json.loads(line)["filtered_resps"] for line in samples.read_text().splitlines()]
        ours = [sample["filtered_resps"] for sample in store.samples(label, task)]
        # lmms-eval writes numbers as text, and a list of one answer as the answer
        assert re.sub(r"[\[\]']", "", str(given)) == re.sub(r"[\[\]']", "", str(ours))
