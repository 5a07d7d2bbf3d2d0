"""CDPruner: "Beyond Attention or Similarity: Maximizing Conditional Diversity" (NeurIPS 2025, arXiv 2506.10967)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vlmslim.compressor import ImageTokens, Keep, check_choices
from vlmslim.engine.families import feature_layers
from vlmslim.methods._clip import clip_of
from vlmslim.methods._question import PromptReader, check_tokenizer, without_answer_format
from vlmslim.methods._selection import Pool, Selection, check_selection
from vlmslim.ops.greedy import Determinant, cosine_matrix, cosines, greedy
from vlmslim.ops.ranking import full_precision


@dataclass
class CDPruner(Selection):
    """Keep the tokens that span the largest volume, each as long as it is relevant to the question.

    The volume is the determinant of a kernel: cosines of projected tokens times the relevance of both. Its greedy
    maximum is a determinantal point process (algorithm 1 of the paper). Relevance is *minus* the cosine of a patch and
    the question in the space of CLIP, scaled to (0, 1] over the image: in that space patches without relation to a text
    have the higher cosines. `sign="plus"` is what the paper's equations say.

    mode="released" follows the release (commit 9541616), for LLaVA-1.5 and LLaVA-NeXT, with these faults: padded
    patches of anyres images compete; every view keeps the same count, rounded down; newlines are gone; a question of
    more than 77 tokens is cut without new ends, so that its first segment says nothing. mode="corrected", the default,
    chooses among the image's own tokens, shares `keep` out over the views by their sizes, and gives each segment a
    start and an end. In both modes relevance is scaled within one image, not over a batch; scores are in fp32; ties go
    to the lower index; and what the release answers with NaN, and then with too few tokens, has a rule: copies and
    tokens that the kept ones span come last, by relevance; equal relevances count as 1, and so do those to a prompt
    without a question; a zero token is like no other.

    keep       : visual tokens to keep per image, a count or a share
    mode       : "corrected" or "released"
    relevance  : to the question, by "clip" (the text tower that belongs to the vision tower), or by "llm" (the mean of
                 the question's input embeddings against projected tokens, the paper's way for other models), or
                 "none" (diversity alone). "auto" is "clip" where the projector reads one layer of a CLIP tower, and
                 "llm" elsewhere
    sign       : of the cosine, "minus" or "plus"; "auto" is "minus" for "clip" (as released) and "plus" for "llm"
    theta      : None multiplies with relevance r (as released); in [0, 1), with exp(r x theta / (2 - 2 theta))
    clip       : the CLIP of the vision tower: hub id, folder, or an open_clip name, as for `recoverable`. None: the
                 tiny CLIP for bundled checkpoints, OpenAI's L/14 at 336 pixels for the tower of LLaVA-1.5
    tokenizer  : the language model's, to read the prompt: hub id, folder, or an object with `decode`. None: that of
                 the checkpoint
    turn       : regular expression of a user's turn whose group 1 is the text, for unknown chat templates
    pool       : search each "view" by itself (as released), or the "image" as a whole
    newline    : newline tokens, within the budget: "rows" keeps that of each row that keeps a token, "drop" none
    positions  : rotary positions: "auto", "original" or "renumbered" (as released)
    """

    keep: Keep = 0.111
    mode: str = "corrected"
    relevance: str = "auto"
    sign: str = "auto"
    theta: float | None = None
    clip: str | None = None
    tokenizer: Any = field(default=None, repr=False)
    turn: str | None = None
    pool: str = "view"
    newline: str = "rows"

    def __post_init__(self) -> None:
        self.reads_prompt = self.relevance != "none"
        check_selection(self)
        check_choices(self, relevance=("auto", "clip", "llm", "none"), sign=("auto", "minus", "plus"))
        check_choices(self, pool=("view", "image"))
        check_tokenizer(self.tokenizer)
        if self.theta is not None and not 0 <= self.theta < 1:
            raise ValueError(f"theta={self.theta}: give a number in [0, 1), or None to multiply with relevance itself")

    def setup(self, model: Any) -> None:
        """Load what relevance needs.

        Raises:
            ValueError: the CLIP does not belong to the vision tower, or no default for `clip` or `tokenizer` is known.
        """
        super().setup(model)
        fits = model.config.vision_config.model_type == "clip_vision_model" and len(feature_layers(model.config)) == 1
        if self.relevance == "auto":
            self.relevance, self.substitutes = ("clip", ()) if fits else ("llm", ("embeddings",))
        if self.relevance == "clip":
            if not fits:
                raise ValueError(
                    "relevance='clip' needs a projector that reads one layer of a CLIP tower, and this model has none; "
                    "use relevance='llm'"
                )
            self.clip_text = clip_of(model, self.clip)
        if self.relevance != "none":
            self.reader = PromptReader(model, self.tokenizer, self.turn)

    def read(self, image: ImageTokens) -> tuple[Tensor, ...]:
        """Return features, and relevance scaled over the image; without a question, all tokens are equally relevant."""
        x = image.features
        text = "" if self.relevance == "none" else without_answer_format(self.reader.text(image))
        if not text:
            return x, torch.ones(len(x), device=x.device)
        if self.relevance == "clip":
            self.clip_text.to(image.tower.device)
            patches = self.clip_text.project(image.tower_tokens, norm=True)
            texts = self.clip_text.embed_segments(text, self.mode == "released")
        else:
            patches, texts = x, self.reader.embed(text, x.device).float().mean(0, keepdim=True)
        minus = self.sign == "minus" or (self.sign == "auto" and self.relevance == "clip")
        image.score = scaled(cosines(patches, texts).mean(1) * (-1 if minus else 1), image.grid[:, 0] >= 0)
        return x, image.score

    def search(self, k: int, pools: Sequence[Pool], *read: Tensor) -> Tensor:
        """Search for the largest volume."""
        features, relevance = read
        if self.theta is not None:
            steepness = self.theta / (2 - 2 * self.theta)
            relevance = ((relevance - relevance.amax(1, keepdim=True)) * steepness).exp()  # a factor changes no pick
        features, weight = self.compared(features)
        return conditional_diversity(features, relevance if weight is None else relevance * weight, k)


@full_precision
def scaled(score: Tensor, counts: Tensor) -> Tensor:
    """Scale scores (n,) to (0, 1] over the tokens that count (n,) bool; 1 if all are equal."""
    low = score.masked_fill(~counts, float("inf")).min()
    spread = score.masked_fill(~counts, float("-inf")).max() - low
    return torch.where(spread > 0, (score - low + 1e-6) / spread.clamp(min=1e-30), 1.0)


@full_precision
def conditional_diversity(x: Tensor, relevance: Tensor, k: int) -> Tensor:
    """Select tokens greedily by the determinant of a kernel of cosines and relevance.

    Args:
        x: (b, n, d) tokens.
        relevance: (b, n), not negative.
        k: number of picks, 1 <= k <= n.

    Returns:
        (b, k) indices in the order of selection; the first j of them are the selection for k = j.
    """
    r, kernel = relevance.float(), cosine_matrix(x)
    # Exactly 1, because the diagonal decides the first pick: where all are equally relevant, rounding would decide it.
    diagonal = kernel.diagonal(dim1=1, dim2=2)
    diagonal.masked_fill_(diagonal > 0, 1)  # that of a zero token stays 0
    kernel = kernel.mul_(r[:, :, None]).mul_(r[:, None])  # in place, because new memory takes longer
    return greedy(Determinant(kernel, r / r.amax(1, keepdim=True).clamp(min=1e-30), k), k)
