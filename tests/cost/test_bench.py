"""`vlmslim bench`: what its record says, how it is shown, and what it refuses."""

import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from snapshots import changes, model_state
from tiny import FAMILIES, tiny
from typer.main import get_command
from typer.testing import CliRunner

from vlmslim.cli import app
from vlmslim.cost.bench.arguments import model_of, parse_batches, parse_numbers, parse_peer, parse_size
from vlmslim.cost.bench.report import file_in, markdown, realised_share, summary, write
from vlmslim.cost.bench.run import Workload, bench, default_budgets, with_budgets
from vlmslim.registry import parse_method

QUICK = Workload(text_tokens=9, new_tokens=2, repeats=2)
TIMES = ("prefill", "ttft", "decode", "latency")
ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "assets" / "bench"
PEER = """
from vlmslim.methods.random import Random

class Theirs(Random):
    pass
"""


def rows(record: dict, scenario: int = 0) -> dict:
    return {row["label"]: row for row in record["scenarios"][scenario]["rows"]}


@pytest.fixture(scope="module")
def record() -> dict:
    methods = [parse_method(text) for text in ("divprune", "fastv:layer=1", "drop_visual:layer=2:tau=None")]
    work, peers = replace(QUICK, batches=(1, 2)), [parse_method("divprune:keep=8")]
    return bench(tiny("llava"), methods, [8, 0.25], work, peers=peers, name="tiny")


def test_a_record_has_every_method_at_every_budget(record):
    labels = ["unpatched", "divprune-8", "divprune-0.25", "fastv-8-layer=1", "fastv-0.25-layer=1"]
    for scenario, batch in zip(record["scenarios"], (1, 2), strict=True):
        assert scenario["batch"] == batch and scenario["visual_tokens"] == 16 and scenario["text_tokens"] == 9
        found = {row["label"]: row["peer"] for row in scenario["rows"]}
        ours = dict.fromkeys([*labels, "drop_visual-layer=2-tau=None"], False)
        assert list(found.items()) == [*ours.items(), ("divprune-8 (peer)", True)]


@pytest.mark.parametrize("scenario", [0, 1])
def test_counts_are_exact(record, scenario):
    found = rows(record, scenario)
    per_layer = {label: row["visual_tokens_per_layer"] for label, row in found.items()}
    assert per_layer["unpatched"] == [16] * 4
    assert per_layer["divprune-8"] == [8] * 4
    assert per_layer["fastv-0.25-layer=1"] == [16, 4, 4, 4]
    assert per_layer["drop_visual-layer=2-tau=None"] == [16, 16, 0, 0]
    assert found["fastv-0.25-layer=1"]["equivalent_tokens"] == 7
    for row in found.values():
        assert row["kv_bytes"] == row["kv_theory_bytes"] > 0
        for part in ("tower", "projector", "language_model", "lm_head", "method"):
            assert row["flops"][part] == pytest.approx(row["flops_counted"][part], rel=0.01)
    assert found["unpatched"]["flops"]["method"] == 0 < found["divprune-8"]["flops"]["method"]
    assert found["unpatched"]["peak_over_unpatched"] == 1


def test_times_are_medians_with_spreads_and_ratios_in_pairs(record):
    for row in rows(record, 1).values():
        assert row["tokens_per_second"] == pytest.approx(2000 / row["decode_ms"]["median"])
        assert 0 < row["encode_ms"]["median"] < row["ttft_ms"]["median"]
        assert row["prefill_ms"]["median"] < row["ttft_ms"]["median"] < row["latency_ms"]["median"]
        for name in TIMES:
            for kind in ("ms", "over_ideal", "over_unpatched"):
                spread = row[f"{name}_{kind}"]
                assert spread["median"] > 0 and spread["iqr"] >= 0
    unpatched, divprune = rows(record)["unpatched"], rows(record)["divprune-8"]
    assert all(unpatched[f"{name}_over_unpatched"] == {"median": 1, "iqr": 0} for name in TIMES)
    assert unpatched["selection_ms"]["median"] == 0 < divprune["selection_ms"]["median"]


