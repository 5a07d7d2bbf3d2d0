"""Checks of a method's answers: every slip gets a sentence that names the method, the answer and what to return."""

import pytest
import torch
from prompts import Picture, batch, words
from tiny import BOS, IMAGE, tiny

import vlmslim
from vlmslim import Compressed, Compressor, ScoreAndKeep
from vlmslim.compressor import Retained

#: a batch with two images of 16 tokens, each of 32 numbers
ROWS = [[BOS, Picture(0), *words(0, 5)], [BOS, *words(1, 3), Picture(1), *words(2, 4)]]


def one_by_one(answer, positions="renumbered") -> Compressor:
    """A method whose `compress` returns `answer(image)`."""

    class Norm(Compressor):
        def compress(self, image):
            return answer(image)

    Norm.positions = positions
    return Norm()


def encoding(answer) -> Compressor:
    """A method whose `encode` returns `answer(image)`, and whose `compress` sends it."""

    class Norm(Compressor):
        def encode(self, image):
            return answer(image)

        def compress(self, image):
            return image.encoded

    return Norm()


def together(answer) -> Compressor:
    """A method whose `compress_images` returns `answer(images)`."""

    class Norm(Compressor):
        def compress_images(self, images):
            return answer(images)

    return Norm()


def between(answer, **methods) -> Compressor:
    """A method whose `retain` returns `answer(tokens)`."""

    class Norm(Compressor):
        layers = (2,)

        def retain(self, tokens):
            return answer(tokens)

    for name, method in methods.items():
        setattr(Norm, name, method)
    return Norm()


def scored(answer, keep=4) -> Compressor:
    """A method whose `score` returns `answer(image)`."""

    class Norm(ScoreAndKeep):
        def score(self, image):
            return answer(image)

    return Norm(keep)


def first(k, shape=32, dtype=torch.float32):
    return torch.zeros(k, shape, dtype=dtype)


AT = torch.arange(4)

