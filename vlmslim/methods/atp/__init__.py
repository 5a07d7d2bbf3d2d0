"""ATP-LLaVA: "Adaptive Token Pruning for Large Vision Language Models" (CVPR 2025, arXiv 2412.00447)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vlmslim.compressor import Compressor, LayerInput, check_choices
from vlmslim.engine.families import language_model
from vlmslim.methods.atp.score_maps import Maps, redundancy
from vlmslim.saving.folder import read
from vlmslim.saving.trained import load_part

# Equations are the paper's. (B, I, n) is the layout of `Maps`: I images a row, of n patches each.


def spatial_score(side: int, strides: Sequence[int], penalty: float = 3.0) -> Tensor:
    """Compute equation 5 on several grids: a patch scores 1 - penalty / stride^2 of the coarsest grid that it is on.

    Grids are anchored at the upper left patch. A patch on no grid scores 0.

    Returns:
        (side * side,).
    """
    score = torch.zeros(side, side)
    for stride in sorted(strides):
        score[::stride, ::stride] = 1 - penalty / stride**2
    return score.flatten()


def hard_mask(redundancy: Tensor, spatial: Tensor, theta_r: Tensor, theta_s: Tensor) -> Tensor:
    """Mark the patches that stay: those above one threshold by attention, or above the other by their place.

    Args:
        redundancy: (..., n).
        spatial: (n,).
        theta_r: (...).
        theta_s: (...).

    Returns:
        (..., n) bool.
    """
    return (redundancy > theta_r[..., None]) | (spatial > theta_s[..., None])


def soft_mask(redundancy: Tensor, spatial: Tensor, theta_r: Tensor, theta_s: Tensor, temperature: float) -> Tensor:
    """Compute equations 9 to 11, which replace `hard_mask` in training: (..., n) in (0, 1), differentiable."""
    by_content = ((redundancy - theta_r[..., None]) * temperature).sigmoid()
    by_place = ((spatial - theta_s[..., None]) * temperature).sigmoid()
    return torch.maximum(by_content, by_place)


def top_k_alive(score: Tensor, alive: Tensor, k: int) -> Tensor:
    """Mark the k alive patches of each image with the highest score, all of them if fewer: (..., n) bool."""
    order = score.masked_fill(~alive, float("-inf")).argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(alive).scatter(-1, order[..., :k], True) & alive


def layer_index(layer: int | float, depth: int) -> int:
    """Return the decoder layer, from 0, at a share of the depth, rounded down; a number stays as it is.

    A share never gives the last layer, because after it there is nothing to prune.
    """
    return min(int(layer * depth + 1e-9), depth - 2) if isinstance(layer, float) else layer


# --- the trained part ------------------------------------------------------------------------------------------------


class ThresholdHead(nn.Linear):
    """Two logits that start at -2 and 3: many tokens stay for their content, almost none for their place alone.

    The start matters. A sampling threshold that begins between two grids would keep one of them for good, wanted or
    not, because it has no gradient once the soft masks are steep.
    """

    def reset_parameters(self) -> None:
        """Draw the weights as a linear layer does, and set the bias."""
        super().reset_parameters()
        with torch.no_grad():
            self.bias.copy_(torch.tensor([-2.0, 3.0]))


class ThresholdModule(nn.Module):
    """One ATP module, equations 6 to 8: two thresholds from the score maps of an image.

    Args:
        patches: n, patches of an image.
        width: of the joint projection.
        learned: whether the module also learns how much the image's attention and the text's count.

    Attributes:
        balance: (2,) logits of these two weights, equal at the start; None if they are not learned.
    """

    def __init__(self, patches: int, width: int, learned: bool = False):
        super().__init__()
        self.mix = nn.Linear(2 * patches, width)
        self.heads = ThresholdHead(width, 2)
        self.balance = nn.Parameter(torch.zeros(2)) if learned else None

    def reset_parameters(self) -> None:
        """Give both scores the same weight."""
        if self.balance is not None:
            nn.init.zeros_(self.balance)

    def forward(self, from_image: Tensor, from_text: Tensor) -> tuple[Tensor, Tensor]:
        """Turn score maps (..., n) into the thresholds of redundancy and of sampling, (...) each, in (0, 1)."""
        with torch.autocast(from_image.device.type, enabled=False):
            maps = torch.cat([from_image, from_text], dim=-1).to(self.mix.weight)
            theta_r, theta_s = self.heads(self.mix(maps)).float().sigmoid().unbind(-1)
            return theta_r, theta_s


@dataclass
class Decision:
    """The result of one module for the N images of a forward.

    layer   : decoder layer, from 0, that the module follows
    soft    : (N,) tokens left, counted by the soft masks of this module and those before; differentiable
    hard    : (N,) tokens left, counted by the rule of inference
    theta_r : (N,) threshold of redundancy
    theta_s : (N,) threshold of sampling
    """

    layer: int
    soft: Tensor
    hard: Tensor
    theta_r: Tensor
    theta_s: Tensor


class ThresholdModules(nn.Module):
    """The trained part of ATP: one `ThresholdModule` for each place in the decoder.

    Attributes:
        layers: decoder layers, from 0, that the modules follow.
        temperature: T of the soft masks; a trainer raises it from 10 to 60.
        decisions: while training, what the modules of the last forward decided, in order.
    """

    def __init__(self, layers: Sequence[int], patches: int, width: int, learned: bool = False):
        super().__init__()
        self.layers, self.patches = tuple(layers), patches
        self.after = nn.ModuleDict({str(layer): ThresholdModule(patches, width, learned) for layer in layers})
        self.temperature = 10.0
        self.decisions: list[Decision] = []

    def counts(self, kind: str = "soft") -> Tensor:
        """Return the tokens left in the last forward, by "soft" or "hard" masks: (N, modules)."""
        return torch.stack([getattr(decision, kind) for decision in self.decisions], dim=1)


#: What the option `mean` of earlier versions meant.
_OLD_SCORES = {"all": "literal", "visible": "visible"}


# --- the method ------------------------------------------------------------------------------------------------------


@dataclass
class ATP(Compressor):
    """After three decoder layers, keep the visual tokens that pass thresholds which are learned per image and layer.

    Two score maps say how much attention each token receives, in the layer that has just run: from the visual tokens of
    its image, and from the text after it. `score` says how they make the redundancy score. The token stays if this
    score exceeds one threshold, or if its patch is on a sampling grid that is coarse enough for the other. A small
    trained module computes both thresholds from the two maps. How many tokens stay on average was set in training
    (`scripts/train_atp.py`) and is not an option. Kept tokens keep their rotary positions, and text always stays.

    In training nothing is dropped: masks from a sigmoid weight the attention of all later layers. For masks of 0 and 1
    this is the same as dropping.

    The paper's text was not available. This follows secondary sources, and differs from them deliberately:
    - The redundancy score is that of the text alone. Equations 3 and 4 average both maps (`score="literal"`), and the
      first of them divides what a token receives by all visual tokens of the image, although a causal model lets only
      the later ones see it. So upper rows win, whatever they show.
    - Scores are min-max normalised per image before use. Taken literally (`normalised=False`) a score is at most about
      1 / n, and no sigmoid of temperature 10 can tell tokens apart.
    - Several grids replace one, so that the sampling rate can vary; `strides=(2,)` is the literal form.
    - Thresholds read full score maps on the patch grid, with zeros where a token is gone.
    - At least `at_least` tokens of an image stay.
    Images must be single grids of patches (LLaVA-1.5); LLaVA-NeXT and OneVision are refused. After a method that acts
    before the language model, a token belongs to the patch whose slot it has taken.

    weights    : folder of trained modules, or "bundled/tiny-atp-36"; "random" to train from scratch
    after      : decoder layers, from 0, that the modules follow, or shares of the depth, rounded down; by default the
                 paper's 4, 14 and 24 of 32
    strides    : of the sampling grids
    penalty    : lambda_sample of equation 5
    normalised : apply min-max normalisation to the scores
    score      : "text": attention from the text alone;
                 "literal": the mean of both maps, with attention from the image divided by all its visual tokens;
                 "visible": the same, divided by the visual tokens that can see the token;
                 "learned": as "visible", but each module learns a convex mix of both maps
    mean       : older name of two scores, so that parts saved with it still load: "all" is score="literal", "visible"
                 is score="visible"
    at_least   : tokens of an image that stay, whatever the thresholds
    width      : of a module's projection; not known from the paper
    hardened   : in training, attend as inference does, and pass gradients straight through to the soft mask
    detached   : in training, stop gradients from the thresholds through the scores into the language model
    """

    reads_back = "thresholds decide how many tokens stay"

    budget_options: ClassVar = ()  # because training sets how much is kept

    weights: str = ""
    after: Sequence[int | float] = (0.125, 0.4375, 0.75)
    strides: Sequence[int] = (2, 3, 4, 6, 8, 12)
    penalty: float = 3.0
    normalised: bool = True
    score: str = "text"
    mean: str = ""
    at_least: int = 1
    width: int = 256
    hardened: bool = False
    detached: bool = True

    def __post_init__(self) -> None:
        self.after, self.strides = tuple(self.after), tuple(self.strides)
        check_choices(self, score=("text", "literal", "visible", "learned"), mean=("", *_OLD_SCORES))
        if self.mean:
            score = _OLD_SCORES[self.mean]
            if self.score not in (type(self).score, score):
                raise ValueError(f"mean={self.mean!r} means score={score!r}: give score={self.score!r} alone")
            self.score, self.mean = score, ""
        if self.at_least < 0:
            raise ValueError(f"at_least={self.at_least}: give an integer from 0 on")
        if not 1 <= self.width <= 2**16:
            raise ValueError(f"width={self.width}: give an integer from 1 to {2**16}")
        if min(self.strides, default=2) < 2:
            raise ValueError(f"strides={self.strides}: give integers from 2 on")
        if not self.after:
            raise ValueError("after=() names no decoder layer; give at least one")
        for layer in self.after:
            if layer < 0 or (isinstance(layer, float) and layer >= 1):
                raise ValueError(f"after={layer!r}: give a decoder layer from 0 on, or a share of the depth in [0, 1)")

    def setup(self, model: Any) -> None:
        """Place the modules in this model, and load or draw their weights.

        Raises:
            ValueError: the model has no single grid of patches, the layers do not fit its decoder, or the weights were
                trained under other options.
        """
        vision, decoder = model.config.vision_config, language_model(model.model).layers
        if model.config.model_type != "llava":
            raise ValueError(
                f"atp is defined for images on a single grid of patches, and {type(model).__name__} cuts images into "
                "tiles or pools them; use a LLaVA-1.5 checkpoint, or another method"
            )
        self.side, depth = vision.image_size // vision.patch_size, len(decoder)
        layers = tuple(layer_index(layer, depth) for layer in self.after)
        if list(layers) != sorted(set(layers)) or layers[-1] > depth - 2:
            raise ValueError(
                f"after={self.after} means layers {layers} of {depth}; they must ascend, and a layer must follow them "
                f"all: give layers such as after=({', '.join(map(str, range(min(3, depth - 1))))},)"
            )
        self.layers = tuple(layer + 1 for layer in layers)
        self.modules = ThresholdModules(layers, self.side**2, self.width, self.score == "learned")
        load_part(self, self.modules, model)
        self.modules.float()
        self._check_options()

    def _check_options(self) -> None:
        """Refuse weights that were trained under other options."""
        names = ("after", "strides", "penalty", "normalised", "score")
        saved = None if self.weights.startswith("random") else read(self.weights)
        for stage in saved.methods if saved else ():
            if stage["method"] == "atp":
                theirs = stage | ({"score": _OLD_SCORES[stage["mean"]]} if stage.get("mean") else {})
                own = {name: getattr(self, name) for name in names}
                own = {name: list(value) if isinstance(value, tuple) else value for name, value in own.items()}
                other = ", ".join(f"{name}={theirs[name]!r}" for name, value in own.items() if theirs[name] != value)
                if other:
                    raise ValueError(
                        f"{self.weights} was trained with {other}; give these options, or patch with it alone"
                    )

    def trained(self) -> ThresholdModules:
        """Return the modules."""
        return self.modules

    def retain(self, tokens: LayerInput) -> Tensor:
        """Apply the rule of inference."""
        maps = self._maps(tokens)
        score = self._redundancy(tokens, maps)
        tokens.score = maps.from_grid(score)
        return (tokens.image == 0) | maps.from_grid(self._keep(maps, score, *self._thresholds(tokens, maps))).bool()

    def soft_retain(self, tokens: LayerInput) -> Tensor | None:
        """Apply the soft masks while the modules are in training mode."""
        if not self.modules.training:
            return None
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detached):
            maps = self._maps(tokens)
        theta_r, theta_s = self._thresholds(tokens, maps)
        score = self._redundancy(tokens, maps)
        keep = self._keep(maps, score, theta_r, theta_s)
        soft = soft_mask(score, self._spatial(maps), theta_r, theta_s, self.modules.temperature)
        soft = torch.where(top_k_alive(score, maps.alive, self.at_least), 1, soft) * maps.alive
        if self.hardened:
            soft = keep + (soft - soft.detach())
        before = maps.alive if tokens.weight is None else maps.to_grid(tokens.weight.float())
        if tokens.layer == self.layers[0]:
            self.modules.decisions = []
        real = maps.real
        self.modules.decisions.append(
            Decision(tokens.layer - 1, (soft * before).sum(-1)[real], keep.sum(-1)[real], theta_r[real], theta_s[real])
        )
        return torch.where(tokens.image > 0, maps.from_grid(soft), 1)

    def _maps(self, tokens: LayerInput) -> Maps:
        return Maps.of(tokens, self.side, self.normalised, visible=self.score != "literal")

    def _module(self, tokens: LayerInput) -> Any:
        return self.modules.after[str(tokens.layer - 1)]

    def _redundancy(self, tokens: LayerInput, maps: Maps) -> Tensor:
        return redundancy(maps.from_image, maps.from_text, self.score, self._module(tokens).balance)

    def _spatial(self, maps: Maps) -> Tensor:
        return spatial_score(self.side, self.strides, self.penalty).to(maps.from_text.device)

    def _thresholds(self, tokens: LayerInput, maps: Maps) -> tuple[Tensor, Tensor]:
        return self._module(tokens)(maps.from_image, maps.from_text)

    def _keep(self, maps: Maps, score: Tensor, theta_r: Tensor, theta_s: Tensor) -> Tensor:
        keep = hard_mask(score, self._spatial(maps), theta_r, theta_s)
        return (keep & maps.alive) | top_k_alive(score, maps.alive, self.at_least)
