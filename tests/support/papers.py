"""A published table of one number, for the tests of published tables."""

LLAVA = "llava-hf/llava-1.5-7b-hf"
PAPER = {
    "title": "T",
    "arxiv": "2501.00001",
    "read": "a test",
    "benchmarks": {"GQA": {"tasks": ["gqa"], "metric": "exact_match", "unit": "percent"}},
    "tables": [
        {
            "table": "Table 1",
            "source": "paper",
            "model": "M",
            "checkpoints": [LLAVA],
            "protocol": "p",
            "convention": "c",
            "columns": ["GQA"],
            "rows": [{"name": "D", "method": "divprune", "keep": 64, "scores": [50.0]}],
        }
    ],
}


def changed(**table) -> dict:
    """Return the paper with another table, or with another `row` in it."""
    row = table.pop("row", {})
    first = PAPER["tables"][0] | table
    return PAPER | {"tables": [first | {"rows": [first["rows"][0] | row]}]}