FAULTS = {
    # what `compress` returns
    "a tensor": (
        one_by_one(lambda image: image.features[:4]),
        r"Norm.compress returned a Tensor \(4, 32\) of float32: return image.pick\(index\), or Compressed\(features\)",
    ),
    "None": (one_by_one(lambda image: None), r"Norm.compress returned None: return image.pick\(index\)"),
    "a list": (one_by_one(lambda image: [0, 1]), r"Norm.compress returned a list: return image.pick\(index\)"),
    "nothing inside": (one_by_one(lambda image: Compressed(None)), r"Norm.compress returned Compressed\(None, None\)"),
    # what `encode` returns
    "features of its own": (
        encoding(lambda image: first(4)),
        r"Norm.encode returned a Tensor .* without features: return Compressed\(features, into=...\), or None to let",
    ),
    "tokens of the model": (
        encoding(lambda image: image.pick(AT)),
        "Norm.encode returned a Compressed without features",
    ),
    "an encoding of another width": (
        encoding(lambda image: Compressed(first(4, 8))),
        r"Norm.encode returned features of shape \(4, 8\)",
    ),
    # what `compress_images` returns
    "one Compressed for all": (
        together(lambda images: images[0].pick(AT)),
        "Norm.compress_images returned a Compressed: return a list with one Compressed for each of the images",
    ),
    "None for all": (together(lambda images: None), "Norm.compress_images returned None: return a list"),
    "a generator": (together(lambda images: (x.pick(AT) for x in images)), "returned a generator: return a list"),
    "too few results": (together(lambda images: [images[0].pick(AT)]), "returned 1 results for 2 images: return one"),
    "tensors in the list": (
        together(lambda images: [image.features[:4] for image in images]),
        r"Norm.compress_images returned a Tensor \(4, 32\) of float32: return image.pick",
    ),
    # indices
    "a boolean mask": (
        one_by_one(lambda image: image.pick(torch.arange(16) % 2 == 0)),
        r"a mask for an index, a Tensor \(16,\) of bool: return image.pick\(mask.nonzero\(\)\[:, 0\]\)",
    ),
    "a mask of bytes": (one_by_one(lambda image: image.pick(torch.ones(16).byte())), "a mask for an index.*uint8"),
    "a mask of whole numbers": (
        one_by_one(lambda image: image.pick(torch.arange(16) % 2)),
        r"Norm returned 16 positions, all 0 or 1, for image 0 .* return image.pick\(mask.nonzero\(\)\[:, 0\]\)",
    ),
    "an array": (one_by_one(lambda image: image.pick(AT.numpy())), r"a NumPy array \(4,\) of int64 for an index"),
    "a sparse index": (one_by_one(lambda image: image.pick(AT.to_sparse())), "of sparse_coo int64 for an index"),
    "a list of positions": (one_by_one(lambda image: image.pick([0, 1])), "returned a list for an index: give the pos"),
    "numbers with a point": (one_by_one(lambda image: image.pick(torch.ones(3))), "of float32 for an index"),
    "a table of positions": (
        one_by_one(lambda image: image.pick(AT[:, None])),
        r"a Tensor \(4, 1\) of int64 for an in",
    ),
    "a single position": (one_by_one(lambda image: image.pick(AT[0])), r"a Tensor \(\) of int64 for an index"),
    "a position twice": (
        one_by_one(lambda image: image.pick(torch.tensor([1, 1, 2]))),
        "Norm returned 3 tokens for 2 distinct positions of image 0 of this batch: keep each position once",
    ),
    "a slot twice": (
        one_by_one(lambda image: Compressed(image.features[:3], torch.tensor([1, 1, 2]))),
        "Norm returned 3 tokens for 2 distinct positions of image 0",
    ),
    "a token of the next image": (
        one_by_one(lambda image: image.pick(torch.tensor([0, 16]))),
        "Norm keeps token 16 of image 0 of this batch, which has 16: .*use 0 .. 15",
    ),
    "a negative position": (one_by_one(lambda image: image.pick(torch.tensor([-1, 0]))), "keeps token -1 of image 0"),
    "a slot of the next image": (
        one_by_one(lambda image: Compressed(image.features[:2], torch.tensor([0, 99]))),
        "Norm keeps token 99 of image 0",
    ),
    "a fault in the second image": (
        together(lambda images: [images[0].pick(AT), images[1].pick(AT + 14)]),
        "Norm keeps token 16 of image 1 of this batch",
    ),
    # counts
    "no token": (
        one_by_one(lambda image: image.pick(AT[:0])),
        "Norm.compress returned no token of image 0.*at least one",
    ),
    "no features": (one_by_one(lambda image: Compressed(first(0))), "no token of image 0 of this batch, which has 16"),
    "too many tokens": (
        one_by_one(lambda image: Compressed(first(17))),
        "17 tokens for image 0 of this batch, which has 16",
    ),
    "more positions than tokens": (one_by_one(lambda image: image.pick(torch.arange(17))), "17 tokens for image 0"),
    "fewer slots than tokens": (one_by_one(lambda image: Compressed(first(5), AT)), "5 tokens with an index of 4"),
    "no slots, but original positions": (
        one_by_one(lambda image: Compressed(first(5)), positions="original"),
        r"5 tokens for image 0 .* without saying which slots they take: .*or set positions='renumbered'",
    ),
    # features
    "another width": (
        one_by_one(lambda image: Compressed(first(4, 16))),
        r"features of shape \(4, 16\): give \(k, 32\)",
    ),
    "one more axis": (one_by_one(lambda image: Compressed(first(4)[None])), r"features of shape \(1, 4, 32\)"),
    "whole numbers": (
        one_by_one(lambda image: Compressed(first(4, dtype=torch.long))),
        r"a Tensor \(4, 32\) of int64 for features: give a tensor \(k, 32\) of floating-point numbers",
    ),
    "a list of features": (one_by_one(lambda image: Compressed([first(1)])), "a list for features"),
    # scores
    "scores of each channel": (
        scored(lambda image: image.features),
        r"Norm.score returned a Tensor \(16, 32\) of float32: return a tensor of shape \(16,\), a number for each",
    ),
    "a score": (scored(lambda image: 3.0), "Norm.score returned a float: return a tensor"),
    "no score": (scored(lambda image: None), "Norm.score returned None: return a tensor"),
    "an array of scores": (scored(lambda image: image.features[:, 0].numpy()), r"returned a NumPy array \(16,\) of fl"),
    # numbers without a meaning
    "features that are not finite": (
        one_by_one(lambda image: Compressed(image.features[:4] / 0)),
        "Norm gave image 0 of this batch tokens that are not finite: look for a division by zero",
    ),
    "sizes of zero": (
        one_by_one(lambda image: Compressed(image.features[:4], AT, size=AT)),
        "Norm gave image 0 of this batch sizes that are not positive",
    ),
    "scores before the language model that are NaN": (
        scored(lambda image: torch.where(torch.arange(16) == 3, torch.nan, 1.0)),
        "Norm gave image 0 of this batch scores that are NaN, which have no rank: give each token a number",
    ),
    "scores between layers that are NaN": (
        between(lambda tokens: tokens.top(tokens.hidden.norm(dim=-1) * torch.nan, 4)),
        "Norm gave row 0 of this batch scores that are NaN",
    ),
    "scores of one row": (
        between(lambda tokens: tokens.top(tokens.hidden[0].norm(dim=-1), 4)),
        r"top\(score, keep\) was given a Tensor \(24,\) of float32 for scores: .* \(B, S\), here \(2, 24\)",
    ),
    "states that are NaN": (
        between(lambda tokens: Retained(tokens.mask, tokens.hidden * torch.nan)),
        "Norm gave row 0 of this batch states that are not finite",
    ),
    # what `retain` returns
    "scores": (
        between(lambda tokens: tokens.hidden.norm(dim=-1)),
        r"Norm.retain returned a Tensor \(2, \d+\) of float32, which look like scores: return a bool mask \(B, S\), "
        r"here \(2, \d+\), True at the tokens that stay, such as tokens.top\(score, keep\)",
    ),
    "whole numbers for a mask": (
        between(lambda tokens: tokens.image),
        r"Norm.retain returned a Tensor .* of int64: return",
    ),
    "another shape": (
        between(lambda tokens: tokens.mask[:, :5]),
        r"Norm.retain returned a Tensor \(2, 5\) of bool: return",
    ),
    "one row": (
        between(lambda tokens: tokens.mask[0]),
        r"Norm.retain returned a Tensor \(\d+,\) of bool: return a bool",
    ),
    "nothing": (between(lambda tokens: None), r"Norm.retain returned None: return a bool mask \(B, S\)"),
    "lists": (between(lambda tokens: tokens.mask.tolist()), "Norm.retain returned a list: return a bool mask"),
    "states changed in place": (
        between(lambda tokens: tokens.hidden.sub_(1).isfinite().all(-1)),
        r"Norm.retain changed tokens.hidden in place: work on a copy; .* return Retained\(keep, hidden\)",
    ),
    "a mask changed in place": (
        between(lambda tokens: tokens.mask.logical_and_(tokens.image == 0)),
        "Norm.retain changed tokens.mask in place",
    ),
    # what `soft_retain` returns
    "a hard mask": (
        between(lambda tokens: tokens.mask, soft_retain=lambda self, tokens: tokens.mask),
        r"Norm.soft_retain returned a Tensor .* of bool: return weights \(B, S\) in .*or None outside of training",
    ),
    "weights of another shape": (
        between(lambda tokens: tokens.mask, soft_retain=lambda self, tokens: tokens.hidden),
        "Norm.soft_retain returned a Tensor .* of float32: return weights",
    ),
}


