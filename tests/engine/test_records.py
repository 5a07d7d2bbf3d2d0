"""Records of images and of decoder layers that a method is shown, against unpatched models."""

import weakref

import torch
from checks import kept_of
from compare import close
from doubles import Both, First, watched
from prompts import LONG_ROWS, ROWS, SEVERAL, Clip, Picture, batch, visual
from tiny import BOS, IMAGE, tiny
from unpatched import merged_embeddings

import vlmslim
from vlmslim.engine.families import encoder_layers


@torch.no_grad()
def test_what_a_method_is_shown(family):
    """The records' shapes, orders and contents, image by image."""
    model = tiny(family)
    rows = [*LONG_ROWS, SEVERAL[0]]
    features = [merged_embeddings(model, x)[0][place] for x in (batch(model, [r]) for r in rows) for place in visual(x)]
    texts = []
    for row in rows:
        ids = batch(model, [row])["input_ids"][0]
        texts += [ids[ids != IMAGE]] * len(visual(dict(input_ids=ids[None])))
    images, layer_inputs = [], []

    class Spy(Both):
        def compress(self, image):
            images.append(image)
            return super().compress(image)

        def retain(self, tokens):
            layer_inputs.append(tokens)
            return super().retain(tokens)

    inputs = batch(model, rows)
    with vlmslim.patch(model, Spy()):
        model(**inputs)
    assert len(images) == len(features)
    for image, want, text in zip(images, features, texts, strict=True):
        close(image.features, want, 1e-5)
        assert torch.equal(image.prompt, text)
        assert not image.video
        assert image.grid.shape == (len(want), 3)
        assert image.tower.shape[1:] == (16, 16)
        assert image.pixels.shape[0] == image.tower.shape[0]
    for tokens, layer in zip(layer_inputs, (2, 3), strict=True):
        assert tokens.layer == layer
        assert tokens.hidden.shape[:2] == tokens.mask.shape == tokens.image.shape == tokens.origin.shape
        for i, row in enumerate(rows):
            x = batch(model, [row])
            expected = [(len(p) + 1) // 2 for p in visual(x)]
            assert list(tokens.entered[i]) == expected
            ids = inputs["input_ids"][i][tokens.origin[i][tokens.mask[i]]]
            assert torch.equal(ids == IMAGE, tokens.image[i][tokens.mask[i]] > 0)
            assert int(tokens.origin[i][tokens.last[i]]) == len(inputs["input_ids"][i]) - 1
            assert not tokens.image[i][~tokens.mask[i]].any(), "padding counted as visual"


@torch.no_grad()
def test_a_method_is_shown_the_text_of_its_own_prompt(family):
    """The whole prompt with the question after the image; nothing of a neighbour's, no padding. In beams too."""
    model = tiny(family)
    inputs = batch(model, ROWS)
    for run in (model, lambda **inputs: model.generate(**inputs, num_beams=2, max_new_tokens=2)):
        spy, seen = watched(First)
        with vlmslim.patch(model, spy):
            run(**inputs)
        copies = len(seen) // len(ROWS)
        for i, (image, _) in enumerate(seen):
            assert image.prompt.tolist() == [token for token in ROWS[i // copies] if isinstance(token, int)]


@torch.no_grad()
def test_the_grid_locates_every_token(family):
    """Project the tower's features by hand at (crop, row, column): that must be the token."""
    model = tiny(family)
    rows = [*LONG_ROWS, SEVERAL[0], [BOS, Picture(9, (40, 64)), 5], [BOS, Picture(10, (64, 23)), 5]]
    spy, seen = watched(First)
    newline = getattr(model.model, "image_newline", None)
    with vlmslim.patch(model, spy):
        model(**batch(model, rows))
    for image, _ in seen:
        projected = model.model.multi_modal_projector(image.tower)
        crop, row, column = image.grid.unbind(1)
        patch = crop >= 0
        close(image.features[patch], projected[crop[patch], row[patch] * 4 + column[patch]], 1e-4)
        if (~patch).any():
            close(image.features[~patch], newline.expand(int((~patch).sum()), -1))
        assert bool((~patch).any()) == (family in ("next", "onevision"))


@torch.no_grad()
def test_the_grid_of_a_video_locates_every_token():
    model = tiny("onevision")
    _, _, ((image, _),), _ = kept_of(model, [BOS, Clip(0, 3), 5, 6], First)
    assert image.video
    frame, row, column = image.grid.unbind(1)
    assert (frame[:12].view(3, 4) == torch.arange(3)[:, None]).all()
    assert frame[12] == -1
    projected = model.model.multi_modal_projector(image.tower).view(3, 4, 4, -1)
    for token in range(12):
        r, c = int(row[token]), int(column[token])
        block = projected[frame[token], 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].mean((0, 1))
        close(image.features[token], block, 1e-4)


@torch.no_grad()
def test_hidden_states_of_the_tower_do_not_outlive_the_encoder(family):
    """They are many times the size of what the language model reads, and forward() lets go of them unpatched."""
    model = tiny(family)
    first, alive = [], []
    encoder_layers(model.model)[0].register_forward_hook(lambda m, a, out: first.append(weakref.ref(out)))
    with vlmslim.patch(model, "uniform", keep=5):
        model.model.language_model.layers[0].register_forward_pre_hook(lambda m, a: alive.append(first[0]()))
        model(**batch(model, LONG_ROWS))
    assert len(first) == 1 and alive == [None]
