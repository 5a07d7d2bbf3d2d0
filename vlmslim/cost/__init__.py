"""The cost of a prompt: counted under named conventions, and measured.

flops.py   analytic FLOPs and KV-cache bytes, from configs alone (imports no torch)
parts.py   FLOPs of a real prefill, by tower, projector, method, language model and LM head
timing.py  time to first token, decoding time and latency, with methods measured interleaved
timer.py   the time of a block on a CPU or a GPU
memory.py  peak memory of a generation, and the bytes of a KV cache
budget.py  the option of a method that makes it meet a given cost
search.py  the search for that option, with few measurements
bench/     all of it for a list of methods: `vlmslim bench`

Import from the modules: `from vlmslim.cost.flops import Ledger`.
"""
