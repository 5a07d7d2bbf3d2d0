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
    Rows,
    greedy,
    similarity_matrix,
    step_by_step,
)


def by_kernel(rule, k, first=None):
    """Search as on a GPU. Without one, Triton interprets the kernel (conftest.py)."""
    pytest.importorskip("triton", reason="torch brings Triton on Linux only")
    from vlmslim.ops.greedy_kernel import search

    stream = rule.stream()
    first = rule.score().argmax(1) if first is None else first
    return search(stream.kind, stream.matrix, first, stream.weight, stream.bonus, k, stream.floor)


#: all ways to search: the one that this device prefers, the plain loop, and the kernel
every_way = pytest.mark.parametrize("search", [greedy, step_by_step, by_kernel])


@every_way
@pytest.mark.parametrize(("reduce", "combine"), [(torch.add, sum), (torch.maximum, max)], ids=["add", "maximum"])
@some
@given(seeds, st.integers(1, 3), st.integers(1, 15), st.data())
def test_each_pick_is_the_least_close_to_those_before(search, reduce, combine, seed, images, n, data):
    k = data.draw(st.integers(1, n))
    generator = torch.Generator().manual_seed(seed)
    closeness = torch.randint(0, 6, (images, n, n), generator=generator).float()  # with ties, and sums that are exact
    closeness.diagonal(dim1=1, dim2=2).fill_(float("inf"))
    first = torch.randint(0, n, (images,), generator=generator)
    before = closeness.clone()
    picks = search(Farthest(Rows(closeness), reduce), k, first)
    assert torch.equal(closeness, before), "the search changed its input"
    for image in range(images):
        want = [int(first[image])]
        while len(want) < k:
            score = [combine(float(closeness[image, p, i]) for p in want) for i in range(n)]
            want.append(min((i for i in range(n) if i not in want), key=lambda i: (score[i], i)))
        assert picks[image].tolist() == want


@pytest.mark.parametrize(("n", "d"), [(3, 16), (400, 64), (577, 64), (1000, 64)])
def test_similarities_are_those_of_single_products(n, d):
    """Few tokens, because a batched product of those rounds otherwise on CPUs; and many, which go in blocks."""
    x = torch.randn(3, n, d, generator=torch.Generator().manual_seed(0))
    found = similarity_matrix(x)
    assert torch.equal(found, found.transpose(1, 2))
    torch.testing.assert_close(found, torch.stack([image @ image.T for image in x]), rtol=0, atol=1e-4)
    assert torch.equal(found[:1], similarity_matrix(x[:1])), "an image depends on its batch"
    if n == 3:
        assert torch.equal(found, torch.stack([image @ image.T for image in x]))


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


@pytest.mark.parametrize("search", [greedy, step_by_step])
@some
@given(seeds, st.integers(1, 6), st.integers(1, 9), st.sampled_from(["plain", "weight", "bonus"]), st.data())
def test_coverage_adds_what_raises_the_sum_of_row_maxima_most(search, seed, m, n, kind, data):
    k = data.draw(st.integers(1, n))
    matrix, extra = exact(seed, 2, m, n) - 0.5, exact(seed + 1, 2, n)
    given = {} if kind == "plain" else {kind: extra}
    got = search(Coverage(matrix.transpose(1, 2), **given), k).tolist()

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
    rule = Farthest(Rows(torch.zeros(1, 3, 3)), torch.maximum)
    with pytest.raises(ValueError, match="first pick"):
        greedy(rule, 2)
    weighted = Farthest(Rows(torch.tensor([[[0.0, -1, -2, -3]] * 4])), torch.maximum, torch.tensor([[1.0, 9, 1, 1]]))
    assert greedy(weighted, 3, torch.tensor([0])).tolist() == [[0, 1, 3]]


@every_way
@some
@given(seeds, st.integers(1, 9), st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.data())
def test_marginal_relevance_weighs_relevance_against_the_nearest_pick(search, seed, n, weight, data):
    k = data.draw(st.integers(1, n))
    relevance, similarity = exact(seed, 2, n), exact(seed + 1, 2, n, n)
    similarity = (similarity + similarity.transpose(1, 2)) / 2
    got = search(MarginalRelevance(relevance, similarity, weight), k).tolist()
    for image in range(2):

        def score(picked, i, image=image):
            if not picked:
                return float(relevance[image, i])
            nearest = max(float(similarity[image, i, j]) for j in picked)
            return weight * float(relevance[image, i]) - (1 - weight) * nearest

        assert got[image] == loop(score, n, k)


@some
@given(seeds, st.integers(2, 12), st.booleans(), st.data())
def test_the_kernel_finds_the_determinants_of_the_loop(seed, n, twice, data):
    """Of equal tokens one is picked; the others are lost, and come last, by the fallback."""
    k = data.draw(st.integers(1, n))
    x = torch.randn(2, n, 16, generator=torch.Generator().manual_seed(seed))
    if twice:
        x[:, n // 2 :] = x[:, : n - n // 2]
    kernel, fallback = x @ x.transpose(1, 2), exact(seed, 2, n)
    assert torch.equal(by_kernel(Determinant(kernel, fallback, k), k), greedy(Determinant(kernel, fallback, k), k))


def test_a_search_among_nans_is_refused():
    """A kernel cannot raise: the image without a NaN has its picks, and the other has none."""
    matrix = similarity_matrix(torch.randn(2, 9, 4))
    sound = greedy(Farthest(Rows(matrix), torch.maximum), 5, torch.tensor([3, 3]))
    matrix[1, 4] = matrix[1, :, 4] = float("nan")
    rule, first = Farthest(Rows(matrix), torch.maximum), torch.tensor([3, 4])
    for refusing in (rule, Coverage(matrix), Determinant(matrix, torch.zeros(2, 9), 5)):
        with pytest.raises(ValueError, match="NaN"):
            greedy(refusing, 5, first)
    assert by_kernel(rule, 5, first).tolist() == [sound[0].tolist(), [-1] * 5]


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "k"), [(576, 64), (2880, 320)])
@pytest.mark.parametrize("kind", ["max-min", "max-sum", "relevance", "determinant"])
def test_a_gpu_makes_the_picks_of_the_loop_and_waits_for_nothing(kind, n, k):
    unit = torch.nn.functional.normalize(torch.randn(8, n, 64, device="cuda") + 1, dim=-1)
    matrix, first = similarity_matrix(unit), torch.arange(8, device="cuda")
    rule = {
        "max-min": lambda: Farthest(Rows(matrix), torch.maximum),
        "max-sum": lambda: Farthest(Rows(matrix), torch.add),
        "relevance": lambda: MarginalRelevance(unit[..., 0], matrix, 0.5),
        "determinant": lambda: Determinant(matrix.square(), unit[..., 0].abs(), k),
    }[kind]
    greedy(rule(), k, first)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = greedy(rule(), k, first)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    want = step_by_step(rule(), k, first)
    if kind == "determinant":  # sums of products round in another order, so near ties may turn
        assert all(torch.isin(a, b).float().mean() > 0.99 for a, b in zip(got, want, strict=True))
    else:
        assert torch.equal(got, want)


@pytest.mark.gpu
def test_a_cuda_graph_can_hold_a_search():
    matrix, first = similarity_matrix(torch.randn(2, 576, 64, device="cuda")), torch.tensor([0, 5], device="cuda")

    def search():
        return greedy(Farthest(Rows(matrix), torch.maximum), 64, first)

    want = search()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = search()
    got.zero_()
    graph.replay()
    assert torch.equal(got, want)
