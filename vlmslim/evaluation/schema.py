"""The entries of the YAML behind `vlmslim run`: model, tasks, methods, budgets. Unknown keys are errors."""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StrictFloat,
    StrictInt,
    Tag,
    field_validator,
    model_validator,
)

from vlmslim.compressor import check_keep
from vlmslim.io.messages import did_you_mean
from vlmslim.originals.templates import conversation

Keep = Annotated[StrictInt, Field(lt=2**63)] | Annotated[StrictFloat, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, lt=2**31, strict=True)]

AUTO: Literal["auto"] = "auto"  # a batch size that is found by trying


def _batch_kind(value: object) -> str:
    return "[auto]" if isinstance(value, str) and not value.isdecimal() else "[count]"


BatchSize = Annotated[
    Annotated[Count, Tag("[count]")] | Annotated[Literal["auto"], Tag("[auto]")], Discriminator(_batch_kind)
]


class Strict(BaseModel):
    """Refuses unknown keys by naming the nearest known one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        if isinstance(data, dict) and cls.model_config["extra"] == "forbid":
            for key in data:
                if key not in cls.model_fields:
                    known = ", ".join(cls.model_fields)
                    raise ValueError(f"unknown key {key!r}.{did_you_mean(key, cls.model_fields)} Known: {known}")
        return data


class ModelConfig(Strict):
    """The checkpoint and how to load it: arguments of the lmms-eval model `vlmslim`."""

    pretrained: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    device: str | None = None
    device_map: str | None = None
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2", "flex_attention"] | None = None
    revision: str | None = None
    max_frames_num: Count | None = None
    system_prompt: str | None = None
    protocol: Literal["original", "hf"] | None = None
    image_aspect_ratio: Literal["pad", "crop"] | None = None
    conversation: str | None = None
    share_prefix: bool = False

    @field_validator("conversation")
    @classmethod
    def _known(cls, name: str | None) -> str | None:
        if name is not None:
            conversation(name)
        return name

    def arguments(self) -> dict:
        """Return the keys that were given."""
        return self.model_dump(exclude_defaults=True)


class TaskConfig(Strict):
    """One lmms-eval task, group or tag.

    metric : the metric on the leaderboard; by default the first of the task
    group  : the part of the leaderboard that the task belongs to; by default known from its name (`task_groups.py`)
    """

    task: str
    metric: str | None = None
    group: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, data: Any) -> Any:
        return {"task": data} if isinstance(data, str) else data


class Cost(Strict):
    """A budget that is solved for each method; `vlmslim.cost.budget` says what each of them counts.

    The first three cost every method the same. `auto` gives each image its own budget, with this mean.
    """

    equivalent_tokens: Annotated[float, Field(gt=0, strict=True, allow_inf_nan=False)] | None = None
    flops_ratio: Annotated[float, Field(gt=0, le=1, strict=True)] | None = None
    ttft_ratio: Annotated[float, Field(gt=0, le=1, strict=True)] | None = None
    auto: Keep | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if len(self.model_dump(exclude_none=True)) != 1:
            raise ValueError(
                "give one of {equivalent_tokens: 64}, {flops_ratio: 0.15}, {ttft_ratio: 0.5} and {auto: 64}"
            )
        if self.auto is not None:
            check_keep(self.auto, "auto")
        return self

    def target(self) -> dict[str, int | float]:
        """Return the currency and its number, ready for JSON; whole numbers are integers, but not shares of tokens."""
        if self.auto is not None:
            return {"auto": self.auto}
        return {k: int(v) if v == int(v) else v for k, v in self.model_dump(exclude_none=True).items()}


def _kind(value: object) -> str:
    return "[cost]" if isinstance(value, dict | Cost) else "[keep]"


Budget = Annotated[Annotated[Keep, Tag("[keep]")] | Annotated[Cost, Tag("[cost]")], Discriminator(_kind)]


class MethodConfig(Strict):
    """A method with its options, or a list of stages; other keys are options.

    keep    : one budget or several, instead of those of the run
    budgets : the same, with costs among them. A cost leaves the options that are given, and solves the first of the
              others that `vlmslim.cost.budget.free_option` knows
    label   : names the row; by default made of the method and its options
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    method: str | None = None
    stages: list[dict[str, Any]] | None = None
    keep: Keep | Annotated[list[Keep], Field(min_length=1)] | None = None
    budgets: Annotated[list[Budget], Field(min_length=1)] | None = None
    label: Annotated[str, Field(pattern=r"^[\w.+=,-]+$")] | None = None

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, data: Any) -> Any:
        data = {"method": data} if isinstance(data, str) else data
        if isinstance(data, dict) and "budget" in data:
            if "budgets" in data:
                raise ValueError("give either 'budget' or 'budgets'")
            data = {k: v for k, v in data.items() if k != "budget"} | {"budgets": [data["budget"]]}
        return data

    @model_validator(mode="after")
    def _one_or_the_other(self) -> Self:
        if (self.method is None) == (self.stages is None):
            raise ValueError("give either 'method' or 'stages'")
        counts = any(not isinstance(budget, Cost) for budget in self.budgets or ())
        if counts and (self.keep is not None or self.stages is not None):
            raise ValueError("next to 'keep' or 'stages', 'budgets' lists costs such as {equivalent_tokens: 64}")
        if isinstance(self.keep, list) and self.budgets:
            raise ValueError("next to 'budgets', 'keep' is one number")
        if self.stages is not None:
            if self.keep is not None or self.options:
                raise ValueError("with 'stages', every stage carries its own 'keep' and options")
            if not self.stages or not all(isinstance(stage.get("method"), str) for stage in self.stages):
                raise ValueError("'stages' is a list of entries such as {method: divprune, keep: 64}")
        return self

    @property
    def options(self) -> dict[str, Any]:
        """The options of the method other than `keep`."""
        return dict(self.model_extra or {})

    @property
    def listed(self) -> list[dict[str, Any]]:
        """The stages as they were given; a method by itself is one stage."""
        if self.stages is not None:
            return self.stages
        return [{"method": self.method} | ({} if self.keep is None else {"keep": self.keep}) | self.options]


class TimingConfig(Strict):
    """Settings of the timing of all methods at the end of a run."""

    prompts: Count = 4
    repeats: Count = 5
    new_tokens: Annotated[Count, Field(ge=2)] = 16


class ReportConfig(Strict):
    """Parts of the report besides scores.

    samples : flipped questions whose visual tokens are recorded under every row, of all tasks together
    """

    samples: Annotated[int, Field(ge=0, lt=2**31, strict=True)] = 0


class ResourcesConfig(Strict):
    """Resources of each worker of `vlmslim run --workers`, and the size of the parts of tasks.

    gpus_per_worker : several for a model with `device_map: auto`; by default 1 where there are GPUs
    shard : most prompts of a part of a task, which one worker answers at a time, and which is kept when a run ends
    """

    gpus_per_worker: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    shard: Count | None = None
