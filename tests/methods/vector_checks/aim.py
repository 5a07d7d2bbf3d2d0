"""Reference vectors `aim_*`: merging, importance, the schedule, and whole tiny decoders, masked and removed."""

import re
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, Qwen2Config

import vlmslim
from vlmslim import Compressed, Compressor
from vlmslim.engine.attention import LayerAttention
from vlmslim.engine.families import KV_CACHE, kv_cache
from vlmslim.methods.bipartite_merge import match, merge_step, merge_tokens
from vlmslim.methods.pagerank_prune import PageRankPrune, pagerank, scheduled

MERGE, SCORE, LOGITS = 1e-5, 1e-5, 1e-4  # tolerances that the vectors come with


def check(arrays: dict[str, np.ndarray]) -> None:
    """Check whatever the file holds."""
    checks = {
        "config": _decoder,
        "raw": _importance,
        "metric": _merge_image,
        "x": _merge_video,
    }
    first = next((checks[key] for key in checks if key in arrays), None)
    if first is None and any(key.endswith("_rate") for key in arrays):
        first = _schedule
    elif first is None:
        assert any(re.fullmatch(r"x_N\d+", key) for key in arrays), f"nothing known in {sorted(arrays)}"
        first = _merge_odd
    first(arrays)


def _close(got, want, tolerance: float) -> None:
    got = got.numpy() if isinstance(got, Tensor) else got
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


def _merge_image(arrays) -> None:
    x, metric = torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["metric"])
    names = [key.removeprefix("out_") for key in arrays if key.startswith("out_")]
    assert names
    for name in names:
        want = arrays[f"out_{name}"]
        merged, slot = merge_tokens(x, metric, want.shape[1])
        _close(merged, want, MERGE)
        assert all(len(row.unique()) == want.shape[1] for row in slot)
        a, b = x, metric
        for r in arrays[f"rs_{name}"].tolist():
            order, mate = match(b, r)
            a, b = merge_step(a, order, mate), merge_step(b, order, mate)
        _close(a, want, MERGE)
        if f"outmetric_{name}" in arrays:
            _close(b, arrays[f"outmetric_{name}"], MERGE)


def _merge_video(arrays) -> None:
    x = torch.from_numpy(arrays["x"])
    names = [key for key in arrays if key.startswith("out_")]
    assert names
    for name in names:
        _close(merge_tokens(x, None, arrays[name].shape[1])[0], arrays[name], MERGE)


