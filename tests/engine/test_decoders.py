"""Language models of many kinds: recomputed attention is the model's own, and what cannot be seen into is refused."""

from typing import ClassVar

import pytest
import torch
from compare import close
from decoders import DECODERS, llava_around, two_rows
from doubles import Halve
from torch import nn

import vlmslim
from vlmslim import Compressor


class Look(Compressor):
    """Notes what the last tokens of each row paid attention to in layer 1."""

    layers = (2,)
    seen: ClassVar[list]

    def retain(self, tokens):
        rows = torch.stack([tokens.last, tokens.last - 3], 1)
        self.seen.append((rows, tokens.attention(rows), tokens.attention(rows, end=int(rows.max()) + 1)))
        return torch.ones_like(tokens.mask)


@pytest.fixture(autouse=True)
def _nothing_seen_yet():
    Look.seen = []


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_recomputed_attention_is_the_decoders_own(name, padding):
    """With the keys of the KV cache and without, against the maps that the unpatched model returns."""
    inputs = two_rows(padding)
    maps = llava_around(name, "eager")(**inputs, output_attentions=True).attentions[1]
    model = llava_around(name)
    with vlmslim.patch(model, Look()):
        model(**inputs, use_cache=True)
        model(**inputs, use_cache=False)
    assert len(Look.seen) == 2
    for rows, got, start in Look.seen:
        want = maps.gather(2, rows[:, None, :, None].expand(-1, maps.shape[1], -1, maps.shape[-1]))
        assert want.amax() < 0.99 and want.std() > 0.02, "a flat map would prove nothing"
        close(got, want, 1e-4)
        close(start, want[..., : start.shape[-1]], 1e-4)


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_a_batch_of_any_decoder_is_its_rows(name):
    """FastV drops the same tokens whatever stands beside a row, and decodes on."""
    model, inputs = llava_around(name), two_rows("left")
    options = dict(max_new_tokens=3, do_sample=False, suppress_tokens=[0, 1, 98, 99])
    with vlmslim.patch(model, "fastv", keep=4) as slim:
        together = model.generate(**inputs, **options)[:, -3:]
        assert slim.receipt.had_effect
        for i in range(2):
            alone = {key: value[i : i + 1] for key, value in inputs.items()}
            real = alone["attention_mask"][0].bool()
            alone |= {key: alone[key][:, real] for key in ("input_ids", "attention_mask")}
            assert model.generate(**alone, **options)[0, -3:].tolist() == together[i].tolist()


@torch.no_grad()
def test_looking_does_not_touch_what_other_threads_use():
    """The attention module's configuration, hooks and weights are what they were while it is looked into."""
    model, inputs = llava_around("Cohere"), two_rows("left")
    attention = model.model.language_model.layers[1].self_attn
    seen, calls = [], []

    class Spying(Look):
        def retain(self, tokens):
            attention.register_forward_hook(lambda *_: calls.append(1))
            hook = attention.q_proj.register_forward_hook(lambda *_: seen.append(attention.config._attn_implementation))
            super().retain(tokens)
            hook.remove()
            return tokens.mask

    with vlmslim.patch(model, Spying()):
        model(**inputs)
    assert set(seen) == {"sdpa"} and not calls


class Plain(nn.Module):
    """An attention module that does not ask transformers how to attend."""

    def __init__(self, inner):
        super().__init__()
        self.config, self.project = inner.config, inner.o_proj

    def forward(self, hidden_states, position_embeddings=None, **kwargs):
        return self.project(hidden_states), None


def test_a_decoder_that_cannot_be_looked_into_is_refused_by_name():
    model = llava_around("Llama")
    model.model.language_model.layers[1].self_attn = Plain(model.model.language_model.layers[1].self_attn)
    before = dict(vars(model.model))
    for method in ("fastv", "todre", "aim"):
        with pytest.raises(TypeError, match="LlamaModel.*layer 1 .*before the language model"):
            vlmslim.patch(model, method, keep=4)
        assert vars(model.model) == before
    for method, options in (("divprune", {"keep": 4}), ("none", {})):
        with vlmslim.patch(model, method, **options):
            model(**two_rows("left"))


@pytest.mark.parametrize("name", ["OPT", "GPT2"])
def test_decoders_without_rotary_positions_are_refused_by_name(name):
    model = llava_around("Llama")
    model.model.language_model = nn.Module()
    model.model.language_model.layers = nn.ModuleList() if name == "OPT" else None
    with pytest.raises(TypeError, match="rotary positions"):
        vlmslim.patch(model, Halve())
