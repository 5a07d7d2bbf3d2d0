"""`vlmslim run` on a stand-in for lmms-eval: order, resuming, refusing to mix, failing loudly."""

import json

import pytest
from evaluation_doubles import COST, FakeHarness, Listening, Solving, stage, stored, write_config

from vlmslim.evaluation.config import load_config
from vlmslim.evaluation.errors import CellError, ConfigError
from vlmslim.evaluation.run import run
from vlmslim.evaluation.store import Store
from vlmslim.leaderboard.board import Leaderboard
from vlmslim.leaderboard.render import render

ROWS = ["none", "random-64", "random-16", "divprune-64", "divprune-16"]
CELLS = [(label, task) for task in ("count", "text") for label in ROWS]  # methods take turns on a task


def test_every_cell_runs_once_the_unpatched_model_first(config):
    harness = FakeHarness()
    board = run(config(), harness=harness)
    assert harness.evaluated == CELLS
    assert harness.loads == 1
    assert [row.label for row in board.rows][0] == "none"
    assert all(len(row.scores) == 2 for row in board.rows)
    assert harness.timed == ROWS


def test_a_second_call_evaluates_and_loads_nothing(config):
    first = run(config(), harness=FakeHarness())
    harness = FakeHarness()
    assert run(config(), harness=harness) == first
    assert (harness.evaluated, harness.loads, harness.timed) == ([], 0, [])


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_run_goes_on_where_it_stopped(config, stop):
    broken = FakeHarness(fail_at=("random-16", "text"), failure=stop())
    with pytest.raises(stop):
        run(config(), harness=broken)
    rest = FakeHarness()
    board = run(config(), harness=rest)
    assert broken.evaluated + rest.evaluated == CELLS
    assert board == run(config(output=str(config().output) + "-2"), harness=FakeHarness())


def test_an_exception_names_the_cell_and_keeps_finished_ones(config):
    with pytest.raises(CellError, match="random-16 on text failed: RuntimeError: out of memory"):
        run(config(), harness=FakeHarness(fail_at=("random-16", "text"), failure=RuntimeError("out of memory")))
    store = Store(config().output)
    assert store.cell("random-16", "count") is not None
    assert store.cell("random-16", "text") is None
    assert store.cell("divprune-16", "text") is not None  # the others of its task went on


def test_rows_and_tasks_that_cannot_be_opened_are_all_named_before_the_first_cell(config):
    harness = FakeHarness()
    harness.refused = {"divprune-16": ValueError("no\nsuch"), "random-64": KeyError("k"), "text": OSError("gone")}
    with pytest.raises(ConfigError) as refused:
        run(config(), harness=harness, fresh=True)
    lines = ["random-64: KeyError: 'k'", "divprune-16: no", "tasks: text cannot be opened: gone"]
    assert str(refused.value).splitlines() == lines
    assert harness.evaluated == [] and not (config().output / "run.json").exists()
    run(config(tasks=["count"], methods=["uniform"]), harness=FakeHarness())
    harness = FakeHarness()
    harness.refused = {"uniform-16": ValueError("what is finished is not opened again")}
    run(config(tasks=["count"], methods=["uniform", "divprune"]), harness=harness)
    assert {label for label, _ in harness.evaluated} == {"divprune-64", "divprune-16"}


def test_a_default_baseline_that_is_not_defined_is_left_out_with_its_reason(tmp_path):
    path = write_config(tmp_path, budgets=[16], baselines=["random", "downsample"])
    harness, display = FakeHarness(), Listening()
    harness.undefined = {"downsample": "it cannot shrink them"}
    named = run(load_config(path), harness=harness, display=display)
    assert "downsample-16" in [row.label for row in named.rows] and not any("without" in text for text in display.said)
    path.write_text(path.read_text().replace("baselines:\n- random\n- downsample\n", ""))
    board = run(load_config(path, output=tmp_path / "default"), harness=harness, display=display)
    assert [row.label for row in board.rows] == ["none", "blind", "random-16", "uniform-16", "divprune-16"]
    assert "without the baseline downsample: it cannot shrink them" in display.said


