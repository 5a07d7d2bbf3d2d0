"""Pictures of many sizes through the real processors: where tokens come from, and every method on them."""

import pytest
import torch
from checks import check_a_batch_is_its_rows, check_changes_nothing, check_count
from compare import close
from doubles import BUDGETED, Everything, keeping_everything, registered, watched
from PIL import Image
from prompts import Picture, batch, words
from tiny import BOS, IMAGE, SIDE, tiny
from transformers import LlavaNextImageProcessor, LlavaOnevisionImageProcessor
from transformers.models.llava_next.modeling_llava_next import unpad_image

import vlmslim
from vlmslim.registry import method_class

METHODS = [name for name in BUDGETED if name != "tokenflex"]  # it keeps as many of every crop: see test_tokenflex
SIZES = [(30, 30), (96, 96), (40, 96), (96, 50), (64, 60)]  # height, width
PINPOINTS = [[SIDE * i, SIDE * j] for i in (1, 2, 3) for j in (1, 2, 3)]


def anyres(family: str):
    """A tiny model whose pictures have up to nine tiles; OneVision shrinks more than two to the size of two."""
    model = tiny(family)
    model.config.image_grid_pinpoints = PINPOINTS
    if family == "onevision":
        model.config.vision_aspect_ratio = "anyres_max_2"
    return model


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    """Coloured patches with some noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(3, -(-size[0] // 8), -(-size[1] // 8), generator=generator)
    pixels = coarse.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, : size[0], : size[1]]
    pixels = (pixels + 0.1 * torch.rand(pixels.shape, generator=generator)).clamp(0, 1)
    return Image.fromarray((pixels.permute(1, 2, 0) * 255).byte().numpy())


@torch.no_grad()
def inputs_of(model, rows: list[list]) -> dict:
    """Model inputs of rows of words and sizes; a size becomes a picture."""
    one = model.config.model_type == "llava_onevision"
    square = {"height": SIDE, "width": SIDE}
    if one:
        process = LlavaOnevisionImageProcessor(size=square, image_grid_pinpoints=PINPOINTS)
    else:
        process = LlavaNextImageProcessor(
            size={"shortest_edge": SIDE}, crop_size=square, image_grid_pinpoints=PINPOINTS
        )
    pictures = [[picture(hash_of(x), x) for x in row if isinstance(x, tuple)] for row in rows]
    inputs = dict(process([p for p in pictures if p], return_tensors="pt"))
    extra = {k: inputs[k] for k in ("image_sizes", "batch_num_images") if k in inputs}
    counts = iter([len(x) for x in model.model.get_image_features(inputs["pixel_values"], **extra).pooler_output])
    ids = [[t for x in row for t in ([IMAGE] * next(counts) if isinstance(x, tuple) else [x])] for row in rows]
    width = max(map(len, ids))
    inputs["input_ids"] = torch.tensor([[0] * (width - len(line)) + line for line in ids])
    inputs["attention_mask"] = torch.tensor([[0] * (width - len(line)) + [1] * len(line) for line in ids])
    return inputs


def hash_of(size: tuple[int, int]) -> int:
    return size[0] * 1000 + size[1]


ROWS = [[BOS, *words(i, 2), size, *words(i, 3 + i)] for i, size in enumerate(SIZES)]


@pytest.mark.parametrize("family", ["next", "onevision"])
@torch.no_grad()
def test_the_grid_locates_every_token(family):
    """Mosaics are cut to the picture, and OneVision's are shrunk: the coordinates are those of the nearest patch."""

    model = anyres(family)
    spy, seen = watched(Everything)
    with vlmslim.patch(model, spy):
        model(**inputs_of(model, ROWS))
    shrunk = 0
    for size, (image, _) in zip(SIZES, seen, strict=True):
        projected = model.model.multi_modal_projector(image.tower).unflatten(1, (4, 4))
        component, row, column = image.mosaic.unbind(1)
        assert torch.equal(image.grid[component == 0, 1:], image.mosaic[component == 0, 1:])
        if not image.tiles[1]:
            assert (component[:16] == 0).all() and (component[16:] == -1).all()
            continue
        rows, columns = image.tiles
        whole = projected[1:].unflatten(0, (rows, columns)).transpose(1, 2).flatten(0, 1).flatten(1, 2)
        places = torch.cartesian_prod(torch.arange(4 * rows), torch.arange(4 * columns)).view(4 * rows, 4 * columns, 2)
        whole, places = (unpad_image(x.permute(2, 0, 1), size).permute(1, 2, 0) for x in (whole, places))
        tiled = component == 1
        height = int((component == -1).sum())
        width = int(tiled.sum()) // height
        shrunk += (height, width) != whole.shape[:2]
        for i, token in enumerate(tiled.nonzero()[:, 0].tolist()):
            line, place = divmod(i, width)
            at = (line + 0.5) * whole.shape[0] / height - 0.5, (place + 0.5) * whole.shape[1] / width - 0.5
            mean = 0
            for y in range(int(at[0]), min(int(at[0]) + 2, whole.shape[0])):
                for x in range(int(at[1]), min(int(at[1]) + 2, whole.shape[1])):
                    mean += whole[y, x] * max(0, 1 - abs(at[0] - y)) * max(0, 1 - abs(at[1] - x))
            close(image.features[token], mean, 1e-3)
            offset = places[0, 0]
            assert abs(row[token] - offset[0] - at[0]) <= 0.5 and abs(column[token] - offset[1] - at[1]) <= 0.5
            crop = 1 + int(row[token]) // 4 * columns + int(column[token]) // 4
            assert image.grid[token].tolist() == [crop, row[token] % 4, column[token] % 4]
    assert (shrunk > 1) == (family == "onevision")


