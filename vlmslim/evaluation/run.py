"""`vlmslim run`: evaluate every method at every budget on every task, and survive interruptions."""

import json
import os
import time
from contextlib import AbstractContextManager
from itertools import groupby
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm import tqdm

from vlmslim.cost.budget import TOLERANCE, cost_of
from vlmslim.cost.flops import DecoderShape
from vlmslim.evaluation import preflight as checks
from vlmslim.evaluation.config import ConfigError, RunConfig, TaskConfig, Variant
from vlmslim.evaluation.store import Store, digest, timing_key
from vlmslim.io import provenance
from vlmslim.io.code import SourceError, code_hash, outside_files
from vlmslim.io.messages import one_line
from vlmslim.leaderboard.board import Leaderboard
from vlmslim.leaderboard.render import write_all
from vlmslim.receipt import headline

WAY_OUT = "use another --output directory, or start over with --fresh"


class CellError(RuntimeError):
    """A cell that could not be evaluated; the message names it. Finished cells stay."""


class Display:
    """What a run tells the outside; the CLI overrides it with progress bars."""

    def say(self, text: str) -> None:
        """A line for the user."""

    def cells(self, total: int, done: int) -> None:
        """The grid has `total` cells, of which `done` are finished."""

    def cell(self, label: str, task: str) -> None:
        """A cell begins."""

    def finished(self) -> None:
        """A cell is saved."""

    def bar(self, total: int = 0, desc: str = "") -> AbstractContextManager:
        """A progress bar within a cell, called and used like tqdm's."""
        return tqdm(total=total, desc=desc, disable=True)


