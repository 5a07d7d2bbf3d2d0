"""Everything in `vlmslim run` that talks to lmms-eval: finding tasks, evaluating a cell, timing, plain config files."""

import glob
import importlib.util
import json
import math
import os
from argparse import Namespace
from collections.abc import Callable
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import yaml
from loguru import logger

import vlmslim
import vlmslim.tasks
from vlmslim.cost.budget import Solution, Solver
from vlmslim.cost.flops import DecoderShape, tower_flops
from vlmslim.cost.timing import measure_together, summarise
from vlmslim.evaluation.config import ConfigError, RunConfig, TaskConfig, Variant
from vlmslim.evaluation.preflight import check_checkpoint, visual_tokens
from vlmslim.evaluation.store import digest
from vlmslim.io import provenance
from vlmslim.io.files import check_writable, write_atomically
from vlmslim.io.messages import did_you_mean, one_line
from vlmslim.saving.folder import located

BUNDLED_TASKS = Path(vlmslim.tasks.__file__).parent
#: lmms-eval's own default on the command line; the Python API would leave reasoning tags alone.
REASONING_TAGS = '[["<think>", "</think>"], ["<analysis>", "</analysis>"]]'

Progress = Callable[..., object]  # called like tqdm(total=..., desc=...), gives a context manager with update(n)


@dataclass(frozen=True)
class Cell:
    """What evaluating one method on one task gave."""

    results: dict
    samples: list[dict]
    receipt: dict


class Tasks:
    """The tasks of a configuration, by name; nothing is downloaded.

    Raises:
        ConfigError: a task does not exist, or does not report the metric asked for; the message names the nearest.
    """

    def __init__(self, config: RunConfig):
        from lmms_eval.tasks import TaskManager

        paths = [str(path) for path in [BUNDLED_TASKS, *config.include_path]]
        names = [task.task for task in config.tasks]
        self.manager = TaskManager("ERROR", include_path=paths, include_defaults=False)
        self.include_path = paths
        self._hashes: dict[tuple, str] = {}  # of data files, by path, size and time: they are read once a run
        if not set(names) <= set(self.manager.all_tasks):  # the full index takes ten seconds or more
            self.manager = TaskManager("ERROR", include_path=paths)
        leaves: dict[str, TaskConfig] = {}
        for task in config.tasks:
            for name in self._leaves(task.task):
                if name == task.task:  # its own entry says more than its group's
                    leaves[name] = task
                leaves.setdefault(name, task.model_copy(update={"task": name}))
        self.leaves = list(leaves.values())
        for leaf in self.leaves:  # now, not when everything is evaluated
            known = self.metrics(leaf.task)
            if leaf.metric is not None and known and leaf.metric not in known:
                hint = did_you_mean(leaf.metric, known)
                raise ConfigError(
                    f"tasks: {leaf.task} reports no metric {leaf.metric!r}.{hint} It has {', '.join(known)}"
                )

    def _leaves(self, name: str) -> list[str]:
        """The tasks inside a group or a tag; a task by itself."""
        index = self.manager.task_index
        if name not in index:
            raise ConfigError(f"tasks: lmms-eval has no task {name!r}.{did_you_mean(name, index)}")
        kind = index[name]["type"]
        if kind == "tag":
            members = index[name]["task"]
        elif kind == "group":
            members = _read_task(index[name]["yaml_path"])["task"]
        else:
            return [name]
        if not all(isinstance(member, str) for member in members):
            raise ConfigError(f"tasks: the group {name!r} defines tasks of its own; list the tasks you want instead")
        return [leaf for member in members for leaf in self._leaves(member)]

    def definition(self, name: str) -> dict[str, str]:
        """Hashes of all that says what a task asks and how: its settings, its functions' files, its local data files.

        Data on the hub are not among them, nor pictures that local data name by their path.
        """
        path = Path(self.manager.task_index[name]["yaml_path"])
        settings = _read_task(str(path))
        found = {"settings": digest(settings)}
        for kind, files in (("functions", _code), ("data", _data)):
            for file in files(settings, _folders(path)):
                part = f"{kind} in {file.name}"  # of two files of one name, both
                found[part] = digest([found.get(part), self._hash(file)])
        return found

    def _hash(self, file: Path) -> str:
        stat = file.stat()
        key = (file, stat.st_size, stat.st_mtime_ns)
        if key not in self._hashes:
            self._hashes[key] = provenance.file_digest(file)
        return self._hashes[key]

    def metrics(self, name: str) -> dict[str, bool]:
        """The metrics that a task reports, in its own order, and whether higher is better."""
        entries = _read_task(self.manager.task_index[name]["yaml_path"]).get("metric_list") or []
        return {entry["metric"].strip(): entry.get("higher_is_better", True) for entry in entries}