def test_times_name_the_machine_that_took_them(config):
    run(config(), harness=FakeHarness())
    store = Store(config().output)
    store.save_timing({k: v for k, v in store.timing.items() if k != "seal"} | {"hardware": "a fast machine"})
    board = run(config(), harness=FakeHarness())
    assert "in one process, on a fast machine." in render(board, "md")
    assert json.loads(render(board, "json"))["facts"]["timed_on"] == "a fast machine"


@pytest.mark.parametrize(
    "change, named",
    [
        ({"seed": 1}, "seed: 0 there, 1 now"),
        ({"limit": 2}, "limit: None there, 2 now"),
        ({"batch_size": 4}, "batch_size: 1 there, 4 now"),
        ({"model": {"pretrained": "tiny", "dtype": "float16"}}, "model.dtype: None there, 'float16' now"),
    ],
)
def test_results_of_different_configs_are_not_mixed(config, change, named):
    run(config(), harness=FakeHarness())
    with pytest.raises(ConfigError) as error:
        run(config(**change), harness=FakeHarness())
    assert named in str(error.value)
    assert "another --output directory, restore the configuration, or start over with --fresh" in str(error.value)
    harness = FakeHarness()
    run(config(**change), fresh=True, harness=harness)
    assert len(harness.evaluated) == 10


def test_a_retrained_checkpoint_is_another_run(config):
    run(config(), harness=FakeHarness())
    with pytest.raises(ConfigError, match="checkpoint: 'weights-1' there, 'weights-2' now"):
        run(config(), harness=FakeHarness(identity="weights-2"))


def test_another_version_of_a_library_is_another_run(config, monkeypatch):
    from vlmslim.io import provenance

    run(config(), harness=FakeHarness())
    monkeypatch.setattr(provenance, "versions", lambda: {"torch": "1.0"})
    with pytest.raises(ConfigError, match="versions.torch: .* there, '1.0' now"):
        run(config(), harness=FakeHarness())


def test_methods_and_tasks_may_be_added(config):
    run(config(), harness=FakeHarness())
    harness = FakeHarness()
    board = run(config(methods=["divprune", "uniform"], tasks=["count", "text", "spatial"]), harness=harness)
    uniform = ["uniform-64", "uniform-16"]
    new = [(label, task) for task in ("count", "text") for label in uniform]
    assert harness.evaluated == new + [(label, "spatial") for label in [*ROWS, *uniform]]
    assert harness.timed == [*ROWS, "uniform-64", "uniform-16"]  # ratios hold within one session only
    assert len(board.rows) == 7


def test_a_row_that_is_taken_out_leaves_the_leaderboard(config):
    run(config(), harness=FakeHarness())
    board = run(config(budgets=[64]), harness=FakeHarness())
    assert [row.label for row in board.rows] == ["none", "random-64", "divprune-64"]


def test_one_label_cannot_mean_two_methods(config):
    entry = {"method": "fastv", "keep": 16, "label": "mine"}
    run(config(methods=[entry]), harness=FakeHarness())
    with pytest.raises(ConfigError) as error:
        run(config(methods=[entry | {"layer": 3}]), harness=FakeHarness())
    assert str(error.value) == (
        f"mine was changed in the middle of the run: {config().output} holds its cell count, made with\n"
        "  method: fastv, keep: 16\nand now it is\n  method: fastv, keep: 16, layer: 3\n"
        "Give the changed method another 'label', use another --output directory, or start over with --fresh"
    )


def test_a_refused_run_changes_nothing(config):
    entry = {"method": "fastv", "keep": 16, "label": "mine"}
    before = run(config(methods=[entry]), harness=FakeHarness())
    written = (config().output / "run.json").read_bytes()
    for refused in ({"methods": [entry | {"layer": 3}]}, {"methods": [entry], "seed": 1}):
        with pytest.raises(ConfigError):
            run(config(**refused), harness=FakeHarness())
    assert (config().output / "run.json").read_bytes() == written
    assert Leaderboard.read(config().output) == before


