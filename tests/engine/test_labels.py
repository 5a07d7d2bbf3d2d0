"""Plain forward with labels: losses, gradients and log-likelihoods of the shortened row, in the caller's shapes."""

import pytest
import torch
from compare import close
from doubles import RULES, Both, BothOriginal, Stairs, Strided, StridedOriginal, expect, name_of
from prompts import LONG_ROWS, SEVERAL, Picture, batch, words
from tiny import BOS, IMAGE, tiny
from torch.nn import functional as F

import vlmslim

IGNORE = -100


def labels_for(inputs: dict) -> torch.Tensor:
    """Every real text token but a row's first is a target: the first one after an image included."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    return ids.masked_fill((mask == 0) | (ids == IMAGE) | (mask.cumsum(1) == 1), IGNORE)


def short_loss(references: list, rows: list, model) -> torch.Tensor:
    """Cross-entropy summed over the shortened rows by hand, divided by the number of targets."""
    total, count = 0, 0
    for ref, row in zip(references, rows, strict=True):
        ids = batch(model, [row])["input_ids"][0]
        alive = ref.alive()
        target = ids[ref.origin[alive]]
        target = target.masked_fill(target == IMAGE, IGNORE)
        logits = ref.logits()[alive]
        total = total + F.cross_entropy(logits[:-1], target[1:], ignore_index=IGNORE, reduction="sum")
        count += int((target[1:] != IGNORE).sum())
    return total / count


ROWS = [*LONG_ROWS, *SEVERAL]


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("rule", RULES, ids=name_of)
@torch.no_grad()
def test_loss_is_that_of_the_shortened_rows(family, backend, rule, padding):
    model = tiny(family, backend)
    references = [expect(model, row, rule) for row in ROWS]
    inputs = batch(model, ROWS, padding)
    with vlmslim.patch(model, rule):
        out = model(**inputs, labels=labels_for(inputs))
    assert out.logits.shape[:2] == inputs["input_ids"].shape
    close(out.loss, short_loss(references, ROWS, model), 1e-4)


@torch.no_grad()
def test_the_first_token_after_the_image_is_a_target(family):
    """Alone: its prediction is made by the last kept token, whose place is not the last placeholder's."""
    model = tiny(family)
    row = [BOS, Picture(0), *words(0, 4)]
    inputs = batch(model, [row])
    labels = torch.full_like(inputs["input_ids"], IGNORE)
    first = int((inputs["input_ids"][0] == IMAGE).nonzero()[-1]) + 1
    labels[0, first] = inputs["input_ids"][0, first]
    for rule in (Strided(), StridedOriginal(), Stairs(), Both()):
        logits = expect(model, row, rule).full_logits()
        with vlmslim.patch(model, rule):
            loss = model(**inputs, labels=labels).loss
        close(loss, F.cross_entropy(logits[first - 1][None], labels[0, first][None]))
        assert torch.isfinite(loss)


@pytest.mark.parametrize("rule", [Strided(), StridedOriginal(), Stairs(), BothOriginal()], ids=name_of)
def test_gradients_are_those_of_the_shortened_rows(family, backend, rule):
    model = tiny(family, backend).train()
    rows = LONG_ROWS[:3]
    short_loss([expect(model, row, rule) for row in rows], rows, model).backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    inputs = batch(model, rows)
    with vlmslim.patch(model, rule):
        model(**inputs, labels=labels_for(inputs), use_cache=False).loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert {n for n, g in wanted.items() if g.any()} == {n for n, g in found.items() if g.any()}
    for part in ("multi_modal_projector.linear_1", "language_model.layers.0", "vision_tower"):
        assert any(part in name and g.any() for name, g in found.items()), f"no gradient reaches {part}"
    for name, want in wanted.items():
        scale = want.abs().max().clamp(min=1e-3)
        torch.testing.assert_close(found[name] / scale, want / scale, rtol=1e-3, atol=1e-3, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("method", ["divprune", "fastv", "random", "uniform", "pool"])
def test_every_method_trains(family, method):
    model = tiny(family).train()
    inputs = batch(model, LONG_ROWS)
    with vlmslim.patch(model, method, keep=4):
        loss = model(**inputs, labels=labels_for(inputs)).loss
        loss.backward()
    for part in ("multi_modal_projector.linear_1.weight", "layers.0.mlp.up_proj.weight", "lm_head.weight"):
        grad = next(p.grad for name, p in model.named_parameters() if name.endswith(part))
        assert torch.isfinite(grad).all()
        assert grad.any(), f"no gradient reaches {part}"


def test_a_frozen_tower_stays_without_gradient(family):
    model = tiny(family).train()
    model.model.vision_tower.requires_grad_(False)
    model.model.language_model.requires_grad_(False)
    inputs = batch(model, LONG_ROWS)
    with vlmslim.patch(model, "divprune", keep=4):
        model(**inputs, labels=labels_for(inputs)).loss.backward()
    with_gradient = {name.split(".")[1] for name, p in model.named_parameters() if p.grad is not None}
    assert "multi_modal_projector" in with_gradient
    assert not with_gradient & {"vision_tower", "language_model"}


@pytest.mark.parametrize("rule", [Strided(), Stairs(), Both()], ids=name_of)
def test_gradient_checkpointing_gives_the_same_or_says_so(family, rule):
    model = tiny(family).train()
    inputs = batch(model, LONG_ROWS)
    labels = labels_for(inputs)

    def gradients():
        model.zero_grad()
        model(**inputs, labels=labels, use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    with vlmslim.patch(model, rule):
        wanted = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with vlmslim.patch(model, rule):
        try:
            found = gradients()
        except (NotImplementedError, RuntimeError, ValueError) as error:
            assert "checkpoint" in str(error), error
            return
    assert set(found) == set(wanted)
    for name in wanted:
        close(found[name], wanted[name])


@pytest.mark.parametrize("rule", [Strided(), StridedOriginal(), Stairs(), Both()], ids=name_of)
@torch.no_grad()
def test_log_likelihood_of_a_continuation(family, backend, rule):
    """As a harness computes it: context + continuation in one forward, the last positions sliced off."""
    model = tiny(family, backend)
    continuations = [words(20, 3), words(21, 1), words(22, 4)]
    rows = [[*row, *more] for row, more in zip(LONG_ROWS, continuations, strict=False)]
    wanted = []
    for row, more in zip(rows, continuations, strict=True):
        logits = expect(model, row, rule).logits()[-len(more) - 1 : -1]
        wanted.append(logits.log_softmax(-1).gather(1, torch.tensor(more)[:, None]).sum())
    for padding in ("left", "right"):
        inputs = batch(model, rows, padding)
        with vlmslim.patch(model, rule):
            logits = model(**inputs).logits
        for i, more in enumerate(continuations):
            real = logits[i][inputs["attention_mask"][i].bool()]
            found = real[-len(more) - 1 : -1].log_softmax(-1).gather(1, torch.tensor(more)[:, None]).sum()
            close(found, wanted[i])


@torch.no_grad()
def test_labels_with_logits_to_keep(family):
    model = tiny(family)
    inputs = batch(model, LONG_ROWS)
    with vlmslim.patch(model, Both()):
        whole = model(**inputs).logits
        for keep in (1, 5, torch.tensor([0, 3, inputs["input_ids"].shape[1] - 1])):
            part = model(**inputs, logits_to_keep=keep).logits
            index = slice(-keep, None) if isinstance(keep, int) else keep
            close(part, whole[:, index], 1e-5)
