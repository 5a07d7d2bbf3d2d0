"""Videos of LLaVA-OneVision: every method on clips of moving shapes, through the processor, on an untrained model.

transformers encodes the videos of one batch as one tensor, so they have equally many frames; clips of other lengths
come in other batches.
"""

from functools import cache

import numpy as np
import pytest
import torch
from checks import check_a_batch_is_its_rows, check_changes_nothing
from doubles import BUDGETED, keeping_everything, registered, watched
from PIL import Image, ImageDraw
from prompts import Clip, Picture, batch, clip_tokens, words
from tiny import BOS, IMAGE, SIDE, VIDEO, tiny
from transformers import LlavaOnevisionVideoProcessor

import vlmslim
from vlmslim.methods.bipartite_merge import BipartiteMerge
from vlmslim.methods.divprune import DivPrune
from vlmslim.methods.todre import Diversify
from vlmslim.registry import method_class

METHODS = [name for name in BUDGETED if name != "tokenflex"]  # it keeps as many of every frame: see test_tokenflex
BY_COUNT = ["random", "uniform", "pool", "divprune", "bipartite_merge", "globalcom2", "tokencorr"]
PROCESSOR = LlavaOnevisionVideoProcessor(size={"height": SIDE, "width": SIDE})


@cache
def film(seed: int, frames: int) -> torch.Tensor:
    """(frames, 3, SIDE, SIDE): a disc and a square cross a coloured ground, in footage that is a little noisy."""
    rng = np.random.default_rng(seed)
    ground, disc, square = (tuple(int(x) for x in rng.integers(0, 256, 3)) for _ in range(3))
    start, step = rng.uniform(10, 40, (2, 2)), rng.uniform(-6, 6, (2, 2))
    shots = []
    for t in range(frames):
        picture = Image.new("RGB", (64, 48), ground)
        draw = ImageDraw.Draw(picture)
        for (x, y), colour, shape in zip(start + t * step, (disc, square), (draw.ellipse, draw.rectangle), strict=True):
            shape((x - 8, y - 8, x + 8, y + 8), fill=colour)
        shots.append(np.asarray(picture) + rng.normal(0, 3, (48, 64, 3)))
    video = np.stack(shots).clip(0, 255).astype(np.uint8)
    return PROCESSOR(videos=[torch.from_numpy(video).permute(0, 3, 1, 2)], return_tensors="pt")["pixel_values_videos"][
        0
    ]


def inputs_of(model, rows: list[list]) -> dict:
    """`tiny.batch`, with footage for its clips."""
    inputs = batch(model, rows)
    clips = [x for row in rows for x in row if isinstance(x, Clip)]
    if clips:
        inputs["pixel_values_videos"] = torch.stack([film(x.seed, x.frames) for x in clips]).to(model.dtype)
    return inputs


CLIPS = [
    [BOS, Clip(0, 4), *words(0, 5)],
    [BOS, *words(1, 3), Clip(1, 4), *words(2, 6)],
    [BOS, Clip(2, 4), *words(3, 2), Clip(3, 4), *words(4, 2)],
]
MIXED = [
    [BOS, Picture(0, (60, 30)), *words(0, 4)],
    [BOS, *words(1, 2), Clip(0, 3), *words(2, 3)],
    [BOS, *words(3, 6)],
    [BOS, Clip(1, 3), *words(4, 2), Picture(1, (60, 60)), *words(5, 3)],
]


@pytest.mark.parametrize("rows", [CLIPS, MIXED], ids=["clips", "mixed"])
@pytest.mark.parametrize("name", METHODS)
def test_a_batch_is_its_rows(name, rows):
    summary = check_a_batch_is_its_rows(tiny("onevision"), rows, registered(name, 6), inputs_of)
    assert summary["images"] == sum(isinstance(x, Clip | Picture) for row in rows for x in row)
    if name in BY_COUNT:
        assert summary["kept"] == summary["requested"] == 6


@pytest.mark.parametrize("rows", [CLIPS, MIXED], ids=["clips", "mixed"])
@pytest.mark.parametrize("name", ["none", *METHODS])
def test_keeping_everything_changes_nothing(name, rows):
    model = tiny("onevision")
    check_changes_nothing(model, inputs_of(model, rows), keeping_everything(name))