def run(config: RunConfig, *, fresh: bool = False, display: Display | None = None, harness=None) -> Leaderboard:
    """Run what is not finished yet of a comparison, and write its leaderboard.

    Args:
        config: the comparison.
        fresh: throw away the results that are in the output directory, once nothing can be refused any more.
        display: shows progress.
        harness: what evaluates a cell; by default the checkpoint behind lmms-eval.

    Raises:
        ConfigError: the output directory belongs to another comparison, or to a run that is still going on, or cannot
            be written to; the checkpoint, the device or a task do not exist; or a method cannot meet a budget.
        CellError: a cell failed, or its method had no effect.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ConfigError(
            "vlmslim run is one process. For several: vlmslim run CONFIG --export DIR, then "
            "accelerate launch -m lmms_eval --config DIR/FILE.yaml"
        )
    if harness is None:
        from vlmslim.evaluation import harness
    display = display or Display()
    store = Store(config.output)
    store.prepare()
    try:
        with FileLock(store.directory / ".lock", timeout=0):
            return _Run(config, store, display, harness, fresh).complete()
    except Timeout as error:
        raise ConfigError(f"another run is writing to {store.directory}; wait, or use another --output") from error


class _Run:
    """One call of `run`, from the plan to the leaderboard."""

    def __init__(self, config: RunConfig, store: Store, display: Display, harness, fresh: bool):
        self.config, self.store, self.display, self._module = config, store, display, harness
        self.fresh = fresh
        self.variants = config.variants()
        self.weights = {variant.label: _weights(variant) for variant in self.variants}
        self.code = {variant.label: _code(variant) for variant in self.variants}
        self._tasks = harness.Tasks(config)
        self.tasks: list[TaskConfig] = self._tasks.leaves
        self.definitions = {task.task: self._tasks.definition(task.task) for task in self.tasks}
        _refuse(checks.check_device, config.model.device, where="model.device")
        self.record = {
            "seed": config.seed,
            "versions": provenance.versions(),
            "git_commit": provenance.git_commit(),
            "uncommitted": provenance.uncommitted(),
            "hardware": provenance.hardware(config.model.device),
        }
        checkpoint = harness.describe_checkpoint(config)
        self.shape = DecoderShape(**checkpoint["shape"])
        self.shared = config.shared() | {"checkpoint": checkpoint["identity"], "versions": self.record["versions"]}
        self.described = {
            "model": config.model.pretrained,
            "checkpoint": checkpoint,
            "limit": config.limit,
            "seed": config.seed,
            "tasks": [task.model_dump() for task in self.tasks],
            "rows": [{"label": v.label, "stages": list(v.stages), "budget": v.budget} for v in self.variants],
        }
        self.hash = digest(self.shared) if fresh else store.check_run(self.shared)
        self._check_counts(checkpoint.get("visual_tokens"))
        self._loaded = None

    @property
    def harness(self):
        """The loaded checkpoint; loaded when the first unfinished cell asks for it."""
        if self._loaded is None:
            self.display.say(f"loading {self.config.model.pretrained}")
            self._loaded = _refuse(self._module.Harness, self.config, self.display.bar, where="model")
        return self._loaded

    def complete(self) -> Leaderboard:
        kept = (
            {} if self.fresh else {(v.label, t.task): self._kept(v, t.task) for v in self.variants for t in self.tasks}
        )
        self.variants = self._solved()
        if self.record["uncommitted"]:
            names = _listed(self.record["uncommitted"])
            self.display.say(f"uncommitted changes of vlmslim: {names}; the commit in the results is marked with +")
        cells = [(variant, task.task) for variant in self.variants for task in self.tasks]
        todo = [(v, task) for v, task in cells if not self._is_finished(v, kept.get((v.label, task)))]
        self._begin()
        self.display.cells(len(cells), len(cells) - len(todo))
        for variant, own in groupby(todo, key=lambda cell: cell[0]):
            for _, task in own:
                self.display.cell(variant.label, task)
                self._evaluate(variant, task)
                self.display.finished()
            receipt = self.store.cell(variant.label, task)["receipt"]
            self.display.say(f"{variant.label}, as on {task}: {headline(receipt)}")
        self._time()
        board = Leaderboard.read(self.store.directory)
        write_all(board, self.store.directory)
        return board

    def _begin(self) -> None:
        """Write the plan. What was refused up to here has changed nothing, also where old results are to go."""
        if self.fresh:
            _ = self.harness  # a checkpoint that cannot be loaded is the last thing to refuse
            self.store.clear()
            if self._solutions:
                self._save_solutions(self._solutions)
        self.store.save_run(self.shared, self.described)

    def _check_counts(self, tokens: int | None) -> None:
        """Refuse counts above what every image has, where the checkpoint tells how many that are."""
        failures = []
        for variant in self.variants if tokens is not None else ():
            try:
                checks.check_counts(() if variant.unsolved else variant.stages, tokens)
            except ValueError as error:
                failures.append(f"{variant.label}: {error}")
        if failures:
            raise ConfigError("\n".join(failures))

    def _save_solutions(self, rows: dict) -> None:
        self.store.save_solutions({"config_hash": self.hash, "rows": rows})

    def _solved(self) -> list[Variant]:
        """The rows with every cost solved. A solution is kept: a task that is added later changes no method."""
        known = None if self.fresh else self.store.solutions
        known = known["rows"] if known is not None and known["config_hash"] == self.hash else {}
        self._solutions = known
        rows, failures = [], []
        for variant in self.variants:
            if variant.unsolved:
                asked = {"budget": variant.budget, **self._made_with(variant)}
                found = known.get(variant.label)
                if found is None or found["asked"] != json.loads(json.dumps(asked)):
                    self.display.say(f"solving {variant.label}")
                    try:
                        solution = self.harness.solve(variant)
                    except ValueError as error:  # a budget that cannot be met, or options that do not fit the model
                        failures.append(f"{variant.label}: {error}")
                        continue
                    except Exception as error:
                        raise CellError(f"{variant.label}: solving its budget failed: {error!r}") from error
                    found = {"asked": asked, "stages": list(solution.stages), "solved": solution.record()}
                    known[variant.label] = found
                    if not self.fresh:  # else the old ones may still be wanted, until nothing is refused any more
                        self._save_solutions(known)
                variant = variant.solve(found["stages"], found["solved"])
            rows.append(variant)
        if failures:
            raise ConfigError("\n".join(failures))
        return rows

    def _made_with(self, variant: Variant) -> dict:
        """Record what the numbers of a row depend on: its stages, its code, and its weights if it has any."""
        weights = self.weights[variant.label]
        made = {"stages": list(variant.stages), "code": self.code[variant.label]}
        return made | ({"weights": weights} if weights else {})

    def _kept(self, variant: Variant, task: str) -> dict | None:
        """Return the finished cell, None if it is still to be done.

        Raises:
            ConfigError: its numbers must not be mixed with those of this run.
        """
        cell = self.store.cell(variant.label, task)
        if cell is None:
            return None
        if cell["config_hash"] != self.hash:
            raise ConfigError(
                f"{self.store.directory} holds a cell {variant.label} / {task} of another run (configuration "
                f"{cell['config_hash'][:12]}, now {self.hash[:12]}), and numbers must not be mixed; {WAY_OUT}"
            )
        if "code" not in cell or "definition" not in cell:
            raise ConfigError(
                f"{self.store.directory} holds a cell {variant.label} / {task} of an older vlmslim, which did not "
                "record the code that made it, so it is unknown whether its numbers may be mixed with new ones; "
                f"{WAY_OUT}"
            )
        methods, before = ([stage["method"] for stage in stages] for stages in (variant.stages, cell["stages"]))
        changed = _changed(cell["code"], self.code[variant.label])
        if changed and methods == before:  # else the label stands for other methods now, which is refused later
            own = [name for name in changed if not _is_engine(name)]
            what = f"the method {variant.label}" if own else "the engine"
            label = "give the changed method another 'label', " if own else ""
            raise ConfigError(
                f"{what} changed in the middle of the run ({_listed(own or changed)}): {self.store.directory} holds "
                f"its cell {task}, made before, and numbers must not be mixed. Undo the change, {label}{WAY_OUT}"
            )
        if changed := _changed(cell["definition"], self.definitions[task]):
            raise ConfigError(
                f"the task {task} changed in the middle of the run ({_listed(changed)}): {self.store.directory} holds "
                f"its cell {variant.label}, made before, and numbers must not be mixed. Undo the change, {WAY_OUT}"
            )
        now = self.weights[variant.label]
        for name, before in cell.get("weights", {}).items():
            same_place = any(name in stage.values() for stage in variant.stages)  # else the stages differ
            if same_place and now.get(name) != before:
                holds = now[name][:12] if now.get(name) else "none that can be read"
                raise ConfigError(
                    f"the weights of {variant.label} changed in the middle of the run: {self.store.directory} holds "
                    f"its cell {task}, made when {name} held {before[:12]}; it holds {holds} now, and numbers must not "
                    f"be mixed. Give the new ones another 'label', {WAY_OUT}"
                )
        return cell

    def _is_finished(self, variant: Variant, cell: dict | None) -> bool:
        """Whether a cell is there, and of the method as it is now."""
        if cell is None:
            return False
        now = json.loads(json.dumps(variant.stages))
        if cell["stages"] != now:
            raise ConfigError(
                f"{variant.label} was changed in the middle of the run: {self.store.directory} holds its cell "
                f"{cell['task']}, made with\n  {_options(cell['stages'])}\nand now it is\n  {_options(now)}\n"
                f"Give the changed method another 'label', {WAY_OUT}"
            )
        return True

    def _evaluate(self, variant: Variant, task: str) -> None:
        harness = self.harness
        started = time.perf_counter()
        try:
            cell = harness.evaluate(variant, task)
            check_effect(variant, cell.receipt)
        except Exception as error:
            raise CellError(f"{variant.label} on {task} failed: {type(error).__name__}: {error}") from error
        self._check_weights(variant)
        self._check_definition(task)
        record = {
            **self._made_with(variant),
            "config_hash": self.hash,
            **self.record,
            "seconds": round(time.perf_counter() - started, 3),
            "definition": self.definitions[task],
            **_versions_of_files(variant),
            "questions": _questions(cell.samples, cell.results.get("configs", {}).get(task, {})),
            "receipt": cell.receipt,
            "lmms_eval": cell.results,
        }
        if variant.solved is not None:
            record["budget"] = variant.solved | {"spent": self._spent(variant, task, cell.receipt)}
        self.store.save_cell(variant.label, task, record, cell.samples)

    def _check_weights(self, variant: Variant) -> None:
        """Refuse numbers of weights that were replaced while they were in use."""
        if _weights(variant) != self.weights[variant.label]:
            raise CellError(f"the weights of {variant.label} were replaced meanwhile; run again when training is over")

    def _check_definition(self, task: str) -> None:
        """Refuse numbers of a task that was edited while it was in use."""
        if changed := _changed(self.definitions[task], self._tasks.definition(task)):
            raise CellError(f"the task {task} was changed meanwhile ({_listed(changed)}); undo the change, {WAY_OUT}")

    def _spent(self, variant: Variant, task: str, receipt: dict) -> float:
        """What a task really cost; said aloud where that is not what the sample prompts cost."""
        ((currency, target),) = variant.budget.items()
        cost = cost_of(receipt, self.shape)[currency]
        if abs(cost - target) > TOLERANCE * target:
            self.display.say(f"{variant.label} costs {cost:.4g} on {task}: its questions differ from the sample's")
        return cost

    def _time(self) -> None:
        """Time all methods together; a method that was added later makes all of them be timed again."""
        if self.config.timing is None:
            return
        settings = {
            "config_hash": self.hash,
            "timing": self.config.timing.model_dump(),
            "rows": [timing_key(v.label, self._made_with(v)) for v in self.variants],
        }
        before = self.store.timing
        if before is not None and before["settings"] == settings:
            return
        timing = self.config.timing
        self.display.say(
            f"timing {len(self.variants)} rows together: {timing.prompts} prompts, {timing.repeats} repetitions"
        )
        rounds = len(self.variants) * (timing.repeats + 1)
        with self.display.bar(total=rounds, desc="timing") as bar:
            times = self.harness.time(self.variants, lambda: bar.update(1))
        for variant in self.variants:
            self._check_weights(variant)
        self.store.save_timing({"settings": settings, "hardware": self.record["hardware"], "times": times})


def _refuse(check, *arguments, where: str):
    """What a check or a loader returns; what it cannot do is a mistake in the configuration."""
    try:
        return check(*arguments)
    except (OSError, TypeError, ValueError) as error:  # TypeError: a class of model that cannot be patched
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{where}: {one_line(error)}") from error


def _changed(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """List the parts that differ between two records of hashes."""
    return sorted(part for part in before.keys() | now.keys() if before.get(part) != now.get(part))


def _listed(names: list[str], most: int = 4) -> str:
    """Join names for a message, the first few of many."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _is_engine(file: str) -> bool:
    """Tell whether a file of `code_hash` is part of this package and of no method."""
    return file.startswith("vlmslim/") and not file.startswith("vlmslim/methods/")


