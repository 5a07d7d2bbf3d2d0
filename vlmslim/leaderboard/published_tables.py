"""The tables of papers as data: their schema, and the files that hold them.

The tables are in `vlmslim/leaderboard/papers/*.yaml`, one file per paper, with the source of every number.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vlmslim.evaluation.errors import ConfigError
from vlmslim.io.yaml_files import read_yaml
from vlmslim.leaderboard.rows import UNPATCHED

DIRECTORY = Path(__file__).parent / "papers"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Benchmark(_Strict):
    """A column of a published table.

    tasks : lmms-eval tasks that ask the same questions; empty where no task does
    """

    tasks: list[str] = []
    metric: str | None = None
    unit: str

    @model_validator(mode="after")
    def _both(self) -> "Benchmark":
        if bool(self.tasks) != bool(self.metric):
            raise ValueError("give 'tasks' and 'metric' together, or neither of them")
        return self


class PublishedRow(_Strict):
    """A line of a published table.

    name   : as in the paper
    method : vlmslim's name, if vlmslim has this method with these `options`; "none" for the unpatched model
    keep   : visual tokens kept per image, as in vlmslim
    fraction, equivalent_tokens : a budget that is not vlmslim's `keep`
    tflops, prefill_ms : as printed; the table's `convention` says how they are counted
    average : over the paper's tasks, in per cent of the unpatched model, as printed
    scores : one per column
    """

    name: str
    method: str | None = None
    options: dict = {}
    keep: Annotated[int | float, Field(gt=0)] | None = None
    fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    equivalent_tokens: Annotated[float, Field(gt=0)] | None = None
    tflops: float | None = None
    prefill_ms: float | None = None
    average: float | None = None
    note: str | None = None
    scores: list[float | None]


class PublishedTable(_Strict):
    """A published table, or the part of it that is about one model.

    source        : where the numbers were read
    checkpoints   : checkpoints on the hub with the same weights; without one, no cell is compared
    visual_tokens : of an image before compression
    protocol      : the evaluation code
    prompts       : whose pictures and prompts the model saw: those of LLaVA's authors ("original"), as in all papers
                    here that name their code, or those of HF's conversions ("hf")
    convention    : how budgets and costs are counted
    known         : what is known of choices that move numbers: tasks, OCR hints, POPE, MME, layer, order, ...
    positions     : rotary positions of what methods before the language model keep; most releases renumber
    ran_with      : method -> the options that it ran with there, where these are not our defaults; several if they give
                    the same result
    columns       : names of the paper's `benchmarks`; none where only averages are known
    """

    table: str
    source: Literal["paper", "poster", "readme", "notes", "third party"]
    model: str
    checkpoints: list[str]
    visual_tokens: int | None = None
    protocol: str
    prompts: Literal["original", "hf"] = "original"
    convention: str
    known: dict[str, str | int] = {}
    positions: Literal["renumbered", "original"] = "renumbered"
    ran_with: dict[str, list[dict]] = {}
    columns: list[str]
    rows: list[PublishedRow]

    @model_validator(mode="after")
    def _rectangular(self) -> "PublishedTable":
        for row in self.rows:
            if len(row.scores) != len(self.columns):
                raise ValueError(
                    f"{self.table}, {row.name}: {len(row.scores)} scores for {len(self.columns)} columns; give one "
                    "score per column, or null"
                )
        return self

    @property
    def unpatched(self) -> PublishedRow | None:
        """The line of the unpatched model."""
        return next((row for row in self.rows if row.method == UNPATCHED), None)


class Paper(_Strict):
    """The tables of one paper; `read` says how the numbers were read.

    short : what the method or the study is called, where the title does not begin with it
    arxiv : its number; None where it is not known
    """

    title: str
    short: str | None = None
    arxiv: Annotated[str, Field(pattern=r"^\d{4}\.\d{5}$")] | None = None
    venue: str | None = None
    read: str
    benchmarks: dict[str, Benchmark]
    tables: list[PublishedTable]

    @property
    def name(self) -> str:
        """Its short name."""
        return self.short or self.title.partition(":")[0]

    @property
    def cited(self) -> str:
        """Its number on arXiv, or else its short name."""
        return self.arxiv or self.name

    @model_validator(mode="after")
    def _known_columns(self) -> "Paper":
        used = {column for table in self.tables for column in table.columns}
        if used != self.benchmarks.keys():
            odd = ", ".join(sorted(used ^ self.benchmarks.keys()))
            raise ValueError(f"'benchmarks' and the columns of the tables must be the same, but differ in {odd}")
        return self


def load_papers(directory: Path | str = DIRECTORY) -> list[Paper]:
    """Read and check all published tables.

    Raises:
        ConfigError: the directory holds no table, or a file does not follow the schema.
    """
    paths = sorted(Path(directory).glob("*.yaml"))
    if not paths:
        raise ConfigError(
            f"{directory} holds no published tables (*.yaml); leave out --published-tables to use those of vlmslim"
        )
    papers = []
    for path in paths:
        try:
            papers.append(Paper.model_validate(read_yaml(path)))
        except ValidationError as error:
            mistakes = [
                ": ".join([*map(str, e["loc"]), e["msg"].removeprefix("Value error, ")]) for e in error.errors()
            ]
            raise ConfigError(f"{path} is no table of published numbers: {'; '.join(mistakes)}") from error
        except ValueError as error:
            raise ConfigError(f"{path}: {error}") from error
    return papers
