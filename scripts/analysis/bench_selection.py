"""Time the core of every method against its formula written down plainly, in one process and interleaved.

    python scripts/analysis/bench_selection.py   # prints a table; writes assets/bench/selection_cpu.{json,md}
    python scripts/analysis/bench_selection.py --device cuda       # the same, as selection_cuda
    python scripts/analysis/bench_selection.py --quick --only LOF  # small sizes: does it run, do both agree?

The shapes are those of LLaVA-1.5-7B (576 visual tokens) and LLaVA-NeXT-7B (2880). The plain versions use tensors, as
the papers' own code does, but take the formulas literally: a greedy step looks at all earlier picks again, an outlier
test compares all pairs, one row of attention is taken out of the full map, a loop goes over centres, crops or cells.
One plain version is a loop in NumPy, which on CPUs starts an operation faster than PyTorch. Both versions get the same
inputs and must give the same result; otherwise the exit status is 1.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from vlmslim.engine.attention import LayerAttention
from vlmslim.io import provenance
from vlmslim.io.files import write_atomically
from vlmslim.methods.atp import top_k_alive
from vlmslim.methods.bipartite_merge import merge_tokens
from vlmslim.methods.divprune import farthest_points
from vlmslim.methods.globalcom2 import combined_score, merge_rankings_by_quota, unlikeness
from vlmslim.methods.pagerank_prune import pagerank
from vlmslim.methods.recoverable import clusters
from vlmslim.methods.recoverable.lof import local_outlier_factor
from vlmslim.methods.todre import diverse
from vlmslim.methods.tokencorr import absorb, beyond_quartiles, repetition
from vlmslim.methods.tokenflex import pool_square
from vlmslim.ops.attention import cls_attention, cls_logits, received_attention
from vlmslim.ops.cells import cell_members, even_cells
from vlmslim.ops.ranking import rank_within_groups


@dataclass(frozen=True)
class Widths:
    """Widths and numbers of heads of the language model and of the vision tower."""

    decoder: int
    decoder_heads: int
    tower: int
    tower_heads: int


BUDGETS, FULL = {576: (192, 128, 64), 2880: (640, 320, 160)}, Widths(4096, 32, 1024, 16)
QUICK_BUDGETS, QUICK = {60: (20, 7)}, Widths(32, 4, 16, 2)
TEXT, ROWS = 60, 256  # text tokens of a prompt; query rows at a time
TOLERANCE = {False: 1e-4, True: 5e-3}  # of numbers; of choices, because rounding may turn a near tie in a long search
PATIENCE = 5  # seconds after which a slow case is not repeated more than three times
INF = float("inf")

# --- the formulas, plainly -------------------------------------------------------------------------------------------


def plain_max_min(x: Tensor, k: int) -> Tensor:
    """DivPrune, algorithm 1: every step takes the minimum over all picks so far."""
    unit = F.normalize(x, dim=-1)
    distance = 1 - unit @ unit.T
    picks = [int((distance + torch.eye(len(x), device=x.device) * 10).min(0).values.argmax())]
    while len(picks) < k:
        nearest = distance[torch.tensor(picks, device=x.device)].min(0).values
        nearest[picks] = -INF
        picks.append(int(nearest.argmax()))
    return torch.tensor(picks)


def numpy_max_min(x: Tensor, k: int) -> Tensor:
    """Search as `farthest_points` does, with its loop over picks in NumPy."""
    unit = F.normalize(x, dim=-1)
    closeness = unit @ unit.T - 1
    closeness.fill_diagonal_(-INF)
    first = int(closeness.amax(1).argmin())
    rows = closeness.fill_diagonal_(INF).cpu().numpy()
    picks, nearest = [first], rows[first].copy()
    while len(picks) < k:
        picks.append(int(nearest.argmin()))
        np.maximum(nearest, rows[picks[-1]], out=nearest)
    return torch.tensor(picks)


def plain_diverse(x: Tensor, k: int, objective: str) -> Tensor:
    """ToDRE, stage 1: every step sums (or maximises) the similarity to all picks so far."""
    unit = F.normalize(x, dim=-1)
    similarity = unit @ unit.T
    picks = [0]
    while len(picks) < k:
        chosen = similarity[torch.tensor(picks, device=x.device)]
        closeness = chosen.sum(0) if objective == "max_sum" else chosen.max(0).values
        closeness[picks] = INF
        picks.append(int(closeness.argmin()))
    return torch.tensor(picks)


def plain_merge(x: Tensor, k: int) -> Tensor:
    """AIM's merging: even tokens go to their nearest odd ones, sums and counts are scattered, step by step."""
    while len(x) > k:
        unit = F.normalize(x, dim=-1)
        best, mate = (unit[::2] @ unit[1::2].T).max(-1)
        order = best.argsort(descending=True, stable=True)
        gone, left = order.split([r := min(len(x) - k, len(x) // 2), len(order) - r])
        even, odd = x[::2], x[1::2].clone()
        count = torch.ones(len(odd), device=x.device)
        odd.index_add_(0, mate[gone], even[gone])
        count.index_add_(0, mate[gone], torch.ones(r, device=x.device))
        x = torch.cat([even[left], odd / count[:, None]])
    return x


def plain_pagerank(logits: Tensor, temperature: float = 0.1) -> Tensor:
    """AIM's importance: the full causal map, and five products with it."""
    size = logits.shape[-1]
    future = torch.ones(size, size, dtype=torch.bool, device=logits.device).triu(1)
    attention = (logits.masked_fill(future, -INF) / temperature).softmax(-1)
    rank = torch.full((*attention.shape[:2], 1, size), 1 / size, device=logits.device)
    for _ in range(5):
        rank = rank @ attention
    return rank[:, :, 0].square().mean(1).sqrt()


def our_pagerank(logits: Tensor, temperature: float = 0.1) -> Tensor:
    """Compute the same from blocks of rows, each with the keys that it can see."""

    def blocks():
        size = logits.shape[-1]
        for end in range(size, 0, -ROWS):
            start = max(0, end - ROWS)
            future = torch.ones(end - start, end, dtype=torch.bool, device=logits.device).triu(start + 1)
            yield logits[..., start:end, :end].masked_fill(future, -INF).div_(temperature).softmax(-1)

    return pagerank(torch.ones(1, logits.shape[-1], device=logits.device), blocks())


def plain_lof(x: Tensor, k: int) -> Tensor:
    """Local outlier factor: all pairs."""
    x = x.double()
    pairs = (x[:, None] - x).abs().fill_diagonal_(INF)
    near, index = pairs.topk(k, largest=False)
    reach = torch.maximum(near, near[:, -1][index])
    density = 1 / (reach.mean(1) + 1e-10)
    return density[index].mean(1) / density


def plain_clusters(a: Tensor, t: Tensor, keys: Tensor, centres: Tensor, x: Tensor, size: int, weight: float) -> Tensor:
    """Recoverable Compression's clusters: centre by centre."""
    keys = F.normalize(keys, dim=-1)
    affinity = keys @ keys.T + weight * t
    affinity.fill_diagonal_(-INF)
    merged = []
    for c in centres.tolist():
        members = affinity[c].topk(size).indices
        merged.append((a[members, None] * x[members]).sum(0))
    return torch.stack(merged)


def plain_logits(q: Tensor, k: Tensor) -> Tensor:
    """CLS logits out of all logits."""
    return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).mean(1)[:, 0, 1:]


def plain_attention(q: Tensor, k: Tensor) -> Tensor:
    """CLS attention out of the full map."""
    return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1).mean(1)[:, 0, 1:]


def plain_received(q: Tensor, k: Tensor) -> Tensor:
    """Column means of the full map."""
    return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1).mean((1, 2))