@pytest.mark.parametrize("slip", FAULTS)
@torch.no_grad()
def test_a_slip_is_told_in_a_sentence(slip):
    method, says = FAULTS[slip]
    model = tiny("llava")
    inputs = batch(model, ROWS)
    plain = model(**inputs).logits
    with vlmslim.patch(model, method), pytest.raises(ValueError, match=says) as told:
        model(**inputs)
    assert "\n" not in str(told.value)
    assert torch.equal(model(**inputs).logits, plain), "the model is as it was"


@pytest.mark.parametrize(
    "answer",
    [
        lambda image: image.pick(AT.int()),
        lambda image: image.pick(AT.flip(0)),
        lambda image: Compressed(image.features[:4].double(), AT),
        lambda image: Compressed(image.features, None),
        lambda image: Compressed(image.features[AT.flip(0)], AT.flip(0)),
    ],
)
@torch.no_grad()
def test_what_is_odd_but_clear_is_accepted(answer):
    model = tiny("llava")
    with vlmslim.patch(model, one_by_one(answer)) as slim:
        assert model(**batch(model, ROWS)).logits.isfinite().all()
    assert slim.receipt.kept.count == 2


@torch.no_grad()
def test_a_tuple_of_results_is_accepted():
    model = tiny("llava")
    with vlmslim.patch(model, together(lambda images: tuple(image.pick(AT) for image in images))) as slim:
        model(**batch(model, ROWS))
    assert slim.receipt.kept.range == [4, 4]


@torch.no_grad()
def test_text_and_padding_stay_whatever_a_mask_says():
    model = tiny("llava")
    inputs = batch(model, ROWS)
    text = [int(n) for n in ((inputs["input_ids"] != IMAGE) & inputs["attention_mask"].bool()).sum(1)]
    with vlmslim.patch(model, between(lambda tokens: torch.zeros_like(tokens.mask))) as slim:
        model(**inputs)
    last = slim.receipt.last
    assert last.text == text and last.visual[2:] == [[0, 0], [0, 0]]
    assert last.sequence == [*last.sequence[:2], max(text), max(text)]


@torch.no_grad()
def test_score_and_keep_keeps_the_best(family):
    model = tiny(family)
    with vlmslim.patch(
        model,
        [
            scored(lambda image: image.features.norm(dim=-1), 3),
            between(lambda tokens: seen.append(tokens) or tokens.mask),
        ],
    ):
        seen = []
        model(**batch(model, ROWS))
    ((tokens,),) = [seen]
    for row, (image,) in enumerate(tokens.images):
        norms = image.features.norm(dim=-1).tolist()
        best = sorted(sorted(range(len(norms)), key=lambda i: (-norms[i], i))[:3])
        assert tokens.slot[row][tokens.image[row] > 0].tolist() == best


@torch.no_grad()
def test_equal_scores_go_to_the_lower_index():
    same = scored(lambda image: torch.zeros(len(image.features)), keep=7)
    image = vlmslim.ImageTokens(torch.zeros(40, 2), torch.zeros(1, 40, 1), torch.zeros(1, 3, 2, 2))
    assert same.compress(image).index.tolist() == list(range(7))
    assert type(same)().compress(image).index.tolist() == list(range(10)), "a quarter by default"


@pytest.mark.parametrize("keep", [0, -1, 1.5, True, "many"])
def test_score_and_keep_refuses_budgets_that_mean_nothing(keep):
    with pytest.raises(ValueError, match="keep="):
        scored(None, keep)
