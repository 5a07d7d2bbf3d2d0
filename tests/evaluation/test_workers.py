"""`vlmslim run --workers`: any number of workers, shards, kills and a dead driver give the cells of one process."""

import json
import re
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

pytest.importorskip("lmms_eval", reason="the extra vlmslim[eval] is not installed")

from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_fixtures import checkpoint, metrics, write_task

from vlmslim.evaluation.cells import Sample
from vlmslim.evaluation.config import RunConfig
from vlmslim.evaluation.errors import CellError, ConfigError
from vlmslim.evaluation.harness import Answers, Harness
from vlmslim.evaluation.queries import Score
from vlmslim.evaluation.run import run
from vlmslim.evaluation.store import Store
from vlmslim.evaluation.workers import RayHarness, check_workers
from vlmslim.io import provenance
from vlmslim.receipt import Image, Prefill, Receipt, StagePass

MORTAL = """
import os, signal
from dataclasses import dataclass
from vlmslim.compressor import Compressor

@dataclass
class Mortal(Compressor):
    \"\"\"Keep the first tokens; kill the process while there are lives in a folder.\"\"\"
    keep: int
    lives: str = ""

    def compress(self, image):
        for life in os.listdir(self.lives):
            os.remove(os.path.join(self.lives, life))
            os.kill(os.getpid(), signal.SIGKILL)
        import torch
        return image.pick(torch.arange(self.keep, device=image.features.device))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, a task of texts and one of choices, and a method that dies on demand."""
    if find_spec("ray") is None:  # vlmslim sets the environment of Ray before it imports Ray
        pytest.skip("the extra vlmslim[ray] is not installed")
    folder = tmp_path_factory.mktemp("workers")
    (folder / "mortal.py").write_text(MORTAL)
    (folder / "lives").mkdir()
    sampled = {"max_new_tokens": 4, "do_sample": True, "temperature": 1.5}  # shards may not change what is drawn
    write_task(folder, "texts", generation_kwargs=sampled, metric_list=metrics("exact_match"))
    write_task(folder, "choices", output_type="multiple_choice", doc_to_choice="choices")
    return folder


@pytest.fixture(scope="module")
def config(folder):
    path = checkpoint("llava", folder)

    def make(output: str, lives: int = 0, **changes) -> RunConfig:
        for life in range(lives):
            (folder / "lives" / str(life)).touch()
        method = {"method": f"{folder}/mortal.py:Mortal", "keep": 5, "label": "mortal", "lives": str(folder / "lives")}
        settings = {
            "model": {"pretrained": path, "device": "cpu", "dtype": "float32"},
            "tasks": ["texts", "choices"],
            "methods": [method, {"method": "divprune", "keep": 4}],
            "baselines": False,
            "include_path": [folder],
            "batch_size": 2,
            "limit": 10,
            "timing": None,
            "resources": {"shard": 4},
            "output": folder / output,
        }
        return RunConfig.model_validate(settings | changes)

    return make


@pytest.fixture(scope="module")
def whole(config):
    """The cells of one process."""
    made = config("whole", resources={})
    run(made)
    return cells(made.output)


def cells(output: Path) -> dict:
    """Read all cells, without their times, the folder they are in, and addresses of functions."""
    store, found = Store(output), {}
    for path in sorted(output.glob("cells/*/*.json")):
        record = store.cell(path.parent.name, path.stem)
        del record["seconds"], record["receipt"]["selection_ms"], record["lmms_eval"]["config"]["resolved_cli_args"]
        text = re.sub(r" at 0x[0-9a-f]+", "", json.dumps(record))
        found[path.parent.name, path.stem] = text, path.with_suffix(".jsonl").read_bytes()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("workers, lives", [(1, 0), (2, 1), (4, 0)])
def test_workers_shards_and_a_kill_change_no_byte(config, whole, workers, lives):
    made = config(f"workers-{workers}", lives)
    run(made, workers=workers)
    assert cells(made.output) == whole
    assert len(list((made.output / "workers").glob("worker-*.log"))) == workers


@pytest.mark.slow
def test_a_unit_that_kills_three_workers_is_reported_and_the_rest_goes_on(config, whole):
    made = config("killer", lives=5, resources={})  # two units, which take turns until one has killed three workers
    with pytest.raises(CellError, match=r"killed 3 workers \(.*\); its log .*worker-0.log ends with\n") as error:
        run(made, workers=1)
    lost = str(error.value).split(" failed")[0]
    assert lost in ("texts", "choices")
    assert cells(made.output) == {place: cell for place, cell in whole.items() if place[1] != lost}
    run(made)  # without workers
    assert cells(made.output) == whole


@pytest.mark.slow
def test_a_worker_that_dies_at_a_single_question_is_replaced(config):
    made = config("single", lives=1)
    harness = RayHarness(made, workers=1)
    try:
        cell = harness.ask(made.variants()[1], "texts", Sample(0, 2))
    finally:
        harness.close()
    assert len(cell.samples) == 2


def kill_driver(made: RunConfig, ready: str, *options: str) -> None:
    """Start a run with some options, kill it with -9 when files match `ready`, and check that no worker outlives it."""
    path = made.output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(made.model_dump(mode="json", exclude={"model"}) | {"model": made.model.arguments()}))
    command = [sys.executable, "-m", "vlmslim.cli", "run", str(path), *options]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as driver:
        while not list(made.output.glob(ready)):
            assert driver.poll() is None
            time.sleep(0.05)
        driver.send_signal(signal.SIGKILL)
    pids = [int(log.read_text().split()[4]) for log in (made.output / "workers").glob("worker-*.log")]
    deadline = time.monotonic() + 120
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not any(alive(pid) for pid in pids)


