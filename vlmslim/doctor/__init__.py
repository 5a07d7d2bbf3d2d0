"""`vlmslim doctor`: prove on a checkpoint that a compression method does what it says and nothing else.

    from vlmslim import doctor

    report = doctor.examine(model, processor, ["divprune", {"method": "fastv", "keep": 64}])
    assert report.passed, report

examine.py    every check on every method
prompts.py    made-up pictures, a video, and conversations
runs.py       a model's answers to the prompts, patched and unpatched
reference.py  the patched model computed by hand, without the engine
checks.py     the checks
report.py     findings, as a table and as JSON

`docs/trust.md` says what each check is for, and why its tolerance is what it is. The tests of this package
examine what is the same on every checkpoint: that nothing of a removed patch stays, and what a receipt says.
"""

from vlmslim.doctor.examine import examine, parse
from vlmslim.doctor.report import Finding, Report

__all__ = ["Finding", "Report", "examine", "parse"]
