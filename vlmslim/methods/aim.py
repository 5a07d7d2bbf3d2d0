"""AIM: "Adaptive Inference of Multi-Modal LLMs via Token Merging and Pruning" (ICCV 2025, arXiv 2412.03248)."""

from dataclasses import dataclass
from typing import ClassVar

from vlmslim.compressor import Compressor, Keep
from vlmslim.methods.bipartite_merge import BipartiteMerge
from vlmslim.methods.pagerank_prune import PageRankPrune


@dataclass
class AIM(Compressor):
    """Merge alike visual tokens before the language model, then prune them progressively inside it.

    Two stages, `BipartiteMerge` and `PageRankPrune`, which say more and can be used apart. The paper's settings:
    OneVision-7B video keep=0.25; LLaVA-1.5 keep=0.4375 (252 tokens) or keep=0.125 (72). What a prefill costs follows
    `equivalent_tokens` in the receipt, far below `keep`. keep=1.0 keeps everything, inside the language model too;
    to prune only, use the stage `PageRankPrune()`.

    Departures from the release (commit edc24e9): likeness, means and importance are computed in fp32; a zero token is
    like no other instead of NaN; a merge asked to remove nothing is the identity; ties go to the lower index; tokens
    stand in reading order by default; pruned tokens are removed rather than hidden, per sample; batches, several
    images a prompt and any depth work. `order="released", newline="extra"` sends the language model what the release
    does.

    keep        : visual tokens to send per image, a count or a share
    start, stop : decoder layers (or shares of the depth) between which the schedule falls from all tokens to none
    order       : "raster", or "released" for the release's order
    newline     : "within" the budget, or "extra" to it, for the token that ends a video or an untiled image
    positions   : "renumbered" (as released) or "original" rotary positions
    temperature, iterations, damping : of the importance
    """

    budget_options: ClassVar = ("keep", "stop")

    keep: Keep = 0.25
    start: int | float | None = None
    stop: int | float | None = None
    order: str = "raster"
    newline: str = "within"
    positions: str = "renumbered"
    temperature: float = 0.1
    iterations: int = 5
    damping: float = 0.0

    def __post_init__(self):
        self.stages()

    def stages(self) -> list[Compressor]:
        """Merging, and pruning unless everything is to be kept."""
        merge = BipartiteMerge(self.keep, self.order, self.newline, self.positions)
        prune = PageRankPrune(self.start, self.stop, self.temperature, self.iterations, self.damping)
        return [merge] if isinstance(self.keep, float) and self.keep == 1 else [merge, prune]
