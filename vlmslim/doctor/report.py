"""The findings of an examination: as records, as JSON, and as a table."""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version

from rich.console import Group
from rich.markup import escape
from rich.table import Column, Table
from transformers import PreTrainedModel

import vlmslim
from vlmslim.evaluation.effect import acted_on
from vlmslim.receipt import headline

_MARKS = {"pass": "[green]✓[/]", "fail": "[bold red]✗[/]", "n/a": "[dim]–[/]"}


@dataclass(frozen=True)
class Finding:
    """One check of one method.

    check     : its name; "patch" if the method could not be attached, "restore" if it changed the model for good
    status    : "pass", "fail" or "n/a"
    measured  : the difference, in `unit`; None where the check could not be made
    tolerance : the largest difference that passes
    note      : what failed, or why there was nothing to check
    """

    method: str
    check: str
    status: str
    measured: float | None = None
    tolerance: float | None = None
    unit: str = ""
    note: str = ""


@dataclass
class Report:
    """The findings of an examination.

    model    : what was examined: checkpoint, class, dtype, device, attention back end, versions
    noise    : in logits, how far the unpatched model is from itself where only rounding differs
    factor   : how many times the noise is tolerated
    findings : in the order in which they were made
    receipts : by method, `Receipt.summary()` of the prompts
    """

    model: dict
    noise: float
    factor: float
    findings: list[Finding] = field(default_factory=list)
    receipts: dict[str, dict] = field(default_factory=dict)

    @classmethod
    def about(cls, model: PreTrainedModel, noise: float, factor: float) -> "Report":
        """Start a report on a model."""
        facts = {
            "checkpoint": model.config._name_or_path,
            "class": type(model).__name__,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
            "attention": model.config.get_text_config()._attn_implementation,
            "versions": {"vlmslim": vlmslim.__version__} | {name: version(name) for name in ("torch", "transformers")},
        }
        return cls(facts, noise, factor)

    @property
    def failures(self) -> list[Finding]:
        """The checks that failed."""
        return [finding for finding in self.findings if finding.status == "fail"]

    @property
    def abstentions(self) -> list[str]:
        """Say of each stage that decides itself and dropped nothing that the checks could not see what it does."""
        return [
            f"{method}: {acted_on(number, stage)}. It decides itself how many tokens it drops, and it dropped none, so "
            "the checks did not examine it; examine it with options under which it drops some"
            for method, receipt in self.receipts.items()
            for number, stage in enumerate(receipt["stages"], start=1)
            if stage["decides"] and not stage["acted"]
        ]

    @property
    def passed(self) -> bool:
        """True if something was checked, and nothing failed."""
        return not self.failures and any(finding.status == "pass" for finding in self.findings)

    def to_json(self, indent: int | None = 2) -> str:
        """Write everything as JSON, with numbers that are not finite as strings."""
        findings = [
            {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(finding).items()}
            for finding in self.findings
        ]
        return json.dumps({"passed": self.passed, **asdict(self), "findings": findings}, indent=indent)

    def __str__(self) -> str:
        lines = [f"{f.method} / {f.check}: {_measured(f)} {f.note}".rstrip() for f in self.failures]
        return "\n".join([self.verdict, *lines, *self.abstentions])

    @property
    def verdict(self) -> str:
        """The outcome in one line."""
        counts = {status: sum(f.status == status for f in self.findings) for status in _MARKS}
        methods = len({finding.method for finding in self.findings})
        return (
            f"{methods} method{'s' * (methods != 1)}: {counts['pass']} checks passed, {counts['fail']} failed, "
            f"{counts['n/a']} not applicable"
        )

    def render(self, verbose: bool = False) -> Group:
        """Return what a terminal shows, for `rich.print`.

        Args:
            verbose: list every finding with its tolerance, not only the failures.
        """
        m = self.model
        head = (
            f"[bold]{escape(m['checkpoint'] or m['class'])}[/] in {m['dtype']} on {m['device']}, {m['attention']}: "
            f"it differs from itself by up to {self.noise:.2g} logits through rounding; {self.factor} times that is "
            "tolerated where rounding may differ, nothing elsewhere"
        )
        methods = dict.fromkeys(finding.method for finding in self.findings)
        verbose |= len(methods) == 1
        parts: list = [head, ""] if len(methods) == 1 else [head, "", self._matrix(methods), ""]
        shown = [f for f in self.findings if verbose or f.status == "fail"]
        parts += [_details(shown), ""] if shown else []
        parts += [escape(headline(summary)) for summary in self.receipts.values() if verbose]
        parts += [f"{escape(f.method)}: {escape(f.note)}" for f in self.findings if f.check == "patch"]
        parts += map(escape, self.abstentions)
        return Group(*parts, f"[{'green' if self.passed else 'bold red'}]{self.verdict}[/]")

    def _matrix(self, methods: Iterable[str]) -> Table:
        checks = dict.fromkeys(finding.check for finding in self.findings if finding.check not in ("patch", "restore"))
        marks = {(finding.method, finding.check): _MARKS[finding.status] for finding in self.findings}
        columns = [Column("method", no_wrap=True), *(Column(check, overflow="fold") for check in checks)]
        table = Table(*columns, box=None, pad_edge=False)
        for method in methods:
            table.add_row(escape(method), *(marks.get((method, check), _MARKS["n/a"]) for check in checks))
        return table


def _details(findings: list[Finding]) -> Table:
    table = Table("", "method", "check", "measured", "tolerated", "", box=None, pad_edge=False)
    for f in findings:
        tolerance = "" if f.tolerance is None else f"{f.tolerance:.3g}"
        table.add_row(_MARKS[f.status], escape(f.method), f.check, _measured(f), tolerance, escape(f.note))
    return table


def _measured(finding: Finding) -> str:
    return "" if finding.measured is None else f"{finding.measured:.3g} {finding.unit}"