_TAG = "!"  # how a value with a tag begins, once it is read
_FUNCTION = f"{_TAG}function "


class _AnyTag(yaml.SafeLoader):
    """Reads lmms-eval's YAML without running the functions it names."""


_AnyTag.add_multi_constructor("!", lambda loader, suffix, node: f"{_TAG}{suffix} {node.value}")


def _read_task(path: str) -> dict:
    """A task's YAML with what it includes. lmms-eval's own reader would import the task's code, which may download."""
    data = yaml.load(Path(path).read_text(encoding="utf-8"), _AnyTag)
    for file in _included(path, data.pop("include", [])):
        data = _read_task(file) | data
    return data


def _included(path: str, names: str | list[str]) -> list[str]:
    """The files that a task's YAML includes, which lie beside it."""
    return [str(Path(path).parent / name) for name in ([names] if isinstance(names, str) else names)]


def _folders(path: Path) -> list[Path]:
    """The folders of a task's YAML and of all that it includes: where its functions and its data may lie."""
    names = yaml.load(path.read_text(encoding="utf-8"), _AnyTag).get("include", [])
    nested = [folder for file in _included(str(path), names) for folder in _folders(Path(file))]
    return list(dict.fromkeys([path.parent, *nested]))


def _strings(value) -> list[str]:
    """All strings inside dictionaries and lists."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [text for part in value for text in _strings(part)]
    return [value] if isinstance(value, str) else []


def _code(settings: dict, folders: list[Path]) -> list[Path]:
    """The files with the functions that a task names: beside its YAML, or in an installed package."""
    names = [text.removeprefix(_FUNCTION) for text in _strings(settings) if text.startswith(_FUNCTION)]
    files = []
    for module in sorted({name.rpartition(".")[0] for name in names}):
        beside = [folder / f"{module}.py" for folder in folders if (folder / f"{module}.py").is_file()]
        files += beside or _installed(module)
    return files


def _installed(module: str) -> list[Path]:
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError):
        return []
    return [Path(spec.origin)] if spec is not None and spec.has_location else []


def _data(settings: dict, folders: list[Path]) -> list[Path]:
    """The local files that a task's data come from."""
    given = settings.get("dataset_kwargs") or {}
    names = [text for key in ("data_files", "data_dir") for text in _strings(given.get(key))]
    if os.sep in str(settings.get("dataset_path")):
        names.append(settings["dataset_path"])
    files = []
    for name in names:
        places = [path for folder in [*folders, Path()] for path in _matching(folder, name)]
        files += [file for place in places for file in (sorted(place.rglob("*")) if place.is_dir() else [place])]
    return sorted({file.resolve() for file in files if file.is_file()})


def _matching(folder: Path, name: str) -> list[Path]:
    """The paths that a name or a pattern means, seen from a folder."""
    return [Path(path) for path in glob.glob(os.path.join(glob.escape(str(folder)), name), recursive=True)]


