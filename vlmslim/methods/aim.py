"""AIM: "Adaptive Inference of Multi-Modal LLMs via Token Merging and Pruning" (ICCV 2025, arXiv 2412.03248)."""

from dataclasses import dataclass
from typing import ClassVar

from vlmslim.compressor import Compressor, Keep
from vlmslim.methods.bipartite_merge import BipartiteMerge
from vlmslim.methods.pagerank_prune import PageRankPrune


@dataclass
class AIM(Compressor):
    """Merge similar visual tokens before the language model, then prune them progressively inside it.

    The two stages are `BipartiteMerge` and `PageRankPrune`; their docstrings give the rules, and each can be used by
    itself. The paper's settings: keep=0.25 for OneVision-7B videos; keep=0.4375 (252 tokens) or keep=0.125 (72) for
    LLaVA-1.5. The cost of a prefill follows `equivalent_tokens` in the receipt, which is far below `keep`. keep=1.0
    keeps everything, inside the language model too; to prune only, use `PageRankPrune`.

    Differs from the release (commit edc24e9): similarity, means and importance are computed in fp32; a zero token is
    similar to no other token, instead of NaN; a merge that has to remove nothing changes nothing; ties go to the lower
    index; tokens stand in reading order by default; pruned tokens are removed rather than hidden, sample by sample;
    batches, several images a prompt and any depth work. `order="released", newline="extra"` sends the language model
    the tokens that the release sends.

    keep        : visual tokens to send per image, a count or a share
    start, stop : decoder layers, or shares of the depth, between which the schedule falls from all tokens to none
    order       : "raster" for reading order, or "released" for the release's order
    newline     : "within" the budget, or "extra" to it, for the token that ends a video or an untiled image
    positions   : rotary positions: "auto", "original" or "renumbered" (as released)
    temperature : of the importance's softmax
    iterations  : steps of the importance's random walk
    damping     : share of each step that is spread evenly
    """

    budget_options: ClassVar = ("keep", "stop")

    keep: Keep = 0.25
    start: int | float | None = None
    stop: int | float | None = None
    order: str = "raster"
    newline: str = "within"
    positions: str = "auto"
    temperature: float = 0.1
    iterations: int = 5
    damping: float = 0.0

    def __post_init__(self) -> None:
        self.stages()  # each stage checks its options

    def stages(self) -> list[Compressor]:
        """Return the two stages, or only the first if everything is to be kept."""
        merge = BipartiteMerge(self.keep, self.order, self.newline, self.positions)
        prune = PageRankPrune(self.start, self.stop, self.temperature, self.iterations, self.damping)
        return [merge] if isinstance(self.keep, float) and self.keep == 1 else [merge, prune]
