"""The ledger of what a prompt costs: counted under named conventions, and measured.

flops.py   analytic FLOPs and KV-cache bytes
parts.py   FLOPs and time of a real prefill, shared out among tower, projector, method, language model and LM head
timing.py  time to first token, decoding and latency, in turn
memory.py  peak memory, and what a KV cache holds
ideal.py   the same model fed directly with as few visual tokens as a method leaves: the bound of every method
shapes.py  the public models' sizes with random weights
bench.py   all of it for a list of methods: `vlmslim bench`
"""

from vlmslim.cost.flops import (
    CONVENTIONS,
    Convention,
    DecoderShape,
    Ledger,
    crop_tokens,
    equivalent_tokens,
    kv_bytes,
    prefill_flops,
    projector_flops,
    tower_flops,
)
from vlmslim.cost.memory import cache_bytes, peak_memory
from vlmslim.cost.parts import count_flops, flop_counter, time_parts
from vlmslim.cost.timing import (
    Spread,
    Timing,
    interleave,
    measure,
    measure_together,
    summarise,
    time_generation,
    time_steady,
)

__all__ = [
    "CONVENTIONS",
    "Convention",
    "DecoderShape",
    "Ledger",
    "Spread",
    "Timing",
    "cache_bytes",
    "count_flops",
    "crop_tokens",
    "equivalent_tokens",
    "flop_counter",
    "interleave",
    "kv_bytes",
    "measure",
    "measure_together",
    "peak_memory",
    "prefill_flops",
    "projector_flops",
    "summarise",
    "time_generation",
    "time_steady",
    "time_parts",
    "tower_flops",
]
