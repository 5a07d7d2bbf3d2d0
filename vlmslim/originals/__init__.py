"""LLaVA in its authors' own format, and the protocol under which the papers evaluate it.

`checkpoint.py` recognises such a checkpoint and describes it to transformers, `weights.py` loads it into the classes of
transformers without conversion, `processor.py` makes the processor that it lacks, `templates.py` has the prompts of the
authors' code, and `protocol.py` gives any checkpoint the pictures and prompts of the papers.
"""
