"""A bench record as Markdown, and both as files."""

import json
from collections.abc import Iterable
from pathlib import Path

from vlmslim.io.files import markdown_table, write_atomically

_NOTES = """\
Ratios in brackets are (over the unpatched model, over the ideal), medians over {repeats} rounds in which all
treatments and ideals take turns, each behind an unrecorded generation of its own; ± is the interquartile range of the
ratio to the ideal. The ideal is the same model fed directly with as many visual tokens in every layer, chosen for free;
that of the unpatched model is itself, so its own ratio shows the noise. FLOPs are analytic, of the language model alone
(multiply-add = 2, attention in full). Prefill is the language model with all that the patch does in it; selection is
the part of it spent in the method; TTFT adds image encoding, which no method here makes cheaper. Decoding and latency
are at a fixed length of {new_tokens} tokens. Peak memory is what a generation allocates on top of the weights. KV is
read off the cache; ✓ where it equals the theory."""

_CPU_TIME = " Times but that of selection are processor time: the machine was shared with other programs."

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


def markdown(record: dict) -> str:
    """The tables of a `bench` record, one per batch size, with what they were measured on and how to read them."""
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
            *_verdict(scenario),
            "",
        ]
    return "\n".join([*lines, _NOTES.format(**work) + (_CPU_TIME if work["cpu_time"] else "")]) + "\n"


def write(record: dict, output: Path | None = None) -> str:
    """The Markdown of a record; with a path, the record goes there as JSON and the Markdown beside it, atomically."""
    text = markdown(record)
    if output is not None:
        write_atomically(output, json.dumps(record, indent=1) + "\n")
        write_atomically(output.with_suffix(".md"), text)
    return text


def _cells(row: dict) -> list[str]:
    def ratios(name: str) -> str:
        own, best = row[f"{name}_over_unpatched"], row[f"{name}_over_ideal"]
        return f"({own['median']:.2f}x, {best['median']:.2f}x ± {best['iqr']:.2f})"

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


def _verdict(scenario: dict) -> Iterable[str]:
    """Which promises were not kept, if any."""
    missed = [
        f"- {row['label']}: {name.replace('_', ' ')} is {target['value']:.3f}, wanted {target['wanted']}"
        for row in scenario["rows"]
        for name, target in row["targets"].items()
        if not target["met"]
    ]
    return ["Targets missed:", "", *missed] if missed else ["All targets met."]
