"""blind: the language model sees the text of the prompt and nothing else."""

import pytest
import torch
from compare import close, greedy
from prompts import LONG_ROWS, ROWS, SEVERAL, all_visual, batch
from tiny import tiny
from unpatched import reference

import vlmslim


@pytest.mark.parametrize("positions", ["renumbered", "original"])
@torch.no_grad()
def test_the_text_alone_is_read(family, positions):
    model = tiny(family)
    for row in (*ROWS, *SEVERAL):
        inputs = batch(model, [row])
        kept = (~all_visual(inputs)).nonzero()[:, 0]
        want = reference(model, inputs, kept, positions=positions)
        with vlmslim.patch(model, "blind", positions=positions) as slim:
            close(model(**inputs).logits[0, kept], want.logits())
        assert slim.receipt.kept.range == [0, 0] and slim.receipt.had_effect


@torch.no_grad()
def test_a_batch_answers_as_its_rows(family):
    model = tiny(family)
    with vlmslim.patch(model, "blind"):
        together = greedy(model, batch(model, LONG_ROWS))[1]
        for i, row in enumerate(LONG_ROWS):
            close(together[i], greedy(model, batch(model, [row]))[1][0], 1e-3)
