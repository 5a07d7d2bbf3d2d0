"""Inputs of a cell: code, weights and the task. A cell counts only while all of them are as they were."""

import json
import shutil
from pathlib import Path

import pytest
from evaluation_doubles import COST, FakeHarness, Solving, rewrite, stored
from method_files import NORM, write
from tiny import tiny

import vlmslim
from vlmslim.evaluation import inputs
from vlmslim.evaluation.errors import CellError, ConfigError
from vlmslim.evaluation.run import run
from vlmslim.evaluation.store import Store
from vlmslim.leaderboard.board import Leaderboard
from vlmslim.leaderboard.render import render

HOW_TO_CONTINUE = "use another --output directory, or start over with --fresh"
REVERSED = NORM.replace("argsort()", "argsort(descending=True)")
REMARKED = NORM.replace("keep: int = 16\n", "keep: int = 16  # of 144\n").replace("More follows.", "Much more follows.")


@pytest.fixture
def train(tmp_path):
    """Trains a TokenFLEX into the same folder as before, and returns how a configuration names it."""

    def train(seed: int, **options) -> dict:
        with vlmslim.patch(tiny("llava"), "tokenflex", keep=4, weights=f"random:{seed}") as slim:
            slim.save_pretrained(tmp_path / "flex")
        return {"method": "tokenflex", "keep": 64, "weights": str(tmp_path / "flex"), "label": "mine"} | options

    return train


@pytest.fixture
def program(tmp_path):
    """Writes a method into the same file as before, and returns how a configuration names it."""

    def program(text: str, **options) -> dict:
        return {"method": f"{write(tmp_path / 'norm.py', text)}:Norm", "keep": 64, "label": "mine"} | options

    return program


@pytest.fixture(params=["code", "weights"])
def make(request, program, train):
    """Makes an entry of methods; with `again` what its numbers depend on is different."""

    def make(again=False, **options) -> dict:
        if request.param == "code":
            return program(REVERSED if again else NORM, **options)
        return train(2 if again else 1, **options)

    return make


def hash_of(entry) -> str:
    return json.loads((Path(entry["weights"]) / "vlmslim.json").read_text())["sha256"]


# ---------------------------------------------------------------------- code and weights alike


def test_what_changed_is_refused(config, make):
    run(config(methods=["divprune", make()]), harness=FakeHarness())
    before, harness = stored(config().output), FakeHarness()
    with pytest.raises(ConfigError, match=r"the (method|weights of) mine changed in the middle of the run"):
        run(config(methods=["divprune", make(again=True)]), harness=harness)
    assert (stored(config().output), harness.loads) == (before, 0)


def test_what_changed_runs_under_a_new_label(config, make):
    run(config(methods=["divprune", make()]), harness=FakeHarness())
    harness = FakeHarness()
    run(config(methods=["divprune", make(again=True, label="mine-2")]), harness=harness)
    assert harness.evaluated == [("mine-2", "count"), ("mine-2", "text")]


def test_what_changed_is_timed_again(config, make):
    run(config(methods=["divprune", make()]), harness=FakeHarness())
    shutil.rmtree(config().output / "cells" / "mine")
    methods = ["divprune", make(again=True)]
    with pytest.raises(KeyboardInterrupt):
        run(config(methods=methods), harness=FakeHarness(fail_at=("mine", "text"), failure=KeyboardInterrupt()))
    rows = {row.label: row for row in Leaderboard.read(config().output).rows}
    assert rows["mine"].times is None and rows["divprune-64"].times is not None  # the old time is not shown
    harness = FakeHarness()
    run(config(methods=methods), harness=harness)
    assert harness.evaluated == [("mine", "text")]
    assert {"mine", "none"} <= set(harness.timed)


def test_the_cost_of_what_changed_is_solved_anew(config, make):
    cost = {"keep": None, "budgets": [COST]}
    run(config(methods=[make(**cost)]), harness=Solving())
    shutil.rmtree(config().output / "cells" / "mine")
    harness = Solving()
    run(config(methods=[make(again=True, **cost)]), harness=harness)
    assert harness.solved == ["mine"]


