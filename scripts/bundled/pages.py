"""Seeded generator of rendered pages - forms, tables, small print - with true answers.

A page is a pure function of (split, seed). Fonts, background photographs and codes of the two splits are disjoint
(``assets/bank/sources.json``; codes by hash). Pages are printed at the size at which LLaVA-NeXT's anyres cuts them: up
to four crops of 144 pixels, nothing resized but the thumbnail, no character across a crop's edge.
"""

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from PIL import Image, ImageFilter
from scenes import CHARACTERS, PATCH, Question, load_bank, random_code

CROP = 144
SIDE = CROP // PATCH  # patches along a crop
PINPOINTS = [[CROP, 2 * CROP], [2 * CROP, CROP], [2 * CROP, 2 * CROP], [CROP, 3 * CROP], [3 * CROP, CROP]]
LINE = CROP // 6  # lines of 24 pixels, symmetric about the middle: a crop's edge falls between two of them
TASKS = ("keyvalue", "table", "smallprint", "presence")
KEYS = (
    "AREA", "BAY", "BOX", "CITY", "CODE", "DATE", "DUE", "EXIT", "FEE", "FLOOR", "GATE", "HALL", "ITEM", "JOB",
    "KEY", "LEVEL", "LOT", "MODEL", "NAME", "NOTE", "ORDER", "PHONE", "PRICE", "QUEUE", "RATE", "ROOM", "SEAT",
    "SIZE", "TAX", "TOTAL", "UNIT", "VAN", "WARD", "YARD", "ZONE",
)  # fmt: skip
SMALL = ("REF", "FORM", "SHEET", "PAGE")  # words before the code in small print
LETTERS = CHARACTERS[:26]
# Dense labels of a patch; 0 = none. `owner`: initial of the key or row that a character belongs to, or small print.
SMALL_PRINT = 1 + len(LETTERS)
LABELS = {
    "first": 1 + len(CHARACTERS), "second": 1 + len(CHARACTERS), "owner": 1 + SMALL_PRINT, "place": 5, "column": 6,
}  # fmt: skip


@dataclass(frozen=True)
class Mark:
    """A printed character: its centre in page pixels, whose it is, its place (from 1) in a value, and its column."""

    char: str
    x: float
    y: float
    owner: str = ""  # initial of the key, letter of the row, "small", or "" for column heads
    place: int = 0
    column: int = 0


@dataclass(frozen=True)
class Entry:
    """A value on the page. `key` is a key word, a row's letter, or the word before the code in small print."""

    kind: str  # "pair", "cell" or "small"
    key: str
    value: str
    column: int = 0


@dataclass
class Page:
    """A rendered page with its ground truth; `crops` are (columns, rows) of the anyres grid."""

    image: Image.Image
    crops: tuple[int, int]
    split: str
    font: str
    entries: list[Entry] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)

    def kind(self, kind: str) -> list[Entry]:
        """Entries of a kind."""
        return [e for e in self.entries if e.kind == kind]


def unpadded(size: tuple[int, int], crops: tuple[int, int]) -> tuple[slice, slice]:
    """Columns and rows of the mosaic's patches that survive LLaVA-NeXT's unpadding of a page (width, height)."""
    kept = []
    for length, other, n, n_other in ((size[0], size[1], *crops), (size[1], size[0], *crops[::-1])):
        total = SIDE * n
        padding = 0
        if length * n_other < other * n:  # this is the padded side
            padding = (total - int(round(length * SIDE * n_other / other, 7))) // 2
        kept.append(slice(padding, total - padding))
    return kept[0], kept[1]


