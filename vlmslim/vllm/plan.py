"""Plan how a vLLM engine compresses its images, or say why it cannot. Nothing here imports vLLM."""

import hashlib
import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from vlmslim.compressor import Compressor, Selector, check_choices
from vlmslim.engine.families import family_of
from vlmslim.io.messages import did_you_mean
from vlmslim.loading import check_checkpoint
from vlmslim.patching import made, set_up
from vlmslim.registry import address_of, is_method_name, options_of, parse_method
from vlmslim.saving.folder import read

PREFIX = "Vlmslim"

#: The architectures that the plug-in adds, and the class in `vlmslim.vllm.models` of each.
ARCHITECTURES = {
    f"{PREFIX}LlavaForConditionalGeneration": "SlimLlava",
    f"{PREFIX}LlavaNextForConditionalGeneration": "SlimLlavaNext",
    f"{PREFIX}LlavaOnevisionForConditionalGeneration": "SlimLlavaOnevision",
}
_BY_MODEL_TYPE = dict(zip(("llava", "llava_next", "llava_onevision"), ARCHITECTURES, strict=True))


def overrides(method: str | dict, model_type: str = "llava", **options: Any) -> dict[str, Any]:
    """Return what makes vLLM compress: `LLM(checkpoint, hf_overrides=overrides("divprune", keep=64))`.

    Args:
        method: a method's name, with its options as keywords; a dictionary with its name under "method"; or a folder
            that `Slim.save_pretrained` wrote.
        model_type: of the checkpoint: "llava", "llava_next" or "llava_onevision".
        **options: of the method.

    Raises:
        ValueError: a method that vLLM cannot run, an unknown option or another kind of checkpoint.
    """
    if model_type not in _BY_MODEL_TYPE:
        raise ValueError(
            f"vlmslim cannot compress {model_type!r} in vLLM.{did_you_mean(model_type, _BY_MODEL_TYPE)} "
            f"Use one of {', '.join(_BY_MODEL_TYPE)}"
        )
    spec = method if isinstance(method, dict) else {"method": method}
    spec = spec | options
    methods = _stages(spec)
    _check_possible(methods)
    found = {"architectures": [_BY_MODEL_TYPE[model_type]], "vlmslim": spec}
    if keeps_positions(methods):
        found["rope_parameters"] = {"mrope_section": [1, 1, 1]}  # any: it makes vLLM ask the model for positions
    return found


def keeps_positions(methods: Sequence[Compressor]) -> bool:
    """Tell whether a method leaves gaps in the positions; vLLM then needs `--video-pruning-rate` too."""
    return any(stage.positions == "original" for method in methods for stage in method.stages())


def command(method: str, checkpoint: str) -> list[str]:
    """Return the command line that serves a checkpoint with a method, word by word.

    Args:
        method: as the command line of vlmslim writes it, or a folder that `Slim.save_pretrained` wrote.
        checkpoint: a folder, a hub id or `bundled/NAME`. What is known of it decides the architecture.

    Raises:
        ValueError: as `overrides`; or the checkpoint cannot be found.
    """
    checkpoint = check_checkpoint(checkpoint)
    model_type = AutoConfig.from_pretrained(checkpoint).model_type
    saved = not is_method_name(method.partition(":")[0]) and read(method) is not None
    given = overrides(method if saved else parse_method(method), model_type)
    words = ["vllm", "serve", checkpoint, "--hf-overrides", json.dumps(given)]
    return words + (["--video-pruning-rate", "0.01"] if "rope_parameters" in given else [])


@dataclass(frozen=True)
class Plan:
    """The method of one engine.

    method : the one stage, set up on the model that transformers would build
    digest : changes with the method, its options and its trained weights
    """

    method: Compressor
    digest: str

    def count(self, n: int, tiles: tuple[int, int] = (0, 0), size: tuple[int, int] = (0, 0)) -> int:
        """Return how many tokens an image of `n` sends: `Compressor.count`, which is known here.

        Raises:
            ValueError: the budget is larger than the image.
        """
        if (count := self.method.count(n, tiles, size)) is None:
            raise ValueError(f"{self.method} decides itself how many tokens it keeps of this image; vLLM cannot know")
        return count


