"""blind: the language model sees the text of the prompt and nothing else."""

import pytest
import torch
from compare import close
from prompts import ROWS, SEVERAL, all_visual, batch
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