def test_where_it_was_measured_is_recorded(record):
    assert record["model"]["name"] == "tiny" and record["model"]["dtype"] == "float32"
    assert record["versions"]["torch"] == version("torch") and record["versions"]["python"]
    assert "threads" in record["device"]
    assert record["workload"]["repeats"] == 2


def row_of(flops: float, time: float) -> dict:
    return {"flops": {"language_model": flops}, "prefill_over_unpatched": {"median": time}}


def test_the_realised_share_is_the_saving_of_time_over_that_of_flops():
    unpatched = row_of(200, 1)
    assert realised_share(row_of(100, 0.5), unpatched) == 1
    assert realised_share(row_of(100, 0.75), unpatched) == 0.5
    assert realised_share(row_of(100, 1.25), unpatched) == -0.5
    assert realised_share(unpatched, unpatched) is None


def test_the_summary_is_one_line_with_every_row(record):
    line = summary(record)
    assert "\n" not in line
    found = json.loads(line)["rows"]
    assert [row["label"] for row in found] == [row["label"] for s in record["scenarios"] for row in s["rows"]]
    by_label = {row["label"]: row for row in found if row["batch"] == 2}
    assert [by_label[name]["budget"] for name in ("unpatched", "fastv-0.25-layer=1")] == [None, 0.25]
    assert by_label["unpatched"]["flops_over_unpatched"] == 1 and by_label["unpatched"]["realised_share"] is None
    ours, measured = by_label["divprune-8"], rows(record, 1)["divprune-8"]
    for name in ("encode_ms", "prefill_ms", "decode_ms", "prefill_over_unpatched"):
        assert ours[name] == measured[name]["median"]
    assert ours["flops_over_unpatched"] == by_label["divprune-8 (peer)"]["flops_over_unpatched"] < 1
    saved = 1 - ours["prefill_over_unpatched"]
    assert ours["realised_share"] == pytest.approx(saved / (1 - ours["flops_over_unpatched"]))


def test_a_folder_gets_names_that_are_not_taken(tmp_path, monkeypatch):
    first = file_in(tmp_path, "lab/llava-1.5-7b", "cpu")
    assert re.fullmatch(r"llava-1\.5-7b_cpu_\d{4}-\d\d-\d\d\.json", first.name)
    first.touch()
    assert file_in(tmp_path, "lab/llava-1.5-7b", "cpu").name == first.name.replace(".json", "_2.json")
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA H200 (SXM)")
    assert "_nvidia-h200-sxm_" in file_in(tmp_path, "llava", "cuda:0").name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_left_as_it_was(family):
    model = tiny(family)
    bench(model, [], [1], QUICK)  # the first generation leaves a trace in the model
    before = model_state(model)
    found = rows(bench(model, [parse_method("random")], None, QUICK))
    assert changes(before, model_state(model)) == []
    n = found["unpatched"]["visual_tokens_per_layer"][0]
    assert list(found)[1:] == [f"random-{keep}" for keep in default_budgets(int(n))]


def test_several_images_in_a_prompt():
    record = bench(tiny("llava"), [parse_method("fastv")], [5], replace(QUICK, images=2, repeats=1))
    assert rows(record)["fastv-5"]["visual_tokens_per_layer"] == [32, 32, 10, 10]


def test_processor_time_is_said_to_be_one(record):
    quick = bench(tiny("llava"), [], [1], replace(QUICK, cpu_time=True))
    assert "processor time" in markdown(quick) and "processor time" not in markdown(record)
    row = rows(quick)["unpatched"]
    assert 0 < row["prefill_ms"]["median"] < row["ttft_ms"]["median"] < row["latency_ms"]["median"]


@pytest.mark.gpu
def test_on_a_gpu():
    record = bench(tiny("llava").to("cuda"), [parse_method("fastv")], [5], QUICK)
    row = rows(record)["fastv-5"]
    assert row["kv_bytes"] == row["kv_theory_bytes"] and row["peak_bytes"] > 0
    assert row["prefill_ms"]["median"] < row["ttft_ms"]["median"]


