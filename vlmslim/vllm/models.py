"""The architectures that vLLM loads by name."""

from torch import Tensor
from vllm.model_executor.models import llava, llava_next, llava_onevision
from vllm.multimodal import MULTIMODAL_REGISTRY

from vlmslim.vllm.encoding import AnyresModel, SlimModel
from vlmslim.vllm.processing import SlimInfo, SlimProcessor


class LlavaInfo(SlimInfo, llava.LlavaProcessingInfo):
    """LLaVA-1.5's images."""


class LlavaProcessor(SlimProcessor, llava.LlavaMultiModalProcessor):
    """LLaVA-1.5's prompts."""


@MULTIMODAL_REGISTRY.register_processor(LlavaProcessor, info=LlavaInfo, dummy_inputs=llava.LlavaDummyInputsBuilder)
class SlimLlava(SlimModel, llava.LlavaForConditionalGeneration):
    """LLaVA-1.5."""


class LlavaNextInfo(SlimInfo, llava_next.LlavaNextProcessingInfo):
    """LLaVA-NeXT's images."""


class LlavaNextProcessor(SlimProcessor, llava_next.LlavaNextMultiModalProcessor):
    """LLaVA-NeXT's prompts."""


@MULTIMODAL_REGISTRY.register_processor(
    LlavaNextProcessor, info=LlavaNextInfo, dummy_inputs=llava.LlavaDummyInputsBuilder
)
class SlimLlavaNext(AnyresModel, llava_next.LlavaNextForConditionalGeneration):
    """LLaVA-NeXT."""


class LlavaOnevisionInfo(SlimInfo, llava_onevision.LlavaOnevisionProcessingInfo):
    """LLaVA-OneVision's images."""


class LlavaOnevisionProcessor(SlimProcessor, llava_onevision.LlavaOnevisionMultiModalProcessor):
    """LLaVA-OneVision's prompts."""


@MULTIMODAL_REGISTRY.register_processor(
    LlavaOnevisionProcessor, info=LlavaOnevisionInfo, dummy_inputs=llava.LlavaDummyInputsBuilder
)
class SlimLlavaOnevision(AnyresModel, llava_onevision.LlavaOnevisionForConditionalGeneration):
    """LLaVA-OneVision, images only."""

    def _newline(self, newline: Tensor) -> dict[str, Tensor]:
        return {"image_newline": newline}
