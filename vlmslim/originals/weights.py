"""Load a checkpoint in the authors' format into the classes of transformers, without conversion."""

import re
import warnings
from typing import Any

import torch
import transformers
from torch import nn

from vlmslim.io import hub
from vlmslim.io.messages import one_line
from vlmslim.originals.checkpoint import Original
from vlmslim.originals.processor import IMAGE, VIDEO
from vlmslim.originals.templates import conversation, conversation_of

TOWER = "model.vision_tower."

#: Keys that the authors' code does not read either: buffers of old versions, and the end of a SigLIP tower.
_UNREAD = re.compile(r"rotary_emb\.inv_freq$|position_ids$|^model\.vision_tower\.")


def load(original: Original, tokenizer: Any, **how: Any) -> Any:
    """Load the model.

    Args:
        original: the checkpoint.
        tokenizer: as `tokenizer_of` returns it; the model learns the ids of `<image>` and `<video>` from it.
        **how: dtype, device_map and attn_implementation for `from_pretrained`.

    Raises:
        ValueError: a part of the model is not in the checkpoint, or a part of the checkpoint not in the model.
    """
    config = original.config
    config.image_token_index = tokenizer.convert_tokens_to_ids(IMAGE)
    tokens = [IMAGE]
    if hasattr(config, "video_token_index"):
        config.video_token_index = tokenizer.convert_tokens_to_ids(VIDEO)
        tokens.append(VIDEO)
    cls = getattr(transformers, config.architectures[0])
    model, info = cls.from_pretrained(
        original.checkpoint,
        config=config,
        key_mapping=key_mapping(cls, config),
        revision=original.revision or "main",
        output_loading_info=True,
        **how,
        **hub.how_to_load(original.checkpoint),
    )
    # The record of renamed keys goes, because `save_pretrained` would write the authors' names back, beside a
    # configuration of transformers: a folder that loads with random weights.
    vars(model).pop("_weight_conversions", None)
    _complete(model, original, set(info["missing_keys"]), set(info["unexpected_keys"]))
    _make_room(model, max(tokenizer.convert_tokens_to_ids(tokens)) + 1)
    _mend_generation(model, tokenizer)
    return model


def key_mapping(cls: Any, config: Any) -> dict[str, str]:
    """Return the names of transformers for the names of the authors, as patterns.

    The patterns have no groups, because transformers cannot turn such patterns round.
    """
    with torch.device("meta"):
        names = cls(config).state_dict()
    inner = "vision_model." if any(name.startswith(f"{TOWER}vision_model.") for name in names) else ""
    return {
        r"^model\.mm_projector\.0\.": "model.multi_modal_projector.linear_1.",
        r"^model\.mm_projector\.2\.": "model.multi_modal_projector.linear_2.",
        r"^model\.vision_tower\.vision_tower\.vision_model\.": f"{TOWER}{inner}",
        r"^model\.embed_tokens\.": "model.language_model.embed_tokens.",
        r"^model\.layers\.": "model.language_model.layers.",
        r"^model\.norm\.": "model.language_model.norm.",
    }


def _complete(model: Any, original: Original, missing: set[str], unexpected: set[str]) -> None:
    """Load the vision tower by its name if the checkpoint has none, and see that nothing is left random.

    Raises:
        ValueError: another part is missing, or a part of the checkpoint has no place.
    """
    no_place = sorted(key for key in unexpected if not _UNREAD.search(key))
    if no_place:
        raise ValueError(
            f"{original.checkpoint} holds {_listed(no_place)}, for which {type(model).__name__} has no place"
        )
    tower = {name for name in model.state_dict() if name.startswith(TOWER)}
    if others := sorted(missing - tower):
        raise ValueError(f"{original.checkpoint} lacks {_listed(others)}, which would stay random: is a file missing?")
    if not missing:
        return
    if missing != tower:
        raise ValueError(
            f"{original.checkpoint} has a part of its vision tower only; it lacks {_listed(sorted(missing))}"
        )
    _load_tower(model.model.vision_tower, original)


def _load_tower(tower: nn.Module, original: Original) -> None:
    """Copy the weights of the tower that the checkpoint names."""
    name = original.tower_name
    kind: Any = type(tower)
    how = {"dtype": "auto", "output_loading_info": True} | hub.how_to_load(name)
    try:
        own, info = kind.from_pretrained(name, config=tower.config, **how)
    except (ImportError, OSError, ValueError) as error:
        raise ValueError(
            f"{original.checkpoint} holds no vision tower, because it was frozen, and {name} could not be loaded: "
            f"{one_line(error)}; download it, or correct mm_vision_tower in config.json"
        ) from error
    if info["missing_keys"]:
        raise ValueError(f"{name} lacks {_listed(sorted(info['missing_keys']))} of the tower of {original.checkpoint}")
    tower.load_state_dict(own.state_dict())
    warnings.warn(
        f"{original.checkpoint} holds no vision tower; vlmslim loaded {name}, as the authors' code does", stacklevel=2
    )


@torch.no_grad()
def _make_room(model: Any, rows: int) -> None:
    """Add the rows of new tokens to the vocabulary, if it has no spare ones.

    Nobody reads the embeddings of new tokens, but their logits would compete. So the rows repeat the first one, which
    is `<unk>` in the vocabulary of LLaMA: no model says it.
    """
    old = model.get_input_embeddings().weight.shape[0]
    if rows <= old:
        return
    model.resize_token_embeddings(rows, mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        layer.weight[old:] = layer.weight[0]


def _mend_generation(model: Any, tokenizer: Any) -> None:
    """Leave out sampling options without sampling, which cannot be saved, and stop where the conversation does."""
    options = model.generation_config
    if not options.do_sample:
        options.temperature = options.top_p = options.top_k = None
    try:
        end = tokenizer.convert_tokens_to_ids(conversation(conversation_of(model.config.text_config)).end)
    except ValueError:
        return
    known = options.eos_token_id if isinstance(options.eos_token_id, list) else [options.eos_token_id]
    if end is not None and end != tokenizer.unk_token_id and end not in known:
        options.eos_token_id = [end, *(one for one in known if one is not None)]


def _listed(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
