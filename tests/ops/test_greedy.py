"""The greedy search against loops over all earlier picks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds, some

from vlmslim.ops.greedy import farthest_greedy, rows_of, similarity_matrix


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
