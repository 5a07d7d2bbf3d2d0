"""Writes a `bench` record as JSON, and as Markdown tables."""

import json
from pathlib import Path
from typing import Any

from vlmslim.io.files import markdown_table, write_atomically

_FOOTNOTES = """\
Ratios in brackets are (over the unpatched model, over the ideal): medians over {repeats} rounds of the ratio within a
round, ± the interquartile range of the ratio to the ideal. Every round times all methods and ideals once, in a random
order, each after a short warm-up. The ideal is the same model with as many visual tokens in every decoder layer,
selected at no cost; the ideal of the unpatched model is that model itself, so its ratio shows the noise. FLOPs are
analytic, of the language model alone (multiply-add = 2, attention in full). Prefill is the language model with the
work of the patch in it; selection is the part of prefill inside the method; TTFT adds image encoding, which no method
here makes cheaper. Decoding and latency are at a fixed length of {new_tokens} tokens. Peak memory is what a generation
allocates on top of the weights. KV is the size of the cache; ✓ where it equals the theory."""

_CPU_TIME = " Times, except selection, are processor time, because other programs used the machine."

_HEADERS = (
    "method",
    "equivalent tokens",
    "prefill GFLOPs",
    "prefill ms",
    "selection ms (GFLOPs)",
    "TTFT ms",
    "decode tokens/s",
    "latency ms",
    "peak MiB",
    "KV MiB",
)


def markdown(record: dict[str, Any]) -> str:
    """Write a `bench` record as Markdown: the model and the machine, one table per batch size, and how to read it."""
    model, work = record["model"], record["workload"]
    lines = [
        f"# {model['name']}",
        "",
        f"{model['class']}, {model['parameters'] / 1e9:.3g} B parameters, {model['decoder']['layers']} decoder layers, "
        f"{model['dtype']}, {model['attention']}; {record['device']}",
        "",
        ", ".join(f"{name} {number}" for name, number in record["versions"].items() if number),
        "",
    ]
    for scenario in record["scenarios"]:
        lines += [
            f"## Batch {scenario['batch']}",
            "",
            f"{scenario['visual_tokens']} visual and {scenario['text_tokens']} text tokens a prompt, "
            f"{scenario['crops']} crops",
            "",
            markdown_table(_HEADERS, map(_cells, scenario["rows"])),
            "",
        ]
    return "\n".join([*lines, _FOOTNOTES.format(**work) + (_CPU_TIME if work["cpu_time"] else "")]) + "\n"


def write(record: dict[str, Any], output: Path | None = None) -> str:
    """Return the Markdown of a record; with a path, write the record there as JSON and the Markdown beside it."""
    text = markdown(record)
    if output is not None:
        write_atomically(output, json.dumps(record, indent=1) + "\n")
        write_atomically(output.with_suffix(".md"), text)
    return text


def _cells(row: dict[str, Any]) -> list[str]:
    def ratios(name: str) -> str:
        unpatched, ideal = row[f"{name}_over_unpatched"], row[f"{name}_over_ideal"]
        return f"({unpatched['median']:.2f}x, {ideal['median']:.2f}x ± {ideal['iqr']:.2f})"

    exact = row["kv_bytes"] == row["kv_theory_bytes"]
    return [
        row["label"],
        f"{row['equivalent_tokens']:.1f}",
        f"{row['flops']['language_model'] / 1e9:,.2f}",
        f"{row['prefill_ms']['median']:.1f} {ratios('prefill')}",
        f"{row['selection_ms']['median']:.2f} ({row['flops']['method'] / 1e9:.3f})",
        f"{row['ttft_ms']['median']:.1f} {ratios('ttft')}",
        f"{row['tokens_per_second']:.1f}",
        f"{row['latency_ms']['median']:.0f} ({row['latency_over_unpatched']['median']:.2f}x)",
        f"{row['peak_bytes'] / 2**20:.1f} ({row['peak_over_unpatched']:.2f}x)",
        f"{row['kv_bytes'] / 2**20:.2f} {'✓' if exact else '(theory %.2f)' % (row['kv_theory_bytes'] / 2**20)}",
    ]