@pytest.mark.parametrize("refusal", ["task", "checkpoint", "budget", "loading", "device", "count"])
def test_what_fresh_refuses_is_not_thrown_away(config, monkeypatch, refusal):
    run(config(), harness=FakeHarness())
    before, changes = stored(config().output), {}
    make = harness = Solving(impossible={"divprune-equivalent_tokens=40"})

    def fail(*_):
        raise (OSError if refusal == "loading" else ConfigError)("not there")

    match refusal:
        case "task":
            make = fail
        case "checkpoint":
            monkeypatch.setattr(harness, "describe_checkpoint", fail)
        case "loading":
            monkeypatch.setattr(harness, "load", fail)
        case "budget":
            changes = {"budgets": [COST]}
        case "device":
            changes = {"model": {"pretrained": "tiny", "device": "foo"}}
        case "count":
            changes = {"budgets": [145]}
            harness.tokens = 144
    with pytest.raises(ConfigError):
        run(config(**changes), fresh=True, harness=make)
    assert stored(config().output) == before
    assert harness.evaluated == []


def test_fresh_solves_anew_and_keeps_what_it_solved(config):
    run(config(budgets=[COST]), harness=Solving())
    harness = Solving()
    run(config(budgets=[COST]), fresh=True, harness=harness)
    assert harness.solved == SOLVED_ROWS
    again = Solving()
    run(config(budgets=[COST]), harness=again)
    assert again.solved == []


@pytest.mark.parametrize(
    "model, message",
    [
        ({"device": "foo"}, "model.device: device='foo': there is no such device"),
        ({"device": "meta"}, "model.device: device='meta' cannot be used"),
    ],
)
def test_devices_that_are_not_there(config, model, message):
    with pytest.raises(ConfigError, match=message):
        run(config(model={"pretrained": "tiny"} | model), harness=FakeHarness())


def test_more_tokens_than_an_image_has_are_refused_at_once(config):
    harness = FakeHarness()
    harness.tokens = 144
    stages = [{"method": "divprune", "keep": 0.5}, {"method": "fastv", "keep": 10**9}]
    with pytest.raises(ConfigError) as error:
        run(config(budgets=[144, 145], methods=[{"stages": stages, "label": "two"}]), harness=harness)
    assert [line.split(":")[0] for line in str(error.value).splitlines()] == ["random-1000000000", "two"]
    assert "which has 144 visual tokens; use at most 144 or a share" in str(error.value)
    assert harness.loads == 0


# --- costs ------------------------------------------------------------------------------------------------------------

SOLVED_ROWS = ["random-equivalent_tokens=40", "divprune-equivalent_tokens=40"]


def test_costs_are_solved_before_anything_is_evaluated(config):
    harness = Solving()
    board = run(config(budgets=[64, COST]), harness=harness)
    assert harness.solved == SOLVED_ROWS
    assert harness.loads == 1
    assert [row.label for row in board.rows if row.budget == COST] == SOLVED_ROWS
    cell = Store(config().output).cell("divprune-equivalent_tokens=40", "text")
    assert cell["stages"] == [{"method": "divprune", "keep": 40}]
    assert cell["budget"] == {
        "option": "keep",
        "value": 40,
        "target": COST,
        "achieved": 40.0,
        "prompts": 4,
        "spent": 40.0,
    }
    assert "budget" not in Store(config().output).cell("divprune-64", "text")


def test_a_solution_is_kept_for_later_calls(config):
    run(config(budgets=[COST]), harness=Solving())
    again = Solving()
    run(config(budgets=[COST]), harness=again)
    assert (again.solved, again.evaluated, again.loads) == ([], [], 0)
    more = Solving()
    run(config(budgets=[COST], tasks=["count", "text", "spatial"], methods=["divprune", "uniform"]), harness=more)
    assert more.solved == ["uniform-equivalent_tokens=40"]
    (config().output / "solutions.json").unlink()  # or damaged: the solver is deterministic, so nothing is lost
    once_more = Solving()
    run(config(budgets=[COST]), harness=once_more)
    assert (once_more.solved, once_more.evaluated) == (SOLVED_ROWS, [])


