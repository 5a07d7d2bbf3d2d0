"""The greedy search against loops over all earlier picks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds, some

from vlmslim.ops.greedy import (
    Coverage,
    Determinant,
    Farthest,
    MarginalRelevance,
    farthest_greedy,
    greedy,
    rows_of,
    similarity_matrix,
)


@pytest.mark.parametrize(("reduce", "combine"), [(torch.add, sum), (torch.maximum, max)], ids=["add", "maximum"])
@some
@given(seeds, st.integers(1, 3), st.integers(1, 15), st.data())
def test_each_pick_is_the_least_close_to_those_before(reduce, combine, seed, images, n, data):
    k = data.draw(st.integers(1, n))
    generator = torch.Generator().manual_seed(seed)
    closeness = torch.randint(0, 6, (images, n, n), generator=generator).float()  # with ties, and sums that are exact
    closeness.diagonal(dim1=1, dim2=2).fill_(float("inf"))
    first = torch.randint(0, n, (images,), generator=generator)
    before = closeness.clone()
    picks = farthest_greedy(rows_of(closeness), first, k, reduce)
    assert torch.equal(closeness, before), "the search changed its input"
    for image in range(images):
        want = [int(first[image])]
        while len(want) < k:
            score = [combine(float(closeness[image, p, i]) for p in want) for i in range(n)]
            want.append(min((i for i in range(n) if i not in want), key=lambda i: (score[i], i)))
        assert picks[image].tolist() == want


def test_similarities_are_those_of_single_products():
    """Few tokens, because a batched product of those rounds otherwise on CPUs; on GPUs larger ones do too."""
    x = torch.randn(5, 3, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(similarity_matrix(x), torch.stack([image @ image.T for image in x]))


# --- the rules, each against its definition ---------------------------------------------------------------------------


def exact(seed: int, *shape: int) -> torch.Tensor:
    """Quarters, so that sums are exact and many scores tie."""
    return torch.randint(0, 5, shape, generator=torch.Generator().manual_seed(seed)) / 4


def loop(score, n: int, k: int) -> list[int]:
    """Pick by `score(picked, candidate)`, the lower index first on ties."""
    picked: list[int] = []
    while len(picked) < k:
        found = {i: score(picked, i) for i in range(n) if i not in picked}
        picked.append(min(found, key=lambda i: (-found[i], i)))
    return picked


@some
@given(seeds, st.integers(1, 6), st.integers(1, 9), st.sampled_from(["plain", "weight", "bonus"]), st.data())
def test_coverage_adds_what_raises_the_sum_of_row_maxima_most(seed, m, n, kind, data):
    k = data.draw(st.integers(1, n))
    matrix, extra = exact(seed, 2, m, n) - 0.5, exact(seed + 1, 2, n)
    given = {} if kind == "plain" else {kind: extra}
    got = greedy(Coverage(matrix, **given), k).tolist()

    for image in range(2):

        def covered(columns, image=image):
            return sum(max([0.0, *(float(matrix[image, row, j]) for j in columns)]) for row in range(m))

        def score(picked, i, image=image, covered=covered):
            gain = covered([*picked, i]) - covered(picked)
            value = float(extra[image, i])
            return {"plain": gain, "weight": gain * value, "bonus": gain + value}[kind]

        assert got[image] == loop(score, n, k)


@some
@given(seeds, st.integers(1, 7))
def test_determinants_grow_by_the_factor_that_the_rule_keeps(seed, n):
    x = torch.randn(2, n, n + 2, generator=torch.Generator().manual_seed(seed)).double()
    kernel, zero = x @ x.transpose(1, 2), torch.zeros(2, n, dtype=torch.float64)
    rule, order, volume = Determinant(kernel, zero, n), greedy(Determinant(kernel, zero, n), n), [1.0, 1.0]
    for step in range(n):
        pick = order[:, step]
        grown = rule.score().gather(1, pick[:, None])[:, 0]
        chosen = order[:, : step + 1]
        for image in range(2):
            own = kernel[image][chosen[image]][:, chosen[image]].det()
            assert float(own) / volume[image] == pytest.approx(float(grown[image]), rel=1e-5)
            volume[image] = float(own)
        rule.add(pick)


def test_several_picks_of_a_step_do_not_see_each_other():
    relevance, similarity = exact(0, 2, 9), exact(1, 2, 9, 9)
    similarity = (similarity + similarity.transpose(1, 2)) / 2
    got = greedy(MarginalRelevance(relevance, similarity, 0.5), 8, at_once=3).tolist()
    for image in range(2):
        want: list[int] = []
        while len(want) < 8:
            near = [max((float(similarity[image, i, j]) for j in want), default=None) for i in range(9)]
            score = [
                float(r) if m is None else 0.5 * float(r) - 0.5 * m for r, m in zip(relevance[image], near, strict=True)
            ]
            left = sorted((i for i in range(9) if i not in want), key=lambda i: (-score[i], i))
            want += left[: min(3, 8 - len(want))]
        assert got[image] == want


def test_a_search_for_the_farthest_needs_a_start():
    rule = Farthest(rows_of(torch.zeros(1, 3, 3)), torch.maximum)
    with pytest.raises(ValueError, match="first pick"):
        greedy(rule, 2)
    weighted = Farthest(rows_of(torch.tensor([[[0.0, -1, -2, -3]] * 4])), torch.maximum, torch.tensor([[1.0, 9, 1, 1]]))
    assert greedy(weighted, 3, torch.tensor([0])).tolist() == [[0, 1, 3]]
