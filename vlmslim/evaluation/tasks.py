"""The tasks of lmms-eval that a run names: what they report, and hashes that notice when one is edited."""

import ast
import glob
import importlib.util
import os
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import yaml

import vlmslim.tasks
from vlmslim.evaluation.config import RunConfig
from vlmslim.evaluation.errors import ConfigError
from vlmslim.evaluation.schema import TaskConfig
from vlmslim.evaluation.store import check_file_names, digest
from vlmslim.io import provenance
from vlmslim.io.code import imports_of
from vlmslim.io.messages import did_you_mean
from vlmslim.io.yaml_files import read_yaml


class Tasks:
    """The tasks of a configuration. Nothing is downloaded, and no code of a task is run.

    manager : lmms-eval's index of tasks
    include_path : the folders beside lmms-eval's own in which tasks are looked up
    leaves  : the single tasks, in order; a group or a tag is replaced by its tasks

    Raises:
        ConfigError: a task does not exist, or does not report the metric asked for; the message names the nearest.
    """

    def __init__(self, config: RunConfig):
        from lmms_eval.tasks import TaskManager

        self.include_path = [vlmslim.tasks.path(), *map(str, config.include_path)]
        _check_files(config.include_path)
        try:
            self.manager = TaskManager("ERROR", include_path=self.include_path, include_defaults=False)
            if not {task.task for task in config.tasks} <= set(self.manager.all_tasks):  # the full index takes 10 s
                self.manager = TaskManager("ERROR", include_path=self.include_path)
        except Exception as error:  # a task file may break lmms-eval anywhere; the error goes on, with the folders
            folders = ", ".join(map(str, config.include_path))
            raise ConfigError(
                f"include_path: lmms-eval cannot read the tasks in {folders}: {type(error).__name__}: {error}"
            ) from error
        leaves: dict[str, TaskConfig] = {}
        for task in config.tasks:
            for name in self.members(task.task):
                if name == task.task:  # an entry of its own says more than that of its group
                    leaves[name] = task
                leaves.setdefault(name, task.model_copy(update={"task": name}))
        self.leaves = list(leaves.values())
        check_file_names("tasks", [leaf.task for leaf in self.leaves])
        for leaf in self.leaves:
            known = self.metrics(leaf.task)
            if leaf.metric is not None and known and leaf.metric not in known:
                hint = did_you_mean(leaf.metric, known)
                raise ConfigError(
                    f"tasks: {leaf.task} reports no metric {leaf.metric!r}.{hint} It has {', '.join(known)}"
                )

    def metrics(self, name: str) -> dict[str, bool]:
        """Return the metrics that a task reports, in its own order, and whether higher is better."""
        entries = _settings(self._file(name)).get("metric_list") or []
        if not isinstance(entries, list) or not all(
            isinstance(entry, dict) and isinstance(entry.get("metric"), str) for entry in entries
        ):
            raise ConfigError(f"tasks: the metric_list of {name} is a list of entries such as {{metric: acc}}")
        return {entry["metric"].strip(): entry.get("higher_is_better", True) for entry in entries}

    def definition(self, name: str) -> dict[str, str]:
        """Hash all that decides what a task asks: its settings, the files of its functions, its local data files.

        Data on the hub do not count, nor do pictures that local data name by their path.

        Returns:
            A hash for each part, such as "data in questions.parquet". Two files of one name share a hash.
        """
        file = self._file(name)
        settings, folders = _settings(file), _folders(file)
        found = {"settings": digest(settings)}
        for kind, files in (("functions", _code_files(settings, folders)), ("data", _data_files(settings, folders))):
            for path in files:
                part = f"{kind} in {path.name}"
                found[part] = digest([found.get(part), _file_hash(path)])
        return found

    def members(self, name: str) -> list[str]:
        """Return the tasks inside a group or a tag; a task by itself."""
        index = self.manager.task_index
        if name not in index:
            raise ConfigError(f"tasks: lmms-eval has no task {name!r}.{did_you_mean(name, index)}")
        kind = index[name]["type"]
        if kind not in ("group", "tag"):
            return [name]
        members = index[name]["task"] if kind == "tag" else _settings(self._file(name))["task"]
        if not all(isinstance(member, str) for member in members):
            raise ConfigError(f"tasks: the group {name!r} defines tasks of its own; list the tasks you want instead")
        return [leaf for member in members for leaf in self.members(member)]

    def _file(self, name: str) -> Path:
        return Path(self.manager.task_index[name]["yaml_path"])


_TAG = "!"  # marks a value that had a tag in the YAML
_FUNCTION = f"{_TAG}function "
_MOST_FILES = 100  # that a task includes, each as often as it is included


class _TaskLoader(yaml.SafeLoader):
    """Reads lmms-eval's YAML. lmms-eval's own reader would import the code that a task names, which may download."""


def _tagged(loader: yaml.SafeLoader, suffix: str, node: yaml.Node) -> object:
    """Read a value with a tag as text, or as a mapping from the tag to a list or a mapping."""
    if isinstance(node, yaml.ScalarNode):
        return f"{_TAG}{suffix} {node.value}"
    if isinstance(node, yaml.SequenceNode):
        return {f"{_TAG}{suffix}": loader.construct_sequence(node, deep=True)}
    assert isinstance(node, yaml.MappingNode)
    return {f"{_TAG}{suffix}": loader.construct_mapping(node, deep=True)}