def labels(page: Page) -> np.ndarray:
    """Labels (rows, columns, len(LABELS)) uint8 of the mosaic's patches: a character counts where its centre lies."""
    width, height = (n * CROP for n in page.crops)
    left, top = (width - page.image.width) // 2, (height - page.image.height) // 2
    out = np.zeros((height // PATCH, width // PATCH, len(LABELS)), np.uint8)
    for mark in sorted(page.marks, key=lambda m: m.x):
        patch = out[int(mark.y + top) // PATCH, int(mark.x + left) // PATCH]
        char = 1 + CHARACTERS.index(mark.char)
        if patch[0]:  # two small characters in one patch: the first one's role counts
            patch[1] = char
            continue
        owner = SMALL_PRINT if mark.owner == "small" else 1 + LETTERS.index(mark.owner) if mark.owner else 0
        patch[:] = char, 0, owner, mark.place, mark.column
    columns, rows = unpadded(page.image.size, page.crops)
    return out[rows, columns]


def _size(rng: np.random.Generator) -> tuple[tuple[int, int], tuple[int, int]]:
    """Page size (width, height) and crops (columns, rows), one side always filling the grid."""
    kind = rng.choice(["full", "low", "half", "wide", "slim", "tall"], p=[0.34, 0.2, 0.1, 0.16, 0.1, 0.1])
    full, vary = 2 * CROP, lambda low, high: int(rng.integers(low, high))
    return {
        "full": ((full, full), (2, 2)), "low": ((full, vary(176, full)), (2, 2)), "half": ((full, CROP), (2, 1)),
        "wide": ((3 * CROP, vary(124, CROP + 1)), (3, 1)), "slim": ((vary(228, full), full), (2, 2)),
        "tall": ((vary(132, CROP + 1), 3 * CROP), (1, 3)),
    }[kind]  # fmt: skip


@lru_cache(maxsize=4096)
def _glyph(split: str, font: str, char: str, cell: int) -> np.ndarray:
    glyph = load_bank(split)["glyphs"][font][char].resize((cell, cell), Image.Resampling.BOX)
    return np.asarray(glyph, np.float32) / 255


class _Press:
    """Prints characters on one page: keeps the ink, the marks, and the lines that are still free."""

    def __init__(self, rng: np.random.Generator, split: str):
        self.rng, self.split = rng, split
        self.size, self.crops = _size(rng)
        self.font = str(rng.choice(sorted(load_bank(split)["glyphs"])))
        wide = self.size[0] >= 3 * CROP
        self.advance = rng.uniform(16, 16.5 if wide or self.size[0] < 2 * CROP else 17.5)
        self.cell = int(rng.integers(19, 24))
        self.ink = np.zeros((self.size[1], self.size[0]), np.float32)
        self.marks: list[Mark] = []
        self.entries: list[Entry] = []
        pad = (CROP * self.crops[0] - self.size[0]) // 2
        self.folds = [CROP * i - pad for i in range(1, self.crops[0])]
        count = (self.size[1] - 12) // LINE // 2 * 2  # even: none on the middle
        jitter = rng.uniform(-2, 2)
        self.lines = [self.size[1] / 2 + (i - count / 2 + 0.5) * LINE + jitter for i in range(count)]

    def room(self, x: float) -> int:
        """Count the characters that fit between `x` and the right margin, whatever falls on folds."""
        folds = sum(x < fold for fold in self.folds)
        return int((self.size[0] - 5 - x - folds * self.advance) / self.advance)

    def print(self, text: str, x: float, y: float, *, small: bool = False, **role) -> float:
        """Print `text` (blanks advance) from `x` on, its middle at height `y`; return where it ends."""
        advance, cell = (self.advance * 0.82, round(self.cell * 0.7)) if small else (self.advance, self.cell)
        half = cell * 0.36  # what a character needs on either side
        for i, char in enumerate(text):
            centre = x + advance / 2
            for fold in self.folds:
                if abs(centre - fold) < half:
                    centre = fold + half
            x = centre + advance / 2
            if char == " ":
                continue
            left, top = round(centre - cell / 2), round(y - cell / 2)
            x0, y0 = max(left, 0), max(top, 0)
            target = self.ink[y0 : top + cell, x0 : left + cell]
            glyph = _glyph(self.split, self.font, char, cell)[y0 - top :, x0 - left :]
            np.maximum(target, glyph[: target.shape[0], : target.shape[1]], out=target)
            place = 1 + i if role.get("valued") else 0
            self.marks.append(Mark(char, centre, y, role.get("owner", ""), place, role.get("column", 0)))
        return x

    def value(self, entry: Entry, owner: str, x: float, y: float, *, small: bool = False) -> float:
        """Print an entry's value and note the entry."""
        self.entries.append(entry)
        return self.print(entry.value, x, y, small=small, valued=True, owner=owner, column=entry.column)


def _code(rng: np.random.Generator, split: str, low: int, high: int, taken: set[str]) -> str:
    """Draw a code of the split with `low` to `high` characters that is not on the page yet."""
    while True:
        code = random_code(rng, split)
        if low <= len(code) <= high and code not in taken:
            taken.add(code)
            return code


def _small_print(press: _Press, taken: set[str]) -> None:
    """One line of small print at the foot of the page, sometimes at its head."""
    rng = press.rng
    y = press.lines.pop(0 if rng.random() < 0.2 else -1)
    narrow = press.size[0] <= CROP
    word = str(rng.choice(SMALL[:2] if narrow else SMALL))
    code = _code(rng, press.split, 2, 3 if narrow else 4, taken)
    length = (len(word) + 1 + len(code)) * press.advance * 0.82
    x = rng.uniform(6, max(7, press.size[0] - 8 - length - 10 * len(press.folds)))
    x = press.print(word + " ", x, y, small=True, owner="small")
    press.value(Entry("small", word, code), "small", x, y, small=True)


def _form(press: _Press, taken: set[str]) -> None:
    """Key-value pairs whose keys differ in their initials: one a line, two on a wide page, stacked on a tall one."""
    rng, width = press.rng, press.size[0]
    stacked, columns = width <= CROP, 2 if width >= 3 * CROP and rng.random() < 0.75 else 1
    slots = [(c, y) for c in range(columns) for y in (press.lines[::2] if stacked else press.lines)]
    slots = slots[: len(press.lines) // 2] if stacked else slots
    number = int(rng.integers(min(3, len(slots)), len(slots) + 1))
    slots = [slots[i] for i in sorted(rng.choice(len(slots), number, replace=False))]
    initials, keys = set(), []
    for key in rng.permutation(KEYS):
        if key[0] not in initials and len(keys) < number:
            initials.add(key[0])
            keys.append(str(key))
    need = max(map(len, keys)) + 5  # the longest key, a gap, a value of four
    spare = width / columns - (need + sum(0 < f < width / columns for f in press.folds)) * press.advance - 8
    margin = 6 + rng.uniform(0, max(1, min(spare, 60)))
    tab = rng.random() < 0.6
    gap = 1 + int(rng.integers(0, max(1, min(4, (spare - margin) // press.advance + 1))))
    for key, (column, y) in zip(keys, slots, strict=True):
        entry = Entry("pair", key, _code(rng, press.split, 2, 4, taken))
        x = margin + column * width / 2
        end = press.print(key + " ", x, y, owner=key[0])
        if stacked:
            press.value(entry, key[0], x + press.advance * float(rng.integers(0, 3)), y + LINE)
        else:
            press.value(entry, key[0], x + (need - 5 + gap) * press.advance if tab else end, y)


def _table(press: _Press, taken: set[str]) -> None:
    """Draw a table of codes: columns headed 1, 2, 3 ... in order, rows by different letters."""
    rng = press.rng
    length = 2 if rng.random() < 0.6 else 3
    room = press.room(6) - 2
    most = min(5, (room + 1) // (length + 1))
    if most < 2:
        length, most = 2, 2
    columns = int(rng.integers(2, most + 1))
    spare = (room + 2 - 2 - columns * (length + 1) + 1) * press.advance
    x0 = 6 + rng.uniform(0, max(1, min(spare, 60)))
    most = min(len(press.lines) - 1, 9)
    rows = int(rng.integers(min(2, most), most + 1))
    first = int(rng.integers(0, len(press.lines) - rows))
    head, *body = press.lines[first : first + rows + 1]
    x = x0 + 2 * press.advance
    for column in range(1, columns + 1):
        x = press.print(str(column) + " " * length, x, head, column=column)
    for letter, y in zip(rng.choice(list(LETTERS), rows, replace=False), body, strict=True):
        x = press.print(str(letter) + " ", x0, y, owner=str(letter))
        for column in range(1, columns + 1):
            entry = Entry("cell", str(letter), _code(rng, press.split, length, length, taken), column)
            x = press.print(" ", press.value(entry, str(letter), x, y), y)


def _paper(rng: np.random.Generator, split: str, size: tuple[int, int], lines: list[float]) -> tuple[np.ndarray, ...]:
    """Paper (H, W, 3) and ink colour (3,), both 0 to 255: tinted, shaded, ruled, over a washed-out photograph."""
    width, height = size
    light = rng.uniform(205, 256) + rng.uniform(-14, 1, 3)
    dark = rng.uniform(0, 60) + rng.uniform(0, 30, 3)
    paper, ink = (light, dark) if rng.random() < 0.88 else (dark, light)
    out = np.broadcast_to(paper, (height, width, 3)).astype(np.float32)
    if rng.random() < 0.4:
        photos = load_bank(split)["background"]
        photo = photos[str(rng.choice(sorted(photos)))]
        left, top = int(rng.integers(photo.width - width + 1)), int(rng.integers(photo.height - height + 1))
        crop = np.asarray(photo.crop((left, top, left + width, top + height)), np.float32)
        out = out + np.float32(rng.uniform(0.1, 0.3)) * (crop - out)
    if rng.random() < 0.5:
        across, down = (np.linspace(-1, 1, n, dtype=np.float32) * np.float32(rng.uniform(-18, 18)) for n in size)
        out = out + across[None, :, None] + down[:, None, None]
    if rng.random() < 0.3:
        out = out.copy()
        for y in lines:
            out[min(int(y + LINE / 2), height - 1)] += np.float32(0.3) * (ink - paper).astype(np.float32)
    return out, ink


def make_page(seed: int, split: str) -> Page:
    """Print page number `seed` of a split ("train" or "test")."""
    rng = np.random.default_rng([seed, 2 + int(split == "test")])
    press, taken = _Press(rng, split), set()
    ruling = list(press.lines)
    if rng.random() < 0.7:
        _small_print(press, taken)
    (_form if rng.random() < 0.55 else _table)(press, taken)
    paper, ink = _paper(rng, split, press.size, ruling)
    strong = split == "train"
    mask = press.ink ** rng.uniform(*((0.6, 1.6) if strong else (0.85, 1.2)))  # thick to thin strokes
    image = paper + mask[..., None] * (ink - paper)
    if rng.random() < 0.3:
        image = image + rng.normal(0, rng.uniform(2, 8 if strong else 4), image.shape[:2])[..., None]
    picture = Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))
    if strong and rng.random() < 0.2:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.7)))
    return Page(picture, press.crops, split, press.font, press.entries, press.marks)


def ask(page: Page, task: str, rng: np.random.Generator) -> Question | None:
    """One question of a task about the page, or None when the page offers none; `about` is (owner, column)."""
    pick = lambda values: values[int(rng.integers(len(values)))]  # noqa: E731
    if task == "keyvalue" and (pairs := page.kind("pair")):
        pair = pick(pairs)
        text = f"What is the {pair.key}? Answer with the code."
        return Question(task, text, pair.value, slice=str(len(pair.value)), about=(pair.key[0], "0"))
    if task == "table" and (cells := page.kind("cell")):
        cell = pick(cells)
        text = f"What is in row {cell.key}, column {cell.column}? Answer with the code."
        return Question(task, text, cell.value, slice=str(cell.column), about=(cell.key, str(cell.column)))
    if task == "smallprint" and (small := page.kind("small")):
        text = "Which code is in the small print? Answer with the code."
        return Question(task, text, small[0].value, slice=str(len(small[0].value)), about=("small", "0"))
    if task == "presence" and (pairs := page.kind("pair")):
        there = [p.key for p in pairs]
        if rng.random() < 0.5:
            key, kind = pick(there), "yes"
        else:
            initials = {k[0] for k in there}
            alike = [k for k in KEYS if k not in there and k[0] in initials]
            other = [k for k in KEYS if k[0] not in initials]
            key, kind = (pick(alike), "alike") if alike and rng.random() < 0.5 else (pick(other), "other")
        about = (key[0], "key") if kind == "yes" else ()
        answer = "yes" if kind == "yes" else "no"
        return Question(task, f"Is {key} on the page? Answer yes or no.", answer, slice=kind, about=about)
    return None
