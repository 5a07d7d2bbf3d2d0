"""VScan against plain loops, its views and its second stage in models."""

import pytest
import torch
from by_hand import ByHand
from checks import VIEWS, kept_of
from compare import close, greedy
from hypothesis import given
from hypothesis import strategies as st
from prompts import LONG_ROWS, Picture, batch, words
from strategies import cosine, noise, seeds, some
from tiny import BOS, DEPTH, tiny

import vlmslim
from vlmslim.methods.vscan import VScan, VScanEntrance, local_and_global, merged, windows


def plain(shallow: list, deep: list, place: list, side: int, k: int, half: int) -> list[int]:
    """Windows, local and global tokens one by one."""
    rows, columns = (max(at[axis] for at in place) + 1 for axis in (0, 1))
    down, across = max(1, rows // side), max(1, columns // side)
    window = [(min(r // side, down - 1), min(c // side, across - 1)) for r, c in place]
    room, local = -(-half // len(set(window))), []
    for i in sorted(range(len(place)), key=lambda i: (-shallow[i], i)):
        if len(local) < half and sum(window[j] == window[i] for j in local) < room:
            local.append(i)
    others = sorted((i for i in range(len(place)) if i not in local), key=lambda i: (-deep[i], i))
    return local + others[: k - len(local)]


def plain_merge(x: list, kept: list[int], group: list[int]) -> list[list[float]]:
    """Each dropped token joins the most similar kept one of its group."""
    members = {i: [x[i]] for i in kept}
    for i in range(len(x)):
        mine = [j for j in kept if group[j] == group[i] >= 0]
        if i not in kept and mine:
            members[max(mine, key=lambda j: (round(cosine(x[i], x[j]), 6), -j))].append(x[i])
    return [[sum(column) / len(members[i]) for column in zip(*members[i], strict=True)] for i in kept]


@some
@given(seeds, st.integers(1, 7), st.integers(1, 7), st.integers(1, 4), st.data())
def test_it_is_the_rule_of_windows(seed, rows, columns, side, data):
    """Attention in quarters, so that many tie."""
    n = rows * columns
    k = data.draw(st.integers(1, n))
    half = data.draw(st.integers(0, k))
    generator = torch.Generator().manual_seed(seed)
    shallow, deep = torch.randint(1, 5, (2, n), generator=generator) / 4
    place = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).view(n, 2)
    local, others = local_and_global(shallow, deep, windows(place.numpy(), side), k, half)
    got = local.tolist() + others.tolist()
    assert got == plain(shallow.tolist(), deep.tolist(), place.tolist(), side, k, half)


@some
@given(seeds, st.integers(2, 16), st.data())
def test_merging_is_a_mean_with_the_most_similar(seed, n, data):
    kept = sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1, max_size=n)))
    generator = torch.Generator().manual_seed(seed)
    x, group = noise(seed, n, 4), torch.randint(-1, 3, (n,), generator=generator)
    got, _, joined = merged(x, torch.tensor(kept), group)
    close(got, torch.tensor(plain_merge(x.tolist(), kept, group.tolist())), 1e-5)
    assert (joined >= 0).sum() == sum(i not in kept and group[i] in group[kept] and group[i] >= 0 for i in range(n))


@pytest.mark.parametrize("row", [VIEWS, [BOS, Picture(1, (60, 44)), *words(0, 4)]], ids=["full", "cut"])
@torch.no_grad()
def test_crops_are_chosen_and_merged_by_themselves(row):
    """A tile whose padding was cut off counts its windows from the first row and column that it has."""
    model = tiny("next", "eager")
    _, _, ((image, result),), _ = kept_of(model, row, VScanEntrance, keep=40, newline="drop", window=2, shallow=0)
    maps = model.model.vision_tower(image.pixels, output_attentions=True).attentions
    shallow, deep = (maps[i][:, :, 0, 1:].mean(1) for i in (0, -2))
    grid, index = image.grid.tolist(), result.index.tolist()
    for crop in range(1 + max(c for c, _, _ in grid)):
        slots = [i for i, (c, _, _) in enumerate(grid) if c == crop]
        own = [i for i in index if i in slots]
        place = [grid[i][1:] for i in slots]
        a, b = ([float(x[crop, r * 4 + c]) for r, c in place] for x in (shallow, deep))
        top, left = map(min, zip(*place, strict=True))
        want = plain(a, b, [[r - top, c - left] for r, c in place], 2, len(own), len(own) // 2)
        assert sorted(slots[i] for i in want) == own
    want = plain_merge(image.features.tolist(), index, [c for c, _, _ in grid])
    close(result.features, torch.tensor(want), 1e-4)


@torch.no_grad()
def test_what_the_release_sends_of_one_crop():
    model = tiny("llava")
    with vlmslim.patch(model, "vscan", keep=8, mode="released"), pytest.raises(ValueError, match="needs 32 tokens"):
        model(**batch(model, [LONG_ROWS[0]]))


def test_two_stages(family):
    """Stage 2 keeps what the last token is about to attend to, and later layers count positions anew."""
    model, row = tiny(family), LONG_ROWS[0]
    inputs = batch(model, [row])
    with vlmslim.patch(model, VScan(keep=12, deep=4, merge=False, newline="drop", positions="renumbered")) as slim:
        out, logits = greedy(model, inputs)
    assert slim.receipt.positions == "renumbered, between layers too"
    assert slim.receipt.last.visual == [[12], [12], [4], [4]]
    first = VScan(keep=12, newline="drop", merge=False).stages()[0]
    with torch.no_grad():
        _, _, ((_, result),), _ = kept_of(tiny(family), row, VScanEntrance, keep=12, newline="drop", merge=False)
        assert first.keep == 12
        prompt = ByHand(family, row)
        prompt.drop([result.index], closed=True)
        for layer in (0, 1, 2):
            prompt.run(layer)
        visual = torch.isin(prompt.origin, prompt.images[0])
        paid = prompt.maps[2][:, -1].mean(0)[visual]
        stay = paid.argsort(descending=True, stable=True)[:4].sort().values
        answer = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        hand = ByHand(family, row, answer)
        hand.drop([result.index], closed=True)
        for layer in range(DEPTH):
            if layer == 2:
                hand.drop([stay], closed=True)
            hand.run(layer)
    close(logits[0], hand.logits()[-len(answer) - 1 : -1])


def test_stages_that_are_left_out():
    assert len(VScan().stages()) == 2
    assert len(VScan(layer=None).stages()) == len(VScan(keep=1.0).stages()) == 1
    tokens = VScan().stages()[1].visual_tokens(96, 32)
    assert tokens == [96] * 16 + [32] * 16
