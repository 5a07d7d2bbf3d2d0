"""Find TokenCorr's alpha for a checkpoint: the key similarity at which a wanted share of the patches stays.

Key similarities have an offset that differs between towers, so every tower needs an alpha of its own. The script looks
at pictures (never at those of a benchmark) and prints the line for a configuration:

    python scripts/calibrate_tokencorr.py bundled/tiny-llava --share 0.2
    python scripts/calibrate_tokencorr.py bundled/tiny-llava-next --pictures pages --share 0.2
    python scripts/calibrate_tokencorr.py llava-hf/llava-v1.6-mistral-7b-hf --pictures DIR --share 0.2 beta=0.1

`--pictures` takes `scenes` or `pages` (pictures of the bundled benchmarks' training split, made when they are needed),
or a folder of image files. Options of TokenCorr other than alpha and keep follow as NAME=VALUE.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).with_name("bundled")))

import argparse
import random
from collections.abc import Iterator

import yaml
from PIL import Image

from vlmslim.loading import default_device, load
from vlmslim.methods.tokencorr.calibration import calibrate
from vlmslim.registry import options_of

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}


def pictures(source: str, count: int, seed: int) -> Iterator[Image.Image]:
    """Make pictures of the training split of a bundled benchmark, or draw them from a folder."""
    first = 10_000_000 * (1 + seed)  # far from the pictures that trained the bundled checkpoints
    if source == "scenes":
        from scenes import make_scene

        yield from (make_scene(first + i, "train").image for i in range(count))
    elif source == "pages":
        from pages import make_page

        yield from (make_page(first + i, "train").image for i in range(count))
    else:
        files = sorted(p for p in Path(source).rglob("*") if p.suffix.lower() in SUFFIXES)
        if not files:
            raise SystemExit(f"--pictures {source}: no image files there; give a folder, or scenes, or pages")
        random.Random(seed).shuffle(files)
        yield from (Image.open(path).convert("RGB") for path in files[:count])


def options(given: list[str]) -> dict:
    """Read NAME=VALUE pairs as options of TokenCorr."""
    known = options_of("tokencorr").keys() - {"alpha", "keep"}
    found = {}
    for pair in given:
        name, equals, value = pair.partition("=")
        if not equals or name not in known:
            raise SystemExit(f"{pair!r}: give NAME=VALUE with one of {', '.join(sorted(known))}")
        found[name] = yaml.safe_load(value)
    return found


def main() -> None:
    """Calibrate and print."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="bundled/NAME, a hub id or a folder")
    parser.add_argument("--share", type=float, required=True, help="of the patches of a crop to keep, on average")
    parser.add_argument("--pictures", default="scenes", help="scenes, pages or a folder")
    parser.add_argument("--count", type=int, default=100, help="how many pictures")
    parser.add_argument("--seed", type=int, default=0, help="other pictures")
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("options", nargs="*", help="of TokenCorr, NAME=VALUE")
    args = parser.parse_intermixed_args()
    chosen = options(args.options)
    model, processor = load(args.model, dtype=args.dtype, device=args.device)
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}
    text = processor.apply_chat_template([turn], add_generation_prompt=True)  # TokenCorr does not look at words
    prompts = (
        processor(images=picture, text=text, return_tensors="pt").to(args.device)
        for picture in pictures(args.pictures, args.count, args.seed)
    )
    found = calibrate(model, prompts, args.share, **chosen)
    print(
        f"# {args.model}, {args.count} pictures ({args.pictures}), {found.crops} crops: keeps {found.kept:.1%} "
        f"of a crop on average, standard deviation {found.spread:.1%}; deep outliers {found.outliers:.1%}"
    )
    stage = {"method": "tokencorr", "alpha": round(found.alpha, 6), **chosen}
    print(f"- {yaml.safe_dump(stage, default_flow_style=True, sort_keys=False, width=200).strip()}")


if __name__ == "__main__":
    main()
