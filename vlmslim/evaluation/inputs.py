"""Hashes of the inputs of a cell: code, weights and the task. A finished cell counts while they are the same."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from vlmslim import bundled
from vlmslim.evaluation.errors import CellError, ConfigError
from vlmslim.evaluation.failures import as_written
from vlmslim.evaluation.store import digest
from vlmslim.evaluation.tasks import Tasks
from vlmslim.evaluation.variants import Variant
from vlmslim.io.code import SourceError, code_hash
from vlmslim.io.provenance import fingerprint
from vlmslim.saving.folder import read

HOW_TO_CONTINUE = "use another --output directory, or start over with --fresh"


class Inputs:
    """Hashes of the code and the weights of every row, and of the definition of every task, taken when a run starts.

    Raises:
        ConfigError: a method has no source file, or weights that no method could load.
    """

    def __init__(self, variants: Iterable[Variant], tasks: Tasks):
        self._tasks = tasks
        self.code: dict[str, dict[str, str]] = {}
        self.weights: dict[str, dict[str, str | None]] = {}
        for variant in variants:
            self.code[variant.label] = _code(variant)
            self.weights[variant.label] = _weights(variant)
        self.definitions = {leaf.task: tasks.definition(leaf.task) for leaf in tasks.leaves}

    def made_with(self, variant: Variant) -> dict:
        """Return what a cell records of its row: the stages, the code, and the weights if there are any."""
        weights = self.weights[variant.label]
        record = {"stages": list(variant.stages), "code": self.code[variant.label]}
        return record | ({"weights": weights} if weights else {})

    def check_stored(self, cell: dict, variant: Variant, directory: Path) -> None:
        """Refuse a finished cell of other code, of another definition of its task, or of other weights.

        Raises:
            ConfigError: the message names what changed, and says how to continue.
        """
        task = cell["task"]
        if "code" not in cell:
            raise ConfigError(
                f"{directory} holds a cell {variant.label} / {task} of an older vlmslim, which did not record the code "
                "that made it, so it is unknown whether its numbers may be mixed with new ones; " + HOW_TO_CONTINUE
            )
        if files := self._changed_code(cell, variant):
            own = [file for file in files if not _is_engine(file)]
            what, advice = "the engine", "Undo the change"
            if own:
                what, advice = f"the method {variant.label}", f"{advice}, give the changed method another 'label'"
            raise _mixed(
                f"{what} changed in the middle of the run ({shortened(own or files)})",
                f"{directory} holds its cell {task}, made before",
                advice,
            )
        if parts := changed_parts(cell["definition"], self.definitions[task]):
            raise _mixed(
                f"the task {task} changed in the middle of the run ({shortened(parts)})",
                f"{directory} holds its cell {variant.label}, made before",
                "Undo the change",
            )
        now = self.weights[variant.label]
        for name, before in cell.get("weights", {}).items():
            same_place = any(name in stage.values() for stage in variant.stages)  # else the stages differ
            hash = now.get(name)
            if same_place and hash != before:
                holds = hash[:12] if hash else "none that can be read"
                raise _mixed(
                    f"the weights of {variant.label} changed in the middle of the run",
                    f"{directory} holds its cell {task}, made when {name} held {before[:12]}; it holds {holds} now",
                    "Give the new ones another 'label'",
                )

    def check_stages(self, cell: dict, variant: Variant, directory: Path) -> None:
        """Refuse a finished cell that other stages made under the same label.

        Raises:
            ConfigError: the message shows both, and says how to continue.
        """
        now = json.loads(json.dumps(variant.stages))
        if cell["stages"] != now:
            raise ConfigError(
                f"{variant.label} was changed in the middle of the run: {directory} holds its cell {cell['task']}, "
                f"made with\n  {as_written(cell['stages'])}\nand now it is\n  {as_written(now)}\n"
                f"Give the changed method another 'label', {HOW_TO_CONTINUE}"
            )

    def _changed_code(self, cell: dict, variant: Variant) -> list[str]:
        """List the files that changed; none if the label stands for other methods now, which is refused elsewhere."""
        before, now = ([stage["method"] for stage in stages] for stages in (cell["stages"], variant.stages))
        return changed_parts(cell["code"], self.code[variant.label]) if before == now else []

    def check_unchanged(self, variant: Variant, task: str) -> None:
        """Refuse numbers of code, weights or a task that were changed while they were in use.

        Raises:
            CellError: the message names what changed, and says how to continue.
        """
        self.check_row(variant)
        if parts := changed_parts(self.definitions[task], self._tasks.definition(task)):
            raise _meanwhile(f"the task {task} was changed meanwhile ({shortened(parts)})", "undo the change")

    def check_row(self, variant: Variant) -> None:
        """Refuse numbers of weights, or of another author's code, that were changed while they were in use.

        An edit of this package does not reach a run that is going on, because Python has imported it already.

        Raises:
            CellError: the message names what changed, and says how to continue.
        """
        if _weights(variant) != self.weights[variant.label]:
            raise CellError(f"the weights of {variant.label} were replaced meanwhile; run again when training is over")
        files = changed_parts(self.code[variant.label], _code(variant))
        if own := [file for file in files if not file.startswith("vlmslim/")]:
            raise _meanwhile(
                f"the method {variant.label} was changed meanwhile ({shortened(own)})",
                "undo the change, give the changed method another 'label'",
            )


def questions_hash(samples: list[dict], settings: dict) -> str:
    """Hash what was asked and how; not by lmms-eval's `doc_hash`, in which pictures stand by their memory address.

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


def weight_hashes(stages: Iterable[dict]) -> dict[str, str | None]:
    """Hash what stages load beside the checkpoint.

    The hash of trained weights is the one that their folder records and that loading checks. That of a local CLIP is
    its fingerprint. Words ("random", "pool") are no files, and what lies on the hub is not read.

    Returns:
        A hash for each name in the stages, None where nothing can be read.

    Raises:
        ValueError: a folder that no method could load either.
    """
    found: dict[str, str | None] = {}
    for stage in stages:
        if name := stage.get("weights"):
            saved = read(name)
            recorded = saved.sha256 if saved is not None else None
            if recorded or "/" in name:
                found[name] = recorded
        if (name := stage.get("clip")) and (hash := fingerprint(bundled.resolve(name))):
            found[name] = hash
    return found


def changed_parts(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """List the names under which two records of hashes differ."""
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))


def shortened(names: Sequence[str], most: int = 4) -> str:
    """Join names for a message, only the first of many."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _code(variant: Variant) -> dict[str, str]:
    try:
        return code_hash(variant.classes)
    except SourceError as error:
        raise ConfigError(f"{variant.label}: {error}") from error


def _weights(variant: Variant) -> dict[str, str | None]:
    try:
        return weight_hashes(variant.stages)
    except ValueError as error:
        raise ConfigError(f"{variant.label}: {error}") from error


def _is_engine(file: str) -> bool:
    """Tell whether a file of `code_hash` is part of this package and of no method."""
    return file.startswith("vlmslim/") and not file.startswith("vlmslim/methods/")


def _mixed(what: str, cell: str, advice: str) -> ConfigError:
    return ConfigError(f"{what}: {cell}, and numbers must not be mixed. {advice}, {HOW_TO_CONTINUE}")


def _meanwhile(what: str, advice: str) -> CellError:
    return CellError(f"{what}; {advice}, {HOW_TO_CONTINUE}")
