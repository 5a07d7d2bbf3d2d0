"""The tiny decoders of the reference vectors, inside a LLaVA that is fed the vectors' own embeddings."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import vlmslim
from vlmslim.compressor import Compressed, Compressor


@dataclass
class Feed(Compressor):
    """Sends given tokens in place of an image's."""

    features: Tensor = None

    def compress(self, image) -> Compressed:
        return Compressed(self.features)


def build(arrays: dict[str, np.ndarray]) -> tuple[LlavaForConditionalGeneration, dict, Tensor]:
    """Make the model, its inputs, and the visual tokens to feed, of `inputs` (S, d) with `n` of them after `first`."""
    x, first, n = torch.from_numpy(arrays["inputs"]), int(arrays["first"]), int(arrays["n"])
    words = torch.cat([x[:first], x[first + n :]])
    text = LlamaConfig(
        hidden_size=x.shape[1],
        intermediate_size=arrays["w.layers.0.mlp.gate_proj.weight"].shape[0],
        num_hidden_layers=int(arrays["depth"]),
        num_attention_heads=int(arrays["heads"]),
        vocab_size=len(words) + 1,  # the last id is the placeholder
        rope_parameters={"rope_type": "default", "rope_theta": float(arrays["rope_theta"])},
        rms_norm_eps=float(arrays["eps"]),
    )
    side = int(np.ceil(n**0.5))
    sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2)
    vision = CLIPVisionConfig(image_size=4 * side, patch_size=4, **sizes)
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_id=len(words))
    model = LlavaForConditionalGeneration(config).eval()
    lm = model.model.language_model
    weights = {key.removeprefix("w."): torch.from_numpy(value) for key, value in arrays.items() if key.startswith("w.")}
    weights["embed_tokens.weight"] = torch.cat([words, torch.zeros(1, x.shape[1])])
    assert not lm.load_state_dict(weights, strict=False).unexpected_keys
    ids = [*range(first), *[len(words)] * side**2, *range(first, len(words))]
    return (
        model,
        dict(input_ids=torch.tensor([ids]), pixel_values=torch.zeros(1, 3, 4 * side, 4 * side)),
        x[first : first + n],
    )


@torch.no_grad()
def run(arrays: dict[str, np.ndarray], method: Compressor, kept: np.ndarray) -> Tensor:
    """Run the decoder under a method: the final states (S', d) of the text and of the visual tokens `kept`."""
    model, inputs, features = build(arrays)
    first, ids = int(arrays["first"]), inputs["input_ids"][0]
    text = (ids != model.config.image_token_id).nonzero()[:, 0]
    with vlmslim.patch(model, [Feed(features), method]):
        hidden = model.model(**inputs, use_cache=False).last_hidden_state[0]
    return hidden[torch.cat([text[:first], first + torch.from_numpy(kept).long(), text[first:]])]
