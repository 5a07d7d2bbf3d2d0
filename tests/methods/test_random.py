"""`random` draws by seed and pixels."""

import torch
from prompts import Picture, batch, words
from tiny import BOS, tiny

import vlmslim
from vlmslim.methods.random import Random


@torch.no_grad()
def test_the_draw_follows_the_seed_and_the_image(family):
    model = tiny(family)

    def kept(rows: list, seed: int) -> list[list[int]]:
        seen = []

        class Spy(Random):
            def compress(self, image):
                result = super().compress(image)
                seen.append(result.index.tolist())
                return result

        with vlmslim.patch(model, Spy(keep=5, seed=seed)):
            model(**batch(model, rows))
        return seen

    rows = [[BOS, Picture(i), *words(i, 3)] for i in range(4)]
    together = kept(rows, 0)
    assert together == kept(rows, 0)
    assert together != kept(rows, 1)
    assert together == [kept([row], 0)[0] for row in rows]
    assert together[::-1] == kept(rows[::-1], 0)
    assert len({tuple(index) for index in together}) == 4, "every image lost the same tokens"