def _merge_odd(arrays) -> None:
    outputs = [(key, re.fullmatch(r"out_N(\d+)_r(\d+)", key)) for key in arrays if key.startswith("out_")]
    assert outputs
    for key, name in outputs:
        x, r = torch.from_numpy(arrays[f"x_N{name[1]}"]), int(name[2])
        _close(merge_step(x, *match(x, min(r, x.shape[1] // 2))), arrays[key], MERGE)


def _blocks(attention: Tensor, rows: int = 7):
    for end in range(attention.shape[-1], 0, -rows):
        yield attention[:, :, max(0, end - rows) : end, :end]


def _importance(arrays) -> None:
    raw = torch.from_numpy(arrays["raw"])
    size = raw.shape[-1]

    def score(logits: Tensor, hidden: Tensor | None = None, temperature: float = 0.1, **options) -> Tensor:
        n = logits.shape[-1]
        blind = torch.ones(n, n, dtype=torch.bool).triu(1)
        if hidden is not None:
            blind = blind | hidden[:, None, None]
        attention = (logits.masked_fill(blind, float("-inf")) / temperature).softmax(-1)
        return pagerank(torch.ones(len(logits), n), _blocks(attention), **options)

    _close(score(raw), arrays["imp_full"], SCORE)
    variants = {"imp_tau1": dict(temperature=1.0), "imp_iters1": dict(iterations=1), "imp_d015": dict(damping=0.15)}
    for name, options in variants.items():
        if name in arrays:
            _close(score(raw, **options), arrays[name], SCORE)
    for name in [key for key in arrays if key.startswith("keepmask_")]:
        kept = torch.from_numpy(arrays[name])
        assert kept.shape[1] == size
        _close(score(raw, ~kept), arrays[name.replace("keepmask", "imp_masked")], SCORE)
        index = torch.from_numpy(arrays[name.replace("keepmask", "kept_idx")])
        _close(score(raw[:, :, index][..., index]), arrays[name.replace("keepmask", "imp_removed")], SCORE)


def _schedule(arrays) -> None:
    for key in [key for key in arrays if key.endswith("_rate")]:
        rate, prefix = arrays[key], key.removesuffix("rate")
        start = int((rate < 1).argmax())
        stop = start + round(1 / (1 - rate[start]))
        depth = len(rate)
        for layer in range(depth):  # what a layer decides is what the next one sees
            assert scheduled(10**6, layer + 1, start, stop) == int(rate[layer] * 10**6)
        prune = PageRankPrune()
        prune.setup(_Depth(depth))
        assert prune.span == (start, stop)
        assert prune.layers == tuple(range(start + 1, stop + 1))
        for name in [name for name in arrays if name.startswith(prefix) and name.endswith("_seen")]:
            seen = arrays[name].tolist()
            assert [scheduled(seen[0], layer, start, stop) for layer in range(depth)] == seen
            after = arrays[name.replace("_seen", "_after")].tolist()
            assert [scheduled(seen[0], layer + 1, start, stop) for layer in range(depth)] == after


class _Depth:
    """The parts of a model that the schedule reads."""

    def __init__(self, depth: int):
        self.model = self.language_model = self
        self.config = SimpleNamespace(model_type="llava")
        self.layers = range(depth)


# --- whole decoders --------------------------------------------------------------------------------------------------


@dataclass
class _Feed(Compressor):
    """Sends given tokens instead of an image's."""

    features: Tensor = None

    def compress(self, image) -> Compressed:
        return Compressed(self.features)


@dataclass
class _Forced(PageRankPrune):
    """Keeps what it is told, whatever the scores."""

    masks: Tensor = None

    def retain(self, tokens) -> Tensor:
        return self.masks[tokens.layer - 1][tokens.origin - self.shift(tokens)]

    def shift(self, tokens) -> Tensor:
        return (tokens.origin > self.end) * self.gone


@dataclass
class _Noted(PageRankPrune):
    """Notes what it keeps."""

    def retain(self, tokens) -> Tensor:
        keep = super().retain(tokens)
        self.kept[tokens.layer] = int((keep & (tokens.image > 0)).sum())
        return keep


def _model(arrays) -> LlavaForConditionalGeneration:
    """A LLaVA around the decoder of the file: its tower is only there to make room for enough visual tokens."""
    option = dict(re.findall(r"([a-z_]+?)_?([\de.-]+)(?= |$)", str(arrays["config"])))
    number = {name: int(float(value)) for name, value in option.items() if name != "rms"}
    qwen = any(key.endswith("q_proj.bias") for key in arrays)
    text = (Qwen2Config if qwen else LlamaConfig)(
        hidden_size=number["hidden"],
        intermediate_size=number["inter"],
        num_hidden_layers=number["layers"],
        num_attention_heads=number["heads"],
        num_key_value_heads=number["kv"],
        vocab_size=number["vocab"] + 1,  # the last id is the placeholder
        rope_parameters={"rope_type": "default", "rope_theta": float(option["rope_theta"])},
        rms_norm_eps=float(option["rms"]),
        tie_word_embeddings=False,
    )
    side = int(np.ceil(int(arrays["V"]) ** 0.5)) + 1
    vision = CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=4 * side,
        patch_size=4,
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(text_config=text, vision_config=vision, image_token_id=number["vocab"])
    ).eval()
    state = model.state_dict()
    for key, value in arrays.items():
        if key.startswith("w::"):
            name = key.removeprefix("w::")
            name = name if name.startswith("lm_head") else name.replace("model.", "model.language_model.", 1)
            rows = state[name][: len(value)]
            assert rows.shape == value.shape, name
            rows.copy_(torch.from_numpy(value))
    return model


@torch.no_grad()
def _decoder(arrays) -> None:
    model = _model(arrays)
    begin, end = int(arrays["T1"]), int(arrays["T1"]) + int(arrays["V"])
    masks = torch.from_numpy(arrays[next(key for key in arrays if key.startswith("masks_layer1_"))])
    tokens = next(arrays[key] for key in ("decode_clean_tokens", "decode_tokens") if key in arrays)
    steps = next(arrays[key] for key in ("decode_clean_logits", "decode_logits") if key in arrays)
    plain = PageRankPrune()
    plain.setup(model)

    # As released: pruned tokens are hidden as keys and go on voting.
    scores, logits, last = _masked(model, torch.from_numpy(arrays["inputs_embeds"]), masks, plain)
    for before, now, score in zip([torch.ones_like(masks[0]), *masks], masks, scores, strict=False):
        if (before & ~now).any() and now[begin:end].any():  # small squares underflow in the release: those are ties
            assert score[begin:end][now[begin:end]].min() * 1.001 + 1e-18 >= score[before & ~now].max()
    _close(scores, arrays["importance_per_layer"], SCORE)
    _close(logits, arrays["logits"][0], LOGITS)
    _close(last, arrays["last_hidden"][0], LOGITS)

    # Removed by the engine: with the released keep sets it computes the same logits, and goes on computing them.
    room = (model.config.vision_config.image_size // model.config.vision_config.patch_size) ** 2
    ids = [arrays["ids1"][0], np.full(room, model.config.image_token_id), arrays["ids2"][0]]
    inputs = dict(
        input_ids=torch.from_numpy(np.concatenate(ids))[None],
        pixel_values=torch.zeros(1, 3, *[model.config.vision_config.image_size] * 2),
    )
    feed = _Feed(torch.from_numpy(arrays["inputs_embeds"])[0, begin:end])
    forced = _Forced(masks=masks)
    forced.end, forced.gone = begin + room - 1, room - (end - begin)
    with vlmslim.patch(model, [feed, forced]) as slim:
        out = model(**inputs)
        _close(out.logits[0, :begin, : arrays["logits"].shape[-1]], arrays["logits"][0, :begin], LOGITS)
        _close(out.logits[0, begin + room :, : arrays["logits"].shape[-1]], arrays["logits"][0, end:], LOGITS)
        assert slim.receipt.summary()["visual_tokens_per_layer"] == arrays["visual_count_per_layer"].tolist()
        now = out.logits[:, -1]
        for token, want in zip(tokens.tolist(), steps, strict=True):
            _close(now[0, : len(want)], want, LOGITS)
            assert want.argmax() == token
            now = model(torch.tensor([[token]]), **{KV_CACHE: kv_cache(out)}).logits[:, -1]
    with vlmslim.patch(model, feed):
        want = arrays["logits_noprune_last"]
        _close(model(**inputs).logits[0, -1, : len(want)], want, LOGITS)

    # Removed, with the survivors' own votes: the same counts.
    noted = _Noted()
    noted.kept = {}
    with vlmslim.patch(model, [feed, noted]) as slim:
        model(**inputs)
        assert slim.receipt.summary()["visual_tokens_per_layer"] == arrays["visual_count_per_layer"].tolist()
    assert noted.kept == {layer: int(arrays["visual_count_per_layer"][layer]) for layer in plain.layers}


def _masked(model, embeds: Tensor, masks: Tensor, prune: PageRankPrune) -> tuple[Tensor, Tensor, Tensor]:
    """The release's simulation, out of our own parts, with its keep sets: scores by layer, logits, last hidden."""
    lm, size = model.model.language_model, embeds.shape[1]
    position = torch.arange(size)[None]
    everyone = torch.ones(1, size, dtype=torch.bool)
    rope, hidden, scores = lm.rotary_emb(embeds, position), embeds, []
    for layer, alive in zip(lm.layers, [everyone[0], *masks], strict=False):
        attention = LayerAttention(layer.self_attn, layer.input_layernorm(hidden), rope)
        raw = attention.attend(everyone, None).logits(position)
        attention = (raw.masked_fill(~alive, float("-inf")) / prune.temperature).softmax(-1)
        scores.append(pagerank(torch.ones(1, size), _blocks(attention), iterations=prune.iterations)[0])
        visible = alive & torch.ones(size, size, dtype=torch.bool).tril()
        mask = torch.zeros(size, size).masked_fill(~visible, torch.finfo(torch.float32).min)
        hidden = layer(hidden, attention_mask=mask[None, None], position_embeddings=rope, position_ids=position)
    last = lm.norm(hidden)
    return torch.stack(scores), model.lm_head(last)[0, :, : model.config.text_config.vocab_size - 1], last[0]


__all__ = ["check"]
