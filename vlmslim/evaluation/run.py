"""`vlmslim run`: evaluate every method at every budget on every task, and survive interruptions."""

import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from vlmslim.cost.budget import TOLERANCE, Solution, cost_of
from vlmslim.cost.flops import DecoderShape
from vlmslim.evaluation import preflight
from vlmslim.evaluation.config import RunConfig
from vlmslim.evaluation.effect import abstentions, check_effect
from vlmslim.evaluation.errors import CellError, ConfigError
from vlmslim.evaluation.failures import cell_failure, message_of, refusing
from vlmslim.evaluation.inputs import HOW_TO_CONTINUE, Inputs, questions_hash, shortened
from vlmslim.evaluation.parts import Parts
from vlmslim.evaluation.progress import Display, RowLine
from vlmslim.evaluation.recording import record_flips
from vlmslim.evaluation.solutions import Solutions
from vlmslim.evaluation.store import Store, digest, reading, timing_key
from vlmslim.evaluation.variants import Variant
from vlmslim.io import provenance
from vlmslim.io.code import outside_files
from vlmslim.leaderboard.board import Leaderboard, preview
from vlmslim.leaderboard.report import write_all
from vlmslim.leaderboard.rows import Row
from vlmslim.leaderboard.tables import NOTHING, kept_text
from vlmslim.loading import check_device

if TYPE_CHECKING:
    from vlmslim.evaluation.cells import Answers, Cell


def run(
    config: RunConfig,
    *,
    fresh: bool = False,
    display: Display | None = None,
    harness: Callable[..., Any] | None = None,
    workers: str | int | None = None,
) -> Leaderboard:
    """Run what is not finished yet of a comparison, and write its leaderboard.

    Args:
        config: the comparison.
        fresh: delete the results in the output directory, as soon as nothing can be refused any more.
        display: shows progress.
        harness: makes what evaluates cells, from the comparison and `Display.bar`; by default `Harness`.
        workers: Ray actors that answer, each with the checkpoint: a number, "auto", or the address of a head node; by
            default this process answers.

    Raises:
        ConfigError: the output directory belongs to another comparison, or to a run that is still going on, or cannot
            be written to; the checkpoint, the device or a task does not exist; or a method cannot meet a budget.
        CellError: a cell failed, or a stage of its method did nothing.
    """
    if os.environ.get("WORLD_SIZE", "1").strip() not in ("", "0", "1"):
        raise ConfigError(
            f"vlmslim run is one process, and WORLD_SIZE is {os.environ['WORLD_SIZE']!r} here: unset it. "
            "For several GPUs: vlmslim run CONFIG --workers auto, or vlmslim run CONFIG --export DIR, then "
            "accelerate launch -m lmms_eval --config DIR/FILE.yaml"
        )
    store, display = Store(config.output), display or Display()
    store.prepare()
    try:
        with FileLock(store.directory / ".lock", timeout=0):
            made = _Run(config, store, display, harness or _default_harness(workers), fresh)
            try:
                return made.complete()
            finally:
                made.harness.close()
    except Timeout as error:
        raise ConfigError(f"another run is writing to {store.directory}; wait, or use another --output") from error


