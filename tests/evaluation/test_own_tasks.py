"""Tasks of one's own: what counts for their identity, and the bounds within which they are read."""

import os

import pytest

pytest.importorskip("lmms_eval", reason="the extra vlmslim[eval] is not installed")

from evaluation_doubles import write_config

from vlmslim.evaluation.config import load_config
from vlmslim.evaluation.errors import ConfigError
from vlmslim.evaluation.schema import TaskConfig
from vlmslim.evaluation.tasks import Tasks


@pytest.fixture
def own(tmp_path, tmp_path_factory):
    """Return a function that reads the task `own` of a folder."""
    config = load_config(write_config(tmp_path_factory.mktemp("config")))

    def own(path=tmp_path, metric="acc") -> Tasks:
        update = {"tasks": [TaskConfig(task="own", metric=metric)], "include_path": [path]}
        return Tasks(config.model_copy(update=update))

    return own


def test_every_part_of_a_tasks_definition_counts(own, tmp_path):
    """Its YAML, what that includes, its functions and its data; not comments, and not when a file was written."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "questions.json").write_text("[1]")
    (tmp_path / "code.py").write_text("import helper\nfrom .parts import cut\ndef images(doc): return []")
    (tmp_path / "helper.py").write_text("import deeper, os, code")
    (tmp_path / "deeper.py").write_text("A = 1")
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "__init__.py").write_text("from .cut import cut")
    (tmp_path / "parts" / "cut.py").write_text("def cut(): ...")
    (tmp_path / "stranger.py").write_text("B = 1")
    (tmp_path / "_base").write_text("dataset_path: json\ndataset_kwargs: {data_files: {test: [data/*.json]}}\n")
    (tmp_path / "own.yaml").write_text("task: own\ninclude: _base\ndoc_to_visual: !function code.images\n")
    tasks = own(metric=None)
    before = tasks.definition("own")
    code = [f"functions in {name}.py" for name in ("__init__", "code", "cut", "deeper", "helper")]
    assert sorted(before) == ["data in questions.json", *code, "settings"]
    os.utime(tmp_path / "data" / "questions.json", (1, 1))
    (tmp_path / "own.yaml").write_text("# words\n" + (tmp_path / "own.yaml").read_text())
    assert tasks.definition("own") == before
    for name, text, part in (
        ("data/questions.json", "[2]", "data in questions.json"),
        ("data/more.json", "[3]", "data in more.json"),
        ("deeper.py", "A = 2", "functions in deeper.py"),
        ("parts/cut.py", "def cut(): return 1", "functions in cut.py"),
        ("stranger.py", "B = 2", None),
        ("code.py", (tmp_path / "code.py").read_text() + "[1:]", "functions in code.py"),
        ("_base", (tmp_path / "_base").read_text() + "generation_kwargs: {max_new_tokens: 1}\n", "settings"),
    ):
        (tmp_path / name).write_text(text)
        now = tasks.definition("own")
        assert {key for key in now if now[key] != before.get(key)} == ({part} if part else set())
        before = now


def laughs(depth=6):
    """Write YAML of 400 bytes that stands for millions of values."""
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]" for i in range(depth)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"own.yaml": laughs()}, "it stands for more than 20000 values"),
        ({"own.yaml": "task: own\ninclude: base", "base": laughs()}, "base not readable as YAML: it stands"),
        ({"own.yaml": "task: own\ninclude: own.yaml"}, "own.yaml includes more than 100 files, or itself"),
        ({"own.yaml": "include: [b, b]", "b": "include: [c, c]", "c": "include: [d, d]", "d": "include: [e, e]",
          "e": "include: [f, f]", "f": "include: [g, g]", "g": "task: own"}, "more than 100 files"),
        ({"own.yaml": "[" * 1000}, "more than 50 lists"),
        ({"own.yaml": "x" * 2**21}, "larger than 1 MiB"),
        ({"own.yaml": "- a"}, "own.yaml is no mapping"),
        ({"own.yaml": ""}, "own.yaml is no mapping"),
        ({"own.yaml": "task: own\ninclude: 3"}, "includes something that is no name of a file"),
        ({"own.yaml": "task: own\ninclude: gone"}, "gone cannot be read: No such file"),
        ({"own.yaml": "task: [own]"}, "lmms-eval cannot read the tasks in .*: KeyError"),
        ({"own.yaml": "task: own\nmetric_list: [acc]"}, "the metric_list of own is a list of entries"),
    ],
)  # fmt: skip
def test_tasks_of_ones_own_are_read_with_bounds(own, tmp_path, files, says):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=says):
        own()


def test_a_pipe_among_the_tasks_is_not_waited_for(own, tmp_path):
    os.mkfifo(tmp_path / "own.yaml")
    for path, says in ((tmp_path, "own.yaml is no file"), (tmp_path / "gone", "gone is no directory")):
        with pytest.raises(ConfigError, match=says):
            own(path)


def test_tagged_values_are_hashed_by_what_they_hold(own, tmp_path):
    hashes = []
    for text in ("[1, 2]", "[1, 2]", "[1, 3]", "{a: 1}"):
        (tmp_path / "own.yaml").write_text(f"task: own\nx: !function {text}\ny: !function a.b\n")
        hashes.append(own(metric=None).definition("own")["settings"])
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3