def describe_checkpoint(config: RunConfig) -> dict:
    """What is known of a checkpoint before it is loaded: its identity, its sizes, and the visual tokens of an image.

    Raises:
        ConfigError: there is no such checkpoint, or it is none that takes pictures.
    """
    from transformers import AutoConfig

    given = config.model.pretrained
    try:
        check_checkpoint(given)
        name, revision, _ = located(given, None, None, config.model.revision, {})
        check_checkpoint(name)
        loaded = AutoConfig.from_pretrained(name, revision=revision)
    except OSError as error:
        raise ConfigError(f"model.pretrained: {given} could not be loaded: {one_line(error)}") from error
    except ValueError as error:
        raise ConfigError(f"model.pretrained: {one_line(error)}") from error
    try:
        described = {"shape": asdict(DecoderShape.from_config(loaded)), "tower_flops": tower_flops(loaded)}
    except AttributeError as error:
        raise ConfigError(f"model.pretrained: {given} is a {loaded.model_type}, no LLaVA") from error
    identity = provenance.fingerprint(name) or getattr(loaded, "_commit_hash", None)
    return {"identity": identity, **described, "visual_tokens": visual_tokens(loaded)}


class Harness:
    """One loaded checkpoint that is evaluated under many methods.

    Args:
        config: the comparison.
        progress: shows the progress of a cell.
    """

    def __init__(self, config: RunConfig, progress: Progress | None = None):
        from vlmslim.evaluation.lmms_model import VlmSlim

        self.config, self.progress = config, progress
        self._solver: Solver | None = None
        self.tasks = Tasks(config)
        first = VlmSlim(**config.model.arguments())
        self.model, self.processor = first.model, first.processor
        first.clean()
        passed_on = {"max_frames_num", "system_prompt"} & config.model.arguments().keys()
        self._options = {name: getattr(config.model, name) for name in passed_on}

    def _lm(self, variant: Variant):
        """The lmms-eval model of one method; lmms-eval discards it after use, the checkpoint stays."""
        from vlmslim.evaluation.lmms_model import VlmSlim

        stages, batch_size = list(variant.stages), self.config.batch_size
        lm = VlmSlim(self.model, stages, batch_size, processor=self.processor, **self._options)
        if self.progress is not None:
            lm.progress = self.progress
        return lm

    def evaluate(self, variant: Variant, task: str) -> Cell:
        """Evaluate one cell through lmms-eval, with the settings that its command line would use."""
        from lmms_eval.evaluator import simple_evaluate

        lm, config = self._lm(variant), self.config
        try:
            with _silence(config.output / "lmms_eval.log"):
                results = simple_evaluate(
                    model=lm,
                    tasks=[task],
                    task_manager=self.tasks.manager,
                    batch_size=config.batch_size,
                    limit=config.limit,
                    log_samples=True,
                    cli_args=Namespace(
                        output_path=str(config.output / "cells" / variant.label),  # some tasks write submission files
                        process_with_media=False,
                        reasoning_tags=REASONING_TAGS,
                    ),
                    verbosity="ERROR",
                    **dict.fromkeys(
                        ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), config.seed
                    ),
                )
        finally:
            if hasattr(lm, "model"):  # it failed half-way: take the patch off
                lm.clean()
        samples = results.pop("samples")[task]
        for name in ("date", "git_hash", "git_branch", "throughput", "usage", "efficiency"):
            results.pop(name, None)
        return Cell(results, samples, lm.receipt)

    def solve(self, variant: Variant) -> Solution:
        """Make a method cost its budget, on the first questions of the tasks, taken in turn.

        Raises:
            BudgetError: it cannot.
        """
        if self._solver is None:
            tasks, limit = len(self.tasks.leaves), self.config.limit or math.inf
            self._solver = Solver(self.model, self._prompts(min(max(self.config.budget_prompts, tasks), limit * tasks)))
        return self._solver.solve(list(variant.stages), **variant.budget)

    def time(self, variants: list[Variant], tick: Callable[[], None] = lambda: None) -> dict:
        """Prefill and decode times of all methods on the same prompts, in turn, with ratios to the first."""
        timing = self.config.timing
        prompts = self._prompts(timing.prompts)

        def attach(variant: Variant):
            tick()
            return nullcontext() if variant.unpatched else vlmslim.patch(self.model, list(variant.stages))

        treatments = {v.label: partial(attach, v) for v in variants}
        times = measure_together(self.model, treatments, prompts, timing.new_tokens, timing.repeats)
        return {label: summarise(own, times[variants[0].label]) for label, own in times.items()}

    def _prompts(self, count: int) -> list[dict]:
        """`generate()` inputs of the first questions, taking the tasks in turn."""
        from lmms_eval.tasks import get_task_dict

        lm = self._lm(Variant("none", ({"method": "none"},)))
        names = [task.task for task in self.tasks.leaves][:count]
        per_task = -(-count // len(names))
        requests = []
        try:
            with _silence(self.config.output / "lmms_eval.log"):
                tasks = get_task_dict(names, self.tasks.manager, "simple")
                for task in tasks.values():
                    task.build_all_requests(limit=per_task, rank=0, world_size=1)
            for name, task in tasks.items():
                lm.task_dict[name] = task.dataset
                firsts = {}  # a multiple-choice question makes one request per choice
                for request in task.instances:
                    firsts.setdefault(request.doc_id, request)
                requests += enumerate(firsts.values())
            requests.sort(key=lambda pair: pair[0])
            return [lm.inputs([request]) for _, request in requests[:count]]
        finally:
            lm.clean()


def export(config: RunConfig, tasks: Tasks, directory: Path) -> list[Path]:
    """Write every cell as a plain configuration file for `python -m lmms_eval --config FILE`.

    Raises:
        ConfigError: an argument cannot be written in lmms-eval's `key=value,...` form.
    """
    paths = []
    variants = config.variants()
    for variant in variants:
        if variant.unsolved:
            raise ConfigError(
                f"{variant.label}: a cost is solved on the model, by vlmslim run; for plain files write the "
                "option that it found (solutions.json in the output directory) instead of the cost"
            )
    try:
        check_writable(directory)
    except ValueError as error:
        raise ConfigError(f"--export: {error}") from error
    for variant in variants:
        for task in tasks.leaves:
            path = directory / f"{variant.label}__{task.task.replace('/', '_')}.yaml"
            plain = {
                "model": "vlmslim",
                "model_args": _model_args(config, variant),
                "tasks": task.task,
                "include_path": tasks.include_path,
                "batch_size": config.batch_size,
                "seed": [config.seed] * 4,
                "log_samples": True,
                "output_path": str(directory / "results" / path.stem),
                "verbosity": "DEBUG",  # at any other level lmms-eval ends with exit status 0 after a failure
            } | ({} if config.limit is None else {"limit": config.limit})
            write_atomically(path, yaml.safe_dump(plain, sort_keys=False, width=1000))
            paths.append(path)
    return paths


def _model_args(config: RunConfig, variant: Variant) -> str:
    from lmms_eval.utils import simple_parse_args_string

    stages = list(variant.stages)
    method = stages[0] if len(stages) == 1 else {"method": json.dumps(stages)}
    arguments = config.model.arguments() | method
    text = ",".join(f"{key}={value}" for key, value in arguments.items())
    if simple_parse_args_string(text) != arguments:
        raise ConfigError(f"lmms-eval would not read {arguments} back from {text!r}; rename the path or the option")
    return text


@contextmanager
def _silence(log: Path):
    """Send what lmms-eval and its tasks print, progress bars included, to a file; stdout is for the leaderboard."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        yield


def quiet(log: Path | None = None) -> None:
    """Keep lmms-eval's log off the terminal, which is for progress and results; write it to a file if one is given."""
    logger.remove()
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
        logger.add(log, level="INFO")
