"""Recoverable Compression: "A Multimodal Vision Token Recovery Mechanism Guided by Text Information".

AAAI 2025, arXiv 2409.01179.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmslim.compressor import Compressed, Compressor, ImageTokens, Keep, check_choices, check_keep, resolve_keep
from vlmslim.methods._clip import clip_of
from vlmslim.methods._question import PromptReader, check_tokenizer
from vlmslim.methods.recoverable.lof import count_outliers
from vlmslim.methods.recoverable.merging import Groups, at_least_tiny, clusters, parts_of, top
from vlmslim.ops.budgets import largest_remainder, share_out
from vlmslim.ops.ranking import full_precision


@dataclass(frozen=True)
class Reading:
    """The options of `Recoverable` in which the paper's description and the released code differ."""

    text_source: str
    text_pool: str
    recovery: str
    neighbours: Sequence[int]
    centres: str
    keys: str
    extra: str


PRESETS = {
    "corrected": Reading("question", "eot", "minimum", (20, 20, 10), centres="rest", keys="own", extra="keep"),
    "released": Reading("system", "last_pad", "minimum", (20, 20, 10), centres="width", keys="shifted", extra="drop"),
    "released_alt": Reading("system", "last_pad", "all", (10, 10, 10), centres="image", keys="shifted", extra="keep"),
}


