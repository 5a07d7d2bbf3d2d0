"""Tiny random checkpoints of families beyond LLaVA, with real processors, for what needs prompts and pictures.

SmolVLM is among them where num2words is installed, which its processor needs.
"""

from pathlib import Path

import torch
import transformers as hf
import zoo
from transformers.utils import is_num2words_available

from vlmslim import bundled

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] | upper + ': ' }}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}{{ 'IMAGE' }}"
    "{% elif part['type'] == 'video' %}{{ 'VIDEO' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
SQUARE = {"height": 32, "width": 32}
INDICATORS = [f"<IMG_{name}>" for name in ("START", "GRID", "COL", "ROW", "END")]  # of Ovis2


def _template(image: str, video: str = "") -> str:
    return TEMPLATE.replace("IMAGE", image).replace("VIDEO", video)


def _tokenizer(image: str, *more: str, **named: str) -> hf.PreTrainedTokenizerFast:
    """The words of the bundled benchmark, and a family's own tokens."""
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_file=str(Path(bundled.resolve("bundled/tiny-llava")) / "tokenizer.json"),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": image} | named,
    )
    tokenizer.add_tokens(list(more), special_tokens=True)
    return tokenizer


def _qwen(processor: type, videos: type) -> hf.ProcessorMixin:
    tokenizer = _tokenizer("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    sizes = dict(patch_size=4, temporal_patch_size=2, merge_size=2)
    span = "<|vision_start|><|{}_pad|><|vision_end|>"
    return processor(
        image_processor=hf.Qwen2VLImageProcessor(**sizes, size=dict(shortest_edge=64 * 64, longest_edge=64 * 96)),
        video_processor=videos(**sizes, size=dict(shortest_edge=2 * 32 * 32, longest_edge=2 * 64 * 96)),
        tokenizer=tokenizer,
        chat_template=_template(span.format("image"), span.format("video")),
    )


def _glm4v():
    tokenizer = _tokenizer(
        "<|image|>", "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>", "<|video|>"
    )
    sizes = dict(patch_size=4, temporal_patch_size=2, merge_size=2)
    return hf.Glm4vProcessor(
        image_processor=hf.Glm4vImageProcessor(**sizes, size=dict(shortest_edge=64 * 64, longest_edge=64 * 96 * 2)),
        video_processor=hf.Glm4vVideoProcessor(**sizes, size=dict(shortest_edge=32 * 32, longest_edge=8 * 64 * 96)),
        tokenizer=tokenizer,
        chat_template=_template(
            "<|begin_of_image|><|image|><|end_of_image|>", "<|begin_of_video|><|video|><|end_of_video|>"
        ),
    )


def _idefics3():
    return _mosaic(hf.Idefics3Processor, hf.Idefics3ImageProcessor)


def _smolvlm():
    return _mosaic(hf.SmolVLMProcessor, hf.SmolVLMImageProcessor, video_processor=hf.SmolVLMVideoProcessor())


def _mosaic(processor: type, images: type, **more) -> hf.ProcessorMixin:
    tokenizer = _tokenizer("<image>", fake_image_token="<fake_token_around_image>", global_image_token="<global-img>")
    places = [f"<row_{i}_col_{j}>" for i in range(1, 4) for j in range(1, 4)]
    tokenizer.add_tokens(["<end_of_utterance>", *places], special_tokens=True)
    return processor(
        image_processor=images(size={"longest_edge": 64}, max_image_size={"longest_edge": 32}),
        tokenizer=tokenizer,
        image_seq_len=4,
        chat_template=_template("<image>"),
        **more,
    )


def _internvl():
    tokenizer = _tokenizer(
        "<IMG_CONTEXT>",
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    return hf.InternVLProcessor(
        image_processor=hf.GotOcr2ImageProcessor(size=SQUARE, crop_to_patches=True, max_patches=4),
        tokenizer=tokenizer,
        video_processor=hf.InternVLVideoProcessor(size=SQUARE),
        image_seq_length=4,
        chat_template=_template("<IMG_CONTEXT>\\n"),
    )


def _gemma3():
    tokenizer = _tokenizer("<image_soft_token>", boi_token="<start_of_image>", eoi_token="<end_of_image>")
    return hf.Gemma3Processor(
        image_processor=hf.Gemma3ImageProcessor(size=SQUARE),
        tokenizer=tokenizer,
        image_seq_length=4,
        chat_template=_template("<start_of_image>"),
    )


def _llava_next_video():
    square = dict(size={"shortest_edge": 32}, crop_size=SQUARE)
    return hf.LlavaNextVideoProcessor(
        image_processor=hf.LlavaNextImageProcessor(image_grid_pinpoints=zoo.PINPOINTS, **square),
        video_processor=hf.LlavaNextVideoVideoProcessor(**square),
        tokenizer=_tokenizer("<image>", "<video>"),
        patch_size=8,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
        chat_template=_template("<image>\n", "<video>\n"),
    )


def _vipllava():
    return hf.LlavaProcessor(
        image_processor=hf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=SQUARE),
        tokenizer=_tokenizer("<image>"),
        patch_size=8,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
        chat_template=_template("<image>\n"),
    )


def _deepseek_vl():
    return hf.DeepseekVLProcessor(
        image_processor=hf.DeepseekVLImageProcessor(size=SQUARE, min_size=4),
        tokenizer=_tokenizer("<image>"),
        num_image_tokens=16,
        chat_template=_template("<image>"),
    )


def _mistral3():
    return hf.PixtralProcessor(
        image_processor=hf.PixtralImageProcessor(patch_size=8, size={"longest_edge": 64}),
        tokenizer=_tokenizer("[IMG]", "[IMG_BREAK]", "[IMG_END]"),
        patch_size=8,
        spatial_merge_size=2,
        chat_template=_template("[IMG]"),
    )


def _aya_vision():
    places = ["<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_LINE_BREAK|>", "TILE_GLOBAL", "<image>"]
    places += [f"TILE_{i}" for i in range(1, 10)]
    return hf.AyaVisionProcessor(
        image_processor=hf.GotOcr2ImageProcessor(size=SQUARE, crop_to_patches=True, max_patches=4),
        tokenizer=_tokenizer("<|IMG_PATCH|>", *places),
        patch_size=8,
        downsample_factor=2,
        img_size=32,
        chat_template=_template("<image>"),
    )


def _cohere2_vision():
    tokenizer = _tokenizer(
        "<|IMG_PATCH|>",
        boi_token="<|START_OF_IMG|>",
        eoi_token="<|END_OF_IMG|>",
        img_line_break_token="<|IMG_LINE_BREAK|>",
    )
    return hf.Cohere2VisionProcessor(
        image_processor=hf.Cohere2VisionImageProcessor(size=SQUARE, patch_size=2, max_patches=4),
        tokenizer=tokenizer,
        chat_template=_template("<|IMG_PATCH|>"),
    )


def _ovis2():
    return hf.Ovis2Processor(
        image_processor=hf.Ovis2ImageProcessor(size=SQUARE, crop_to_patches=True, max_patches=4),
        tokenizer=_tokenizer("<image>", "<IMG_ATOM>", *INDICATORS),
        image_seq_length=4,
        chat_template=_template("<image>"),
    )


PROCESSORS = {
    "qwen2_vl": lambda: _qwen(hf.Qwen2VLProcessor, hf.Qwen2VLVideoProcessor),
    "qwen2_5_vl": lambda: _qwen(hf.Qwen2_5_VLProcessor, hf.Qwen2VLVideoProcessor),
    "qwen3_vl": lambda: _qwen(hf.Qwen3VLProcessor, hf.Qwen3VLVideoProcessor),
    "glm4v": _glm4v,
    "idefics3": _idefics3,
    "internvl": _internvl,
    "gemma3": _gemma3,
    "vipllava": _vipllava,
    "deepseek_vl": _deepseek_vl,
    "llava_next_video": _llava_next_video,
    "mistral3": _mistral3,
    "aya_vision": _aya_vision,
    "cohere2_vision": _cohere2_vision,
    "ovis2": _ovis2,
}
if is_num2words_available():
    PROCESSORS["smolvlm"] = _smolvlm
_QWEN = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
#: Which of the zoo's tokens are which of the tokenizer's.
TOKENS = {
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN,
    "glm4v": {
        "image_token_id": "<|image|>",
        "video_token_id": "<|video|>",
        "image_start_token_id": "<|begin_of_image|>",
        "image_end_token_id": "<|end_of_image|>",
        "video_start_token_id": "<|begin_of_video|>",
        "video_end_token_id": "<|end_of_video|>",
    },
    "idefics3": {"image_token_id": "<image>"},
    "smolvlm": {"image_token_id": "<image>"},
    "internvl": {"image_token_id": "<IMG_CONTEXT>"},
    "gemma3": {
        "image_token_id": "<image_soft_token>",
        "boi_token_index": "<start_of_image>",
        "eoi_token_index": "<end_of_image>",
    },
    "vipllava": {"image_token_id": "<image>"},
    "deepseek_vl": {"image_token_id": "<image>"},
    "llava_next_video": {"image_token_id": "<image>", "video_token_id": "<video>"},
    "mistral3": {"image_token_id": "[IMG]"},
    "aya_vision": {"image_token_id": "<|IMG_PATCH|>"},
    "cohere2_vision": {"image_token_id": "<|IMG_PATCH|>"},
    "ovis2": {"image_token_id": "<IMG_ATOM>", "visual_indicator_token_ids": INDICATORS},
}


def checkpoint(name: str, folder: Path) -> str:
    """Write a checkpoint of a family with its processor, and return where."""
    processor = PROCESSORS[name]()
    cls, config = zoo.parts(name)
    for option, token in TOKENS[name].items():
        setattr(config, option, processor.tokenizer.convert_tokens_to_ids(token))
    config.text_config.vocab_size = len(processor.tokenizer)
    torch.manual_seed(0)
    model = cls(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(0, 1.5 / p[0].numel() ** 0.5)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)
