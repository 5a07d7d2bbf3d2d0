"""`vlmslim show`: the answers and the kept tokens of several methods, as one picture or one page."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vlmslim.io.files import atomically, write_atomically
from vlmslim.pictures.ask import UNPATCHED, Answer
from vlmslim.pictures.canvas import Canvas
from vlmslim.pictures.draw import Panel, drawn, panels, sheet

FORMATS = (".png", ".html")


def write(path: Path, question: str, answers: Sequence[Answer], processor: Any, size: int = 320) -> None:
    """Write the answers to a question, and the tokens that each method kept, as a picture or as a page.

    Args:
        path: ends in .png or .html.
        question: that was asked.
        answers: of `vlmslim.pictures.ask.ask`; the first is the unpatched model's.
        processor: of the checkpoint.
        size: pixels of the longer side of a picture.

    Raises:
        ValueError: another ending, or a stage that does not say what it made its tokens of.
    """
    check_format(path)
    if path.suffix == ".html":
        return write_atomically(path, page(question, answers, processor, size))
    with atomically(path) as part:
        picture(answers, processor, size, question).save(part, "PNG", optimize=True)


def check_format(path: Path) -> None:
    """Refuse a file of another kind.

    Raises:
        ValueError: says which endings there are.
    """
    if path.suffix not in FORMATS:
        raise ValueError(f"--output {path}: give a file that ends in {' or '.join(FORMATS)}")


def picture(answers: Sequence[Answer], processor: Any, size: int = 320, question: str = "") -> Image.Image:
    """Draw a line of pictures for each method and image; the first of a line has the method and its answer."""
    lines = []
    for answer in answers:
        for trace in answer.traces:
            first, *others = panels(trace, processor, size)
            lines.append([Panel(first.picture, answer.method, f"answer: {answer.text or '(empty)'}"), *others])
    return sheet(lines, question)


def page(question: str, answers: Sequence[Answer], processor: Any, size: int = 320) -> str:
    """Write one HTML page that holds everything: the methods side by side, layer by layer, and stage by stage."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    unpatched, depth = answers[0], answers[0].traces[0].depth
    shown = []
    for answer in answers:
        images = []
        for trace in answer.traces:
            canvas = Canvas.of(trace, processor, size)
            cuts = [
                {"first": cut.first, "count": cut.count, "n": len(trace.grid), "src": _source(drawn(canvas, cut))}
                for cut in trace.cuts
            ]
            stages = [
                {"title": panel.title, "caption": panel.caption, "src": _source(panel.picture)}
                for panel in panels(trace, processor, size)[1:]  # the first is the image as it came, shown above
            ]
            images.append({"cuts": cuts, "stages": stages})
        shown.append({"answer": answer, "images": images, "flops": answer.flops / unpatched.flops})
    environment = Environment(
        loader=PackageLoader("vlmslim.pictures"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    template = environment.get_template("show.html")
    return template.render(question=question, shown=shown, depth=depth, unpatched=UNPATCHED)


def _source(picture: Image.Image) -> str:
    """Return a picture as the source of an HTML image."""
    data = io.BytesIO()
    picture.save(data, "WEBP", quality=88, method=4)
    return f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"
