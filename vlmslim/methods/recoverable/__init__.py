"""Recoverable Compression: visual filter, recovery by the question, merge of the rest (AAAI 2025, arXiv 2409.01179)."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmslim.compressor import Compressed, Compressor, ImageTokens, Keep, check_choices, check_keep, resolve_keep
from vlmslim.methods.recoverable.clip import default_clip, load_clip
from vlmslim.methods.recoverable.question import find_text
from vlmslim.ops.outliers import count_outliers
from vlmslim.ops.selection import full_precision, largest_remainder, share_out

PRESETS = {
    "corrected": dict(
        text_source="question", text_pool="eot", recovery="minimum", neighbours=(20, 20, 10), centres="rest",
        keys="own", extra="keep",
    ),
    "released": dict(
        text_source="system", text_pool="last_pad", recovery="minimum", neighbours=(20, 20, 10), centres="width",
        keys="shifted", extra="drop",
    ),
    "released_alt": dict(
        text_source="system", text_pool="last_pad", recovery="all", neighbours=(10, 10, 10), centres="image",
        keys="shifted", extra="keep",
    ),
}  # fmt: skip


@dataclass
class Recoverable(Compressor):
    """Keep the tokens that CLS looks at and those that look like the question; merge the others into a few.

    1. Visual filter: as many tokens of highest CLS attention as there are outliers (LOF) among the attention values.
    2. Text recovery: of the others, as many of highest similarity to the question as its outliers number.
    3. Merging: of what is left, the tokens CLS looks at most become centres. Each takes in the attention-weighted
       sum of its 32 most similar tokens; one extra token is the attention-weighted sum of all that are no centres.

    Kept tokens stay in reading order, merged ones follow. The method finds its counts itself, image by image (about a
    tenth of LLaVA-1.5's tokens); with `keep` they are `shares` of that budget, which is met exactly.

    The released code (commit d927594) differs from its description in five places. `preset="corrected"`, the default,
    follows the description; `preset="released"` follows the code, and `"released_alt"` the second routine in its file,
    which is commented out there. Both presets take on these slips deliberately:

    - the "question" is the first line of the prompt, which is the system prompt (`text_source="system"`);
    - the text is pooled at the last padding token, not at its end (`text_pool="last_pad"`), and so depends on
      `pad_length`, for which the released value is unknown;
    - the share of outliers is multiplied by the feature width to get the number of centres (`centres="width"`; the
      second routine multiplies by the image's tokens, "image");
    - keys of the merged tokens are read at wrong rows, those of other patches (`keys="shifted"`);
    - without a centre the extra token is dropped (`extra="drop"`, first routine only).

    Departures of every preset: scores are computed in fp32 and outliers in fp64; ties go to the lower index; the
    vision tower runs once, not twice; each prompt has its own question, in any batch; clusters and centres are capped
    by the tokens there are; an image never ends up empty (the extra token then stays). Under anyres, which the
    release cannot do, every crop is filtered, recovered and merged by itself, newlines go first, and `keep` is shared
    out over the crops by size. Not for towers without CLS, nor for LLaVA-OneVision, which resizes tokens on their way.

    keep        : visual tokens to send per image, a count or a share; None lets the method decide
    clip        : the CLIP whose vision tower the model uses: a HF `CLIPModel` (hub id or folder), an open_clip folder,
                  "hf-hub:org/name", or "NAME:PRETRAINED" with open_clip's name and tag or weights file.
                  None: the tiny CLIP for bundled checkpoints, OpenAI's L/14 at 336 pixels for the tower of LLaVA-1.5
    tokenizer   : the language model's, to read the prompt: hub id, folder, or an object with `decode`.
                  None: that of the checkpoint
    preset      : "corrected", "released" or "released_alt": what the options below are where they are None
    shares      : of `keep` for filter, recovery and merging
    text_source : "question" (first line of the user's last turn), "user" (all of that turn), or "system" (first line
                  of the whole prompt)
    turn        : regular expression of a user's turn, group 1 being the text; for a chat template unknown to us
    text_pool   : "eot" (CLIP's own text embedding) or "last_pad"
    pad_length  : tokens the text is padded to, for "last_pad"; None: as many as the CLIP reads
    patch_norm  : put the tower's post-layernorm before the projection of patches
    neighbours  : of the outlier test: for filter, recovery and centres
    recovery    : values among which text outliers are counted: "minimum" (all, with the minimum in place of the
                  filter's picks), "rest" (without those), "all" (as they are; the same token may be picked twice)
    centres     : the share of outliers is taken of "rest" (the tokens left, so their outliers are counted),
                  "selected" (the kept ones), "image" (all) or "width"
    keys        : "own" or "shifted"
    extra       : the extra token where there is no centre: "keep" or "drop"
    cluster     : tokens that a centre takes in
    text_weight : weight of the text similarity against that of keys, in forming clusters
    """

    tower_layers: ClassVar = (-1,)
    needs_cls: ClassVar = True

    keep: Keep | None = None
    clip: str | None = None
    tokenizer: object = field(default=None, repr=False)
    preset: str = "corrected"
    shares: tuple[float, float, float] = (0.5, 0.3, 0.2)
    text_source: str | None = None
    turn: str | None = None
    text_pool: str | None = None
    pad_length: int | None = None
    patch_norm: bool = False
    neighbours: tuple[int, int, int] | None = None
    recovery: str | None = None
    centres: str | None = None
    keys: str | None = None
    extra: str | None = None
    cluster: int = 32
    text_weight: float = 50.0

    def __post_init__(self):
        if self.keep is not None:
            check_keep(self.keep)
        for name, value in PRESETS.get(self.preset, {}).items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        check_choices(
            self,
            preset=tuple(PRESETS),
            text_source=("question", "user", "system"),
            text_pool=("eot", "last_pad"),
            recovery=("minimum", "rest", "all"),
            centres=("rest", "selected", "image", "width"),
            keys=("own", "shifted"),
            extra=("keep", "drop"),
        )
        self.shares, self.neighbours = tuple(self.shares), tuple(self.neighbours)
        if len(self.shares) != 3 or min(self.shares) < 0 or abs(sum(self.shares) - 1) > 1e-6:
            raise ValueError(f"shares={self.shares}: give three shares, of filter, recovery and merging, that sum to 1")
        if len(self.neighbours) != 3 or not all(isinstance(k, int) and k >= 1 for k in self.neighbours):
            raise ValueError(f"neighbours={self.neighbours}: give three numbers >= 1, for filter, recovery and centres")
        for name, least in (("cluster", 1), ("pad_length", 2)):
            value = getattr(self, name)
            if name == "pad_length" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r}: give a whole number >= {least}")
        if self.turn is not None and re.compile(self.turn).groups != 1:
            raise ValueError(f"turn={self.turn!r}: give a regular expression with exactly one group, the user's text")

    def setup(self, model: nn.Module) -> None:
        """Load the CLIP and the tokenizer, and check that they go with the model.

        Raises:
            ValueError: the model is an OneVision or feeds the CLS token to the language model; its vision tower is not
                the CLIP's; or a default for `clip` or `tokenizer` is not known.
        """
        if model.config.model_type == "llava_onevision":
            raise ValueError(
                "Recoverable merges vision-tower tokens, and LLaVA-OneVision resizes them on their way to the language "
                "model; choose another method for this checkpoint"
            )
        if model.config.vision_feature_select_strategy != "default":
            raise ValueError(
                "Recoverable needs vision_feature_select_strategy='default'; this checkpoint feeds CLS to the language "
                "model as one more visual token"
            )
        self._projector = model.model.multi_modal_projector
        self._clip = load_clip(self.clip or default_clip(model))
        self._clip.check_tower(model.model.vision_tower)
        if self.pad_length is not None and self.pad_length > self._clip.context:
            raise ValueError(f"pad_length={self.pad_length}: this CLIP reads at most {self._clip.context} tokens")
        self._tokenizer = self.tokenizer
        if isinstance(self.tokenizer, str | Path | None):
            from transformers import AutoTokenizer

            name = self.tokenizer or model.config._name_or_path
            if not name:
                raise ValueError("this model does not say where it was loaded from: give tokenizer=HUB_ID_OR_FOLDER")
            self._tokenizer = AutoTokenizer.from_pretrained(name)

    def compress(self, image: ImageTokens) -> Compressed:
        """Filter, recover and merge one image."""
        return self.compress_images([image])[0]

    def compress_images(self, images: list[ImageTokens]) -> list[Compressed]:
        """Each image by itself; images of one prompt share its text."""
        texts: dict[str, Tensor] = {}
        results = []
        for image in images:
            n = len(image.features)
            k = None if self.keep is None else resolve_keep(self.keep, n)
            if k == n:
                results.append(image.pick(torch.arange(n, device=image.features.device)))
                continue
            text = self._text(image)
            if text not in texts:
                self._clip.to(image.tower.device)
                texts[text] = self._clip.embed(text, self.text_pool, self.pad_length)
            results.append(self._compress(image, k, texts[text]))
        return results

    def _text(self, image: ImageTokens) -> str:
        if image.prompt is None:
            raise ValueError("Recoverable reads the question from input_ids; pass them instead of inputs_embeds")
        prompt = self._tokenizer.decode(image.prompt.tolist())
        return find_text(prompt, self.text_source, self.turn, getattr(self._tokenizer, "all_special_tokens", ()))

    def _compress(self, image: ImageTokens, k: int | None, text: Tensor) -> Compressed:
        device = image.features.device
        crop, row, column = image.grid.cpu().unbind(1)
        patches, newlines = (crop >= 0).nonzero()[:, 0], (crop < 0).nonzero()[:, 0]
        if k is not None and k >= len(patches):
            kept = torch.cat([patches, newlines[: k - len(patches)]]).sort().values
            return image.pick(kept.to(device))
        attention, similarity, keys = self._scores(image, text)
        crops = [patches[crop[patches] == i] for i in range(len(image.tower))]
        crops = [members for members in crops if len(members)]
        budgets = [None] * len(crops) if k is None else share_out(k, [len(members) for members in crops])
        kept, merged = [], []
        for members, budget in zip(crops, budgets, strict=True):
            at = crop[members].to(device), (row * image.side + column)[members].to(device)
            given = image.tower[at].float(), attention[at], similarity[at], keys[at]
            if budget != 0:
                with torch.autocast(device.type, enabled=False):
                    selected, made = self.recover(*given, budget)
                kept.append(members.to(device)[selected])
                merged.append(made)
        if not sum(map(len, kept + merged)):
            merged = [weighted_sum(*given[:2])]
        kept, merged = torch.cat(kept).sort().values, torch.cat(merged)
        features = image.features[kept]
        if len(merged):
            features = torch.cat([features, self._projector(merged.to(image.tower.dtype)).to(features)])
        return Compressed(features)

    def _scores(self, image: ImageTokens, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """CLS attention (c, p), text similarity (c, p) and keys (c, p, v) of every patch, fp32."""
        layer, hidden = image.taps[-1]
        with torch.no_grad():
            q, k = image.qk(-1)
            last = layer(hidden, attention_mask=None)  # what leaves the tower's last layer
            last = last[0] if isinstance(last, tuple) else last
            patches = self._clip.project(last[:, 1:], self.patch_norm)
        return joint_cls_attention(q, k), text_similarity(patches, text), k[:, :, 1:].transpose(1, 2).flatten(2).float()

    def recover(
        self, x: Tensor, attention: Tensor, similarity: Tensor, keys: Tensor, budget: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """The method itself, on the tokens of one crop.

        Args:
            x: (n, v) vision-tower tokens, fp32.
            attention: (n,) what CLS pays each.
            similarity: (n,) to the text.
            keys: (n, v) of the tower's last layer.
            budget: tokens to end up with, at most n; None to let the outliers decide.

        Returns:
            The kept tokens (m,), ascending, and the merged ones (j, v), j of which may be zero.
        """
        n = len(x)
        if budget == n:
            return torch.arange(n, device=x.device), x[:0]
        parts = None if budget is None else largest_remainder(budget, self.shares)
        seen = top(attention, count_outliers(attention, self.neighbours[0]) if parts is None else parts[0])
        found = self.recovered(similarity, seen, None if parts is None else parts[1])
        free = torch.ones(n, dtype=torch.bool, device=x.device).index_fill(0, torch.cat([seen, found]), False)
        selected, rest = (~free).nonzero()[:, 0], free.nonzero()[:, 0]
        a, t, width = attention[rest], similarity[rest], x.shape[1]
        if parts is None:
            base = {"rest": len(rest), "selected": len(selected), "image": n, "width": width}[self.centres]
            count = min(share_of(count_outliers(a, self.neighbours[2]), len(rest), base), len(rest))
        else:
            count = max(parts[2] - 1, 0)
        centres = top(a, count)
        keys = keys[rest] if self.keys == "own" else keys[: len(rest)]
        merged = [x[rest][centres] + clusters(a, t, keys, centres, self.cluster, self.text_weight) @ x[rest]]
        others = torch.ones_like(a).index_fill(0, centres, 0).bool()
        if count < len(rest) and (parts[2] > 0 if parts else count > 0 or self.extra == "keep"):
            merged.append(weighted_sum(x[rest][others], a[others]))
        return selected, torch.cat(merged)

    def recovered(self, similarity: Tensor, seen: Tensor, count: int | None = None) -> Tensor:
        """The tokens that the text brings back.

        Args:
            similarity: (n,) to the text.
            seen: (m,) the tokens that the visual filter kept.
            count: how many; None to let the outliers decide.

        Returns:
            (count,) indices, most similar first.
        """
        n, neighbours = len(similarity), self.neighbours[1]
        if count is None and self.recovery == "all":
            return top(similarity, count_outliers(similarity, neighbours))
        left = similarity.index_fill(0, seen, float("-inf"))
        if count is None:
            if self.recovery == "rest":
                count = count_outliers(similarity[left.isfinite()], neighbours)
            else:
                filled = torch.where(left.isfinite(), similarity, similarity.min())
                count = share_of(count_outliers(filled, neighbours), n, n - len(seen))
        return top(left, count)


@full_precision
def joint_cls_attention(q: Tensor, k: Tensor) -> Tensor:
    """What CLS pays to each patch, by one softmax over the full width: heads are not kept apart, as in the release.

    Args:
        q: (c, heads, p', d) queries, of which that of CLS, the first, is used.
        k: (c, heads, p', d) keys, that of CLS first.

    Returns:
        (c, p' - 1); with CLS's own share, which is left out, it sums to 1.
    """
    cls, keys = q[:, :, 0].flatten(1), k.float().transpose(1, 2).flatten(2)
    logits = (keys @ cls[..., None])[..., 0] / cls.shape[1] ** 0.5
    return logits.softmax(-1)[:, 1:]


@full_precision
def text_similarity(patches: Tensor, text: Tensor) -> Tensor:
    """Cosine of patches (..., p, d) and a text (d,), divided by the root of d: (..., p)."""
    return F.normalize(patches, dim=-1) @ F.normalize(text.float(), dim=-1) / patches.shape[-1] ** 0.5


def share_of(count: int, n: int, base: int) -> int:
    """`count` of `n` as a share of `base`, cut to a whole number."""
    return count if n == base else int(base * (count / n)) if n else 0


def top(score: Tensor, k: int) -> Tensor:
    """Indices of the k highest scores (n,), highest first, lower index first on ties."""
    return score.argsort(descending=True, stable=True)[:k]


@full_precision
def clusters(
    attention: Tensor, similarity: Tensor, keys: Tensor, centres: Tensor, size: int, text_weight: float
) -> Tensor:
    """What each centre takes in: the attention of its nearest tokens, other centres among them, and 0 elsewhere.

    A token is near that has a similar key, and (whichever the centre) that resembles the text.

    Args:
        attention: (n,) what CLS pays each token.
        similarity: (n,) to the text.
        keys: (n, v).
        centres: (j,) indices.
        size: how many tokens a centre takes in, if there are that many.
        text_weight: of `similarity` against the cosine of keys.

    Returns:
        (j, n) weights.
    """
    n = len(attention)
    keys = F.normalize(keys.float(), dim=-1)
    affinity = keys[centres] @ keys.T + text_weight * similarity.float()
    affinity.scatter_(1, centres[:, None], float("-inf"))
    place = torch.full((n,), len(centres), device=keys.device)
    place[centres] = torch.arange(len(centres), device=keys.device)
    order = place.argsort(stable=True)  # ties: other centres first, in their order, then by index
    members = order[affinity[:, order].argsort(dim=1, descending=True, stable=True)[:, : min(size, max(n - 1, 0))]]
    return torch.zeros_like(affinity).scatter_(1, members, attention[members])


def weighted_sum(x: Tensor, weight: Tensor) -> Tensor:
    """(1, v): the sum of tokens x (n, v) times weight (n,)."""
    return weight[None].to(x) @ x
