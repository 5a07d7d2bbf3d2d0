"""The record of a model family."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Family:
    """One family of vision-language models: where its parts are, and how its encoder hands out images.

    A new family is a row of `FAMILIES`. Paths are attributes joined by dots.

    model_type     : `config.model_type`
    name           : the transformers class that a user loads
    units          : how the encoder's output is cut into images. "crops": each entry is one square view. "anyres": a
                     thumbnail and tiles, unpadded and joined by newline tokens. "packed": images of any size, one after
                     the other. "samples": each entry holds all views of one prompt
    video          : takes `pixel_values_videos`
    video_token    : the field of the configuration that holds the placeholder of videos
    language_model : from the core model, as are `tower` and `projector`
    layers         : the encoder layers, from the tower
    grid           : of packed images, the argument that holds (frames,) rows and columns
    merge          : patches along each side of a token, a number or a path from the configuration
    joins          : tells from the ids between two views whether they belong to one picture; None if views never do
    thumbnail      : which of a picture's views shows the whole picture, 0 for the first one and -1 for the last one
    masks_by_type  : the core model makes the attention masks, one for each type of decoder layer
    slides         : decoder layers may use sliding windows
    """

    model_type: str
    name: str
    units: str = "crops"
    video: bool = False
    video_token: str = "video_token_id"
    language_model: str = "language_model"
    tower: str = "vision_tower"
    projector: str = "multi_modal_projector"
    layers: str = "encoder.layers"
    grid: str = ""
    merge: str | int = 1
    joins: Callable[[np.ndarray], bool] | None = None
    thumbnail: int = -1
    masks_by_type: bool = False
    slides: bool = False

    @property
    def anyres(self) -> bool:
        """True if images become a thumbnail and tiles, unpadded and joined by newline tokens."""
        return self.units == "anyres"
