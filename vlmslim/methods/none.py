"""none: keep every visual token, the control that shows what the engine itself costs."""

from dataclasses import dataclass

from vlmslim.compressor import Compressor
from vlmslim.registry import the_method


@the_method
@dataclass
class NoCompression(Compressor):
    """Attach only the recorder: outputs are bit-identical to those of the unpatched model, and there is a receipt."""

    def requested(self, n: int) -> int:
        """Keep all of them."""
        return n