_TaskLoader.add_multi_constructor("!", _tagged)


def _check_files(folders: Iterable[Path]) -> None:
    """Read the YAML of the user's own tasks with bounds on its size, because lmms-eval reads it without.

    Raises:
        ConfigError: a folder is missing, or a file is no YAML, stands for too much, or includes itself.
    """
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"include_path: {folder} is no directory")
        for place, _, names in os.walk(folder):
            for name in sorted(names):
                if name.endswith(".yaml"):
                    _settings(Path(place, name))


def _read(file: Path) -> tuple[dict, list[Path]]:
    """Read the YAML of a task, and find the files that it includes, which lie beside it.

    Raises:
        ConfigError: the file cannot be read, or it is no mapping.
    """
    try:
        if file.exists() and not file.is_file():  # reading a pipe would wait forever
            raise ValueError("is no file")
        data = read_yaml(file, _TaskLoader)
        if not isinstance(data, dict):
            raise ValueError("is no mapping, such as {task: my_task}")
        names = data.pop("include", [])
        names = [names] if isinstance(names, str) else names
        if not isinstance(names, list) or not all(isinstance(name, str) and "\0" not in name for name in names):
            raise ValueError("includes something that is no name of a file")
    except ValueError as error:
        raise ConfigError(f"tasks: {file} {error}") from error
    return data, [file.parent / name for name in names]


def _settings(file: Path, opened: list[Path] | None = None) -> dict:
    """Return the settings of a task, with those that its YAML includes; `opened` collects the files.

    Raises:
        ConfigError: a file cannot be read, or too many are included, because one includes itself.
    """
    opened = [file] if opened is None else opened
    if len(opened) > _MOST_FILES:
        raise ConfigError(f"tasks: {opened[0]} includes more than {_MOST_FILES} files, or itself")
    data, included = _read(file)
    for other in included:
        opened.append(other)
        data = _settings(other, opened) | data
    return data


def _folders(file: Path) -> list[Path]:
    """Return the folders of a task's YAML and of all that it includes, where its functions and data may lie."""
    nested = [folder for other in _read(file)[1] for folder in _folders(other)]
    return list(dict.fromkeys([file.parent, *nested]))


def _strings(value: object) -> Iterator[str]:
    """Yield all strings inside dictionaries and lists."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from _strings(part)
    elif isinstance(value, str):
        yield value


def _code_files(settings: dict, folders: list[Path]) -> list[Path]:
    """Find the files with the functions that a task names: beside its YAML, or in an installed package."""
    names = [text.removeprefix(_FUNCTION) for text in _strings(settings) if text.startswith(_FUNCTION)]
    files = []
    for module in sorted({name.rpartition(".")[0] for name in names}):
        beside = [file for folder in folders if (file := folder / f"{module}.py").is_file()]
        files += beside or _installed(module)
    return _with_imports(files)


def _with_imports(files: Iterable[Path]) -> list[Path]:
    """Add the files that lie beside a file and that it imports, and what those import."""
    found: list[Path] = []
    waiting = list(files)
    while waiting:
        file = waiting.pop(0).resolve()
        if file in found:
            continue
        found.append(file)
        try:
            tree = ast.parse(file.read_bytes(), str(file)) if file.suffix == ".py" else ast.Module([], [])
        except (SyntaxError, ValueError, RecursionError):
            continue  # its import will fail and say so
        for names in imports_of(tree, file.parent.parts):  # relative imports become absolute paths
            place = file.parent.joinpath(*names)
            waiting += [
                other for other in (place.with_name(f"{names[-1]}.py"), place / "__init__.py") if other.is_file()
            ]
    return found


def _installed(module: str) -> list[Path]:
    """Find the file of an importable module; nothing if there is none."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError):
        return []
    return [Path(spec.origin)] if spec is not None and spec.has_location and spec.origin else []


def _data_files(settings: dict, folders: list[Path]) -> list[Path]:
    """Find the local files that the data of a task come from."""
    given = settings.get("dataset_kwargs") or {}
    names = [text for key in ("data_files", "data_dir") for text in _strings(given.get(key))]
    if os.sep in str(settings.get("dataset_path")):
        names.append(settings["dataset_path"])
    places = [path for name in names for folder in [*folders, Path()] for path in _matching(folder, name)]
    files = [file for place in places for file in ([place] if place.is_file() else place.rglob("*"))]
    return sorted({file.resolve() for file in files if file.is_file()})


def _matching(folder: Path, pattern: str) -> list[Path]:
    """Find the paths that a name or a pattern means, seen from a folder."""
    return [Path(path) for path in glob.glob(os.path.join(glob.escape(str(folder)), pattern), recursive=True)]


def _file_hash(file: Path) -> str:
    stat = file.stat()
    return _hash_as_written(file, stat.st_size, stat.st_mtime_ns)


@cache
def _hash_as_written(file: Path, size: int, written: int) -> str:
    """Hash a file once, because tasks share data files; `size` and `written` tell whether it changed since."""
    return provenance.file_digest(file)
