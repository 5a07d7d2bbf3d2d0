"""MMTok: "Multimodal Coverage Maximization for Efficient Inference of VLMs" (ICLR 2026, arXiv 2508.18264)."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmslim.compressor import ImageTokens, Keep
from vlmslim.methods._question import ANSWER_FORMATS, PromptReader, check_tokenizer, without_answer_format
from vlmslim.methods._selection import Pool, Selection, check_selection
from vlmslim.ops.greedy import Coverage, cosines, greedy, similarity_matrix
from vlmslim.ops.padding import in_padding
from vlmslim.ops.ranking import full_precision

_STOP_WORDS = """a an the is are was were be been being have has had do does did it they he she we you i what where when
why how who which and or but so if then question answer to for with by from at into onto upon"""
STOP_WORDS = frozenset(_STOP_WORDS.split())


@dataclass
class MMTok(Selection):
    """Keep the tokens that cover best the words of the question and all visual tokens, found greedily.

    How well a token covers a word is a softmax, over the tokens of the crop or frame, of the cosine between the word's
    input embedding and the projected token, divided by a temperature. How well it covers another token is the same
    with vision-tower features. A word or token is covered by its best kept token. The sum over words, divided by
    their number, and alpha times the mean over tokens are maximised together (equations 5 to 9).

    mode="released" follows the release (commit d1522cd), for LLaVA-1.5 and LLaVA-NeXT: padded patches of anyres images
    compete, every view keeps the same count, rounded down, and newlines are gone. mode="corrected", the default,
    chooses among the image's own tokens, and shares `keep` out over the views by their sizes, at least one to each. In
    both modes each image is covered by the words of its own prompt (the release's question passes through hidden state,
    and may be that of an earlier prompt), cosines are in fp32, ties go to the lower index, and no token is picked
    twice. A prompt without words, or given as embeddings, leaves the coverage of tokens alone.

    As in the release ("MMTok++" in appendix C of the paper), patches of the padding that makes a picture square are
    picked last, though they are to be covered. The release computes them from the size of the picture, which the model
    does not know; here their pixels tell (`in_padding`).

    The words are those of the user's last turn, without the sentences that say how to answer, and without stop words;
    a question of stop words alone stays as it is.

    keep             : visual tokens to keep per image, a count or a share
    mode             : "corrected" or "released"
    word_temperature : of the softmax for words; the paper uses 0.02 for LLaVA
    temperature      : of the softmax for tokens; the paper uses 0.2
    alpha            : weight of the coverage of tokens; the paper uses 0.5
    tokenizer        : the language model's, to read the prompt: hub id, folder, or an object with `decode` that can be
                       called. None: that of the checkpoint
    turn             : regular expression of a user's turn whose group 1 is the text, for unknown chat templates
    left_out         : sentences that say how to answer; the words leave them out. The default has the release's two
    padding_last     : pick patches of padding last (as released); the paper's main tables are without
    newline          : newline tokens, within the budget: "rows" keeps that of each row that keeps a token, "drop" none
    positions        : rotary positions: "auto", "original" or "renumbered" (as released)
    """

    pool = "view"
    every_view = True

    keep: Keep = 0.111
    mode: str = "corrected"
    word_temperature: float = 0.02
    temperature: float = 0.2
    alpha: float = 0.5
    tokenizer: Any = field(default=None, repr=False)
    turn: str | None = None
    left_out: Sequence[str] = field(default=ANSWER_FORMATS, repr=False)
    padding_last: bool = True
    newline: str = "rows"

    def __post_init__(self) -> None:
        self.reads_prompt = True
        check_selection(self)
        check_tokenizer(self.tokenizer)
        for name in ("word_temperature", "temperature"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)}: give a positive number")
        if self.alpha < 0:
            raise ValueError(f"alpha={self.alpha}: give 0 for the coverage of words alone, or a positive number")

    def setup(self, model: Any) -> None:
        """Find the tokenizer and the input embeddings."""
        super().setup(model)
        self.reader = PromptReader(model, self.tokenizer, self.turn)

    def read(self, image: ImageTokens) -> tuple[Tensor, ...]:
        """Return the tower's features, the cosine of each token to each word, and which tokens are padding."""
        x = image.features
        text = "" if image.prompt is None else keywords(self.reader.text(image), self.left_out)
        to_words = cosines(x, self.reader.embed(text, x.device).to(x))
        return image.tower_tokens, to_words, padding_of(image) & self.padding_last

    def search(self, k: int, pools: Sequence[Pool], *read: Tensor) -> Tensor:
        """Search for the best coverage."""
        x, to_words, last = read
        return cover(self.compared(x)[0], to_words, k, self.word_temperature, self.temperature, self.alpha, last)


def keywords(text: str, left_out: Sequence[str] = ANSWER_FORMATS) -> str:
    """Return the words of a user's text that a picture may show, joined by blanks."""
    text = without_answer_format(re.sub(r"^(?:<image>[ \t]*)+(?:\n|$)", "", text.strip()), left_out)
    kept = [word for word in re.findall(r"\w+", text) if word.lower() not in STOP_WORDS]
    return " ".join(kept) or text


def padding_of(image: ImageTokens) -> Tensor:
    """Find the tokens of an image that show nothing but padding: (n,) bool; none where a picture is cut into tiles."""
    if image.tiles[1] or image.video or image.merge > 1 or image.make_views is not None:
        return torch.zeros(len(image.features), dtype=torch.bool, device=image.features.device)
    return image.at_tokens(in_padding(image.pixels, image.side))


@full_precision
def cover(
    x: Tensor,
    to_words: Tensor,
    k: int,
    word_temperature: float = 0.02,
    temperature: float = 0.2,
    alpha: float = 0.5,
    last: Tensor | None = None,
) -> Tensor:
    """Select tokens greedily by how well they cover words and tokens.

    Args:
        x: (b, n, v) vision-tower features.
        to_words: (b, n, m) cosine of each token to each word; m may be 0.
        k: number of picks.
        word_temperature: of the softmax of the cosines to a word.
        temperature: of the softmax of the cosines to a token.
        alpha: weight of the coverage of tokens.
        last: (b, n) True at tokens that are picked after all others, but are to be covered.

    Returns:
        (b, k) indices in the order of selection; the first j of them are the selection for k = j.
    """
    _, n, m = to_words.shape
    words = (to_words.float() / word_temperature).softmax(1) / max(1, m)
    tokens = (similarity_matrix(F.normalize(x, dim=-1, eps=1e-8)) / temperature).softmax(1) / n  # it is symmetric
    bonus = None if last is None else last.float() * -(2 + alpha)  # below every gain, which is at most 1 + alpha
    return greedy(Coverage(torch.cat([words, alpha * tokens], dim=2), bonus=bonus), k)
