"""The table of docs/models.md: which method works on which family. `python tests/support/method_table.py` writes it.

Every method is attached to a tiny model of every family. What `patch` refuses, the table marks with the reason.
"""

import re
from pathlib import Path

import tiny
import zoo

import vlmslim
from vlmslim.engine.families import FAMILIES
from vlmslim.registry import method_names, options_of

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- methods by family -->\n", "<!-- end -->\n"
FAMILY_BEGIN, FAMILY_END = "<!-- families -->\n", "<!-- end of families -->\n"
UNITS = {
    "crops": "square views",
    "anyres": "a thumbnail and tiles, unpadded, with newline tokens",
    "packed": "any size",
    "samples": "views of 64 tokens or so, and the whole",
}
REASONS = {  # what the sentence of a refusal says -> what the table says
    "CLS token": "CLS",
    "several patches make a visual token": "patches",
    "cannot recompute it": "tower",
    "is defined for images on a single grid|resizes tokens": "grid",
}
NEEDS_MORE = "this model does not tell"  # which CLIP or which folder: a real checkpoint tells, or an option
OPTIONS = {
    "atp": {"weights": "random"},
    "tokenflex": {"keep": 0.5, "weights": "pool"},
    "schedule": {"layer": (1,), "counts": (2,)},
}
OWN = {"llava": "llava", "llava_next": "next", "llava_onevision": "onevision"}


def build(model_type: str):
    return tiny.tiny(OWN[model_type]) if model_type in OWN else zoo.build(model_type)


def options(name: str) -> dict:
    return OPTIONS.get(name) or ({"keep": 0.5} if "keep" in options_of(name) else {})


def verdict(model, name: str) -> str:
    """Return "yes", or why `patch` refuses the method."""
    try:
        vlmslim.patch(model, name, **options(name)).remove()
    except (ValueError, TypeError) as error:
        if re.search(NEEDS_MORE, str(error)):
            return "yes"
        found = [reason for said, reason in REASONS.items() if re.search(said, str(error))]
        assert found, f"{name} is refused without a reason that the table knows: {error}"
        return found[0]
    return "yes"


def verdicts() -> dict[str, dict[str, str]]:
    """Return the verdict of each method, by method and family."""
    models = {model_type: build(model_type) for model_type in FAMILIES}
    return {name: {kind: verdict(model, name) for kind, model in models.items()} for name in method_names()}


def table() -> str:
    """Return the table in Markdown."""
    head = ["method", *(f"`{kind}`" for kind in FAMILIES)]
    lines = [head, ["---"] * len(head)]
    for name, found in verdicts().items():
        lines.append([f"`{name}`", *found.values()])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def family_table() -> str:
    """Return the table of families in Markdown."""
    lines = ["| family | class | images | video |", "|---|---|---|---|"]
    for family in FAMILIES.values():
        video = "yes" if family.video else "frames as images"
        lines.append(f"| `{family.model_type}` | `{family.name}` | {UNITS[family.units]} | {video} |")
    return "\n".join(lines) + "\n"


def pages() -> str:
    """Return docs/models.md with both tables as they are now."""
    text = PAGE.read_text()
    for begin, end, made in ((FAMILY_BEGIN, FAMILY_END, family_table()), (BEGIN, END, table())):
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{made}\n{end}{rest.split(end)[1]}"
    return text


if __name__ == "__main__":
    PAGE.write_text(pages())
