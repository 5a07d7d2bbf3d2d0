"""Draw which visual tokens three methods keep of one bundled picture: kept patches clear, dropped patches faded.

    python scripts/draw_kept_tokens.py

Writes assets/kept_tokens.png, the picture of the README. The model is bundled/tiny-llava, which reads 144 patches.
"""

import argparse
import io
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq
import torch
from PIL import Image, ImageDraw, ImageFont

import vlmslim
from vlmslim.loading import load

ROOT = Path(__file__).resolve().parent.parent
QUESTIONS = ROOT / "vlmslim/tasks/scenes/data/scenes_detail.parquet"
METHODS = {"random": "a random subset", "divprune": "diverse tokens", "fastv": "what the last token attends to"}
SIZE, GAP, TEXT = 320, 16, 60  # of a panel, between panels, of the caption under a panel


@dataclass
class Spy(vlmslim.Compressor):
    """Note the slots of the visual tokens that reach the last decoder layer."""

    layers = (7,)
    slots: list[int] = field(default_factory=list)

    def retain(self, tokens: vlmslim.LayerInput) -> torch.Tensor:
        """Keep everything."""
        self.slots += tokens.slot[tokens.slot >= 0].tolist()
        return tokens.mask


def kept_slots(model, inputs, method: str, keep: int) -> list[int]:
    """Return the slots of the tokens that `method` keeps."""
    spy = Spy()
    with vlmslim.patch(model, [vlmslim.method(method, keep=keep), spy]), torch.no_grad():
        model(**inputs)
    return spy.slots


def faded(picture: Image.Image, slots: list[int], side: int) -> Image.Image:
    """Fade the patches of `picture` that are not in `slots`; `side` patches make a row."""
    clear = Image.new("L", (side, side), 40)
    for slot in slots:
        clear.putpixel((slot % side, slot // side), 255)
    return Image.composite(picture, Image.new("RGB", picture.size, "white"), clear.resize(picture.size, Image.NEAREST))


def draw(panels: list[tuple[Image.Image, str, str]]) -> Image.Image:
    """Put the panels beside one another, each over its name and a caption."""
    width = len(panels) * SIZE + (len(panels) - 1) * GAP
    sheet = Image.new("RGB", (width, SIZE + TEXT), "white")
    pen, name_font, caption_font = ImageDraw.Draw(sheet), ImageFont.load_default(24), ImageFont.load_default(18)
    for i, (picture, name, caption) in enumerate(panels):
        left = i * (SIZE + GAP)
        sheet.paste(picture, (left, 0))
        pen.text((left + SIZE // 2, SIZE + 8), name, "black", name_font, anchor="ma")
        pen.text((left + SIZE // 2, SIZE + 36), caption, "#555555", caption_font, anchor="ma")
    return sheet


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--question", default="detail-0008", help="id of a question of the task scenes_detail")
    parser.add_argument("--keep", type=int, default=36, help="visual tokens to keep, of 144")
    parser.add_argument("--out", type=Path, default=ROOT / "assets/kept_tokens.png")
    args = parser.parse_args()

    (row,) = [row for row in pq.read_table(QUESTIONS).to_pylist() if row["id"] == args.question]
    picture = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
    model, processor = load("bundled/tiny-llava", dtype="float32", device="cpu")
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["question"]}]}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(images=[picture], text=[prompt], return_tensors="pt")

    large = picture.resize((SIZE, SIZE), Image.LANCZOS)
    panels = [(large, "144 visual tokens", row["question"].partition("?")[0] + "?")]
    for method, caption in METHODS.items():
        slots = kept_slots(model, inputs, method, args.keep)
        panels.append((faded(large, slots, side=12), f"{method}: {len(slots)}", caption))
    draw(panels).save(args.out, optimize=True)
    print(args.out)


if __name__ == "__main__":
    main()
