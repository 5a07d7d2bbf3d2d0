"""The text tower of the CLIP whose vision tower a model uses, loaded from Hugging Face or open_clip."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from vlmslim import bundled
from vlmslim.engine.families import tower
from vlmslim.io import hub

#: the CLIP of LLaVA-1.5, and the width, depth, patch size and image size of its vision tower
CLIP_OF_LLAVA = ("openai/clip-vit-large-patch14-336", (1024, 24, 14, 336))

#: CLIPs that patches hold, by name. They are shared because a model may be patched several times (`vlmslim doctor` does
#: it three times), and a CLIP has a gigabyte.
_in_use: "WeakValueDictionary[str, ClipText]" = WeakValueDictionary()


class ClipText(nn.Module):
    """The text tower of a CLIP, and the projection that brings patches into its space.

    Args:
        modules: the modules that `states` runs, so that `.to()` moves them.
        states: token ids (1, t) -> token states (1, t, d), after the final layer norm and the projection.
        tokenize: text, length -> ids, with start and end of text, cut to `length`.
        end: id of the end of text.
        context: the most tokens that the tower reads.
        projection: (v, d) of patches.
        norm: the vision tower's post-layernorm.
        stem: (v, 3, h, w) the vision tower's patch embedding, by which towers are told apart.
    """

    def __init__(
        self,
        modules: list[nn.Module],
        states: Callable[[Tensor], Tensor],
        tokenize: Callable[[str, int], list[int]],
        end: int,
        context: int,
        projection: Tensor,
        norm: nn.Module,
        stem: Tensor,
    ):
        super().__init__()
        self.parts = nn.ModuleList(modules)
        self.states, self.tokenize, self.end, self.context = states, tokenize, end, context
        self.norm = norm
        self.projection: Tensor
        self.register_buffer("projection", projection.detach().float())
        self.stem = stem.detach().float().cpu()
        self.requires_grad_(False).eval().float()

    def check_tower(self, tower: Any) -> None:
        """Refuse a model whose vision tower is not this CLIP's; a fine-tuned one passes.

        Raises:
            ValueError: width, patch size or weights are those of another tower.
        """
        stem = getattr(tower, "vision_model", tower).embeddings.patch_embedding.weight
        if stem.shape == self.stem.shape:
            if stem.is_meta:
                return
            stem = stem.detach().float().cpu()
            if (stem - self.stem).norm() < 0.5 * self.stem.norm():
                return
        raise ValueError(
            f"the vision tower of this model (patch embedding {tuple(stem.shape)}) is not that of the CLIP "
            f"({tuple(self.stem.shape)}), so text and patches cannot be compared; give clip=THE_CLIP_OF_THIS_TOWER"
        )

    @torch.no_grad()
    def embed(self, text: str, pool: str = "eot", length: int | None = None) -> Tensor:
        """Embed a text: (d,) fp32.

        Args:
            text: any length; it is cut to what the tower reads.
            pool: "eot" takes the state at the first end of text, as CLIP does; "last_pad" the state at the last of
                `length` places.
            length: number of places, for "last_pad"; None for as many as the tower reads.
        """
        device = self.projection.device
        length = length if length is not None and pool == "last_pad" else self.context
        ids = self.tokenize(text, length)
        if pool == "last_pad":
            ids = ids + [self.end] * (length - len(ids))
        with torch.autocast(device.type, enabled=False):
            states = self.states(torch.tensor([ids], device=device))[0]
        return states[-1 if pool == "last_pad" else ids.index(self.end)].float()

    @torch.no_grad()
    def embed_segments(self, text: str, released: bool = False) -> Tensor:
        """Embed a text of any length in segments that the tower can read: (segments, d) fp32.

        Args:
            text: as it is.
            released: cut the ids every `context` places, so that only the first segment has a start and only the last
                an end, and pool each at its largest id, as CDPruner's release does. The first segment of a long text
                then is pooled at its start, and says nothing. Otherwise each segment has both, and is pooled at its
                end.
        """
        device, ids = self.projection.device, self.tokenize(text, 10_000)
        if released:
            segments = [ids[i : i + self.context] for i in range(0, len(ids), self.context)]
            places = [max(range(len(own)), key=own.__getitem__) for own in segments]
        else:
            start, words, end = ids[:1], ids[1:-1], ids[-1:]
            room = self.context - 2
            segments = [start + words[i : i + room] + end for i in range(0, max(1, len(words)), room)]
            places = [len(own) - 1 for own in segments]
        with torch.autocast(device.type, enabled=False):
            states = [
                self.states(torch.tensor([own], device=device))[0, place]
                for own, place in zip(segments, places, strict=True)
            ]
        return torch.stack(states).float()

    @torch.no_grad()
    def project(self, patches: Tensor, norm: bool = False) -> Tensor:
        """Project patches into the space of texts: (..., v) -> (..., d) fp32; `norm` applies post-layernorm first."""
        with torch.autocast(patches.device.type, enabled=False):
            patches = patches.float()
            return (self.norm(patches) if norm else patches) @ self.projection


def load_clip(name: str) -> ClipText:
    """Load a CLIP by the names that `Recoverable.clip` takes, or return the one that another patch still uses.

    Raises:
        ValueError: the folder has no CLIP, or the open_clip name comes without weights.
        ImportError: open_clip is not installed.
        TypeError: the CLIP's towers are not plain transformers.
    """
    clip = _in_use.get(name)
    if clip is None:
        clip = _in_use[name] = _load(name)
    return clip


def _load(name: str) -> ClipText:
    name = bundled.resolve(name)
    if Path(name).is_dir():
        if (Path(name) / "open_clip_config.json").is_file():
            return _open_clip(f"local-dir:{name}")
        if (Path(name) / "config.json").is_file():
            return _hf_clip(name)
        raise ValueError(
            f"clip={name!r}: the folder has no open_clip_config.json and no config.json; give a CLIP's folder"
        )
    if name.startswith(("hf-hub:", "local-dir:")):
        return _open_clip(name)
    if ":" in name:
        return _open_clip(*name.split(":", 1))
    if name.count("/") == 1:
        return _hf_clip(name)
    raise ValueError(
        f"clip={name!r}: give a folder, a HF hub id (org/name), 'hf-hub:org/name' for an open_clip hub id, or an "
        "open_clip name with its weights ('ViT-L-14-336-quickgelu:openai')"
    )


def _hf_clip(name: str) -> ClipText:
    from transformers import AutoTokenizer, CLIPModel

    asked = {} if Path(name).is_dir() else hub.how_to_ask()
    try:
        model = CLIPModel.from_pretrained(name, dtype=torch.float32, **asked)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **asked)
    except OSError as error:
        if asked:
            raise OSError(f"clip={name!r}: {hub.hint(name)}") from error
        raise

    def tokenize(text: str, length: int) -> list[int]:
        return tokenizer(text, truncation=True, max_length=length)["input_ids"]

    return hf_clip_text(model, tokenize, tokenizer.eos_token_id)


def hf_clip_text(model: Any, tokenize: Callable[[str, int], list[int]], end: int) -> ClipText:
    """Take the text tower out of a loaded HF `CLIPModel`.

    Args:
        model: the `CLIPModel`.
        tokenize: text, length -> ids.
        end: id of the end of text, from the tokenizer, because the configuration of older checkpoints has a wrong one.
    """
    text, projection = model.text_model, model.text_projection
    tower = getattr(model.vision_model, "vision_model", model.vision_model)
    return ClipText(
        modules=[text, projection],
        states=lambda ids: projection(text(input_ids=ids).last_hidden_state),
        tokenize=tokenize,
        end=end,
        context=model.config.text_config.max_position_embeddings,
        projection=model.visual_projection.weight.T,
        norm=tower.post_layernorm,
        stem=tower.embeddings.patch_embedding.weight,
    )


def _open_clip(name: str, pretrained: str | None = None) -> ClipText:
    try:
        import open_clip
    except ImportError as error:
        raise ImportError(f"clip={name!r} needs open_clip: pip install 'vlmslim[clip]'") from error
    model = open_clip.create_model(name, pretrained, precision="fp32", require_pretrained=True)
    text, tower, tokenizer = getattr(model, "text", model), model.visual, open_clip.get_tokenizer(name)
    needed = {text: ("token_embedding", "ln_final"), tower: ("proj", "conv1"), tokenizer: ("eot_token_id",)}
    for owner, attributes in needed.items():
        for attribute in attributes:
            if not hasattr(owner, attribute):
                raise TypeError(f"clip={name!r} is not a plain CLIP: its {type(owner).__name__} has no {attribute}")
    end = tokenizer.eot_token_id

    def tokenize(words: str, length: int) -> list[int]:
        ids = tokenizer([words], context_length=length)[0].tolist()  # with padding at the end
        return ids[: len(ids) - ids[::-1].index(end)]  # to the last end, because the text may contain another one

    stem, projection, norm = tower.conv1.weight, tower.proj, tower.ln_post
    if text is model:
        del model.visual  # the text tower is what is left

    def states(ids: Tensor) -> Tensor:
        x = text.token_embedding(ids) + text.positional_embedding[: ids.shape[1]]
        x = text.transformer(x, attn_mask=text.attn_mask[: ids.shape[1], : ids.shape[1]])
        x, project = text.ln_final(x), text.text_projection
        return project(x) if isinstance(project, nn.Linear) else x @ project

    return ClipText(
        modules=[text],
        states=states,
        tokenize=tokenize,
        end=end,
        context=text.positional_embedding.shape[0],
        projection=projection,
        norm=norm,
        stem=stem,
    )


def clip_of(model: Any, name: str | None = None) -> ClipText:
    """Load the CLIP whose vision tower a model uses, by its name, or by what `default_clip` knows.

    Raises:
        ValueError: the CLIP does not belong to the vision tower, or no default is known.
    """
    clip = load_clip(name or default_clip(model))
    clip.check_tower(tower(model.model))
    return clip


def default_clip(model: Any) -> str:
    """Return the name of the CLIP that a model's vision tower comes from.

    Raises:
        ValueError: the tower is neither a bundled checkpoint's nor that of LLaVA-1.5.
    """
    if Path(model.config._name_or_path).resolve().parent == Path(bundled.__file__).resolve().parent:
        return "bundled/tiny-clip"
    name, size = CLIP_OF_LLAVA
    vision = model.config.vision_config
    if (vision.hidden_size, vision.num_hidden_layers, vision.patch_size, vision.image_size) == size:
        return name
    raise ValueError(
        "this model does not tell which CLIP its vision tower comes from; give clip=THE_CLIP_OF_THIS_VISION_TOWER: a "
        "hub id, a folder, or an open_clip NAME:PRETRAINED"
    )