def _code(variant: Variant) -> dict[str, str]:
    """Hash the code of a row's methods."""
    try:
        return code_hash(variant.classes)
    except SourceError as error:
        raise ConfigError(f"{variant.label}: {error}") from error


def _versions_of_files(variant: Variant) -> dict[str, dict[str, str]]:
    """Record which versions of other authors' files a row runs; nothing for methods of this package."""
    versions = {name: provenance.file_version(name, file) for name, file in outside_files(variant.classes).items()}
    return {"method_versions": versions} if versions else {}


def _weights(variant: Variant) -> dict[str, str | None]:
    """The hashes of what a row loads beside the checkpoint, by name."""
    try:
        return provenance.weights(variant.stages)
    except ValueError as error:
        raise ConfigError(f"{variant.label}: {error}") from error


def _options(stages: list[dict]) -> str:
    """Stages as a user writes them."""
    return " + ".join(", ".join(f"{key}: {value}" for key, value in stage.items()) for stage in stages)


def _questions(samples: list[dict], settings: dict) -> str:
    """A hash of what was asked and how; not lmms-eval's `doc_hash`, in which pictures stand by their memory address.

    Args:
        samples: of a cell.
        settings: of its task, as lmms-eval has them; functions among them stand by their address, so few count.
    """
    asked = [
        [sample["doc_id"], sample["target"], [text for text in sample["arguments"] if isinstance(text, str)]]
        for sample in samples
    ]
    how = {name: settings.get(name) for name in ("output_type", "generation_kwargs", "num_fewshot", "repeats")}
    return digest([asked, how])


def check_effect(variant: Variant, receipt: dict) -> None:
    """Refuse a cell in which a method was on and did nothing; see `checks.check_effect`."""
    checks.check_effect(variant.stages, receipt)


def export(config: RunConfig, directory: Path | str) -> list[Path]:
    """Write every cell as a plain lmms-eval configuration; see `harness.export`."""
    from vlmslim.evaluation import harness

    return harness.export(config, harness.Tasks(config), Path(directory))
