"""The table of docs/models.md: which method works on which family. `python tests/support/method_table.py` writes it.

Every method is attached to a tiny model of every family. The table marks what `patch` refuses with the reason, and what
it takes with the substitutes that the patch names.
"""

import re
from pathlib import Path

import tiny
import zoo
from clip_fixtures import Words

import vlmslim
from vlmslim.engine.families import FAMILIES
from vlmslim.engine.unsupported import UNSUPPORTED
from vlmslim.methods._substitutes import SUBSTITUTES
from vlmslim.registry import method_names, options_of

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- methods by family -->\n", "<!-- end -->\n"
FAMILY_BEGIN, FAMILY_END = "<!-- families -->\n", "<!-- end of families -->\n"
REFUSED_BEGIN, REFUSED_END = "<!-- refused families -->\n", "<!-- end of refused families -->\n"
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
MEANINGS = {
    "CLS": "the method reads the CLS token of the tower, and there is none",
    "patches": "the method works on single patches, and here a visual token is made of several",
    "tower": "the method reads the attention of the tower, and vlmslim cannot recompute it for this tower",
    "grid": "the method is defined for one grid of patches",
}
NEEDS_MORE = "this model does not tell which CLIP"  # a real checkpoint tells, or an option
OPTIONS = {
    "atp": {"weights": "random"},
    "tokenflex": {"keep": 0.5, "weights": "pool"},
    "schedule": {"layer": (1,), "counts": (2,)},
}
OWN = {"llava": "llava", "llava_next": "next", "llava_onevision": "onevision"}


class Refused(Exception):
    """`patch` refuses a method; the argument is the word of the table."""


def build(model_type: str):
    return tiny.tiny(OWN[model_type]) if model_type in OWN else zoo.build(model_type)


def options(name: str) -> dict:
    known = options_of(name)
    own = OPTIONS.get(name) or ({"keep": 0.5} if "keep" in known else {})
    return own | ({"tokenizer": Words()} if "tokenizer" in known else {})


def patched(model, name: str) -> vlmslim.Slim | None:
    """Patch a model; None where the method needs a CLIP that a tiny model does not name.

    Raises:
        Refused: `patch` refuses the method.
    """
    try:
        return vlmslim.patch(model, name, **options(name))
    except (ValueError, TypeError) as error:
        if re.search(NEEDS_MORE, str(error)):
            return None
        found = [reason for said, reason in REASONS.items() if re.search(said, str(error))]
        assert found, f"{name} is refused without a reason that the table knows: {error}"
        raise Refused(found[0]) from error


def cell(model, name: str) -> str:
    """Return "yes", with the substitutes that the method takes, or "no" and why `patch` refuses the method."""
    try:
        slim = patched(model, name)
    except Refused as why:
        return f"no: {why}"
    if slim is None:
        return "yes"
    slim.remove()
    return f"yes: {', '.join(slim.substitutes)}".removesuffix(": ")


def cells() -> dict[str, dict[str, str]]:
    """Return the cells of each method, by method and family."""
    models = {model_type: build(model_type) for model_type in FAMILIES}
    return {name: {kind: cell(model, name) for kind, model in models.items()} for name in method_names()}


def table() -> str:
    """Return the table in Markdown, with what its words mean."""
    head = ["method", *(f"`{kind}`" for kind in FAMILIES)]
    lines = [head, ["---"] * len(head)]
    for name, found in cells().items():
        lines.append([f"`{name}`", *found.values()])
    rows = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return f"{rows}\n{_legend('yes', SUBSTITUTES)}\n{_legend('no', MEANINGS)}"


def _legend(verdict: str, words: dict[str, str]) -> str:
    return f"| {verdict}: | meaning |\n|---|---|\n" + "".join(f"| {word} | {said} |\n" for word, said in words.items())


def family_table() -> str:
    """Return the table of families in Markdown."""
    lines = ["| family | class | images | video |", "|---|---|---|---|"]
    for family in FAMILIES.values():
        video = "yes" if family.video else "frames as images"
        lines.append(f"| `{family.model_type}` | `{family.name}` | {UNITS[family.units]} | {video} |")
    return "\n".join(lines) + "\n"


def refused_table() -> str:
    """Return the table of families that are refused in Markdown."""
    lines = [f"| `{kind}` | {why} |\n" for kind, why in UNSUPPORTED.items()]
    return "| family | why |\n|---|---|\n" + "".join(lines)


def pages() -> str:
    """Return docs/models.md with its tables as they are now."""
    text = PAGE.read_text()
    tables = (
        (FAMILY_BEGIN, FAMILY_END, family_table()),
        (BEGIN, END, table()),
        (REFUSED_BEGIN, REFUSED_END, refused_table()),
    )
    for begin, end, made in tables:
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{made}\n{end}{rest.split(end)[1]}"
    return text


if __name__ == "__main__":
    PAGE.write_text(pages())