def our_rows(layer, hidden: Tensor, rope: tuple[Tensor, Tensor], rows: Tensor, real: Tensor) -> Tensor:
    """Recompute a few rows of decoder attention from the input of a layer."""
    attention = LayerAttention(layer.self_attn, layer.input_layernorm(hidden), rope).attend(real, None)
    return attention.softmax(attention.logits(rows))


def plain_rows(layer, hidden: Tensor, rope: tuple[Tensor, Tensor], rows: Tensor) -> Tensor:
    """Read a few rows of decoder attention out of the full causal map."""
    attn, x = layer.self_attn, layer.input_layernorm(hidden)
    q, k = (p(x).unflatten(-1, (-1, attn.head_dim)).transpose(1, 2) for p in (attn.q_proj, attn.k_proj))

    def turned(y: Tensor) -> Tensor:
        first, second = y.chunk(2, dim=-1)
        return y * rope[0][:, None] + torch.cat([-second, first], -1) * rope[1][:, None]

    logits = turned(q) @ turned(k).transpose(-1, -2) * attn.scaling
    future = torch.ones(logits.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
    return logits.masked_fill(future, -INF).softmax(-1)[:, :, rows[0]]


def plain_unlikeness(x: Tensor, group: Tensor) -> Tensor:
    """GlobalCom2 without CLS: crop by crop."""
    parts = [x[group == c] for c in range(int(group.max()) + 1)]
    return torch.cat([-F.cosine_similarity(part, part.mean(0, keepdim=True), dim=-1) for part in parts])


def plain_combined(own: Tensor, global_score: Tensor, crop: Tensor) -> Tensor:
    """GlobalCom2's sum of normalised scores, crop by crop."""
    parts = [crop == c for c in range(int(crop.max()) + 1)]
    return torch.cat([F.normalize(own[p], dim=0) + F.normalize(global_score[p], dim=0) for p in parts])


def plain_quota(score: Tensor, group: Tensor, weight: Tensor, k: int) -> Tensor:
    """Webster's method for GlobalCom2's crop budgets: seat by seat."""
    size = group.bincount(minlength=len(weight)).double()
    members = [(group == g).nonzero()[:, 0] for g in range(len(size))]
    ranked = [at[score[at].argsort(descending=True, stable=True)] for at in members]
    seats, order = torch.zeros(len(size), dtype=torch.double), []
    while len(order) < k:
        claim = (weight.double() * size / (seats + 0.5)).masked_fill(seats >= size, -INF)
        g = int(claim.argmax())
        order.append(int(ranked[g][int(seats[g])]))
        seats[g] += 1
    return torch.tensor(order)


def plain_repetition(keys: Tensor, limit: int) -> Tensor:
    """TokenCorr's density: alike patches of each patch, sorted."""
    keys = F.normalize(keys, dim=-1)
    similarity = (keys @ keys.T).fill_diagonal_(-INF)
    return similarity.sort(dim=1, descending=True).values[:, limit]


def plain_quartiles(x: Tensor) -> Tensor:
    """TokenCorr's outliers by sorting and interpolating."""
    ordered = x.double().sort().values

    def at(q: float) -> Tensor:
        place = q * (len(x) - 1)
        low = int(place)
        return ordered[low] + (place - low) * (ordered[min(low + 1, len(x) - 1)] - ordered[low])

    return x > at(0.75) + 1.5 * (at(0.75) - at(0.25))


def plain_absorb(x: Tensor, keys: Tensor, weight: Tensor, keep: Tensor, neighbours: int) -> Tensor:
    """TokenCorr's aggregation: patch by patch."""
    kept, dropped = keep.nonzero()[:, 0], (~keep).nonzero()[:, 0]
    keys = F.normalize(keys, dim=-1)
    similarity = keys @ keys.T
    merged = []
    for i in kept:
        taken = dropped[similarity[i, dropped].topk(min(neighbours, len(dropped))).indices]
        own = torch.cat([i[None], taken])
        merged.append((weight[own, None] * x[own]).sum(0) / weight[own].sum())
    return torch.stack(merged)


def plain_top(score: Tensor, group: Tensor, k: int) -> Tensor:
    """Pick the k best tokens of every image of every row, image by image."""
    keep = torch.zeros_like(score, dtype=torch.bool)
    for b in range(len(score)):
        for g in range(1, int(group[b].max()) + 1):
            at = (group[b] == g).nonzero()[:, 0]
            keep[b, at[score[b, at].topk(k).indices]] = True
    return keep


def plain_top_alive(score: Tensor, alive: Tensor, k: int) -> Tensor:
    """ATP's floor: image by image."""
    keep = torch.zeros_like(alive)
    for b in range(len(score)):
        there = alive[b].nonzero()[:, 0]
        keep[b, there[score[b, there].topk(min(k, len(there))).indices]] = True
    return keep


def plain_cells(height: int, width: int, k: int) -> Tensor:
    """`uniform`'s partition of a grid: bands of rows, cells in a band, token by token."""
    bands = min(height, k, max(1, round((k * height / width) ** 0.5), -(-k // width)))
    cells = []
    for row in range(height):
        band = max(b for b in range(bands) if b * height // bands <= row)
        first, end = band * k // bands, (band + 1) * k // bands
        for column in range(width):
            inside = max(c for c in range(end - first) if c * width // (end - first) <= column)
            cells.append(first + inside)
    return torch.tensor(cells)


def plain_pool(x: Tensor, cell: Tensor, k: int) -> Tensor:
    """Mean of every cell, cell by cell."""
    return torch.stack([x[cell == i].mean(0) for i in range(k)])


def our_pool(x: Tensor, cell: Tensor) -> Tensor:
    """Average as `pool` does."""
    member, size = cell_members(cell.cpu())
    return torch.segment_reduce(x[member.to(x.device)], "mean", lengths=size.to(x.device))


def plain_square(x: Tensor, side: int) -> Tensor:
    """TokenFLEX's pooling: stretch to a multiple, then cell by cell."""
    grid = round(x.shape[1] ** 0.5)
    x = x.transpose(1, 2).unflatten(2, (grid, grid))
    cell = -(-grid // side)
    x = F.interpolate(x, size=(cell * side, cell * side), mode="bilinear", align_corners=True)
    cells = [
        x[..., i * cell : (i + 1) * cell, j * cell : (j + 1) * cell].mean((-2, -1))
        for i in range(side)
        for j in range(side)
    ]
    return torch.stack(cells, dim=1)


# --- the cases -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One core function at one size: ours and the plain one, on the same inputs; `k` is 0 where no budget matters."""

    name: str
    method: str
    n: int
    k: int
    ours: Callable[[], Tensor]
    plain: Callable[[], Tensor]


def inputs(n: int, widths: Widths, device: str) -> SimpleNamespace:
    """Make the inputs of the functions at n visual tokens: `crops` crops, or images, of equal size in a row."""
    generator = torch.Generator().manual_seed(n)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    def alike(width: int) -> Tensor:
        return normal(n, width) + normal(1, width)  # tokens share a direction, as real ones do

    crops = 5 if n % 5 == 0 else 1
    size, side, head = n // crops, int(n**0.5), widths.tower // widths.tower_heads
    crop = torch.arange(n, device=device) // size
    text = torch.zeros(TEXT, dtype=torch.long, device=device)
    return SimpleNamespace(
        n=n,
        device=device,
        crops=crops,
        x=alike(widths.decoder),
        patches=alike(widths.tower),
        keys=alike(widths.tower),
        a=normal(n).softmax(0),
        t=normal(n) / widths.tower**0.5,
        q=normal(crops, widths.tower_heads, 1 + size, head),
        k=normal(crops, widths.tower_heads, 1 + size, head),
        logits=normal(1, widths.decoder_heads, n + TEXT, n + TEXT),
        crop=crop,
        group=torch.cat([text, 1 + crop])[None].repeat(2, 1),
        score=normal(2, n + TEXT),
        own=normal(n).cpu().double(),  # GlobalCom2 shares out on the CPU
        global_score=normal(n).cpu().double(),
        weight=1 + 0.2 * torch.rand(crops, generator=generator),
        alive=normal(4, n) > -1,
        content=normal(4, n),
        image=normal(2, side * side, widths.tower),
        layer=_layer(widths, device),
        hidden=normal(1, n + TEXT, widths.decoder),
        rope=_rope(n + TEXT, widths.decoder // widths.decoder_heads, device),
        rows=torch.tensor([[n + TEXT - 1]], device=device),
        neighbours=min(32, n // 4),
    )


def scores(i: SimpleNamespace) -> list[tuple]:
    """Functions that no budget enters: name, method, ours, plain."""
    limit, home = i.n // 20, i.crop.cpu()
    real = torch.ones(1, i.n + TEXT, dtype=torch.bool, device=i.device)
    a = i.a.cpu()
    return [
        (
            "attention of the last row",
            "fastv",
            lambda: our_rows(i.layer, i.hidden, i.rope, i.rows, real),
            lambda: plain_rows(i.layer, i.hidden, i.rope, i.rows),
        ),
        ("pagerank", "aim", lambda: our_pagerank(i.logits), lambda: plain_pagerank(i.logits)),
        ("LOF", "recoverable", lambda: local_outlier_factor(i.a, 20), lambda: plain_lof(i.a, 20)),
        ("CLS attention", "todre, tokencorr", lambda: cls_attention(i.q, i.k), lambda: plain_attention(i.q, i.k)),
        ("CLS logits", "globalcom2", lambda: cls_logits(i.q, i.k), lambda: plain_logits(i.q, i.k)),
        ("unlikeness", "globalcom2", lambda: unlikeness(i.x, i.crop), lambda: plain_unlikeness(i.x, i.crop)),
        (
            "combined scores",
            "globalcom2",
            lambda: combined_score(i.own, i.global_score, home),
            lambda: plain_combined(i.own, i.global_score, home),
        ),
        ("received attention", "tokencorr", lambda: received_attention(i.q, i.k), lambda: plain_received(i.q, i.k)),
        ("key density", "tokencorr", lambda: repetition(i.keys, limit), lambda: plain_repetition(i.keys, limit)),
        ("quartile outliers", "tokencorr", lambda: beyond_quartiles(a), lambda: plain_quartiles(a)),
    ]


def selections(i: SimpleNamespace, k: int) -> list[tuple]:
    """Functions of a budget: name, method, ours, plain."""
    ranked = i.a.argsort(descending=True)
    centres = ranked[: max(1, k // 5)]
    keep = torch.zeros(i.n, dtype=torch.bool, device=i.device).index_fill(0, ranked[:k], True)
    each, square, home = k // i.crops, max(1, int(k**0.5)), i.crop.cpu()
    pivot = torch.tensor(0, device=i.device)
    height, width = i.n // 12, 12
    mosaic = torch.cartesian_prod(torch.zeros(1, dtype=torch.long), torch.arange(height), torch.arange(width))
    cell = even_cells(mosaic, k).to(i.device)
    return [
        ("max-min", "divprune", lambda: farthest_points(i.x, k), lambda: plain_max_min(i.x, k)),
        ("max-min, loop in NumPy", "divprune", lambda: farthest_points(i.x, k), lambda: numpy_max_min(i.x, k)),
        ("max-sum", "todre", lambda: diverse(i.x, k, pivot), lambda: plain_diverse(i.x, k, "max_sum")),
        ("k-center", "todre", lambda: diverse(i.x, k, pivot, "k_center"), lambda: plain_diverse(i.x, k, "k_center")),
        ("bipartite merging", "aim", lambda: merge_tokens(i.x, None, k)[0], lambda: plain_merge(i.x, k)),
        (
            "clusters",
            "recoverable",
            lambda: clusters(i.a, i.t, i.keys, centres, i.neighbours, 50.0) @ i.patches,
            lambda: plain_clusters(i.a, i.t, i.keys, centres, i.patches, i.neighbours, 50.0),
        ),
        (
            "crop budgets",
            "globalcom2",
            lambda: merge_rankings_by_quota(i.own, home, i.weight)[:k],
            lambda: plain_quota(i.own, home, i.weight, k),
        ),
        (
            "aggregation",
            "tokencorr",
            lambda: absorb(i.patches, i.keys, i.a, keep, "knn", i.neighbours),
            lambda: plain_absorb(i.patches, i.keys, i.a, keep, i.neighbours),
        ),
        (
            "top-k of each image",
            "fastv, aim",
            lambda: (rank_within_groups(i.score, i.group) < each) & (i.group > 0),
            lambda: plain_top(i.score, i.group, each),
        ),
        (
            "top-k of alive tokens",
            "atp",
            lambda: top_k_alive(i.content, i.alive, k),
            lambda: plain_top_alive(i.content, i.alive, k),
        ),
        ("square pooling", "tokenflex", lambda: pool_square(i.image, square), lambda: plain_square(i.image, square)),
        ("even cells", "uniform, pool", lambda: even_cells(mosaic, k), lambda: plain_cells(height, width, k)),
        ("cell means", "pool", lambda: our_pool(i.x, cell), lambda: plain_pool(i.x, cell, k)),
    ]


def cases(n: int, budgets: tuple[int, ...], widths: Widths, device: str) -> list[Case]:
    """All cases at n visual tokens."""
    given = inputs(n, widths, device)
    found = [Case(name, method, n, 0, ours, plain) for name, method, ours, plain in scores(given)]
    return found + [
        Case(name, method, n, k, ours, plain) for k in budgets for name, method, ours, plain in selections(given, k)
    ]


def _layer(widths: Widths, device: str):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    config = LlamaConfig(
        hidden_size=widths.decoder, num_attention_heads=widths.decoder_heads, intermediate_size=widths.decoder
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    return LlamaDecoderLayer(config, 0).eval().requires_grad_(False).to(device)


def _rope(length: int, size: int, device: str) -> tuple[Tensor, Tensor]:
    angle = torch.arange(length)[:, None] / 10000 ** (torch.arange(size // 2) / (size // 2))
    angle = torch.cat([angle, angle], -1)[None].to(device)
    return angle.cos(), angle.sin()


# --- measuring -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """Medians of both, and the median over repetitions of plain over ours: above 1, ours is faster."""

    name: str
    method: str
    n: int
    k: int
    repeats: int
    ours_ms: float
    plain_ms: float
    speedup: float
    difference: float  # largest, relative to the largest value; of choices, the share that only one made
    agrees: bool


def measure(case: Case, repeats: int, device: str) -> Result:
    """Compare both once, then time them interleaved."""
    result = case.ours()
    choices = not result.is_floating_point()
    difference = compare(result, case.plain())
    ours, plain = [], []
    begin = time.perf_counter()
    while len(ours) < min(repeats, 3) or len(ours) < repeats and time.perf_counter() - begin < PATIENCE:
        ours.append(_milliseconds(case.ours, device))
        plain.append(_milliseconds(case.plain, device))
    speedup = statistics.median(b / a for a, b in zip(ours, plain, strict=True))
    medians = statistics.median(ours), statistics.median(plain)
    sizes = case.n, case.k, len(ours)
    return Result(case.name, case.method, *sizes, *medians, speedup, difference, difference <= TOLERANCE[choices])


def compare(ours: Tensor, plain: Tensor) -> float:
    """How far apart two results are, from 0."""
    if ours.shape != plain.shape:
        return INF
    ours, plain = ours.cpu(), plain.cpu()
    if ours.dtype == torch.long:
        return float(1 - torch.isin(ours, plain).double().mean())
    if ours.dtype == torch.bool:
        return float((ours != plain).double().mean())
    same = ours == plain  # infinities included
    apart = (ours.double() - plain.double()).abs().masked_fill(same, 0)
    return float(apart.max() / plain.double().abs().masked_fill(same, 0).max().clamp(min=1e-12)) if len(apart) else 0.0


def _milliseconds(function: Callable[[], Tensor], device: str) -> float:
    """Time one call: processor time on a CPU, so that other programs do not count; on a GPU until it has finished."""
    if device == "cpu":
        start = time.process_time()
        function()
        return 1000 * (time.process_time() - start)
    torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)


def markdown(record: dict) -> str:
    """Write the record as a page."""
    lines = [
        "# Selection and merging against their formulas",
        "",
        "Median milliseconds (on a CPU, of processor time) on one set of inputs, at the shapes of LLaVA-1.5-7B "
        "(N = 576) and LLaVA-NeXT-7B (2880). The plain version takes the formula literally, with tensors "
        "(`scripts/analysis/bench_selection.py`). The speed-up is the median over repetitions, interleaved, of plain "
        "over ours. Both give the same result in every row, or the script fails. Ours can be slower where it orders "
        "ties (the lower index first), computes in fp64, keeps no full attention map in memory, or sums in an order "
        "that repeats on GPUs.",
        "",
        "`max-min, loop in NumPy` has the same algorithm on both sides. It shows how much of a selection on a CPU a "
        "loop over picks in NumPy would save, and so why that loop exists only once, in PyTorch.",
        "",
        "| function | method | N | keep | ours ms | plain ms | speed-up |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for r in record["results"]:
        size = f"{r['n']} | {r['k'] or '–'} | {r['ours_ms']:.2f} | {r['plain_ms']:.2f} | {r['speedup']:.1f}x"
        lines.append(f"| {r['name']} | {r['method']} | {size} |")
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    lines += [
        "",
        f"{record['hardware']}; {record['repeats']} repetitions, 3 of slow ones; {versions}.",
    ]
    return "\n".join(lines) + "\n"


def table(results: list[Result]) -> Table:
    """Write the results for a terminal."""
    shown = Table("function", "method", "N", "keep", "ours ms", "plain ms", "speed-up", "agree", box=None)
    for r in results:
        style = "" if r.agrees and r.speedup >= 1 else "yellow" if r.agrees else "red"
        agree = "yes" if r.agrees else f"no: {r.difference:.2g}"
        numbers = f"{r.ours_ms:.2f}", f"{r.plain_ms:.2f}", f"{r.speedup:.1f}x"
        shown.add_row(r.name, r.method, str(r.n), str(r.k or "–"), *numbers, agree, style=style)
    return shown


def main() -> int:
    """Run, print, write; 1 if any pair disagrees."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", default="", help="only functions whose name contains this")
    parser.add_argument("--quick", action="store_true", help="small sizes, one repetition: checks, does not measure")
    parser.add_argument("--output", type=Path, help="path without suffix; by default assets/bench/selection_DEVICE")
    given = parser.parse_args()
    sizes, widths, repeats = (QUICK_BUDGETS, QUICK, 1) if given.quick else (BUDGETS, FULL, given.repeats)
    results = []
    torch.set_num_threads(1)  # a function's processor time is then its time
    with torch.inference_mode():
        for n, budgets in sizes.items():
            for case in cases(n, budgets, widths, given.device):
                if given.only in case.name:
                    results.append(measure(case, repeats, given.device))
    Console(width=110).print(table(results))
    record = {
        "hardware": provenance.hardware(given.device),
        "versions": provenance.versions(),
        "git_commit": provenance.git_commit(),
        "widths": asdict(widths),
        "repeats": repeats,
        "results": [asdict(result) for result in results],
    }
    if given.output is None and not (given.quick or given.only):
        given.output = Path(__file__).parents[2] / "assets" / "bench" / f"selection_{given.device}"
    if given.output is not None:
        write_atomically(given.output.with_suffix(".json"), json.dumps(record, indent=1) + "\n")
        write_atomically(given.output.with_suffix(".md"), markdown(record))
    return 0 if all(result.agrees for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