def plan_of(config: Any) -> Plan:
    """Read the plan off a checkpoint's configuration, as `--hf-overrides` left it.

    Args:
        config: of transformers, with the method under `vlmslim`.

    Raises:
        ValueError: no method, one that vLLM cannot run or that does not suit the checkpoint, one that decides itself
            how many tokens it keeps, or one that keeps none; or the architecture is for another kind of checkpoint.
    """
    spec = getattr(config, "vlmslim", None)
    if not isinstance(spec, str | dict):
        raise ValueError(
            "vlmslim: the configuration names no method; `vlmslim vllm divprune:keep=64` prints the option that does"
        )
    known = _BY_MODEL_TYPE.get(config.model_type)
    if (given := {*ARCHITECTURES} & {*(config.architectures or ())}) and given != {known}:
        raise ValueError(
            f"vlmslim: {min(given)} is no architecture for a checkpoint of the type {config.model_type!r}; give "
            f"{known or 'a checkpoint of the type ' + ', '.join(_BY_MODEL_TYPE)}"
        )
    stages = _stages(spec)
    _check_possible(stages)
    skeleton = skeleton_of(config)
    with warnings.catch_warnings():  # a skeleton has no weights to compare a trained part's backbone with
        warnings.filterwarnings("ignore", message=".*no weights of this model can be read")
        (method,) = set_up(stages, skeleton)
    if not family_of(skeleton).anyres:  # every picture has as many tokens
        vision = config.vision_config
        method.count((vision.image_size // vision.patch_size) ** 2)
    count = method.count(sys.maxsize)
    if count == 0:
        raise ValueError(f"{method} keeps nothing of an image; leave the images out of the prompts instead")
    if count is None:
        raise ValueError(
            f"{method} decides itself how many tokens it keeps of an image, and vLLM must know before it encodes the "
            "image: set keep, or use another method"
        )
    return Plan(method, _digest(method))


def skeleton_of(config: Any) -> Any:
    """Build the model that transformers would build, without weights. Methods look at it when they are set up."""
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


def _stages(spec: str | dict) -> list[Compressor]:
    """Make the methods that a configuration names.

    Raises:
        ValueError: no method, or an unknown name or option.
    """
    if isinstance(spec, str):
        return made(spec)
    if "method" not in spec:
        raise ValueError(f"vlmslim: {spec!r} names no method; write {{'method': 'divprune', 'keep': 64}}")
    return made(spec["method"], **{option: value for option, value in spec.items() if option != "method"})


def _check_possible(methods: Sequence[Compressor]) -> None:
    """Refuse methods that vLLM cannot run.

    Raises:
        ValueError: says which stage and why; or `positions` is unknown.
    """
    stages = [stage for method in methods for stage in method.stages()]
    for stage in stages:
        check_choices(stage, positions=("renumbered", "original"))
        if not stage.drops_between_layers and not stage.acts_before_llm:
            raise ValueError(f"{stage} changes nothing; start vLLM without the --hf-overrides of vlmslim")
        if stage.drops_between_layers:
            raise ValueError(
                f"{stage} works inside the decoder. vLLM keeps one length of a request for all layers, and its "
                "attention kernels return no weights, so a plug-in cannot drop tokens there; use a method that works "
                "before the language model, such as divprune, or todre with layer=None"
            )
        if stage.reads_prompt:
            raise ValueError(
                f"{stage} reads the question. vLLM encodes an image once for all prompts with it, and never shows them "
                "to the encoder; use a method that looks at the image alone, such as divprune"
            )
        if isinstance(stage, Selector) and stage.rectify:
            raise ValueError(
                f"{stage} counts merged tokens in every decoder layer, which vLLM's attention kernels cannot do; leave "
                "out rectify"
            )
        if stage.encodes:
            raise ValueError(f"{stage} encodes pictures itself, which the plug-in does not offer; use another method")
    if len(stages) != 1:
        raise ValueError(f"give one method that works before the language model, not {len(stages)}")


def _digest(method: Compressor) -> str:
    """Return a hash of a method, its options and its trained weights.

    Pictures under another digest are other pictures: KV caches that engines share must not mix them up.
    """
    options = {option: getattr(method, option) for option in options_of(method)}
    described: dict[str, Any] = {"method": address_of(method), "options": options}
    if method.trained() is not None and (saved := read(str(options["weights"]))) is not None:
        described["weights"] = saved.sha256
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()[:16]
