"""Tiny random checkpoints of families beyond LLaVA, with real processors, for what goes through lmms-eval."""

from pathlib import Path

import torch
import transformers as hf
import zoo

from vlmslim import bundled

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] | upper + ': ' }}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}{{ 'IMAGE' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
SQUARE = {"height": 32, "width": 32}


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


def _qwen2_5_vl():
    tokenizer = _tokenizer("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    sizes = dict(patch_size=4, temporal_patch_size=2, merge_size=2)
    return hf.Qwen2_5_VLProcessor(
        image_processor=hf.Qwen2VLImageProcessor(**sizes, min_pixels=64 * 64, max_pixels=64 * 96),
        video_processor=hf.Qwen2VLVideoProcessor(**sizes),
        tokenizer=tokenizer,
        chat_template=TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
    )


def _idefics3():  # SmolVLM's prompts look alike; its processor needs one more package
    tokenizer = _tokenizer("<image>", fake_image_token="<fake_token_around_image>", global_image_token="<global-img>")
    places = [f"<row_{i}_col_{j}>" for i in range(1, 4) for j in range(1, 4)]
    tokenizer.add_tokens(["<end_of_utterance>", *places], special_tokens=True)
    images = hf.Idefics3ImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    template = TEMPLATE.replace("IMAGE", "<image>")
    return hf.Idefics3Processor(image_processor=images, tokenizer=tokenizer, image_seq_len=4, chat_template=template)


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
        chat_template=TEMPLATE.replace("IMAGE", "<IMG_CONTEXT>\\n"),
    )


def _gemma3():
    tokenizer = _tokenizer("<image_soft_token>", boi_token="<start_of_image>", eoi_token="<end_of_image>")
    return hf.Gemma3Processor(
        image_processor=hf.Gemma3ImageProcessor(size=SQUARE),
        tokenizer=tokenizer,
        image_seq_length=4,
        chat_template=TEMPLATE.replace("IMAGE", "<start_of_image>"),
    )


PROCESSORS = {"qwen2_5_vl": _qwen2_5_vl, "idefics3": _idefics3, "internvl": _internvl, "gemma3": _gemma3}
#: Which of the zoo's tokens are which of the tokenizer's.
TOKENS = {
    "qwen2_5_vl": {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    },
    "idefics3": {"image_token_id": "<image>"},
    "internvl": {"image_token_id": "<IMG_CONTEXT>"},
    "gemma3": {
        "image_token_id": "<image_soft_token>",
        "boi_token_index": "<start_of_image>",
        "eoi_token_index": "<end_of_image>",
    },
}


def checkpoint(name: str, folder: Path) -> str:
    """Write a checkpoint of a family with its processor, and return where."""
    processor = PROCESSORS[name]()
    make, kind = zoo.ZOO[name]
    config = make()
    for option, token in TOKENS[name].items():
        setattr(config, option, processor.tokenizer.convert_tokens_to_ids(token))
    config.text_config.vocab_size = len(processor.tokenizer)
    torch.manual_seed(0)
    model = getattr(hf, kind)(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(0, 1.5 / p[0].numel() ** 0.5)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)