@pytest.mark.parametrize("change", ["code", "weights", "task"])
def test_what_changes_during_the_run_stops_it(config, program, train, change):
    class Impatient(FakeHarness):
        def evaluate(self, variant, task):
            if (variant.label, task) == ("mine", "text"):
                if change == "code":
                    program(REVERSED)
                elif change == "weights":
                    train(2)
                else:
                    self.definition = {"settings": "edited"}
            return super().evaluate(variant, task)

    with pytest.raises(CellError) as error:
        run(config(methods=[train(1) if change == "weights" else program(NORM)]), harness=Impatient())
    sentence = {
        "code": "the method mine was changed meanwhile (norm.py); undo the change, give the changed method another ",
        "weights": "the weights of mine were replaced meanwhile; run again when training is over",
        "task": f"the task text was changed meanwhile (settings); undo the change, {HOW_TO_CONTINUE}",
    }
    assert str(error.value).startswith(sentence[change])
    store = Store(config().output)
    assert store.cell("mine", "count") is not None and store.cell("mine", "text") is None


# ---------------------------------------------------------------------- code


def test_the_code_of_a_method_may_change_in_its_words(config, program):
    run(config(methods=[program(NORM)]), harness=FakeHarness())
    harness = FakeHarness()
    run(config(methods=[program(REMARKED)]), harness=harness)
    assert REMARKED != NORM and harness.evaluated == []
    with pytest.raises(ConfigError) as error:
        run(config(methods=[program(REVERSED)]), harness=FakeHarness())
    assert str(error.value) == (
        f"the method mine changed in the middle of the run (norm.py): {config().output} holds its cell count, made "
        "before, and numbers must not be mixed. Undo the change, give the changed method another 'label', "
        + HOW_TO_CONTINUE
    )


@pytest.fixture
def edit(monkeypatch):
    """Pretends that a file of the package was edited."""
    real = inputs.code_hash

    def edit(file):
        def edited(classes):
            return {name: hash + "+" * (name == file) for name, hash in real(classes).items()}

        monkeypatch.setattr(inputs, "code_hash", edited)

    return edit


@pytest.mark.parametrize("file", ["vlmslim/compressor.py", "vlmslim/ops/attention.py", "vlmslim/patching.py"])
def test_an_engine_that_was_edited_is_not_mixed(config, edit, file):
    run(config(), harness=FakeHarness())
    edit(file)
    with pytest.raises(ConfigError) as error:
        run(config(), harness=FakeHarness())
    assert str(error.value) == (
        f"the engine changed in the middle of the run ({file}): {config().output} holds its cell count, made before, "
        f"and numbers must not be mixed. Undo the change, {HOW_TO_CONTINUE}"
    )


def test_only_the_rows_of_an_edited_method_are_refused(config, edit):
    run(config(), harness=FakeHarness())
    edit("vlmslim/methods/divprune.py")
    with pytest.raises(ConfigError, match=r"the method divprune-64 changed .* \(vlmslim/methods/divprune.py\)"):
        run(config(), harness=FakeHarness())
    harness = FakeHarness()
    run(config(methods=["random"]), harness=harness)
    assert harness.evaluated == []


def test_other_methods_under_an_old_label_are_named_as_such(config):
    run(config(methods=[{"method": "fastv", "label": "mine"}]), harness=FakeHarness())
    with pytest.raises(
        ConfigError, match="mine-64 was changed in the middle of the run: .*, made with\n  method: fastv"
    ):
        run(config(methods=[{"method": "divprune", "label": "mine"}]), harness=FakeHarness())


def test_cells_and_the_board_say_which_version_of_a_file_of_ones_own_ran(config, program):
    board = run(config(methods=[program(NORM)]), harness=FakeHarness())
    store = Store(config().output)
    assert "; norm.py uncommitted; " in render(board, "md")
    assert store.cell("mine", "text")["method_versions"] == {"norm.py": "uncommitted"}
    assert "method_versions" not in store.cell("none", "text")


def test_a_cell_of_an_older_vlmslim_is_refused(config):
    """It does not record its code. To do it again without a word would throw away what may have taken days."""
    run(config(), harness=FakeHarness())
    rewrite(Store(config().output), "none", "text", without="code")
    before = stored(config().output)
    with pytest.raises(ConfigError) as error:
        run(config(), harness=FakeHarness())
    assert str(error.value) == (
        f"{config().output} holds a cell none / text of an older vlmslim, which did not record the code that made it, "
        f"so it is unknown whether its numbers may be mixed with new ones; {HOW_TO_CONTINUE}"
    )
    assert stored(config().output) == before
    assert Leaderboard.read(config().output).rows  # an old directory can still be read


# ---------------------------------------------------------------------- weights