@pytest.mark.slow
def test_a_driver_that_dies_leaves_no_process_and_resumes(config, whole):
    made = config("driver")
    kill_driver(made, "cells/*/*.json", "--workers", "2")
    done = {p: p.stat().st_mtime_ns for p in made.output.glob("cells/*/*.json")}
    run(made, workers=2)
    assert all(p.stat().st_mtime_ns == when for p, when in done.items())
    assert cells(made.output) == whole


@pytest.mark.slow
def test_parts_that_a_dead_driver_has_are_not_asked_again(config, whole):
    made = config("parts", resources={"shard": 2})
    kill_driver(made, "parts/divprune-4/*/*.json", "--workers", "2")  # the last row of a part
    kept = {path.parts[-3:] for path in made.output.glob("parts/*/*/*.json")}
    assert kept
    for change, message in (
        ({"seed": 1}, "holds results of another run"),
        ({"methods": [{"method": "divprune", "keep": 5, "label": "mortal"}]}, "changed in the middle of the run"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(config("parts", **change), workers=2)
    for log in (made.output / "workers").glob("worker-*.log"):
        log.unlink()
    run(made, workers=2)
    assert cells(made.output) == whole and not (made.output / "parts").exists()
    logs = "".join(log.read_text() for log in (made.output / "workers").glob("worker-*.log"))
    asked = re.findall(r"^(\w+) (\d+-of-\d+): (.*)$", logs, re.MULTILINE)
    again = {(label, task, f"{part}.json") for task, part, labels in asked for label in labels.split(", ")}
    assert again and not again & kept


@pytest.mark.slow
def test_a_process_without_workers_keeps_its_parts_too(config, whole):
    made = config("alone", resources={"shard": 2})
    kill_driver(made, "parts/divprune-4/*/*.json")
    kept = {path.parts[-3:] for path in made.output.glob("parts/*/*/*.json")}
    asked = set()

    class Noted(Harness):
        def answer(self, variants, task, part=0, parts=1, bar=None):
            asked.update((variant.label, task, f"{part + 1}-of-{parts}.json") for variant in variants)
            return super().answer(variants, task, part, parts, bar)

    run(made, harness=Noted)
    assert kept and asked and not asked & kept
    assert cells(made.output) == whole and not (made.output / "parts").exists()


def alive(pid: int) -> bool:
    """Tell if a process runs; one that only waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("given", ["0", "-1", "two", "1.5", "ray://", "http://head"])
def test_wrong_numbers_of_workers(given):
    with pytest.raises(ConfigError, match="give a number from 1 up, auto, or ray://HEAD:10001"):
        check_workers(given)


def test_ray_that_is_not_installed(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r'--workers needs Ray: pip install "vlmslim\[ray\]"'):
        run(config("no-ray"), workers=2)


def test_more_gpus_than_there_are(config, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(ConfigError, match="3 workers of 2 GPUs need 6 GPUs, and there are 1; give fewer --workers"):
        RayHarness(config("gpus", resources={"gpus_per_worker": 2}), workers=3).load()


@pytest.mark.slow
def test_a_worker_with_other_libraries_is_refused(config, monkeypatch):
    versions = provenance.versions() | {"transformers": "5.0.0"}
    monkeypatch.setattr(provenance, "versions", lambda: versions)  # here; the worker is another process
    with pytest.raises(
        ConfigError, match=r"worker 0 on .* has transformers \S+ and not 5.0.0; give all nodes the same"
    ):
        run(config("versions"), workers=1)


def test_a_limit_that_splits_nothing(config, whole):
    made = config("unsplit", resources={"shard": 500})
    harness = RayHarness(made, workers=1)
    with pytest.raises(ConfigError, match="resources.shard: 500 splits nothing, because no task has more than 500"):
        harness.check_split({"texts": made.variants(), "choices": made.variants()})
    harness.check_split({"texts": made.variants()})  # the other task is finished, and may have been split
    units = RayHarness(config("split"), workers=1).units({"choices": made.variants(), "texts": made.variants()})
    assert [(unit.part, unit.parts) for unit in units if unit.task == "texts"] == [(0, 3), (1, 3), (2, 3)]


@pytest.mark.parametrize(
    "kind, result",
    [("generate_until", GenerationResult("red", TokenCounts(21, 2))), ("loglikelihood", Score(0.1 + 0.2, True))],
)
def test_answers_and_receipts_survive_the_way_to_the_disk(kind, result):
    receipt = Receipt("M()", "original", "sdpa", "float32", 8, 2, (("fastv", (1,)),))
    stage = StagePass([16], [4], acted=1, keeps_all=False, decides=False)
    receipt.saw_prefill(Prefill([[Image(16, 4, 4)]], [5], [[16], [4]], [21, 9], [21, 9], [stage]))
    given = Answers(kind, "hash", {3: result}, receipt, {"protocol": "hf"}, 1.5, 0.25, "a card", 4)
    back = Answers.of_record(json.loads(json.dumps(given.as_record())))
    assert back == given and type(back.results[3]) is type(result)
    assert back.receipt.summary() == receipt.summary()
    merged, expected = (Receipt.pooled([one, receipt]).summary() for one in (back.receipt, receipt))
    assert merged == expected


def test_parts_of_other_questions_are_not_merged():
    with pytest.raises(RuntimeError, match="asks other questions on another machine"):
        Answers.merged([Answers("loglikelihood", "a"), Answers("loglikelihood", "b")])


@pytest.mark.slow
def test_a_head_node_that_does_not_answer(config):
    with pytest.raises(ConfigError, match="no Ray head node answers at ray://127.0.0.1:9"):
        run(config("head"), workers="ray://127.0.0.1:9")
