"""Pictures of kept tokens: what is drawn is what the receipt counted, on the pixels that the model saw."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import zoo
from doubles import Both, PairMean, Stairs, Strided, watched
from PIL import Image
from prompts import LONG_ROWS, SEVERAL, Clip, Picture, batch, words
from tiny import BOS, tiny
from transformers import PixtralImageProcessor, Qwen2VLImageProcessor

import vlmslim
from vlmslim.compressor import Compressed, Compressor
from vlmslim.engine.families import FAMILIES
from vlmslim.methods.bipartite_merge import BipartiteMerge, destinations, merge_tokens
from vlmslim.methods.globalcom2 import GlobalCom2
from vlmslim.methods.hiprune import HiPrune
from vlmslim.methods.holov import HoloV
from vlmslim.methods.pool import Pool
from vlmslim.methods.prunesid import PruneSID
from vlmslim.methods.sparsevlm import SparseVLM, clusters
from vlmslim.methods.tokencorr import TokenCorr
from vlmslim.methods.tokenflex import TokenFlex
from vlmslim.methods.visionzip import VisionZip
from vlmslim.pictures.canvas import Canvas, pictures_of
from vlmslim.pictures.draw import Panel, kept, panels, sheet
from vlmslim.pictures.trace import Cut

DARK, MARK, BLANK = 51, 90, 255  # of a patch in these tests; of a token without a place; of no token at all
PLAIN = SimpleNamespace(image_processor=SimpleNamespace(image_mean=[0.0] * 3, image_std=[1.0] * 3))


def faded(grey: int) -> int:
    return round(200 + 40 / 255 * (grey - 200))


def dark(inputs: dict) -> dict:
    """The same prompts with pictures of one dark grey; padding stays zero."""
    return {name: torch.where(x == 0, x, 0.2) if "pixel_values" in name else x for name, x in inputs.items()}


def shares(picture: Image.Image) -> tuple[float, int, int]:
    """The clear part of the patches of a picture, and how many tokens without a place are clear and faded."""
    grey = np.asarray(picture)[..., 0]
    count = {value: int((grey == value).sum()) for value in (DARK, faded(DARK), MARK, faded(MARK))}
    assert sum(count.values()) + int((grey == BLANK).sum()) == grey.size, "a colour that means nothing"
    patches = count[DARK] + count[faded(DARK)]
    return count[DARK] / patches, count[MARK] // 49, count[faded(MARK)] // 49


def check_drawn(model, inputs: dict, method) -> None:
    """The clear tokens of every picture of every layer are as many as the receipt counted, and where the method left
    them."""
    with vlmslim.patch(model, method, record="tokens") as slim, torch.no_grad():
        model(**inputs)
    last = slim.receipt.last
    for layer, counted in enumerate(last.visual):
        for row, traces in enumerate(last.traces):
            drawn = 0
            for trace in traces:
                part, marks, faded_marks = shares(kept(trace, PLAIN, layer, 48))
                placeless = int((trace.grid < 0).any(1).sum())
                assert marks + faded_marks == placeless
                placed = len(trace.grid) - placeless
                assert (part * placed) == pytest.approx(round(part * placed))
                drawn += round(part * placed) + marks
            assert drawn == counted[row]


@pytest.mark.parametrize("method", [Strided(), Stairs(), Both()], ids=str)
def test_as_many_tokens_are_clear_as_the_receipt_counted(family, method):
    model = tiny(family)
    check_drawn(model, dark(batch(model, [*LONG_ROWS, SEVERAL[0]])), method)


def test_frames_of_a_video():
    model = tiny("onevision")
    check_drawn(model, dark(batch(model, [[BOS, Clip(0, 3), *words(0, 4), Picture(1), 5]])), Both())


@pytest.mark.parametrize("name", zoo.ZOO)
def test_every_family(name):
    model = zoo.build(name)
    rows = zoo.film(name) if FAMILIES[name].video else zoo.SEVERAL
    check_drawn(model, dark(zoo.batch(name, model, rows)), Both())


def test_the_clear_patches_are_those_of_the_method():
    model = tiny("llava")
    with vlmslim.patch(model, Both(), record="tokens") as slim, torch.no_grad():
        model(**dark(batch(model, [LONG_ROWS[0]])))
    chosen = range(
        0, 16, 2
    )  # of `Both`, before the language model; before layers 2 and 3 the last half of what is left
    for layer, slots in [(0, chosen), (1, chosen), (2, chosen[4:]), (3, chosen[6:]), (-1, chosen[6:])]:
        grey = np.asarray(kept(slim.receipt.last.traces[0][0], PLAIN, layer, 32))[4::8, 4::8, 0]
        assert np.flatnonzero(grey == DARK).tolist() == list(slots)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "glm4v", "mistral3"])
@torch.no_grad()
def test_the_pixels_are_those_that_the_processor_made(name):
    """Patches that stand in the order of tokens, or beside padding, become the picture again."""
    model = zoo.build(name)
    inputs = zoo.batch(name, model, zoo.SEVERAL)
    pictures = [
        Image.fromarray(np.random.default_rng(pic.seed).integers(0, 256, (pic.height, pic.width, 3), np.uint8))
        for row in zoo.SEVERAL
        for pic in row
        if isinstance(pic, zoo.Pic)
    ]
    if name == "mistral3":
        how = PixtralImageProcessor(patch_size=8, size={"longest_edge": 64})
    else:
        how = Qwen2VLImageProcessor(patch_size=4, min_pixels=1, max_pixels=10**6)
    made = how(images=pictures, return_tensors="pt")["pixel_values"]
    if name == "mistral3":
        made = torch.nn.functional.pad(made, (0, 64 - made.shape[3], 0, 64 - made.shape[2]))
    assert made.shape == inputs["pixel_values"].shape
    with vlmslim.patch(model, "none", record="tokens") as slim:
        model(**inputs | {"pixel_values": made})
    traces = [trace for row in slim.receipt.last.traces for trace in row]
    for trace, picture in zip(traces, pictures, strict=True):
        (view,) = pictures_of(trace, SimpleNamespace(image_processor=how))
        assert np.abs(view.astype(int) - np.asarray(picture)).max() <= 1


def test_where_merged_tokens_went():
    """Merging the rows of an identity matrix shows in each merged row which tokens went into it."""
    for n, k in [(16, 9), (16, 8), (17, 3), (12, 12)]:
        steps: list = []
        metric = torch.randn(2, n, 5)
        merged, _ = merge_tokens(torch.eye(n).expand(2, n, n), metric, k, steps)
        into = destinations(n, steps).expand(2, n)
        assert torch.equal(merged > 0, into[:, None] == torch.arange(k)[:, None])


@pytest.mark.parametrize(
    "cls, options", [(Pool, {}), (BipartiteMerge, {"keep": 0.5}), (VisionZip, {"contextual": 0.5})]
)
@torch.no_grad()
def test_merged_tokens_are_means_of_the_patches_drawn(cls, options):
    """On OneVision, which merges what the language model would read."""
    model = tiny("onevision")
    spy, seen = watched(cls, **{"keep": 7} | options)
    with vlmslim.patch(model, spy, record="tokens") as slim:
        model(**batch(model, [*LONG_ROWS[:2], SEVERAL[0]]))
    traces = [trace for row in slim.receipt.last.traces for trace in row]
    assert any(trace.cuts[0].merged for trace in traces)
    for (image, sent), trace in zip(seen, traces, strict=True):
        into = torch.from_numpy(trace.cuts[0].into)
        size = into[into >= 0].bincount(minlength=len(sent))
        members = torch.stack([image.features[into == j].mean(0) for j in range(len(sent))])
        plain = size <= 2 if cls is BipartiteMerge else size > 0  # of more tokens it takes means of means
        torch.testing.assert_close(sent.vectors(image)[plain], members[plain])
        for panel in panels(trace, PLAIN):
            assert panel.picture.width > 100


SHARING = [(TokenFlex, {"keep": 0.6, "weights": "pool"}), (TokenCorr, {"keep": 0.4, "merge": "knn", "neighbours": 3})]


@pytest.mark.parametrize("cls, options", SHARING)
@torch.no_grad()
def test_tokens_that_share_patches_are_the_sums_drawn(cls, options):
    model = tiny("llava")
    spy, seen = watched(cls, **options)
    with vlmslim.patch(model, spy, record="tokens") as slim:
        model(**batch(model, LONG_ROWS[:1]))
    ((image, sent),) = seen
    (cut,) = slim.receipt.last.traces[0][0].cuts
    made_of = torch.from_numpy(cut.made_of)
    assert ((made_of > 0).sum(0) > 1).any()
    torch.testing.assert_close(sent.vectors(image), image.project(made_of @ image.tower_tokens))
    largest = (made_of / made_of.sum(1, keepdim=True)).argmax(0)
    assert (torch.from_numpy(cut.into) == torch.where((made_of > 0).any(0), largest, -1)).all()


@pytest.mark.parametrize("cls, options", SHARING)
@torch.no_grad()
def test_every_shared_token_has_its_place(family, cls, options):
    """Anyres mosaics with padding cut away, newlines, several images; on OneVision a video, too."""
    model = tiny(family)
    rows = [*LONG_ROWS, SEVERAL[0]] + [[BOS, Clip(0, 3), 5]] * (family == "onevision")
    spy, seen = watched(cls, **options)
    with vlmslim.patch(model, [spy, vlmslim.method("fastv", keep=0.5, layer=2)], record="tokens") as slim:
        model(**batch(model, rows))
    last = slim.receipt.last
    for row, traces in enumerate(last.traces):
        for layer in (0, 2):
            shown = [len(np.unique(cut.into[cut.shown])) for cut in (trace.at(layer) for trace in traces)]
            assert sum(shown) <= last.visual[layer][row] and (layer or sum(shown) == last.visual[layer][row])
        for trace in traces:
            found = [panel.title.rpartition(": ")[2] for panel in panels(trace, PLAIN)]
            assert ("parts" in found) == any(cut.made_of is not None for cut in trace.cuts)


@pytest.mark.parametrize("mode", ["corrected", "released"])
@torch.no_grad()
def test_tokens_that_merge_between_layers(mode):
    model = tiny("llava")
    drawn = []
    for recycle in (True, False):
        method = SparseVLM(keep=None, layer=(1, 3), counts=(8, 3), mode=mode, recycle=recycle)
        with vlmslim.patch(model, method, record="tokens") as slim:
            model(**batch(model, LONG_ROWS))
        last = slim.receipt.last
        for row, traces in enumerate(last.traces):
            for trace in traces:
                for cut in trace.cuts:
                    assert len(np.unique(cut.into[cut.shown])) == cut.count == last.visual[cut.first][row]
        drawn.append(last.traces[0][0].cuts)
    (_, first, second), (_, alone, _) = drawn
    of, into = clusters(16 - 8)
    sizes = np.bincount(first.into[first.shown])
    assert first.count == 8 + into and sizes.sum() == 8 + of and (sizes > 1).sum() <= into
    assert second.merged and set(np.flatnonzero(alone.shown)) <= set(np.flatnonzero(first.shown))


@pytest.mark.parametrize("cls", [VisionZip, PruneSID, HoloV, GlobalCom2, HiPrune])
@torch.no_grad()
def test_what_a_release_sends_is_drawn(cls):
    """Its tokens stand in an order of their own, and some hold no patch of the picture: CLS tokens and padding."""
    model = tiny("next")
    spy, seen = watched(cls, mode="released", keep=0.5)
    with vlmslim.patch(model, spy, record="tokens") as slim:
        model(**batch(model, [LONG_ROWS[0], SEVERAL[0]]))
    cuts = [trace.cuts[0] for row in slim.receipt.last.traces for trace in row]
    for (image, sent), cut in zip(seen, cuts, strict=True):
        made_of = sent.made_of()
        single = ((made_of > 0).sum(1) == 1) & (made_of.sum(1) == 1)
        torch.testing.assert_close(sent.vectors(image)[single], (made_of @ image.features)[single])
        shown = len(np.unique(cut.into[cut.shown]))
        assert cut.count == len(sent) == shown + cut.nowhere and 2 * cut.nowhere < cut.count


@torch.no_grad()
def test_tokens_of_a_shrunk_picture_cover_it():
    model = tiny("llava")
    with vlmslim.patch(model, "downsample", keep=4, record="tokens") as slim:
        model(**batch(model, [LONG_ROWS[0]]))
    (cut,) = slim.receipt.last.traces[0][0].cuts
    assert cut.into.reshape(4, 4).tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]


def test_scores_are_shown_where_the_method_has_them():
    model = tiny("llava")
    inputs = dark(batch(model, LONG_ROWS))
    for method, count in [("divprune", 2), ("fastv", 3), ("random", 2), ("vispruner", 3)]:
        with vlmslim.patch(model, method, keep=5, record="tokens") as slim, torch.no_grad():
            model(**inputs)
        found = panels(slim.receipt.last.traces[0][0], PLAIN)
        assert len(found) == count, [panel.title for panel in found]
        assert found[-1].title == f"{method}: 5 of 16"


def test_nothing_is_kept_unless_asked():
    @torch.no_grad()
    def run(**options):
        model = tiny("llava")
        with vlmslim.patch(model, Silent(), **options) as slim:
            model(**batch(model, LONG_ROWS))
        return slim

    class Silent(Compressor):
        def compress(self, image):
            return Compressed(image.features[:5], torch.arange(5), into=lambda: torch.full((3,), 0))

    slim = run()
    assert slim.receipt.last.traces is None
    with pytest.raises(RuntimeError, match='record="tokens"'):
        slim.picture(PLAIN)
    with pytest.raises(ValueError, match=r"Compressed.into of shape \(3,\): return \(16,\)"):
        run(record="tokens")
    Silent.compress = lambda self, image: Compressed(image.features[:5], made_of=lambda: torch.ones(16, 5))
    with pytest.raises(ValueError, match=r"Compressed.made_of of shape \(16, 5\): return \(5, 16\)"):
        run(record="tokens")


def test_mistakes_get_a_sentence():
    model = tiny("llava")
    with pytest.raises(ValueError, match="record='all': give 'tokens'"):
        vlmslim.patch(model, "none", record="all")
    with vlmslim.patch(model, PairMean(), record="tokens") as slim:
        with torch.no_grad():
            model(**batch(model, LONG_ROWS))
        with pytest.raises(ValueError, match="pairmean does not say which patches it made its tokens of"):
            slim.picture(PLAIN)
        with pytest.raises(ValueError, match="AutoProcessor.from_pretrained"):
            slim.picture()
        with pytest.raises(ValueError, match=r"in these prompts of its batch: \[0, 1, 3\]"):
            slim.picture(PLAIN, row=2)
        with pytest.raises(ValueError, match="layer=4: the language model has 4 decoder layers"):
            slim.picture(PLAIN, layer=4)


def test_cells_of_a_shrunk_mosaic_show_the_nearest_token():
    """A OneVision that shrinks mosaics: every cell of the mosaic has a token, though there are fewer of them."""
    model = tiny("onevision")
    model.config.vision_aspect_ratio = model.model.config.vision_aspect_ratio = "anyres_max_1"
    with torch.no_grad():
        output = model.model.get_image_features(torch.zeros(1, 5, 3, 32, 32), torch.tensor([[64, 64]]))
        n = len(output.pooler_output[0])
        ids = torch.tensor([[1, *[99] * n, 5]])
        with vlmslim.patch(model, "none", record="tokens") as slim:
            model(input_ids=ids, pixel_values=torch.zeros(1, 5, 3, 32, 32), image_sizes=torch.tensor([[64, 64]]))
    (trace,) = slim.receipt.last.traces[0]
    assert n < 16 + 64
    token = Canvas.of(trace, PLAIN, 32).token
    assert set(np.unique(token)) - {-2} == set(range(n))


def test_order_of_scores():
    """One huge score hides no others, equal scores look alike, and a token without a score has no place."""
    score = np.array([5.0, 1e30, -2.0, 5.0, np.nan, -np.inf])
    rank = Cut(0, "any", 3, None, score).rank
    assert rank[:4].tolist() == [0.5, 1.0, 0.0, 0.5] and np.isnan(rank[4:]).all()
    assert Cut(0, "any", 3, None, np.zeros(2)).rank.tolist() == [0, 0] and Cut(0, "any", 3, None).rank is None


@pytest.mark.parametrize("text", ["two\nlines\x07 and a bell", "long " * 400, "x" * 5000, ""])
def test_texts_never_leave_their_panel(text):
    picture = Image.new("RGB", (100, 50), "white")
    pixels = np.asarray(sheet([[Panel(picture, "a"), Panel(picture, text, text), Panel(picture, "c")]]))
    assert pixels.shape[0] < 300 and pixels.shape[1] == 3 * 100 + 4 * 16
    assert (pixels[:, [*range(118, 130), *range(234, 246)]] == 255).all(), "the gaps beside the panel stay empty"
