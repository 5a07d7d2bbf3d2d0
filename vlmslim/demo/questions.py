"""A visitor's question, checked and answered. Visitors take turns, because a model has one patch at a time."""

import io
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vlmslim import tasks
from vlmslim.doctor import parse
from vlmslim.patching import patch
from vlmslim.pictures.ask import Answer, ask, readable
from vlmslim.registry import method_names

MOST_BYTES, MOST_PIXELS, MOST_LETTERS = 10 * 2**20, 40_000_000, 500  # of a visitor's picture and question
MOST_STRETCH = 50  # longer side / shorter side: a processor enlarges the shorter one to what the model reads
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # Pillow hands some others, such as EPS, to another program
NEW_TOKENS = 48
NOTHING = "–"  # the choice of no second method
#: Questions of the bundled benchmarks that a visitor may pick: task, id.
EXAMPLES = (
    ("scenes_detail", "detail-0008"),
    ("scenes_text", "text-0003"),
    ("scenes_count", "count-0005"),
    ("scenes_colour", "colour-0002"),
    ("scenes_presence", "presence-0004"),
    ("scenes_spatial", "spatial-0006"),
)


@dataclass(frozen=True)
class Example:
    """A bundled picture and a question about it."""

    picture: Image.Image
    question: str


def examples() -> Iterator[Example]:
    """Yield the bundled pictures and questions."""
    import pyarrow.parquet as parquet

    for task, name in EXAMPLES:
        table = parquet.read_table(Path(tasks.path()) / f"scenes/data/{task}.parquet", filters=[("id", "==", name)])
        (row,) = table.to_pylist()
        yield Example(Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB"), row["question"])


class Questions:
    """Answers questions with one model, one after the other.

    Args:
        model: a loaded model without a patch.
        processor: of its checkpoint.
    """

    def __init__(self, model: Any, processor: Any):
        self.model, self.processor = model, processor
        self._turn = threading.Lock()
        self.methods = [name for name in method_names() if name != "none" and self._fits(name)]

    def _fits(self, name: str) -> bool:
        """Tell whether a method can be attached to this model without more options than a budget."""
        try:
            patch(self.model, parse(name, 0.25)).remove()
        except (ImportError, OSError, TypeError, ValueError):
            return False
        return True

    def ask(self, path: str | None, question: str, first: str, second: str, percent: float) -> list[Answer]:
        """Answer a question, unpatched and under one method or two.

        Args:
            path: of the visitor's picture.
            question: about it.
            first: a method of `methods`, and so is `second`, or `NOTHING`.
            second: see `first`.
            percent: of the visual tokens that a method keeps, if it takes a budget.

        Raises:
            ValueError: says what the visitor may change.
        """
        picture, question = checked_picture(path), checked_question(question)
        names = [name for name in dict.fromkeys((first, second)) if name != NOTHING]
        for name in names:
            if name not in self.methods:
                raise ValueError(f"{name} is no method of this list; choose one of {', '.join(self.methods)}")
        if not isinstance(percent, int | float) or not 0 < percent <= 100:
            raise ValueError(f"{percent} is no share of the visual tokens; give one from 1 to 100 %")
        methods = [(name, parse(name, float(percent) / 100)) for name in names]
        with self._turn:
            return ask(self.model, self.processor, question, [picture], methods, new_tokens=NEW_TOKENS, warm=True)


def checked_picture(path: str | None) -> Image.Image:
    """Open a visitor's picture.

    Raises:
        ValueError: there is none, it is too large, or it cannot be read.
    """
    if not path:
        raise ValueError("there is no picture yet; pick one below or upload one")
    file = Path(path)
    if file.is_file() and file.stat().st_size > MOST_BYTES:
        raise ValueError(f"the picture has more than {MOST_BYTES // 2**20} MB; upload a smaller one")
    try:
        with Image.open(file, formats=FORMATS) as opened:
            width, height = opened.size  # of the header; nothing is decoded
    except (Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise ValueError("the file cannot be read as a picture; upload a PNG, JPEG or WebP") from error
    if width * height > MOST_PIXELS:
        raise ValueError(f"the picture has {width} x {height} pixels; upload one of at most {MOST_PIXELS:,} pixels")
    if max(width, height) > MOST_STRETCH * min(width, height):
        raise ValueError(
            f"the picture has {width} x {height} pixels; upload one whose longer side is at most {MOST_STRETCH} times "
            "the shorter one"
        )
    try:
        picture = readable(file)
    except ValueError as error:
        raise ValueError("the picture is damaged; save it anew as PNG or JPEG") from error
    if not isinstance(picture, Image.Image):
        raise ValueError("the picture is animated; upload a still one")
    return picture


def checked_question(question: str | None) -> str:
    """Return a visitor's question without blanks around it.

    Raises:
        ValueError: there is none, or it is too long.
    """
    question = (question or "").strip()
    if not question:
        raise ValueError("there is no question yet; write one")
    if len(question) > MOST_LETTERS:
        raise ValueError(f"the question has {len(question)} letters; write one of at most {MOST_LETTERS}")
    return question
