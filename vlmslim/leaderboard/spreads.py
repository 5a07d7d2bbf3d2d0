"""Differences between papers that report the same method at the same budget on the same model."""

from dataclasses import dataclass

from vlmslim.leaderboard.published_tables import Paper


@dataclass(frozen=True)
class Report:
    """One table's average of a method at a budget.

    average : in per cent of the unpatched model, over the paper's own tasks
    known   : what is known of the table's choices
    """

    paper: str
    table: str
    average: float
    known: dict[str, str | int]


@dataclass(frozen=True)
class Spread:
    """Averages that papers report for one method at one budget on one model, the lowest first."""

    name: str
    keep: int | float
    reports: list[Report]

    @property
    def low(self) -> float:
        """The lowest average."""
        return self.reports[0].average

    @property
    def high(self) -> float:
        """The highest average."""
        return self.reports[-1].average

    def listed(self) -> str:
        """Write the averages with their papers."""
        return ", ".join(f"{report.paper} {report.average:.1f}" for report in self.reports)

    def differences(self) -> list[str]:
        """Return the choices that are not known to be the same in all papers."""
        names = dict.fromkeys(name for report in self.reports for name in report.known)
        return [name for name in names if len({str(report.known.get(name)) for report in self.reports}) > 1]

    def text(self) -> str:
        """Say how far the papers lie apart, and what is known of the reasons."""
        told = f"{len(self.reports)} tables: {self.low:.1f} to {self.high:.1f} % of unpatched."
        for name in self.differences():
            said = [f"{r.paper}: {r.known[name]}" for r in self.reports if name in r.known]
            told += f" {name[0].upper()}{name[1:]} ({'; '.join(dict.fromkeys(said))})."
        return told


def spreads_of(papers: list[Paper], model: str) -> dict[tuple[str, int | float | None], Spread]:
    """Collect the averages that papers report on a checkpoint.

    Returns:
        (method, keep) -> its spread. A method that vlmslim does not have goes by its name in the papers.
    """
    found: dict[tuple[str, int | float | None], Spread] = {}
    for paper in papers:
        for table in (table for table in paper.tables if model in table.checkpoints):
            for row in table.rows:
                if row.average is not None and row.keep is not None:
                    key = (row.method or row.name, row.keep)
                    spread = found.setdefault(key, Spread(row.name, row.keep, []))
                    spread.reports.append(Report(paper.name, table.table, row.average, table.known))
    for spread in found.values():
        spread.reports.sort(key=lambda report: (report.average, report.paper))
    return found