def test_a_refused_budget_leaves_a_directory_for_the_next_call(config):
    with pytest.raises(ConfigError, match="it cannot"):
        run(config(budgets=[COST]), harness=Solving(impossible={SOLVED_ROWS[1]}))
    assert (config().output / "solutions.json").exists()
    run(config(budgets=[64]), harness=Solving())


def test_a_run_stops_at_once_where_budgets_cannot_be_met(config):
    harness = Solving(impossible=SOLVED_ROWS)
    with pytest.raises(ConfigError, match="random.*=40: it cannot\ndivprune.*=40: it cannot"):
        run(config(budgets=[64, COST]), harness=harness)
    assert harness.evaluated == []


def halves(rows):
    return rows[: len(rows) // 2], rows[len(rows) // 2 :]


def test_every_finished_row_is_a_line_with_its_score(config):
    display = Listening()
    scores = {("none", "count"): 4, ("none", "text"): 2, ("divprune-64", "count"): 2, ("divprune-64", "text"): 2}
    run(config(), harness=FakeHarness(scores=scores), display=display)
    assert [line.label for line in display.rows] == 2 * ROWS  # a first look at one task, and the whole rows
    first, lines = ({line.label: line.text(width=11).split() for line in rows} for rows in halves(display.rows))
    assert first["divprune-64"][2] == "50.0"
    assert lines["none"][:3] == ["none", "144.0", "100.0"]
    assert lines["divprune-64"][:3] == ["divprune-64", "64.0", "75.0"]  # half of the one task, all of the other
    assert float(lines["divprune-64"][3]) >= 0


def test_a_row_without_a_number_does_not_stop_the_others(config):
    class Mute(FakeHarness):
        def evaluate(self, variant, task):
            cell = super().evaluate(variant, task)
            cell.results["results"][task]["acc,none"] = "N/A"
            return cell

    display = Listening()
    with pytest.raises(ConfigError, match="reports no number"):
        run(config(), harness=Mute(), display=display)
    assert [line.score for line in display.rows] == [None] * 2 * len(ROWS)


def test_a_task_that_costs_otherwise_than_the_sample_is_named(config):
    display = Listening()
    run(config(budgets=[COST]), harness=Solving(cost=50.0), display=display)
    assert "divprune-equivalent_tokens=40 costs 50 on text: its questions differ from the sample's" in display.said
    assert Store(config().output).cell("divprune-equivalent_tokens=40", "text")["budget"]["spent"] == 50.0


def test_a_stage_that_never_acted_fails_the_run(config):
    with pytest.raises(CellError) as error:
        run(config(), harness=FakeHarness(without_effect={"divprune-64"}))
    assert str(error.value).startswith(
        "divprune-64 on count failed: RuntimeError: stage 1 (divprune, before the language model) acted on 0 of 4 "
        "prompts; it was not asked to keep everything"
    )
    assert Store(config().output).cell("divprune-64", "count") is None


def test_a_stage_that_abstains_is_told_row_by_row(config):
    class Undecided(FakeHarness):
        def evaluate(self, variant, task):
            cell = super().evaluate(variant, task)
            if not variant.unpatched:
                cell.receipt["stages"].append(stage("drop_visual", layers=(7,), decides=True, prompts=4))
            return cell

    display = Listening()
    run(config(), harness=Undecided(), display=display)
    told = [remark for line in halves(display.rows)[1] for remark in line.remarks]
    assert told == ["stage 2 (drop_visual, before layer 7) acted on 0 of 8 prompts"] * len(ROWS[1:])
    assert all(display.rows[1].text(0).endswith(remark) for remark in display.rows[1].remarks)
    assert Store(config().output).cell("divprune-16", "text")["receipt"]["stages"][1]["acted"] == 0


def test_several_processes_are_refused(config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="accelerate launch -m lmms_eval --config"):
        run(config(), harness=FakeHarness())


def test_without_timing(config):
    harness = FakeHarness()
    board = run(config(timing=None), harness=harness)
    assert harness.timed == []
    assert all(row.times is None for row in board.rows)
