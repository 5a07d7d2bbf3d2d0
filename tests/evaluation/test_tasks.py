"""The bundled tasks: found, complete, read without a network, and scored as they should be."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lmms_eval", reason="the extra vlmslim[eval] is not installed")

from lmms_eval.tasks import TaskManager, get_task_dict
from lmms_eval.utils import load_yaml_config
from lmms_fixtures import run_lmms_eval, stock_answers

import vlmslim.tasks
from vlmslim import bundled
from vlmslim.evaluation.lmms_model import VlmSlim
from vlmslim.tasks.scenes.utils import normalise, score

GROUPS = {
    "scenes": ["presence", "colour", "count", "spatial", "detail", "text", "choice"],
    "documents": ["keyvalue", "table", "smallprint", "presence"],
}
GROUPS = {group: [f"{group}_{name}" for name in names] for group, names in GROUPS.items()}
NAMES = [name for names in GROUPS.values() for name in names]
MODELS = {"scenes": "bundled/tiny-llava", "documents": "bundled/tiny-llava-next"}


def task_file(name: str) -> Path:
    return Path(vlmslim.tasks.path()) / name.partition("_")[0] / f"{name}.yaml"


@pytest.fixture(scope="module")
def manager() -> TaskManager:
    return TaskManager("ERROR", include_path=vlmslim.tasks.path(), include_defaults=False)


def test_every_task_and_group_is_found(manager):
    assert sorted(manager.all_groups) == sorted(GROUPS)
    assert sorted(manager.all_subtasks) == sorted(NAMES)
    for group, names in GROUPS.items():
        assert load_yaml_config(task_file(group), mode="simple")["task"] == names


def test_no_name_collides_with_a_task_of_lmms_eval():
    import lmms_eval.tasks

    own = {path.stem for path in Path(lmms_eval.tasks.__file__).parent.rglob("*.yaml")}
    assert not own & {*GROUPS, *NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_paths_do_not_depend_on_the_working_directory(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = load_yaml_config(task_file(name), mode="full")["dataset_kwargs"]["data_files"]
    assert Path(files["test"]).is_absolute() and Path(files["test"]).is_file()


@pytest.mark.parametrize("name", NAMES)
def test_the_questions_load_and_their_answers_score(name, manager, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    task = get_task_dict([name], manager)[name]
    docs = task.test_docs()
    assert len(docs) >= 200
    assert len(set(docs["id"])) == len(docs)
    assert len(set(docs["answer"])) > 1
    doc = docs[0]
    assert task.doc_to_visual(doc)[0].mode == "RGB"
    assert task.doc_to_text(doc) == doc["question"]
    task.build_all_requests(limit=3)
    if name == "scenes_choice":
        assert all(doc["answer"] in doc["choices"] for doc in docs.remove_columns("image"))
        right = doc["choices"].index(doc["answer"])
        losses = [(0.1 if i == right else 2.0, False) for i in range(len(doc["choices"]))]
        assert task.process_results(doc, losses) == {"acc": 1.0}
        assert task.process_results(doc, losses[1:] + losses[:1]) == {"acc": 0.0}
    else:
        assert task.process_results(doc, [f" {doc['answer'].upper()}."]) == {"acc": 1.0}
        assert task.process_results(doc, [f"not {doc['answer']}"]) == {"acc": 0.0}
        assert len(task.instances) == 3


@pytest.mark.parametrize("group", GROUPS)
def test_unpatched_the_bundled_model_answers_as_the_stock_class(group, manager, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # stock classes cannot score choices: lmms-eval 0.7 makes text of their log-likelihoods
    names = [name for name in GROUPS[group] if name != "scenes_choice"]
    expected = stock_answers(monkeypatch, bundled.resolve(MODELS[group]), names, manager, limit=4)
    _, answers = run_lmms_eval(VlmSlim(MODELS[group], batch_size=8), names, manager, limit=4)
    assert answers == expected


def test_answers_are_compared_without_case_blanks_and_full_stop():
    assert normalise("  Dark   Green. ") == "dark green"
    assert score({"answer": "3"}, ["3."]) == {"acc": 1.0}
    assert score({"answer": "no"}, ["no, it is not"]) == {"acc": 0.0}
    assert score({"answer": "red"}, [""]) == {"acc": 0.0}


def test_the_one_liner_of_the_documentation():
    line = "import vlmslim.tasks; print(vlmslim.tasks.path())"
    out = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, check=True, cwd="/")
    assert os.path.samefile(out.stdout.strip(), vlmslim.tasks.path())


def test_bundled_checkpoints_are_named():
    assert bundled.resolve("org/model") == "org/model"
    for name in bundled.names():
        assert (Path(bundled.resolve(name))).is_dir()
    with pytest.raises(ValueError, match="no bundled checkpoint 'bundled/tiny-lava'; there are: "):
        bundled.resolve("bundled/tiny-lava")
