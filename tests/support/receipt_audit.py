"""Expected receipts, counted without the receipt."""

import math
from dataclasses import dataclass, field

import torch
from compare import lengths
from prompts import ROWS, SEVERAL, Clip, all_visual, batch, visual, words
from tiny import BOS, family_of
from torch import nn

import vlmslim
from vlmslim import Compressor
from vlmslim.engine.families import kv_cache
from vlmslim.patching import Slim


@dataclass
class ReceiptAudit:
    """Audits a receipt against what the hooks counted, one prompt at a time.

    mismatches : one message for each field that differs
    """

    slim: Slim
    mismatches: list[str] = field(default_factory=list)
    _text_prompts: int = 0
    _images: list[tuple] = field(default_factory=list)
    _text: list[int] = field(default_factory=list)
    _computed: list[list[int]] = field(default_factory=list)  # per prompt and layer, the tokens it computed
    _held: list[list[int]] = field(default_factory=list)  # per prompt and layer, the tokens in its KV cache

    @torch.no_grad()
    def prefill(self, inputs: dict) -> None:
        """Prefill one prompt, and compare the receipt's last entry with it."""
        layers = self.slim.model.model.language_model.layers
        computed = [0] * len(layers)
        hooks = [layer.register_forward_pre_hook(_counter(computed, i)) for i, layer in enumerate(layers)]
        out = self.slim.model(**inputs, use_cache=True)
        for hook in hooks:
            hook.remove()
        media = visual(inputs)
        if not media:
            self._text_prompts += 1
            return
        last, held, placeholders = self.slim.receipt.last, lengths(kv_cache(out)), all_visual(inputs)
        (images,), text = last.images, int((~placeholders).sum())
        visits = sum(stage.acts_before_llm + len(stage.layers) for stage in self.slim.stages)
        self._compare(
            {
                "text": (last.text, [text]),
                "tokens": ([image.tokens for image in images], [len(columns) for columns in media]),
                "kept": (sum(image.kept for image in images), computed[0] - text),
                "requested": ([image.requested for image in images], [self._requested(len(x)) for x in media]),
                "visual": (last.visual, [[n - text] for n in computed]),
                "sequence": (last.sequence, computed),
                "kv": (last.kv, held),
                "timers": (len(last.timers), visits),
            }
        )
        self._images += images
        self._text.append(text)
        self._computed.append(computed)
        self._held.append(held)

    def summary(self) -> None:
        """Compare the receipt's means with the prompts so far, which must be all that the receipt has seen."""
        receipt, prompts = self.slim.receipt, len(self._text)
        said = receipt.summary()
        tokens, asked, kept = zip(*self._images, strict=True)
        text = sum(self._text) / prompts
        sequence, held = ([sum(x) / prompts for x in zip(*rows, strict=True)] for rows in (self._computed, self._held))
        seen = [n - text for n in sequence]
        counted = {
            "images": len(tokens),
            "prompts": prompts,
            "text_prompts": self._text_prompts,
            "text_tokens": text,
            "visual_tokens_per_layer": seen,
            "equivalent_tokens": sum(seen) / len(seen),
            "sequence_per_layer": sequence,
            "kv_per_layer": held,
            "kv_bytes": sum(held) * receipt.kv_bytes_per_token,
            "had_effect": min(seen) * prompts < sum(tokens) - 0.5,
            **self._settings(),
        }
        for name, values in (
            ("visual_tokens", tokens),
            ("kept", kept),
            ("requested", [n for n in asked if n is not None]),
        ):
            counted[name] = sum(values) / len(values) if values else None
            counted[f"{name}_range"] = [min(values), max(values)] if values else None
        self._compare({f"summary of {name}": (said[name], value) for name, value in counted.items()})

    def _settings(self) -> dict[str, str]:
        """Return method, positions, back end and dtype as they are in the model."""
        language, stages = self.slim.model.model.language_model, self.slim.stages
        before = next((s.method.positions for s in stages if s.acts_before_llm), "")
        closes = any(s.layers and s.method.layer_positions == "renumbered" for s in stages)
        words = {
            ("", False): "original",
            ("", True): "renumbered",
            ("renumbered", True): "renumbered, between layers too",
            ("original", True): "original, between layers renumbered",
        }
        return {
            "method": str(self.slim),
            "positions": words.get((before, closes), before),
            "backend": language.config._attn_implementation,
            "dtype": str(next(language.parameters()).dtype).removeprefix("torch."),
        }

    def _requested(self, n: int) -> int | None:
        """Return what was asked of an image of `n` tokens: before the language model, or else in the last stage."""
        stage = next((stage for stage in self.slim.stages if stage.acts_before_llm), self.slim.stages[-1])
        return stage.method.requested(n)

    def _compare(self, pairs: dict[str, tuple]) -> None:
        """Note the fields of which the receipt says something else than was counted: name -> (said, counted)."""
        self.mismatches += [
            f"{name}: {said}, not {counted}" for name, (said, counted) in pairs.items() if not _equal(said, counted)
        ]


def _counter(computed: list[int], i: int):
    """Return a hook that adds the tokens that layer `i` computes."""

    def count(layer: nn.Module, args: tuple) -> None:
        computed[i] += args[0].shape[1]

    return count


def _equal(a: object, b: object) -> bool:
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, float) or isinstance(b, float):  # means may have been added up in another order
        return None not in (a, b) and math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-9)
    return a == b


def audited(model: nn.Module, method: Compressor | list[Compressor]) -> list[str]:
    """Return what is wrong in the receipt of a few single prompts under a method."""
    rows = [ROWS[0], SEVERAL[0], [BOS, *words(3, 7)]]
    if family_of(model) == "onevision":
        rows.append([BOS, *words(4, 3), Clip(0), *words(5, 2)])
    with vlmslim.patch(model, method) as slim:
        audit = ReceiptAudit(slim)
        for row in rows:
            audit.prefill(batch(model, [row]))
        audit.summary()
    return audit.mismatches