def test_the_table_is_a_table(record):
    text = markdown(record)
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 * (2 + 7) and len({line.count("|") for line in table}) == 1
    assert len({len(line) for line in table[:9]}) == 1
    assert "## Batch 2" in text and "✓" in text and "(theory " not in text
    other = json.loads(json.dumps(record))
    other["scenarios"][0]["rows"][1]["kv_bytes"] += 2**20
    assert "(theory " in markdown(other)


def test_files_are_the_record_and_the_table(record, tmp_path):
    path = tmp_path / "new" / "tiny.json"
    text = write(record, path)
    assert json.loads(path.read_text()) == json.loads(json.dumps(record))
    assert path.with_suffix(".md").read_text() == text == markdown(record)
    assert sorted(p.name for p in path.parent.iterdir()) == ["tiny.json", "tiny.md"]


@pytest.mark.parametrize("path", sorted(COMMITTED.glob("*llava*.json")), ids=lambda path: path.stem)
def test_the_committed_tables_are_those_of_the_records_beside_them(path):
    record = json.loads(path.read_text())
    assert path.with_suffix(".md").read_text() == markdown(record)
    for row in (row for scenario in record["scenarios"] for row in scenario["rows"]):
        assert row["kv_bytes"] == row["kv_theory_bytes"] and row["peak_over_unpatched"] <= 1


def test_the_engine_is_close_to_the_ideal_on_a_real_shape():
    """In the committed record; on the tiny checkpoints the engine's constant time is a tenth of a prefill."""
    record = json.loads((COMMITTED / "llava-1.5-7b-2-layers-cpu.json").read_text())
    over_ideal = {label: row["prefill_over_ideal"]["median"] for label, row in rows(record).items()}
    assert over_ideal.keys() == {"unpatched", "random-192", "divprune-192", "fastv-192-layer=1"}
    assert max(over_ideal["random-192"], over_ideal["divprune-192"]) <= 1.05
    assert over_ideal["fastv-192-layer=1"] <= 1.10


