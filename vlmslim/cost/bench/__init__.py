"""`vlmslim bench`: what methods cost and save, against the unpatched model and against the ideal.

run.py        measures: `bench(model, methods, budgets, Workload(...))` returns a record
report.py     writes a record as JSON and as Markdown tables
ideal.py      the lower bound: the same model with as few visual tokens as a method leaves, selected at no cost
prompt.py     made-up prompts of an exact size
shapes.py     public models' sizes with random weights
arguments.py  reads the arguments of the command
"""