@pytest.mark.parametrize("keep", [1, 0.2, 0.5])
@pytest.mark.parametrize("name", BY_COUNT)
@torch.no_grad()
def test_clips_of_any_length_keep_what_is_asked(name, keep):
    model = tiny("onevision")
    for frames in (1, 2, 5):
        with vlmslim.patch(model, name, keep=keep) as slim:
            model(**inputs_of(model, [[BOS, Clip(7, frames), *words(0, 3)]]))
        summary = slim.receipt.summary()
        n = clip_tokens(frames)
        assert summary["visual_tokens"] == n
        assert summary["kept"] == (keep if isinstance(keep, int) else max(1, round(keep * n)))


@pytest.mark.parametrize("newline", ["pool", "drop", "rows"])
@pytest.mark.parametrize("method", [DivPrune, Diversify])
@torch.no_grad()
def test_the_newline_of_a_clip(method, newline):
    """It ends the clip: "rows" keeps it, as the clip keeps a token; "drop" does not; "pool" lets it compete."""
    model = tiny("onevision")
    spy, seen = watched(method, keep=6, newline=newline)
    with vlmslim.patch(model, spy):
        model(**inputs_of(model, CLIPS))
    for image, result in seen:
        assert len(result.index.unique()) == 6
        kept = len(image.features) - 1 in result.index
        assert kept or newline != "rows"
        assert not kept or newline != "drop"


@pytest.mark.parametrize("name", ["divprune", "k_center"])
@torch.no_grad()
def test_a_still_clip_is_not_kept_frame_by_frame(name):
    """Diversity is sought over all frames: of four frames that show the same, every place is kept just once."""
    model = tiny("onevision")
    spy, seen = (
        watched(DivPrune, keep=4, newline="drop")
        if name == "divprune"
        else watched(Diversify, keep=4, newline="drop", objective=name)
    )
    inputs = inputs_of(model, [[BOS, Clip(0, 4), 5]])
    noise = torch.randn(inputs["pixel_values_videos"].shape, generator=torch.Generator().manual_seed(0))
    inputs["pixel_values_videos"] = film(0, 1).expand(1, 4, -1, -1, -1) + 1e-4 * noise
    with vlmslim.patch(model, spy):
        model(**inputs)
    ((image, result),) = seen
    places = image.grid[result.index, 1:]
    assert len(places.unique(dim=0)) == 4


@torch.no_grad()
def test_merging_stays_within_a_frame():
    """Another picture in one frame changes no merged token of the others."""
    model = tiny("onevision")
    inputs = inputs_of(model, [[BOS, Clip(0, 4), 5]])
    found = []
    for pixels in (film(0, 4), torch.cat([film(0, 4)[:2], film(9, 4)[2:3], film(0, 4)[3:]])):
        spy, seen = watched(BipartiteMerge, keep=9)  # two a frame, and the newline
        with vlmslim.patch(model, spy):
            model(**inputs | dict(pixel_values_videos=pixels[None]))
        ((image, result),) = seen
        frame = image.grid[result.index, 0]
        assert [int((frame == f).sum()) for f in (0, 1, 2, 3, -1)] == [2, 2, 2, 2, 1]
        found.append((frame, result.features))
    (frame, before), (same, after) = found
    assert torch.equal(frame, same)
    moved = (before - after).abs().amax(-1) > 1e-5
    assert moved[frame == 2].all()
    assert not moved[frame != 2].any()


@torch.no_grad()
def test_the_more_telling_frame_keeps_more():
    """GlobalCom²: frames are its crops, and their budgets differ though they are of one size."""
    model = tiny("onevision")
    spy, seen = watched(method_class("globalcom2"), keep=9, newline="drop", temperature=0.1)
    inputs = inputs_of(model, [[BOS, Clip(0, 4), 5]])
    odd = torch.cat([film(0, 1).expand(3, -1, -1, -1), film(9, 1)])  # three alike, and one that is unlike the mean
    with vlmslim.patch(model, spy):
        model(**inputs | dict(pixel_values_videos=odd[None]))
    ((image, result),) = seen
    counts = image.grid[result.index, 0].bincount(minlength=4)
    assert counts.sum() == 9
    assert counts.argmax() == 3


def test_what_cannot_do_videos_says_so():
    with pytest.raises(ValueError, match="OneVision|CLS"):
        vlmslim.patch(tiny("onevision"), "recoverable", keep=4)


def test_the_prompts_are_what_they_seem():
    model = tiny("onevision")
    ids = inputs_of(model, MIXED)["input_ids"]
    assert [(row == VIDEO).sum().item() for row in ids] == [0, 13, 0, 13]
    assert [(row == IMAGE).any().item() for row in ids] == [True, False, False, True]
