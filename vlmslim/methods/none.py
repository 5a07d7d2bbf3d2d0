"""none: keep every visual token. The honest baseline: the engine counts, and changes nothing."""

from dataclasses import dataclass

from vlmslim.compressor import Compressor


@dataclass
class Unpruned(Compressor):
    """Attach the recorder alone: outputs are bit-identical to the unpatched model's, but there is a receipt."""
