"""Seeded generator of composed scenes: cut-out art, drawn shapes and signs on photographs, with true answers.

A scene is a pure function of (split, seed). Art styles, backgrounds, fonts and sign codes of the two splits are
disjoint (``assets/bank/sources.json``; codes by hash). Pictures are 192x192 RGB and hold 2 to 12 items.
"""

import hashlib
import json
from dataclasses import dataclass, field

import numpy as np
from PIL import Image
from scene_art import (
    BANK,
    CHARACTERS,
    CODE_CHARACTERS,
    COLOURS,
    GRID,
    PATCH,
    SHAPES,
    SIZE,
    TAG_DIGITS,
    THINGS,
    draw_plate,
    draw_shape,
    fit,
    load_bank,
    photograph,
    recolour,
)

TASKS = ("presence", "colour", "count", "spatial", "detail", "text", "choice")
FAMILIES = (*TASKS, "side")  # questions that the generator knows; "side" is in no task (assets/README.md says why)
GROUPS = {t["name"]: t["group"] for t in json.loads((BANK / "things.json").read_text())}
# How often a thing is drawn: a fixed uneven order, so that "popular" negatives mean something.
_ORDER = np.random.default_rng(7).permutation(len(THINGS))
WEIGHTS = (1 / (_ORDER + 8.0)) / (1 / (_ORDER + 8.0)).sum()
POPULAR = [THINGS[i] for i in np.argsort(_ORDER)[: len(THINGS) // 3]]
# Dense labels, one class per patch in each group (0 = none): what the auxiliary heads of the tower learn.
KINDS = ("none", *THINGS, *SHAPES, "sign", "tag")
LABELS = {
    "kind": len(KINDS), "colour": 1 + len(COLOURS), "character": 1 + len(CHARACTERS), "place": 5,
    "owner": 1 + len(THINGS), "centre": 2,
}  # fmt: skip


@dataclass
class Item:
    """One thing, shape or sign. `box` is (left, top, right, bottom) in pixels."""

    kind: str  # "thing", "shape" or "sign"
    name: str  # noun, shape name, or the sign's code
    box: tuple[int, int, int, int]
    colour: str = ""  # of a shape
    tag: str = ""  # digit on the thing's tag
    style: str = ""  # art style or font it came from

    @property
    def centre(self) -> tuple[float, float]:
        """Centre (x, y) in pixels."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclass
class Scene:
    """A picture with its ground truth: items and dense labels (144, len(LABELS)) uint8."""

    image: Image.Image
    items: list[Item]
    labels: np.ndarray
    background: str
    split: str

    def named(self, kind: str) -> dict[str, list[Item]]:
        """Group the items of a kind by name."""
        out: dict[str, list[Item]] = {}
        for item in self.items:
            if item.kind == kind:
                out.setdefault(item.name, []).append(item)
        return out


@dataclass
class Question:
    """A question about one scene; `choices` only for the multiple-choice task."""

    task: str
    text: str
    answer: str
    choices: list[str] = field(default_factory=list)
    slice: str = ""
    about: tuple[str, ...] = ()  # names of the items that the answer is read from


def code_split(code: str) -> str:
    """Return the split that a sign's code belongs to: one code in five is held out."""
    return "test" if hashlib.sha256(code.encode()).digest()[0] % 5 == 0 else "train"


def random_code(rng: np.random.Generator, split: str) -> str:
    """Draw a sign's code of 2 to 4 characters that belongs to `split`."""
    while True:
        length = int(rng.choice([2, 3, 4], p=[0.3, 0.5, 0.2]))
        code = "".join(rng.choice(list(CODE_CHARACTERS), length))
        if code_split(code) == split:
            return code


def _plan(rng: np.random.Generator, split: str) -> list[tuple]:
    """Choose what the scene holds: (kind, name, colour, tag, size) tuples, largest first."""
    things: list[str] = []
    if rng.random() < 0.5:  # things of one group keep company
        group = str(rng.choice(sorted(set(GROUPS.values()))))
        weights = WEIGHTS * np.array([1.0 if GROUPS[t] == group else 0.08 for t in THINGS])
    else:
        weights = WEIGHTS
    n_kinds = int(rng.integers(1, 6))
    for name in rng.choice(THINGS, n_kinds, replace=False, p=weights / weights.sum()):
        things.append(str(name))
    shapes = [str(s) for s in rng.choice(SHAPES, int(rng.integers(1, 4)), replace=False)]
    repeated = int(rng.integers(1, 6)) - 1  # further copies of the counted kind
    count_things = rng.random() < 0.65
    few = len(things) + len(shapes) + repeated <= 5
    top = 64 if few else 46
    size = lambda low, high: int(np.exp(rng.uniform(np.log(low), np.log(high))))  # noqa: E731
    plan = []
    for i, name in enumerate(things):
        copies = 1 + (repeated if count_things and i == 0 else 0)
        tag = str(rng.choice(list(TAG_DIGITS))) if copies == 1 and rng.random() < 0.45 else ""
        for _ in range(copies):
            big = few and rng.random() < 0.12
            plan.append(("thing", name, "", tag, size(60, 90) if big else size(28, top)))
    for i, name in enumerate(shapes):
        copies = 1 + (repeated if not count_things and i == 0 else 0)
        for _ in range(copies):
            plan.append(("shape", name, str(rng.choice(list(COLOURS))), "", size(18, min(44, top))))
    plan.sort(key=lambda p: -p[4])
    plan = plan[:11]
    if rng.random() < 0.6:
        plan.insert(0, ("sign", random_code(rng, split), "", "", int(rng.integers(21, 27))))
    return plan


def make_scene(seed: int, split: str) -> Scene:
    """Compose the scene number `seed` of a split."""
    rng = np.random.default_rng([seed, int(split == "test")])
    bank = load_bank(split)
    image, background = photograph(rng, split)
    labels = np.zeros((GRID, GRID, len(LABELS)), np.uint8)
    column = {name: i for i, name in enumerate(LABELS)}
    items: list[Item] = []
    taken = np.zeros((SIZE, SIZE), bool)

    def patches(alpha: np.ndarray, left: int, top: int) -> np.ndarray:
        canvas = np.zeros((SIZE, SIZE), np.uint8)
        canvas[top : top + alpha.shape[0], left : left + alpha.shape[1]] = alpha
        return np.asarray(Image.fromarray(canvas).reduce(PATCH)) >= np.uint8(77)  # 30 % of the patch

    for kind, name, colour, tag, size in _plan(rng, split):
        style = ""
        if kind == "thing":
            style = str(rng.choice(sorted(bank["art"])))
            turn = 20 if split == "train" else 10
            sprite = recolour(rng, fit(rng, bank["art"][style][name], size, split, True, turn), split)
        elif kind == "shape":
            sprite = draw_shape(rng, name, colour, size, split)
        else:
            advance = int(rng.integers(16, 19))
            sprite, style = draw_plate(rng, name, split, size, advance)
        width, height = sprite.size
        if tag:  # the tag hangs over the thing's lower right corner
            cell = int(rng.integers(21, 25))
            plate, font = draw_plate(rng, tag, split, cell, 14)
            offset = (width - plate.width // 2, height - plate.height // 2)
            width, height = offset[0] + plate.width, offset[1] + plate.height
        for _ in range(40):
            left, top = int(rng.integers(1, SIZE - width)), int(rng.integers(1, SIZE - height))
            region = (slice(max(0, top - 3), top + height + 3), slice(max(0, left - 3), left + width + 3))
            if not taken[region].any():
                break
        else:
            continue  # no room: the scene holds one item fewer
        taken[top : top + height, left : left + width] = True
        image.paste(sprite, (left, top), sprite)
        alpha = np.asarray(sprite.getchannel("A"))
        hit = patches(alpha, left, top)
        labels[hit, column["kind"]] = KINDS.index("sign" if kind == "sign" else name)
        item = Item(kind, name, (left, top, left + sprite.width, top + sprite.height), colour, tag, style)
        cx, cy = item.centre
        if kind == "shape":
            labels[hit, column["colour"]] = 1 + list(COLOURS).index(colour)
        if kind != "sign":
            labels[int(cy) // PATCH, int(cx) // PATCH, column["centre"]] = 1
        else:
            for i, char in enumerate(name):
                x0 = left + 3 + i * advance
                row0, row1 = (top + 5) // PATCH, (top + sprite.height - 6) // PATCH
                cell_slice = (slice(row0, row1 + 1), int(x0 + advance / 2) // PATCH)
                labels[(*cell_slice, column["character"])] = 1 + CHARACTERS.index(char)
                labels[(*cell_slice, column["place"])] = 1 + i
        if tag:
            x0, y0 = left + offset[0], top + offset[1]
            image.paste(plate, (x0, y0), plate)
            hit = patches(np.full((plate.height, plate.width), 255, np.uint8), x0, y0)
            labels[hit, column["kind"]] = KINDS.index("tag")
            labels[hit, column["character"]] = 1 + CHARACTERS.index(tag)
            labels[hit, column["owner"]] = 1 + THINGS.index(name)
        items.append(item)
    if split == "train" and rng.random() < 0.3:
        noise = rng.integers(-8, 9, (SIZE, SIZE, 1), dtype=np.int16)
        image = Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))
    return Scene(image, items, labels.reshape(GRID * GRID, -1), background, split)


def article(noun: str) -> str:
    """Put the indefinite article before a noun."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def relation(a: Item, b: Item) -> str:
    """Say where `a` is, seen from `b`: left, right, above, below, or "" if that is not clear-cut."""
    dx, dy = a.centre[0] - b.centre[0], a.centre[1] - b.centre[1]
    if max(abs(dx), abs(dy)) < 30 or max(abs(dx), abs(dy)) < 1.7 * min(abs(dx), abs(dy)):
        return ""
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "above" if dy < 0 else "below"


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Write a caption that names every item, in random order."""
    parts = []
    for kind in ("thing", "shape", "sign"):
        for name, group in scene.named(kind).items():
            if kind == "sign":
                parts.append(f"a sign saying {' '.join(name)}")
            elif kind == "shape" and len(group) == 1:
                parts.append(article(f"{group[0].colour} {name}"))
            elif len(group) > 1:
                parts.append(f"{len(group)} {name} pictures" if kind == "thing" else f"{len(group)} {name} shapes")
            else:
                parts.append(article(name) + (f" with tag {group[0].tag}" if group[0].tag else ""))
    rng.shuffle(parts)
    return ", ".join(parts)


def ask(scene: Scene, task: str, rng: np.random.Generator) -> Question | None:
    """Ask one question of a task about the scene; None if the scene offers none."""
    things, shapes = scene.named("thing"), scene.named("shape")
    absent = [t for t in THINGS if t not in things]
    single = [n for n, group in things.items() if len(group) == 1]
    pick = lambda names: str(rng.choice(sorted(names)))  # noqa: E731
    if task == "presence" and things:
        if rng.random() < 0.5:
            name, answer, kind = pick(things), "yes", "yes"
        else:
            kind, answer = pick(("random", "popular", "adversarial")), "no"
            groups = {GROUPS[t] for t in things}
            pool = {"random": absent, "popular": [t for t in absent if t in POPULAR],
                    "adversarial": [t for t in absent if GROUPS[t] in groups]}[kind]  # fmt: skip
            name = pick(pool or absent)
        about = (name,) if answer == "yes" else ()
        text = f"Is there {article(name)} in the picture? Answer yes or no."
        return Question(task, text, answer, slice=kind, about=about)
    if task == "colour" and (names := [n for n, group in shapes.items() if len(group) == 1]):
        name = pick(names)
        text = f"What colour is the {name}? Answer with one word."
        return Question(task, text, shapes[name][0].colour, slice=name, about=(name,))
    if task == "count" and (things or shapes):
        groups = {n: len(g) for n, g in {**things, **shapes}.items()}
        numbers = sorted(set(groups.values()))  # asked mostly about what repeats, else nearly every answer is 1
        number = numbers[-1] if rng.random() < 0.6 else rng.choice(numbers)
        name = pick([n for n, k in groups.items() if k == number])
        text = f"How many times does the {name} appear? Answer with one number."
        return Question(task, text, str(number), slice=str(number), about=(name,))
    if task == "side":
        everything = {n: g[0] for n, g in {**things, **shapes}.items() if len(g) == 1}
        names = rng.permutation(sorted(everything)).tolist()
        for a in names:
            for b in names:
                if a != b and (answer := relation(everything[a], everything[b])):
                    text = f"Is the {a} left, right, above or below the {b}? Answer with one word."
                    return Question(task, text, answer, slice=answer, about=(a, b))
        return None
    if task == "detail" and (names := [n for n in single if things[n][0].tag]):
        name = pick(names)
        text = f"Which digit is on the tag of the {name}? Answer with one digit."
        return Question(task, text, things[name][0].tag, slice=str(len(names)), about=(name,))
    if task == "spatial" and (names := [n for n in single if things[n][0].tag]):
        name = pick(names)
        tag = things[name][0].tag
        if sum(i.tag == tag for i in scene.items) == 1:
            return Question(task, f"What is the tag {tag} on? Answer with one word.", name, about=(name,))
        return None
    if task == "text" and (signs := scene.named("sign")):
        code = next(iter(signs))
        return Question(
            task, "What does the sign say? Answer with the code.", code, slice=str(len(code)), about=(code,)
        )
    if task == "choice" and things:
        name = pick(things)
        near = [t for t in absent if GROUPS[t] == GROUPS[name]]
        options = [name, pick(near or absent)]
        while len(options) < 4:
            other = pick(absent)
            if other not in options:
                options.append(other)
        options = rng.permutation(options).tolist()
        text = f"Which of these is in the picture: {', '.join(options[:3])} or {options[3]}? Answer with one word."
        return Question(task, text, name, options, slice=GROUPS[name], about=(name,))
    return None