@dataclass
class Recoverable(Compressor):
    """Keep the tokens that CLS looks at and those that resemble the question; merge the others into a few.

    1. Visual filter: keep the tokens of highest CLS attention, as many as there are outliers (by local outlier
       factor) among the attention values.
    2. Text recovery: of the others, keep those most similar to the question, as many as their outliers number.
    3. Merging: of what is left, the tokens of highest CLS attention become centres. Each centre takes in the
       attention-weighted sum of its 32 most similar tokens. One extra token is the attention-weighted sum of all
       tokens that are no centres.

    Kept tokens stay in reading order, and merged ones follow. The method finds the counts itself, image by image
    (about a tenth of LLaVA-1.5's tokens). With `keep`, the counts are `shares` of that budget, which is met exactly.

    The released code (commit d927594) differs from its own description in five places. `preset="corrected"`, the
    default, follows the description. `preset="released"` follows the code, and `"released_alt"` follows the second
    routine in its file, which is commented out there. The two presets reproduce these faults:

    - the "question" is the first line of the decoded prompt, which is `<s>` and the system prompt, special tokens and
      blanks included (`text_source="system"`);
    - the text is pooled at the last padding token instead of at its end (`text_pool="last_pad"`), and so depends on
      `pad_length`, whose released value is unknown;
    - the share of outliers is multiplied by the feature width to get the number of centres (`centres="width"`); the
      second routine multiplies by the image's tokens ("image");
    - the keys of the merged tokens are read at wrong rows, those of other patches (`keys="shifted"`);
    - without a centre the extra token is dropped (`extra="drop"`, first routine only).

    Every preset differs from the release in this: scores are in fp32 and outliers in fp64; ties go to the lower
    index; the vision tower runs once instead of twice; each prompt has its own question, in any batch; clusters and
    centres are capped by the number of tokens; an image never ends up empty, because the extra token then stays. Under
    anyres, which the release does not support, every crop is filtered, recovered and merged by itself, newlines are
    dropped first, and `keep` is shared out over the crops by size. Towers without CLS are refused, and so is
    LLaVA-OneVision, because it resizes tokens after the projector.

    keep        : visual tokens to send per image, a count or a share; None lets the method decide
    clip        : the CLIP whose vision tower the model uses: a HF `CLIPModel` (hub id or folder), an open_clip folder,
                  "hf-hub:org/name", or "NAME:PRETRAINED" with open_clip's name and its tag or weights file. None: the
                  tiny CLIP for bundled checkpoints, OpenAI's L/14 at 336 pixels for the tower of LLaVA-1.5
    tokenizer   : the language model's, to read the prompt: hub id, folder, or an object with `decode`. None: that of
                  the checkpoint
    preset      : "corrected", "released" or "released_alt": the values of options below that are None
    shares      : shares of `keep` for filter, recovery and merging
    text_source : "question" (first line of the user's last turn, or the question after a leading `Context:` or
                  `Hint:`), "user" (all of that turn), or "system" (first line of the decoded prompt, as it is)
    turn        : regular expression of a user's turn whose group 1 is the text, for chat templates unknown to us
    text_pool   : "eot" (CLIP's own text embedding) or "last_pad"
    pad_length  : tokens that the text is padded to, for "last_pad"; None: as many as the CLIP reads
    patch_norm  : apply the tower's post-layernorm before patches are projected
    neighbours  : neighbours of the outlier test, for filter, recovery and centres
    recovery    : values among which text outliers are counted: "minimum" (all, with the minimum in place of the
                  filter's picks), "rest" (without those), "all" (unchanged; a token may be picked twice)
    centres     : what the share of outliers is multiplied by: "rest" (the tokens left, so it is the number of
                  outliers), "selected" (the kept tokens), "image" (all tokens) or "width"
    keys        : "own" or "shifted"
    extra       : the extra token if there is no centre: "keep" or "drop"
    cluster     : tokens that a centre takes in
    text_weight : weight of the text similarity against that of keys, in forming clusters
    """

    reads_back = "outliers decide how many tokens stay"

    tower_layers = (-1,)
    needs_cls: ClassVar = True
    needs_patches: ClassVar = True

    keep: Keep | None = None
    clip: str | None = None
    tokenizer: Any = field(default=None, repr=False)
    preset: str = "corrected"
    shares: Sequence[float] = (0.5, 0.3, 0.2)
    text_source: str | None = None
    turn: str | None = None
    text_pool: str | None = None
    pad_length: int | None = None
    patch_norm: bool = False
    neighbours: Sequence[int] | None = None
    recovery: str | None = None
    centres: str | None = None
    keys: str | None = None
    extra: str | None = None
    cluster: int = 32
    text_weight: float = 50.0

    def __post_init__(self) -> None:
        self.reads_prompt = True
        if self.keep is not None:
            check_keep(self.keep)
        check_choices(self, preset=tuple(PRESETS))
        for f in fields(Reading):
            if getattr(self, f.name) is None:
                setattr(self, f.name, getattr(PRESETS[self.preset], f.name))
        self.reading = Reading(**{f.name: getattr(self, f.name) for f in fields(Reading)})
        check_choices(
            self.reading,
            text_source=("question", "user", "system"),
            text_pool=("eot", "last_pad"),
            recovery=("minimum", "rest", "all"),
            centres=("rest", "selected", "image", "width"),
            keys=("own", "shifted"),
            extra=("keep", "drop"),
        )
        self.shares, neighbours = tuple(self.shares), self.reading.neighbours
        if len(self.shares) != 3 or min(self.shares) < 0 or abs(sum(self.shares) - 1) > 1e-6:
            raise ValueError(f"shares={self.shares}: give three shares, of filter, recovery and merging, that sum to 1")
        if len(neighbours) != 3 or min(neighbours) < 1:
            raise ValueError(
                f"neighbours={neighbours}: give three integers from 1 on, for filter, recovery and centres"
            )
        for name, least in (("cluster", 1), ("pad_length", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value!r}: give an integer from {least} on")
        check_tokenizer(self.tokenizer)
        if self.turn is not None and _groups(self.turn) != 1:
            raise ValueError(f"turn={self.turn!r}: give a regular expression with exactly one group, the user's text")

    def setup(self, model: Any) -> None:
        """Load the CLIP and the tokenizer, and check that they belong to the model.

        Raises:
            ValueError: the model is a OneVision, or feeds the CLS token to the language model; its vision tower is
                not the CLIP's; or no default for `clip` or `tokenizer` is known.
        """
        if model.config.model_type == "llava_onevision":
            raise ValueError(
                "Recoverable merges vision-tower tokens, and LLaVA-OneVision resizes tokens after the projector; use "
                "another method with this checkpoint"
            )
        if getattr(model.config, "vision_feature_select_strategy", "default") != "default":
            raise ValueError(
                "Recoverable needs vision_feature_select_strategy='default', and this checkpoint feeds CLS to the "
                "language model as one more visual token; use another method with it"
            )
        self.clip_text = clip_of(model, self.clip)
        if self.pad_length is not None and self.pad_length > self.clip_text.context:
            raise ValueError(
                f"pad_length={self.pad_length}: this CLIP reads {self.clip_text.context} tokens; use at most these"
            )
        self.reader = PromptReader(model, self.tokenizer, self.turn)

    def compress(self, image: ImageTokens) -> Compressed:
        """Filter, recover and merge one image."""
        return self.compress_images([image])[0]

    def compress_images(self, images: list[ImageTokens]) -> list[Compressed]:
        """Compress each image by itself; the images of one prompt share the embedding of its text."""
        embedded: dict[str, Tensor] = {}
        results = []
        for image in images:
            k = None if self.keep is None else resolve_keep(self.keep, len(image.features))
            patches = (image.grid[:, 0] >= 0).nonzero()[:, 0]
            if k is not None and k >= len(patches):  # nothing to drop but newlines
                newlines = (image.grid[:, 0] < 0).nonzero()[:, 0]
                results.append(image.pick(torch.cat([patches, newlines[: k - len(patches)]]).sort().values))
                continue
            text = self.text_of(image)
            if text not in embedded:
                self.clip_text.to(image.tower.device)
                embedded[text] = self.clip_text.embed(text, self.reading.text_pool, self.pad_length)
            results.append(self._compress(image, k, embedded[text]))
        return results

    def text_of(self, image: ImageTokens) -> str:
        """Find the text to compare the image's patches with, in its prompt."""
        return self.reader.text(image, self.reading.text_source)

    def _compress(self, image: ImageTokens, k: int | None, text: Tensor) -> Compressed:
        """Compress an image to k tokens, or to as many as the method finds, by the embedding of a text (d,)."""
        device = image.features.device
        crop, row, column = image.grid.cpu().unbind(1)
        attention, similarity, keys = self._scores(image, text)
        crops = [(crop == i).nonzero()[:, 0] for i in crop[crop >= 0].unique().tolist()]
        budgets = [None] * len(crops) if k is None else share_out(k, [len(slots) for slots in crops])
        places, kept, groups, merged = [], [], [], []
        for slots, budget in zip(crops, budgets, strict=True):
            at = crop[slots].to(device), (row * image.side + column)[slots].to(device)
            x, given = image.tower[at].float(), (attention[at], similarity[at], keys[at])
            if budget != 0:
                with torch.autocast(device.type, enabled=False):
                    groups.append(self.groups(*given, x.shape[1], budget))
                    merged.append(groups[-1].sums(x))
                places.append(slots)
                kept.append(slots.to(device)[groups[-1].kept])
        if not sum(map(len, kept + merged)):  # an image never ends up empty
            groups[-1] = Groups.of_all(given[0])
            merged = [groups[-1].sums(x)]
        index = torch.cat(kept).sort().values
        features = image.features[index]
        if len(vectors := torch.cat(merged)):
            features = torch.cat([features, image.project(vectors).to(features)])
        return Compressed(features, made_of=partial(parts_of, len(image.features), index, places, groups))

    def _scores(self, image: ImageTokens, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return CLS attention (c, p), text similarity (c, p) and keys (c, p, v) of every patch, in fp32."""
        layer, hidden = image.recorded_layers[-1]
        with torch.no_grad():
            q, k = image.qk(-1)
            last = layer(hidden, attention_mask=None)  # the output of the tower's last layer
            last = last[0] if isinstance(last, tuple) else last
            patches = self.clip_text.project(last[:, 1:], self.patch_norm)
        return joint_cls_attention(q, k), text_similarity(patches, text), k[:, :, 1:].transpose(1, 2).flatten(2).float()

    def recover(
        self, x: Tensor, attention: Tensor, similarity: Tensor, keys: Tensor, budget: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Apply the method to the tokens of one crop.

        Args:
            x: (n, v) vision-tower tokens, fp32.
            attention: (n,) as for `groups`, and so are the others.
            similarity: (n,).
            keys: (n, v).
            budget: number of tokens, or None.

        Returns:
            The kept tokens (m,), ascending, and the merged ones (j, v); j may be zero.
        """
        groups = self.groups(attention, similarity, keys, x.shape[1], budget)
        return groups.kept, groups.sums(x)

    def groups(
        self, attention: Tensor, similarity: Tensor, keys: Tensor, width: int, budget: int | None = None
    ) -> Groups:
        """Decide for one crop which tokens stay and which are summed.

        Args:
            attention: (n,) what CLS pays to each token.
            similarity: (n,) to the text.
            keys: (n, v) of the tower's last layer.
            width: v, the width of a vision-tower token.
            budget: number of tokens to end up with, at most n; None to let the outliers decide.
        """
        n, device = len(attention), attention.device
        if budget == n:
            none = torch.arange(0, device=device)
            return Groups(torch.arange(n, device=device), none, none, keys.new_zeros(0, 0))
        parts = None if budget is None else largest_remainder(budget, self.shares)
        seen = top(attention, count_outliers(attention, self.reading.neighbours[0]) if parts is None else parts[0])
        found = self.recovered(similarity, seen, None if parts is None else parts[1])
        free = torch.ones(n, dtype=torch.bool, device=device).index_fill(0, torch.cat([seen, found]), False)
        selected, rest = (~free).nonzero()[:, 0], free.nonzero()[:, 0]
        a, t = attention[rest], similarity[rest]
        if parts is None:
            base = {"rest": len(rest), "selected": len(selected), "image": n, "width": width}[self.reading.centres]
            count = min(share_of(count_outliers(a, self.reading.neighbours[2]), len(rest), base), len(rest))
            extra = count > 0 or self.reading.extra == "keep"
        else:
            count, extra = max(parts[2] - 1, 0), parts[2] > 0  # the extra token is one of the merged ones
        centres = top(a, count)
        keys = keys[rest] if self.reading.keys == "own" else keys[: len(rest)]
        taken = clusters(a, t, keys, centres, self.cluster, self.text_weight)
        others = None
        if extra and count < len(rest):
            others = torch.ones_like(a).index_fill(0, centres, 0).bool().nonzero()[:, 0]
        return Groups(selected, rest, centres, taken, others, None if others is None else at_least_tiny(a[others]))

    def recovered(self, similarity: Tensor, seen: Tensor, count: int | None = None) -> Tensor:
        """Return the tokens that the text brings back.

        Args:
            similarity: (n,) to the text.
            seen: (m,) the tokens that the visual filter kept.
            count: number of tokens to return; None to let the outliers decide.

        Returns:
            (count,) indices, most similar first.
        """
        n, neighbours = len(similarity), self.reading.neighbours[1]
        if count is None and self.reading.recovery == "all":
            return top(similarity, count_outliers(similarity, neighbours))
        left = similarity.index_fill(0, seen, float("-inf"))
        if count is None:
            if self.reading.recovery == "rest":
                count = count_outliers(similarity[left.isfinite()], neighbours)
            else:
                filled = torch.where(left.isfinite(), similarity, similarity.min())
                count = share_of(count_outliers(filled, neighbours), n, n - len(seen))
        return top(left, count)


@full_precision
def joint_cls_attention(q: Tensor, k: Tensor) -> Tensor:
    """Compute what CLS pays to each patch, by one softmax over the full width, as the release does: not head by head.

    Args:
        q: (c, heads, 1 + p, d) queries, CLS first.
        k: (c, heads, 1 + p, d) keys, CLS first.

    Returns:
        (c, p); together with CLS's own share, which is left out, each row sums to 1.
    """
    cls, keys = q[:, :, 0].flatten(1), k.float().transpose(1, 2).flatten(2)
    logits = (keys @ cls[..., None])[..., 0] / cls.shape[1] ** 0.5
    return logits.softmax(-1)[:, 1:]


def _groups(pattern: str) -> int:
    """Return the number of groups in a regular expression, or -1 if it is none."""
    try:
        return re.compile(pattern).groups
    except (re.error, OverflowError, RecursionError):
        return -1


@full_precision
def text_similarity(patches: Tensor, text: Tensor) -> Tensor:
    """Compute the cosine of patches (..., p, d) and a text (d,), divided by the root of d: (..., p)."""
    return F.normalize(patches, dim=-1) @ F.normalize(text.float(), dim=-1) / patches.shape[-1] ** 0.5


def share_of(count: int, n: int, base: int) -> int:
    """Apply the share `count` of `n` to `base`, rounded down."""
    return count if n == base else int(base * (count / n)) if n else 0
