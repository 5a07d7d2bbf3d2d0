"""What a patched model really did: the answer to "is it even on?"."""

from dataclasses import dataclass, field


@dataclass
class Receipt:
    """Counts since the patch, or since the last reset. Nothing in it is derived from what was asked for.

    method    : the method with all its options
    positions : "renumbered" or "original"
    backend   : attention implementation of the language model
    dtype     : of the language model's weights
    kv_bytes_per_token : bytes that one token takes in the KV cache of one layer
    layers    : number of decoder layers
    """

    method: str
    positions: str
    backend: str
    dtype: str
    kv_bytes_per_token: int
    layers: int
    images: int = 0
    visual_tokens: int = 0
    kept: int = 0
    requested: int = 0
    undecided: int = 0  # images whose count the method chose itself
    prompts: int = 0
    text_prompts: int = 0
    text_tokens: int = 0
    visual_tokens_per_layer: list[int] = field(default_factory=list)  # summed over prompts

    def reset(self) -> None:
        """Start counting anew."""
        for name in (
            "images",
            "visual_tokens",
            "kept",
            "requested",
            "undecided",
            "prompts",
            "text_prompts",
            "text_tokens",
        ):
            setattr(self, name, 0)
        self.visual_tokens_per_layer = [0] * self.layers

    def __post_init__(self):
        self.reset()

    def saw_image(self, tokens: int, requested: int | None, kept: int) -> None:
        """One image entered: how many tokens it had, how many were asked for, how many went on."""
        self.images += 1
        self.visual_tokens += tokens
        self.kept += kept
        self.requested += requested or 0
        self.undecided += requested is None

    def saw_prefill(self, text: list[int], visual: list[list[int]]) -> None:
        """A batch of prompts with images was prefilled.

        Args:
            text: text tokens of each row.
            visual: per decoder layer, visual tokens of each row.
        """
        self.prompts += len(text)
        self.text_tokens += sum(text)
        self.visual_tokens_per_layer = [
            total + sum(rows) for total, rows in zip(self.visual_tokens_per_layer, visual, strict=True)
        ]

    def saw_text(self, rows: int) -> None:
        """A batch without images passed through."""
        self.text_prompts += rows

    @property
    def had_effect(self) -> bool:
        """Whether a visual token was dropped anywhere."""
        return any(total < self.visual_tokens for total in self.visual_tokens_per_layer) and self.images > 0

    def summary(self) -> dict:
        """Means, ready for JSON: tokens per image, layers and bytes per prompt (padding not counted)."""
        images, prompts = max(self.images, 1), max(self.prompts, 1)
        per_layer = [total / prompts for total in self.visual_tokens_per_layer]
        text = self.text_tokens / prompts
        return {
            "method": self.method,
            "images": self.images,
            "prompts": self.prompts,
            "text_prompts": self.text_prompts,
            "visual_tokens": self.visual_tokens / images,
            "requested": self.requested / (self.images - self.undecided) if self.images > self.undecided else None,
            "kept": self.kept / images,
            "visual_tokens_per_layer": per_layer,
            "equivalent_tokens": sum(per_layer) / self.layers,
            "text_tokens": text,
            "kv_bytes": sum(v + text for v in per_layer) * self.kv_bytes_per_token,
            "had_effect": self.had_effect,
            "positions": self.positions,
            "backend": self.backend,
            "dtype": self.dtype,
        }

    def __str__(self) -> str:
        s = self.summary()
        if not self.images:
            return f"{self.method}: no image seen yet"
        return (
            f"{self.method}: {s['images']} images, {s['visual_tokens']:.1f} -> {s['kept']:.1f} visual tokens each, "
            f"{s['equivalent_tokens']:.1f} on average over the layers of a prompt, "
            f"{s['kv_bytes'] / 2**20:.2f} MiB of KV cache a prompt"
        )
