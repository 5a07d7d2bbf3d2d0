"""The images that travel with an output of the encoder.

`generate` may encode the images long before it calls `forward`, so the record travels with the features.
"""

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlmslim.compressor import ImageTokens

if TYPE_CHECKING:
    from vlmslim.engine.encoder import RecordingEncoder

_ATTRIBUTE = "vlmslim_images"


@dataclass
class Encoded:
    """The images of an encoder output, without the tower's hidden states, which need not outlive the encoder.

    images : in the order of the prompts, or their views where the prompt tells which views make a picture
    copies : how many rows in succession share them, because `generate` repeats entries for beams
    """

    images: list[ImageTokens]
    copies: int

    @classmethod
    def of(cls, output: Any) -> "Encoded":
        """Read the images off an encoder output.

        Raises:
            ValueError: the output was not encoded by this patched model.
        """
        record = record_of(output)
        if record is None:
            raise ValueError(
                "these image features were encoded before the patch or by a function that was set after it, or cut up "
                "by chunked prefill; let the patched model encode the images, and call generate() with "
                "prefill_chunk_size=None"
            )
        images = [copy.copy(image) for image in record.images]  # several forwards may share an output
        return cls(images, len(output.pooler_output) // max(record.entries, 1))


@dataclass
class Record:
    """The record that travels with an encoder output.

    images  : `Encoded.images`
    entries : number of entries of the output when it was encoded
    encoder : the encoder that recorded the images
    """

    images: list[ImageTokens]
    entries: int
    encoder: "RecordingEncoder"


def record_of(output: object) -> Record | None:
    """Return the record that travels with an encoder output; None without one."""
    return getattr(output, _ATTRIBUTE, None)


def put_record(output: object, record: Record | None) -> None:
    """Let a record travel with an encoder output."""
    setattr(output, _ATTRIBUTE, record)