def test_the_proof_on_a_gpu_prints_its_commands():
    script = "scripts/gpu_proof.sh"
    subprocess.run(["bash", "-n", script], check=True, cwd=ROOT)
    done = subprocess.run(["bash", script, "--dry-run"], capture_output=True, text=True, cwd=ROOT, check=True)
    for shape in ("llava-1.5-7b", "llava-next-7b", "qwen2.5-vl-7b", "qwen3-vl-8b"):
        assert f"vlmslim bench --shape {shape} " in done.stdout
    for command in ("pytest -m gpu", "--dtype bfloat16 --attention flash_attention_2", "scripts/bench_selection.py"):
        assert command in done.stdout
    assert "scripts/gpu_targets.py" in done.stdout
    for line in done.stdout.splitlines():
        program, *words = shlex.split(line.partition(" > ")[0])
        if program == "vlmslim":
            command = get_command(app).get_command(None, words[0])
            command.make_context(words[0], words[1:])  # refuses arguments that the command does not know


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would start the proof")
def test_the_proof_needs_a_gpu():
    done = subprocess.run(["bash", "scripts/gpu_proof.sh"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stdout == "" and "no CUDA device" in done.stderr


def test_the_targets_for_a_gpu_are_read_off_the_records(record, tmp_path):
    def targets(name: str, over_ideal: float) -> subprocess.CompletedProcess:
        made = json.loads(json.dumps(record))
        made["model"]["name"] = name
        for row in made["scenarios"][0]["rows"]:
            row["prefill_over_ideal"]["median"], row["peak_over_unpatched"] = over_ideal, 0.5
        (tmp_path / "record.json").write_text(json.dumps(made | {"scenarios": made["scenarios"][:1]}))
        command = [sys.executable, "scripts/gpu_targets.py", str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)

    assert targets("tiny", 2.0).returncode == 0  # a tiny model is far from its ideal
    good, bad = targets("llava-1.5-7b, random weights", 1.02), targets("llava-1.5-7b, random weights", 1.04)
    assert good.returncode == 0 and "batch 1, divprune-8: prefill over ideal 1.020, target 1.03: met" in good.stdout
    assert bad.returncode == 1 and "prefill over ideal 1.040, target 1.03: MISSED" in bad.stdout


def test_arguments_are_read():
    assert parse_numbers("192,0.5") == (192, 0.5)
    assert parse_batches("1,8") == (1, 8)
    assert parse_size("672x1008") == (672, 1008) and parse_size(None) is None
    assert default_budgets(576) == [192, 128, 64]
    assert list(with_budgets([parse_method("fastv:keep=9"), parse_method("none")], [1, 2])) == ["fastv-9", "none"]


@pytest.mark.parametrize(
    "mistake, says",
    [
        (lambda: parse_numbers("1,x"), "192,128,64"),
        (lambda: parse_batches("0"), "whole numbers from 1 up"),
        (lambda: parse_batches("1,-1"), "whole numbers from 1 up"),
        (lambda: parse_batches("1.5"), "whole numbers from 1 up"),
        (lambda: parse_size("672"), "HEIGHTxWIDTH"),
        (lambda: with_budgets([parse_method("fastv")] * 2, [4]), "fastv-4 is asked for twice"),
        (lambda: bench(tiny("llava"), [parse_method("random")], [17], QUICK), "larger than the image"),
        (lambda: parse_peer("divprune"), "path/to/file.py:Class"),
        (lambda: model_of(), "give a checkpoint or --shape"),
        (lambda: model_of("bundled/tiny-llava", "llava-1.5-7b"), "one of the two"),
        (lambda: model_of("bundled/tiny-llava", layers=2), "--layers goes with --shape"),
        (lambda: model_of(shape="llava-1.5-7b", dtype="int8"), "use float32"),
        (lambda: model_of("/nonexist/x"), "the path /nonexist/x does not exist"),
        (lambda: model_of("bundled/tiny-llava", device="foo"), "there is no such device"),
        (lambda: model_of("bundled/nothing"), "no bundled checkpoint"),
    ],
)
def test_mistakes_are_refused_before_anything_is_measured(mistake, says):
    with pytest.raises(ValueError, match=says):
        mistake()


def test_the_command_compares_with_a_peer_prints_the_table_and_a_line_and_writes_both_files(tmp_path):
    peer, folder = tmp_path / "theirs.py", tmp_path / "records"
    peer.write_text(PEER)
    folder.mkdir()
    arguments = "bench bundled/tiny-llava -m random --budgets 64 --text-tokens 9 --new-tokens 2 --repeats 1"
    compared = ["--compare-with", f"{peer}:Theirs", "--device", "cpu", "--output", str(folder)]
    shown = CliRunner().invoke(app, [*arguments.split(), *compared])
    assert shown.exit_code == 0, shown.output
    (path,) = folder.glob("tiny-llava_cpu_*.json")
    record = json.loads(path.read_text())
    assert list(rows(record)) == ["unpatched", "random-64", "theirs-64 (peer)"]
    assert shown.stdout == f"{path.with_suffix('.md').read_text()}\n{summary(record)}\n"


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["bench"], "give a checkpoint or --shape"),
        (["bench", "bundled/tiny-llava", "-m", "nothing"], "unknown method"),
        (["bench", "bundled/tiny-llava", "-m", "fastv:layr=2"], "Did you mean 'layer'"),
        (["bench", "bundled/tiny-llava", "--output", "table.md"], "ends in .json"),
        (["bench", "--shape", "llava-9"], "unknown shape"),
        (["bench", "bundled/tiny-llava", "--batch", "0"], "whole numbers from 1 up"),
        (["bench", "bundled/tiny-llava", "--output", f"{__file__}/x.json"], "cannot be written to"),
    ],
)
def test_the_command_says_what_is_wrong(arguments, says):
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 2 and says in shown.stderr and shown.stdout == ""