def test_cells_say_with_which_weights_they_were_made(config, train):
    entry = train(1)
    board = run(config(methods=["divprune", entry]), harness=FakeHarness())
    store = Store(config().output)
    assert store.cell("mine", "text")["weights"] == {entry["weights"]: hash_of(entry)}
    assert "weights" not in store.cell("divprune-64", "text")
    rows = {row.label: row for row in board.rows}
    assert rows["mine"].provenance["weights"] == f"{entry['weights']}={hash_of(entry)}"
    assert "weights" not in rows["divprune-64"].provenance
    again = FakeHarness()
    run(config(methods=["divprune", train(1)]), harness=again)
    assert (again.evaluated, again.loads) == ([], 0)  # the same training


def test_weights_that_are_words_need_no_record(config):
    run(config(methods=[{"method": "tokenflex", "weights": "pool"}]), harness=FakeHarness())
    assert "weights" not in Store(config().output).cell("tokenflex-64-weights=pool", "text")


@pytest.mark.parametrize("place", ["method", "deleted", "stage", "clip", "checkpoint"])
def test_weights_that_changed_under_their_path_are_refused(config, train, tmp_path, place):
    entry, clip = train(1), tmp_path / "clip"
    before = hash_of(entry)
    write(clip / "config.json", "{}")
    write(clip / "model.safetensors", "first")
    stages = [{name: entry[name] for name in ("method", "keep", "weights")}, {"method": "fastv", "keep": 16}]
    changes = {
        "stage": {"methods": [{"stages": stages, "label": "mine"}]},
        "clip": {"methods": [{"method": "recoverable", "clip": str(clip), "label": "mine"}]},
        "checkpoint": {
            "model": {"pretrained": entry["weights"]},
            "methods": [{"method": "tokenflex", "label": "mine"}],
        },
    }
    settings = config(**{"methods": [entry], "budgets": [64]} | changes.get(place, {}))
    run(settings, harness=FakeHarness())
    if place == "clip":
        write(clip / "model.safetensors", "other")
        held = f"made when {clip} held "
    elif place == "deleted":
        shutil.rmtree(entry["weights"])
        held = f"made when {entry['weights']} held {before[:12]}; it holds none that can be read now"
    else:
        held = f"made when {entry['weights']} held {before[:12]}; it holds {hash_of(train(2))[:12]} now"
    harness = FakeHarness()
    with pytest.raises(ConfigError) as error:
        run(settings, harness=harness)
    cell = f"the weights of mine changed in the middle of the run: {settings.output} holds its cell count, "
    assert str(error.value).startswith(cell + held)
    assert str(error.value).endswith(f"must not be mixed. Give the new ones another 'label', {HOW_TO_CONTINUE}")
    assert harness.loads == 0


def test_a_saved_patch_as_the_checkpoint_brings_its_weights(config, train):
    folder = train(1)["weights"]
    settings = config(model={"pretrained": folder}, methods=["tokenflex"], budgets=[64])
    stages = {variant.label: variant.stages for variant in settings.variants()}
    assert stages["tokenflex-64"] == ({"method": "tokenflex", "keep": 64, "weights": folder},)


def test_weights_that_cannot_be_read_are_a_clear_error(config, train):
    entry = train(1)
    write(Path(entry["weights"]) / "vlmslim.json", "{}")
    with pytest.raises(ConfigError, match="mine: .*vlmslim.json is no configuration of vlmslim"):
        run(config(methods=[entry]), harness=FakeHarness())


# ---------------------------------------------------------------------- tasks


def test_a_task_that_was_edited_is_not_mixed(config):
    run(config(methods=["none"], budgets=[64]), harness=FakeHarness())
    with pytest.raises(ConfigError) as error:
        run(config(), harness=FakeHarness(definition="edited"))
    assert str(error.value) == (
        f"the task count changed in the middle of the run (settings): {config().output} holds its cell none, made "
        f"before, and numbers must not be mixed. Undo the change, {HOW_TO_CONTINUE}"
    )
    harness = FakeHarness()
    run(config(), harness=harness)  # as it was
    assert ("none", "count") not in harness.evaluated


def test_questions_are_told_apart_by_what_is_asked():
    def hash_of(settings=None, **changes):
        sample = {"doc_id": 0, "target": "a", "arguments": ["how many?", {"until": ["x"]}], "doc_hash": "at 0x7f"}
        return inputs.questions_hash([sample | changes], settings or {})

    short, long = ({"generation_kwargs": {"max_new_tokens": n}, "doc_to_text": f"at 0x{n}"} for n in (1, 512))
    assert hash_of() == hash_of(doc_hash="at 0x80", resps=[["b"]])
    assert hash_of() != hash_of(arguments=["how many now?"])
    assert hash_of(short) != hash_of(long)
    assert hash_of(short) == hash_of(short | {"doc_to_text": "at 0x9"})
