"""The page of the demo, made with Gradio. It loads nothing from other sites and sends nothing to them."""

import os
import tempfile
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

try:
    import gradio as gr
except ImportError as error:
    raise ImportError('the demo needs Gradio: pip install "vlmslim[demo]"') from error

from vlmslim.demo.questions import MOST_BYTES, MOST_LETTERS, NOTHING, Questions, examples
from vlmslim.pictures.ask import Answer
from vlmslim.pictures.canvas import Canvas
from vlmslim.pictures.draw import drawn, panels

COLUMNS = [
    *("method", "answer", "visual tokens sent", "mean over layers"),
    *("prefill FLOPs", "time to first token", "time to last token"),
]
HOUR = 3600  # seconds after which pictures of visitors are deleted
THEME = gr.themes.Default(
    primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
).set(
    button_primary_background_fill="*primary_700",  # white letters stand out from it
    button_primary_background_fill_dark="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_hover_dark="*primary_800",
)
CSS = """
.answers { overflow-x: auto; }
.answers table { width: 100%; margin: 0; border-collapse: collapse; font-variant-numeric: tabular-nums; }
.answers table :is(th, td) {
  padding: .45rem .8rem; border: 0; border-bottom: 1px solid var(--border-color-primary); text-align: left;
}
.answers table :is(th, td):nth-child(n + 3) { text-align: right; }
.answers td:nth-child(n + 3) { white-space: nowrap; }
.answers :is(table, thead, tbody, tr) { border: 0 !important; }
.pictures, .pictures :is(.gallery-container, .grid-wrap) {
  height: auto !important; min-height: 0 !important; max-height: none !important;
}
.pictures .grid-container {
  grid-template: none / repeat(auto-fit, minmax(min(15rem, 100%), 1fr)) !important; grid-auto-rows: auto !important;
}
.small .grid-container { grid-template-columns: repeat(auto-fit, minmax(7rem, 1fr)) !important; }
.pictures:not(.small) .caption-label { white-space: normal; }
"""

#: A picture for each run of decoder layers: its first layer, the picture, the text under it.
Cuts = list[tuple[int, Image.Image, str]]


def build(model: Any, processor: Any, name: str) -> gr.Blocks:
    """Build the page for a loaded model.

    Args:
        model: without a patch.
        processor: of its checkpoint.
        name: of the checkpoint, for the heading.
    """
    questions = Questions(model, processor)
    depth = model.config.get_text_config().num_hidden_layers

    def answer(path: str, question: str, first: str, second: str, percent: float) -> tuple:
        try:
            answers = questions.ask(path, question, first, second, percent)
            cuts = [_cuts(one, processor) for one in answers]
            stages = [
                (panel.picture, f"{panel.title}, {panel.caption}")
                for one in answers[1:]
                for panel in panels(one.traces[0], processor)[1:]
            ]
        except (ImportError, TypeError, ValueError) as error:
            raise gr.Error(str(error), title="vlmslim", print_exception=False) from error
        receipts = {one.method: one.receipt for one in answers}
        last = depth - 1
        return (
            gr.Column(visible=True),
            table_of(answers),
            cuts,
            at_layer(cuts, last),
            gr.Slider(value=last),
            stages,
            receipts,
        )

    shown = _examples()

    def pick(event: gr.SelectData) -> tuple[str, str]:
        return shown[event.index]

    with gr.Blocks(title="vlmslim", analytics_enabled=False, delete_cache=(HOUR, HOUR)) as page:
        gr.Markdown(
            f"# vlmslim\nWhich visual tokens of a picture does a method keep, and what does `{name}` then answer?"
        )
        with gr.Row():
            with gr.Column(scale=2):
                picture = gr.Image(
                    shown[0][0], type="filepath", label="Picture", sources=["upload", "clipboard"], height=280
                )
                # This component would decode a file first, whatever its size; `Questions` checks it before.
                picture.preprocess = _path_of  # type: ignore[method-assign]
                question = gr.Textbox(shown[0][1], label="Question", max_length=MOST_LETTERS)
            with gr.Column(scale=1):
                first = gr.Dropdown(questions.methods, value="divprune", label="Method")
                second = gr.Dropdown([NOTHING, *questions.methods], value="fastv", label="Second method")
                percent = gr.Slider(1, 100, value=25, step=1, label="Visual tokens kept, %")
                button = gr.Button("Ask", variant="primary")
        bundled = gr.Gallery(
            shown,
            label="Bundled pictures",
            elem_classes=["pictures", "small"],
            height="auto",
            allow_preview=False,
            interactive=False,
        )
        cuts = gr.State([], time_to_live=HOUR)
        table = gr.HTML(elem_classes="answers", padding=False, min_height=80)  # with room for the progress of an answer
        with gr.Column(visible=False) as found:
            layer = gr.Slider(0, depth - 1, value=depth - 1, step=1, label="Decoder layer")
            kept = gr.Gallery(label="Kept tokens in this layer", elem_classes="pictures", height="auto", format="webp")
            with gr.Accordion("Stage by stage, with scores", open=False):
                stages = gr.Gallery(label="Stages", elem_classes="pictures", height="auto", format="webp")
            with gr.Accordion("Receipts: what really happened", open=False):
                receipts = gr.JSON(label="Receipts")
            gr.Markdown(
                "Kept patches are clear, dropped ones are grey. The order of scores runs from dark to bright. Outlines "
                "of one colour hold the patches that were merged into one token. FLOPs are those of the language "
                "model's prefill; times are of this machine, measured once."
            )
        bundled.select(pick, None, [picture, question], show_progress="hidden", queue=False, api_visibility="private")
        gr.on(
            [button.click, question.submit],
            answer,
            [picture, question, first, second, percent],
            [found, table, cuts, kept, layer, stages, receipts],
            show_progress_on=table,  # a mistake is told once, not over each picture
            api_visibility="private",
        )
        layer.release(at_layer, [cuts, layer], kept, show_progress="hidden", queue=False, api_visibility="private")
    return page.queue(max_size=32, default_concurrency_limit=1)


