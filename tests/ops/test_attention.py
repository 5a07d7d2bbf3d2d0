"""Recomputed attention of vision towers, against plain loops."""

import math

import torch
from compare import close
from hypothesis import given
from hypothesis import strategies as st
from strategies import noise, seeds, some

from vlmslim.ops.attention import attention_rows, cls_attention, cls_logits, received_attention


@some
@given(seeds, st.integers(1, 3), st.integers(1, 4), st.integers(1, 7))
def test_attention_of_towers(seed, crops, heads, patches):
    q, k = noise(seed, 2, crops, heads, 1 + patches, 5)
    for c in range(crops):
        rows = []  # [head][query] -> softmax over keys
        for h in range(heads):
            logits = (q[c, h].double() @ k[c, h].double().T / 5**0.5).tolist()
            rows.append([[math.exp(x) / sum(map(math.exp, row)) for x in row] for row in logits])
        paid = [sum(rows[h][0][p] for h in range(heads)) / heads for p in range(1, 1 + patches)]
        looked = [[float(x) for x in (q[c, h, 0].double() @ k[c, h].double().T / 5**0.5)] for h in range(heads)]
        means = [sum(row[p] for row in looked) / heads for p in range(1, 1 + patches)]
        close(cls_logits(q, k)[c].double(), torch.tensor(means).double(), 1e-5)
        close(cls_attention(q, k)[c].double(), torch.tensor(paid).double(), 1e-5)
        size = 1 + patches
        got = [sum(rows[h][i][p] for h in range(heads) for i in range(size)) / heads / size for p in range(size)]
        close(received_attention(q, k)[c].double(), torch.tensor(got).double(), 1e-5)
    close(received_attention(q, k).sum(1), torch.ones(crops), 1e-5)


@some
@given(seeds, st.integers(1, 3), st.integers(1, 9), st.integers(1, 4))
def test_rows_of_attention_come_in_steps(seed, rows, size, chunk):
    """Each query comes once, with its own row of the map, averaged over heads."""
    full, queries = noise(seed, rows, 2, size, size).softmax(-1), noise(seed + 1, rows, size) > 0

    def attend(index):
        assert 1 <= index.shape[1] <= chunk
        return full.gather(2, index[:, None, :, None].expand(-1, 2, -1, size))

    found = torch.zeros(rows, size, size)
    for index, paid in attention_rows(attend, queries, chunk):
        for b in range(rows):
            for q, row in zip(index[b].tolist(), paid[b], strict=True):
                found[b, q] += row
    close(found, full.mean(1) * queries[..., None], 1e-6)
