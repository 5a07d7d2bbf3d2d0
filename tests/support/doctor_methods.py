"""Honest methods for the doctor's tests; the faulty ones derive from them."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from vlmslim import Compressor
from vlmslim.compressor import resolve_keep


@dataclass
class Plain(Compressor):
    """Before the language model: tokens at even distances."""

    keep: int | float = 0.25

    def index(self, n):
        k = resolve_keep(self.keep, n)
        return torch.arange(k) * n // k

    def compress(self, image):
        return image.pick(self.index(len(image.features)))


@dataclass
class Original(Plain):
    """The same at the caller's positions."""

    positions: str = "original"


@dataclass
class Late(Compressor):
    """Between layers: the first tokens of each image."""

    layers: ClassVar = (2,)
    keep: int | float = 0.25

    def score(self, tokens):
        return -tokens.origin.float()

    def retain(self, tokens):
        return tokens.top(self.score(tokens), self.keep)


@dataclass
class Fixed(Compressor):
    """Between layers: nothing but text, without a budget, before a layer that only the model tells."""

    def setup(self, model):
        self.layers = (len(model.model.language_model.layers) // 2,)

    def retain(self, tokens):
        return tokens.mask & (tokens.image == 0)
