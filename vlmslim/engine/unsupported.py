"""Model families of transformers that vlmslim was tried on and refuses. docs/models.md lists them."""

_RECURRENT = "its decoder has layers with a recurrent state, in which a dropped token changes all tokens after it"

#: Why a family cannot be patched, by `config.model_type`.
UNSUPPORTED = {
    "video_llava": "it has two vision towers, and hands out videos frame by frame with CLS tokens",
    "paligemma": "all tokens of its prompt see each other, so the answer would change with the padding of a batch",
    "lfm2_vl": "its decoder has convolutions, in which a dropped token changes its neighbours",
    "qwen3_5": _RECURRENT,
    "qwen3_5_moe": _RECURRENT,
    "minicpmv4_6": _RECURRENT,
    "perception_lm": "its vision tower comes from timm, and it encodes videos as if they were pictures",
    "kimi_k25": "its decoder attends by compressed keys that all heads share (MLA), which vlmslim cannot read",
}