class _Run:
    """One call of `run`. The constructor refuses what can be refused before the checkpoint is loaded."""

    def __init__(self, config: RunConfig, store: Store, display: Display, harness: Callable[..., Any], fresh: bool):
        self.config, self.store, self.display, self.fresh = config, store, display, fresh
        self.variants = config.variants()
        self.harness = harness(config, display.bar)
        self.tasks = [task.task for task in self.harness.tasks.leaves]
        with refusing("model.device"):
            check_device(config.model.device)
        self.record: dict[str, Any] = {
            "seed": config.seed,
            "versions": provenance.versions(),
            "git_commit": provenance.git_commit(),
            "uncommitted": provenance.uncommitted(),
            "hardware": provenance.hardware(config.model.device),
        }
        checkpoint = self.harness.describe_checkpoint()
        self._leave_out(checkpoint.pop("undefined", {}))
        self.inputs = Inputs(self.variants, self.harness.tasks)
        self.shape = DecoderShape(**checkpoint["shape"])
        self.shared = config.shared() | {"checkpoint": checkpoint["identity"], "versions": self.record["versions"]}
        self.described = {
            "model": config.model.pretrained,
            "checkpoint": checkpoint,
            "limit": config.limit,
            "seed": config.seed,
            "include_path": [str(folder.resolve()) for folder in config.include_path],
            "tasks": [task.model_dump() for task in self.harness.tasks.leaves],
            "rows": [{"label": v.label, "stages": list(v.stages), "budget": v.budget} for v in self.variants],
        }
        with reading(store.directory):
            self.hash = digest(self.shared) if fresh else store.check_run(self.shared)
        self._check_counts(checkpoint.get("visual_tokens"))
        self.parts = Parts(store, self.hash, self.inputs)
        self.solutions = Solutions(store, self.hash, self.inputs, fresh=fresh, solve=self._solve)
        self._loaded = False

    def _leave_out(self, undefined: dict[str, str]) -> None:
        """Leave out default baselines that this checkpoint cannot have, with the reason; named ones stay.

        Args:
            undefined: name of a method -> why.
        """
        if "baselines" in self.config.model_fields_set:
            return
        for name, why in undefined.items():
            kept = [v for v in self.variants if not (v.baseline and v.stages[0]["method"] == name)]
            if len(kept) < len(self.variants):
                self.display.message(f"without the baseline {name}: {why}")
            self.variants = kept

    def complete(self) -> Leaderboard:
        """Solve budgets, evaluate and time what is missing, and write the leaderboard."""
        with reading(self.store.directory):
            stored = {(v.label, task): self._stored_cell(v, task) for v in self.variants for task in self.tasks}
        self.variants = self.solutions.solve_all(self.variants)
        with reading(self.store.directory):
            todo = [
                (variant, task)
                for variant in self.variants
                for task in self.tasks
                if stored[variant.label, task] is None
            ]
            self._check_started(stored)
        rows = list(dict.fromkeys(variant for variant, _ in todo))
        by_task = {task: [variant for variant in rows if (variant, task) in todo] for task in self.tasks}
        missing = {task: variants for task, variants in by_task.items() if variants}
        self._open(missing)
        self._begin()
        for (label, task), cell in stored.items():
            if cell is not None:  # a run may have been killed after it had saved the cell
                self.store.delete_parts(label, task)
        total = len(self.variants) * len(self.tasks)
        self.display.start(total, total - len(todo), max(len(variant.label) for variant in self.variants))
        self._evaluate(missing, rows)
        self._sum_up(rows)
        self._time()
        board = Leaderboard.read(self.store.directory)
        if self.config.report.samples:
            samples = self.config.report.samples
            record_flips(board, self.store, self.variants, samples, self.harness, self.display)
        write_all(board, self.store.directory)
        return board

    def _load(self) -> None:
        """Load the checkpoint, when the first unfinished cell or unsolved budget needs it."""
        if not self._loaded:
            self.display.message(f"loading {self.config.model.pretrained}")
            with refusing("model"):
                self.harness.load()
            self._loaded = True

    def _solve(self, variant: Variant) -> Solution:
        """Find the option of a row that makes it cost its budget.

        Raises:
            ConfigError: the checkpoint cannot be loaded.
            ValueError: no value of the option does, or the options do not fit the model.
            CellError: anything else that the method raises.
        """
        self._load()
        self.display.message(f"solving {variant.label}")
        try:
            return self.harness.solve(variant)
        except ValueError:
            raise
        except Exception as error:  # a method may raise anything; the error goes on, with the name of the row
            raise CellError(f"{variant.label}: solving its budget failed: {error!r}") from error

    def _open(self, todo: dict[str, list[Variant]]) -> None:
        """Open what the unfinished cells will read, because an error should not come after hours of other cells.

        Raises:
            ConfigError: a method cannot be attached to the checkpoint, or the data of a task cannot be read.
        """
        if not todo:
            return
        self._load()
        failures = []
        for variant in dict.fromkeys(variant for variants in todo.values() for variant in variants):
            try:
                self.harness.check_method(variant)
            except Exception as error:  # a method may raise anything; all that fail are listed in one refusal
                failures.append(f"{variant.label}: {message_of(error)}")
        for task in todo:
            try:
                self.harness.check_task(task)
            except Exception as error:  # a task may raise anything; all that fail are listed in one refusal
                failures.append(f"tasks: {task} cannot be opened: {message_of(error)}")
        if failures:
            raise ConfigError("\n".join(failures))
        self.harness.check_split(todo)

    def _begin(self) -> None:
        """Write the plan. What was refused up to here has changed nothing, also where old results are to go."""
        if uncommitted := self.record["uncommitted"]:
            names = shortened(uncommitted)
            self.display.message(f"uncommitted changes of vlmslim: {names}; the commit in the results is marked with +")
        if self.fresh:
            self._load()  # a checkpoint that cannot be loaded is the last thing to refuse
            self.store.clear()
            self.solutions.save()
        self.store.save_run(self.shared, self.described)

    def _check_counts(self, tokens: int | None) -> None:
        """Refuse counts above the visual tokens of every image, if the checkpoint tells how many those are."""
        if tokens is None:
            return
        failures = []
        for variant in self.variants:
            try:
                if not variant.unsolved:
                    preflight.check_counts(variant.stages, tokens)
            except ValueError as error:
                failures.append(f"{variant.label}: {error}")
        if failures:
            raise ConfigError("\n".join(failures))

    # ---------------------------------------------------------------- cells

    def _stored_cell(self, variant: Variant, task: str) -> dict | None:
        """Return the finished cell; None if it is still to be done, for the first time or afresh.

        Raises:
            ConfigError: its numbers must not be mixed with those of this run.
        """
        cell = None if self.fresh else self.store.cell(variant.label, task)
        if cell is not None:
            self._check_same(cell, variant)
        return cell

    def _check_started(self, stored: dict[tuple[str, str], dict | None]) -> None:
        """Refuse finished cells of other stages, and answered parts of other cells that must not be mixed with ours."""
        for variant in self.variants:
            for task in self.tasks:
                if (cell := stored[variant.label, task]) is not None:
                    self.inputs.check_stages(cell, variant, self.store.directory)
                elif not self.fresh:
                    for part in self.store.parts(variant.label, task):
                        self._check_same(part, variant)
                        self.inputs.check_stages(part, variant, self.store.directory)

    def _check_same(self, cell: dict, variant: Variant) -> None:
        """Refuse a cell, or a part of one, of another run, or of other code, weights or questions."""
        if cell["config_hash"] != self.hash:
            raise ConfigError(
                f"{self.store.directory} holds a cell {variant.label} / {cell['task']} of another run (configuration "
                f"{cell['config_hash'][:12]}, now {self.hash[:12]}), and numbers must not be mixed; {HOW_TO_CONTINUE}"
            )
        self.inputs.check_stored(cell, variant, self.store.directory)

    def _sum_up(self, rows: list[Variant]) -> None:
        """Tell the user what rows kept, scored and took, as far as they are finished."""
        for row in rows:
            self._sum_up_row(row.label)

    def _sum_up_row(self, label: str) -> None:
        cells = [cell for task in self.tasks if (cell := self.store.cell(label, task)) is not None]
        try:
            row = preview(self.store, label)
        except ConfigError:  # no number: the board says so after the last row, and the other rows may still run
            row = Row(label, None)
        self.display.finish_row(
            RowLine(
                label,
                NOTHING if row.cost is None else kept_text(row.cost),
                None if row.relative is None else 100 * row.relative.value,
                sum(cell["seconds"] for cell in cells),
                tuple(abstentions([cell["receipt"] for cell in cells])),
            )
        )

    def _evaluate(self, todo: dict[str, list[Variant]], rows: list[Variant]) -> None:
        """Evaluate methods on tasks, and save a cell for each. A cell that fails does not stop the others.

        Raises:
            CellError: cells failed.
        """
        failed: list[CellError] = []
        answered = self.harness.answer_all(todo, self.display.start_cell, self.parts) if todo else ()
        for number, (task, answers) in enumerate(answered, 1):
            if isinstance(answers, Exception):
                failed.append(cell_failure(task, answers))
            else:
                failed += [error for variant in todo[task] if (error := self._grade(variant, task, answers))]
                for variant in todo[task]:  # finished, or failed and to be done afresh
                    self.store.delete_parts(variant.label, task)
            if number == 1 < len(todo) and not failed:
                self.display.message(f"a first look, at {task} alone:")
                self._sum_up(rows)
                self.display.message("all tasks:")
        if failed:
            more = f" ({len(failed) - 1} more cells failed)" if len(failed) > 1 else ""
            raise CellError(f"{failed[0]}{more}") from failed[0].__cause__

    def _grade(self, variant: Variant, task: str, answers: "dict[str, Answers]") -> CellError | None:
        """Save the cell of a method that has answered a task; return what failed instead."""
        try:
            cell = self.harness.cell(variant, task, answers[variant.label])
            check_effect(cell.receipt)
        except Exception as error:  # a method or a task may raise anything; the run ends with it, after other cells
            return cell_failure(f"{variant.label} on {task}", error)
        self.inputs.check_unchanged(variant, task)
        self._save(variant, task, cell)
        self.display.finish_cell()
        return None

    def _save(self, variant: Variant, task: str, cell: "Cell") -> None:
        """Save a finished cell."""
        record = {
            **self.inputs.made_with(variant),
            "config_hash": self.hash,
            **self.record,
            "hardware": cell.hardware or self.record["hardware"],
            "seconds": round(cell.seconds, 3),
            "batch_size": cell.batch_size,
            "definition": self.inputs.definitions[task],
            "questions": questions_hash(cell.samples, cell.results.get("configs", {}).get(task, {})),
            "receipt": cell.receipt,
            "protocol": cell.protocol,
            "method_flops": cell.method_flops,
            "lmms_eval": cell.results,
        }
        if files := outside_files(variant.classes):
            record["method_versions"] = {name: provenance.file_version(name, file) for name, file in files.items()}
        if variant.solved is not None:
            record["budget"] = variant.solved | {"spent": self._spent(variant, task, cell.receipt)}
        self.store.save_cell(variant.label, task, record, cell.samples)

    def _spent(self, variant: Variant, task: str, receipt: dict) -> float | None:
        """Return what a task really cost, and tell the user if that is not what the sample prompts cost.

        None for a cost that is a time, which all rows are measured for together.
        """
        ((currency, target),) = variant.cost.items()
        if currency == "ttft_ratio":
            return None
        if currency == "auto":
            cost = receipt["kept"] / (receipt["visual_tokens"] if isinstance(target, float) else 1)
        else:
            cost = cost_of(receipt, self.shape)[currency]
        if abs(cost - target) > TOLERANCE * target:
            self.display.message(f"{variant.label} costs {cost:.4g} on {task}: its questions differ from the sample's")
        return cost

    def _time(self) -> None:
        """Time all methods together. A method that was added makes all of them be timed again."""
        timing = self.config.timing
        if timing is None:
            return
        settings = {
            "config_hash": self.hash,
            "timing": timing.model_dump(),
            "rows": [timing_key(variant.label, self.inputs.made_with(variant)) for variant in self.variants],
        }
        before = self.store.timing
        if before is not None and before.get("settings") == settings:
            return
        self._load()
        self.display.message(
            f"timing {len(self.variants)} rows together: {timing.prompts} prompts, {timing.repeats} repetitions"
        )
        with self.display.bar(total=len(self.variants) * (timing.repeats + 1), desc="timing") as bar:
            times = self.harness.time(self.variants, timing, lambda: bar.update(1))
        for variant in self.variants:
            self.inputs.check_row(variant)
        self.store.save_timing({"settings": settings, "hardware": self.record["hardware"], "times": times})


def _default_harness(workers: str | int | None) -> Callable[..., Any]:
    if workers is not None:
        from vlmslim.evaluation.workers import RayHarness

        return partial(RayHarness, workers=workers)
    from vlmslim.evaluation.harness import Harness  # it loads lmms-eval, which takes seconds

    return Harness
