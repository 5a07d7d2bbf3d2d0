"""The searches of `vlmslim.ops.greedy` as one Triton kernel: one program makes all picks of one image.

The state of a search, one number a token, stays in registers, and each step reads one row of the matrix. The host
starts one kernel and waits for nothing, so a CUDA graph can hold it. `Coverage` has no part in it, because each of its
steps reads the whole matrix, which one program would do more slowly than all of the device in the plain loop.

With TRITON_INTERPRET=1 in the environment before Triton is imported, the kernel runs on a CPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _search(
    matrix, first, weight, bonus, rows, picks, n, k, floor, KIND: tl.constexpr, BLOCK: tl.constexpr, PICKS: tl.constexpr
):
    image = tl.program_id(0).to(tl.int64)
    matrix += image * n * n
    rows += image * k * n
    picks += image * k
    token = tl.arange(0, BLOCK)
    inside = token < n
    free = inside
    scale = tl.load(weight + image * n + token, mask=inside, other=0.0)
    added = tl.load(bonus + image * n + token, mask=inside, other=0.0)
    if KIND == "determinant":
        state = tl.load(matrix + token * (n + 1), mask=inside, other=0.0)  # each token's factor
        least = floor * tl.max(tl.where(inside, state, float("-inf")), 0)
        score = tl.where(state > least, state, added)
    else:
        state = tl.full((BLOCK,), 0.0 if KIND == "sum" else float("-inf"), tl.float32)  # each token's closeness
        least = 0.0
        score = tl.zeros_like(state)
    score = tl.where(token == tl.load(first + image), score, float("-inf"))
    for step in range(k):
        best, pick = tl.max(score, 0, return_indices=True)  # the lower index on ties
        tl.store(picks + step, pick)
        free = free & (token != pick)
        row = tl.load(matrix + pick * n + token, mask=inside, other=0.0)
        if KIND == "determinant":
            for earlier in range(step):
                found = rows + earlier * n
                row -= tl.load(found + pick) * tl.load(found + token, mask=inside, other=0.0)
            row = tl.where(best > least, row / tl.sqrt(tl.maximum(best, 1e-30)), 0.0)
            tl.store(rows + step * n + token, row, mask=inside)
            tl.debug_barrier()  # every thread reads what others have stored
            state -= row * row
            score = tl.where(state > least, state, added)
        else:
            if KIND == "sum":
                state += row
            else:
                state = tl.maximum(state, row, propagate_nan=tl.PropagateNan.ALL)
            score = added - scale * state
        score = tl.where(free, score, float("-inf"))
    broken = inside & ((state != state) | (scale != scale) | (added != added))
    if tl.max(broken.to(tl.int32), 0) > 0:
        tl.debug_barrier()
        place = tl.arange(0, PICKS)
        tl.store(picks + place, tl.full((PICKS,), -1, tl.int64), mask=place < k)


@torch.library.custom_op("vlmslim::greedy_search", mutates_args=())
def search(
    kind: str, matrix: Tensor, first: Tensor, weight: Tensor, bonus: Tensor, k: int, floor: float = 0.0
) -> Tensor:
    """Pick k tokens of every image by a `vlmslim.ops.greedy.Stream`.

    Args:
        kind: of the stream.
        matrix: (b, n, n) fp32.
        first: (b,) the first pick of each image.
        weight: (b, n) fp32.
        bonus: (b, n) fp32.
        k: number of picks, 1 <= k <= n.
        floor: of the stream.

    Returns:
        (b, k) indices in the order of selection; all -1 for an image with a NaN.
    """
    images, n = matrix.shape[:2]
    picks = torch.empty(images, k, dtype=torch.long, device=matrix.device)
    rows = matrix.new_empty((images, k, n) if kind == "determinant" else 0)
    block = triton.next_power_of_2(n)
    _search[(images,)](
        *(x.contiguous() for x in (matrix, first, weight, bonus)),
        rows,
        picks,
        n,
        k,
        floor,
        KIND=kind,
        BLOCK=block,
        PICKS=triton.next_power_of_2(k),
        num_warps=min(16, max(1, block // 256)),
        enable_fp_fusion=False,  # the plain loop rounds after each operation
    )
    return picks


@search.register_fake
def _(kind: str, matrix: Tensor, first: Tensor, weight: Tensor, bonus: Tensor, k: int, floor: float = 0.0) -> Tensor:
    return torch.empty(len(matrix), k, dtype=torch.long, device=matrix.device)