def serve(model: Any, processor: Any, name: str, *, host: str = "127.0.0.1", port: int | None = None) -> None:
    """Show the page until the process ends.

    Args:
        model: without a patch.
        processor: of its checkpoint.
        name: of the checkpoint, for the heading.
        host: address to listen on; the default is this machine alone.
        port: by default the first free one from 7860 on.

    Raises:
        OSError: the port is taken.
    """
    page = build(model, processor, name)
    _, address, _ = page.launch(**how(host, port), prevent_thread_lock=True)
    print(f"{name} answers at {address} until Ctrl-C", flush=True)
    page.block_thread()


def how(host: str = "127.0.0.1", port: int | None = None) -> dict[str, Any]:
    """Return the arguments of `launch`: no tunnel, no other site, limited uploads."""
    return {
        "server_name": host,
        "server_port": port,
        "share": False,
        "ssr_mode": False,
        "max_file_size": MOST_BYTES,
        "enable_monitoring": False,
        "state_session_capacity": 64,
        "footer_links": [],
        "quiet": True,
        "theme": THEME,
        "css": CSS,
    }


def table_of(answers: list[Answer]) -> str:
    """Return an HTML table of answers; costs stand beside those of the unpatched model."""
    base = answers[0]
    rows = [
        [
            one.method,
            one.text or "(empty)",
            f"{one.receipt['kept']:g} of {one.receipt['visual_tokens']:g}",
            f"{one.receipt['equivalent_tokens']:.1f}",
            f"{one.flops / 1e9:.3g} G ({one.flops / base.flops:.2f}x)",
            f"{one.ttft_ms:.0f} ms ({one.ttft_ms / base.ttft_ms:.2f}x)",
            f"{one.latency_ms:.0f} ms ({one.latency_ms / base.latency_ms:.2f}x)",
        ]
        for one in answers
    ]
    head = "".join(f'<th scope="col">{name}</th>' for name in COLUMNS)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def at_layer(cuts: list[Cuts], layer: int) -> list[tuple[Image.Image, str]]:
    """Return the picture and the text of each method at a decoder layer."""
    return [next((picture, text) for first, picture, text in reversed(one) if first <= layer) for one in cuts]


def _cuts(answer: Answer, processor: Any) -> Cuts:
    trace = answer.traces[0]
    canvas = Canvas.of(trace, processor)
    return [
        (cut.first, drawn(canvas, cut), f"{answer.method}: {cut.count} of {len(trace.grid)} visual tokens")
        for cut in trace.cuts
    ]


def _path_of(payload: Any) -> str | None:
    return None if payload is None else payload.path


def _examples() -> list[tuple[str, str]]:
    """Write the bundled pictures to files, which Gradio wants, and return them with their questions."""
    folder = Path(tempfile.mkdtemp(prefix="vlmslim-demo-"))
    found = []
    for i, example in enumerate(examples()):
        path = folder / f"{i}.png"
        example.picture.save(path)
        found.append((str(path), example.question))
    return found
