"""What a receipt ought to say, counted without it."""

import math
from dataclasses import dataclass, field

from torch import Tensor, nn
from transformers import Cache

from vlmslim.patching import Slim
from vlmslim.receipt import Receipt


def settings(slim: Slim) -> dict[str, str]:
    """Method, positions, back end and dtype as they are in the model."""
    language = slim.model.model.language_model
    return {
        "method": str(slim),
        "positions": next((s.method.positions for s in slim.stages if s.acts_before_llm), "original"),
        "backend": slim.model.config.get_text_config()._attn_implementation,
        "dtype": str(next(language.parameters()).dtype).removeprefix("torch."),
    }


def requested(slim: Slim, n: int) -> int | None:
    """What was asked of an image of `n` tokens: at the entrance, or failing that in the last pruned layer."""
    stage = next((s for s in slim.stages if s.acts_before_llm), slim.stages[-1])
    return stage.method.requested(n)


@dataclass
class Told:
    """Single prompts, and what is wrong in what the receipt says of them.

    wrong : the entries that are, in words
    """

    slim: Slim
    wrong: list[str] = field(default_factory=list)
    _images: list[tuple] = field(default_factory=list)
    _text: list[int] = field(default_factory=list)
    _computed: list[list[int]] = field(default_factory=list)
    _held: list[list[int]] = field(default_factory=list)

    def prompt(self, visual: Tensor, media: int, computed: list[int], cache: Cache) -> None:
        """One prompt has just been prefilled.

        Args:
            visual: (L,) bool, its placeholders.
            media: its pictures and videos.
            computed: per layer, the tokens that it really computed.
            cache: as it is now.
        """
        last, text = self.slim.receipt.last, int((~visual).sum())
        (images,) = last.images
        asked = [requested(self.slim, image.tokens) for image in images]
        held = [layer.keys.shape[-2] for layer in cache.layers]
        worked = sum(stage.acts_before_llm + len(stage.layers) for stage in self.slim.stages)
        pairs = {
            "text": (last.text, [text]),
            "images": (len(images), media),
            "tokens": (sum(image.tokens for image in images), int(visual.sum())),
            "kept": (sum(image.kept for image in images), computed[0] - text),
            "requested": ([image.requested for image in images], asked),
            "visual": (last.visual, [[n - text] for n in computed]),
            "sequence": (last.sequence, computed),
            "kv": (last.kv, held),
            "spans": (len(last.spans), worked),
        }
        self._compare(pairs)
        self._images += images
        self._text.append(text)
        self._computed.append(computed)
        self._held.append(held)

    def summary(self, receipt: Receipt, text_prompts: int) -> None:
        """Those prompts, and some without images, are all that the receipt has seen: hold its means against them."""
        said, prompts = receipt.summary(), len(self._text)
        tokens, asked, kept = zip(*self._images, strict=True)
        text = sum(self._text) / prompts
        sequence, held = ([sum(x) / prompts for x in zip(*rows, strict=True)] for rows in (self._computed, self._held))
        visual = [n - text for n in sequence]
        ours = {
            "images": len(tokens),
            "prompts": prompts,
            "text_prompts": text_prompts,
            "text_tokens": text,
            "visual_tokens_per_layer": visual,
            "equivalent_tokens": sum(visual) / len(visual),
            "sequence_per_layer": sequence,
            "kv_per_layer": held,
            "kv_bytes": sum(held) * receipt.kv_bytes_per_token,
            "had_effect": min(visual) * prompts < sum(tokens) - 0.5,
            **settings(self.slim),
        }
        for name, values in (
            ("visual_tokens", tokens),
            ("kept", kept),
            ("requested", [n for n in asked if n is not None]),
        ):
            ours[name] = sum(values) / len(values) if values else None
            ours[f"{name}_range"] = [min(values), max(values)] if values else None
        self._compare({f"summary of {name}": (said[name], value) for name, value in ours.items()})

    def _compare(self, pairs: dict[str, tuple]) -> None:
        """Each what the receipt says and what is true."""
        self.wrong += [f"{name}: {said}, not {true}" for name, (said, true) in pairs.items() if not _alike(said, true)]


def _alike(a: object, b: object) -> bool:
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_alike, a, b))
    if isinstance(a, float) or isinstance(b, float):  # means may have been added up in another order
        return None not in (a, b) and math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-9)
    return a == b


def counted(layers: nn.ModuleList, computed: list[int]) -> list:
    """Hooks that add up in `computed` the tokens that every layer computes."""

    def counter(i: int):
        def count(module, args):
            computed[i] += args[0].shape[1]

        return count

    return [layer.register_forward_pre_hook(counter(i)) for i, layer in enumerate(layers)]