@pytest.mark.parametrize("size", [(60, 30), (64, 23), (23, 64), (40, 64), (60, 60), (32, 64)])
@pytest.mark.parametrize("family", ["next", "onevision"])
@torch.no_grad()
def test_the_mosaic_follows_the_unpadded_grid(family, size):
    """Sizes that lose rows or columns to unpadding: coordinates are contiguous within what is left, and in order."""
    model = tiny(family)
    spy, seen = watched(Everything)
    with vlmslim.patch(model, spy):
        model(**batch(model, [[BOS, Picture(0, size), 5]]))
    component, row, column = seen[0][0].mosaic.unbind(1)
    tiles = component == 1
    height, width = row[tiles].unique(), column[tiles].unique()
    assert (height.diff() == 1).all() and (width.diff() == 1).all()
    assert torch.equal(row[tiles], height.repeat_interleave(len(width)))
    assert torch.equal(column[tiles], width.repeat(len(height)))
    assert int((component < 0).sum()) == len(height), "one newline ends each row"


@pytest.mark.parametrize("family", ["next", "onevision"])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_on_every_size(family, name):
    """In a batch as alone, with what was asked for, and nothing changed if everything is kept."""
    model = anyres(family)
    method = registered(name, 7)
    vlmslim.patch(model, method).remove()
    summary = check_a_batch_is_its_rows(model, ROWS, method, inputs_of)
    if method.stages()[0].acts_before_llm:
        assert summary["kept"] == summary["requested"] == 7
    check_changes_nothing(model, inputs_of(model, ROWS), keeping_everything(name))


@pytest.mark.parametrize("family", ["next", "onevision"])
@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_every_budget_is_met_on_every_size(family, name):
    model = anyres(family)
    inputs = inputs_of(model, ROWS)
    for keep in (1, 14, 0.55, 0.95):
        with vlmslim.patch(model, name, keep=keep) as slim:
            logits = model(**inputs).logits
        summary = slim.receipt.summary()
        assert logits.isfinite().all()
        assert summary["kept"] == summary["requested"] or not slim.stages[0].acts_before_llm


@pytest.mark.parametrize("newline", ["pool", "drop", "rows"])
@pytest.mark.parametrize("name", ["divprune", "todre"])
@pytest.mark.parametrize("family", ["next", "onevision"])
@torch.no_grad()
def test_newlines_of_cut_and_shrunken_mosaics(family, name, newline):
    model = anyres(family)
    cls = method_class(name)
    spy, seen = watched(cls if name == "divprune" else cls.__mro__[1], keep=14, newline=newline)
    with vlmslim.patch(model, spy):
        model(**inputs_of(model, ROWS))
    for image, result in seen:
        index = result.index
        assert len(index.unique()) == 14
        component, row, _ = image.mosaic.unbind(1)
        ends = (component < 0).nonzero()[:, 0].tolist()
        kept = [i for i, end in enumerate(ends) if end in index]
        if newline == "drop":
            assert not kept
        elif newline == "pool":
            assert len(kept) <= 1 or name == "todre", "alike, so the farthest is never a second one"
        else:
            lines = row[component == 1].unique().tolist()
            alive = {lines.index(r) for r in row[index[component[index] == 1]].tolist()}
            assert len(alive) - len(kept) in (0, 1), "the budget may end between the last row and its newline"
            assert set(kept) <= alive


@pytest.mark.parametrize(
    "method",
    [
        {"method": "divprune", "keep": 9},
        {"method": "bipartite_merge", "keep": 0.5, "newline": "extra"},
        {"method": "tokenflex", "keep": 0.3, "weights": "pool"},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["next", "onevision"])
def test_servers_know_the_count_of_a_picture_of_any_shape(family, method):
    """Two pictures in a prompt have no tiles in OneVision, which shrinks large mosaics too."""
    model = anyres(family)
    rows = [*ROWS, [BOS, SIZES[0], 5, SIZES[1], 6]]
    check_count(model, method, inputs_of(model, rows))
