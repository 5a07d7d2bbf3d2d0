"""Writes a `bench` record as JSON, as Markdown tables, and as one line for a program."""

import json
import re
from datetime import date
from itertools import count
from pathlib import Path
from typing import Any

from vlmslim.io import provenance
from vlmslim.io.files import markdown_table, write_atomically

_FOOTNOTES = """\
Ratios in brackets are (over the unpatched model, over the ideal): medians over {repeats} rounds of the ratio within a
round, ± the interquartile range of the ratio to the ideal. Every round times all methods and ideals once, in a random
order, each after a short warm-up. The ideal is the same model with as many visual tokens in every decoder layer,
selected at no cost; the ideal of the unpatched model is that model itself, so its ratio shows the noise. FLOPs are
analytic, of the language model alone (multiply-add = 2, attention in full). Realised is the share of the saving in
FLOPs that is a saving of prefill time: (1 - prefill over unpatched) / (1 - FLOPs over unpatched). Encode is the vision
tower and the projector (– in a record that has no such time). Prefill is the language model with the
work of the patch in it; selection is the part of prefill inside the method; TTFT is encoding, prefill and the choice
of the first token. Decoding and latency are at a fixed length of {new_tokens} tokens. Peak memory is what a generation
allocates on top of the weights. KV is the size of the cache; ✓ where it equals the theory."""

_CPU_TIME = " Times, except selection, are processor time, because other programs used the machine."

_HEADERS = (
    "method",
    "equivalent tokens",
    "prefill GFLOPs",
    "encode ms",
    "prefill ms",
    "realised",
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
            markdown_table(_HEADERS, (_cells(row, scenario["rows"][0]) for row in scenario["rows"])),
            "",
        ]
    return "\n".join([*lines, _FOOTNOTES.format(**work) + (_CPU_TIME if work["cpu_time"] else "")]) + "\n"


def summary(record: dict[str, Any]) -> str:
    """Write a `bench` record as one line of JSON: the model, the machine, and the medians of every row.

    Times are milliseconds. `budget` is what the method was asked to keep per image.
    """
    rows = []
    for scenario in record["scenarios"]:
        unpatched, *_ = scenario["rows"]
        for row in scenario["rows"]:
            found = {"label": row["label"], "peer": row["peer"], "batch": scenario["batch"]}
            found |= {"budget": (row["stage"] or {}).get("keep"), "equivalent_tokens": row["equivalent_tokens"]}
            for name in ("encode_ms", "selection_ms"):
                found[name] = row[name]["median"]
            for name in ("prefill", "ttft", "decode", "latency"):
                for kind in ("ms", "over_unpatched", "over_ideal"):
                    found[f"{name}_{kind}"] = row[f"{name}_{kind}"]["median"]
            found["flops_over_unpatched"] = _flops_ratio(row, unpatched)
            found["realised_share"] = realised_share(row, unpatched)
            found["peak_over_unpatched"] = row["peak_over_unpatched"]
            rows.append(found)
    where = {"model": record["model"]["name"], "dtype": record["model"]["dtype"], "device": record["device"]}
    return json.dumps(where | {"commit": record["versions"]["commit"], "rows": rows})


def realised_share(row: dict[str, Any], unpatched: dict[str, Any]) -> float | None:
    """Return the saving of prefill time over the saving of the language model's FLOPs.

    1 means that the time falls as theory says; below 0 the method takes more time than it saves. None where theory
    saves nothing.

    Args:
        row: of a method, in a record.
        unpatched: the row of the unpatched model in the same scenario.
    """
    theory = 1 - _flops_ratio(row, unpatched)
    return (1 - row["prefill_over_unpatched"]["median"]) / theory if theory > 0 else None


def file_in(folder: Path, model: str, device: str) -> Path:
    """Name a record in a folder after the model, the card (or "cpu") and the date: a name that is not taken."""
    stem = f"{re.sub(r'[^A-Za-z0-9.]+', '-', Path(model).name)}_{provenance.card(device)}_{date.today()}"
    names = (folder / f"{stem}{'' if n == 1 else f'_{n}'}.json" for n in count(1))
    return next(path for path in names if not path.exists())


def write(record: dict[str, Any], output: Path | None = None) -> str:
    """Return the Markdown of a record; with a path, write the record there as JSON and the Markdown beside it."""
    text = markdown(record)
    if output is not None:
        write_atomically(output, json.dumps(record, indent=1) + "\n")
        write_atomically(output.with_suffix(".md"), text)
    return text


def _flops_ratio(row: dict[str, Any], unpatched: dict[str, Any]) -> float:
    return row["flops"]["language_model"] / unpatched["flops"]["language_model"]


def _cells(row: dict[str, Any], unpatched: dict[str, Any]) -> list[str]:
    def ratios(name: str) -> str:
        unpatched, ideal = row[f"{name}_over_unpatched"], row[f"{name}_over_ideal"]
        return f"({unpatched['median']:.2f}x, {ideal['median']:.2f}x ± {ideal['iqr']:.2f})"

    share = realised_share(row, unpatched)
    exact = row["kv_bytes"] == row["kv_theory_bytes"]
    return [
        row["label"],
        f"{row['equivalent_tokens']:.1f}",
        f"{row['flops']['language_model'] / 1e9:,.2f}",
        f"{row['encode_ms']['median']:.1f}" if "encode_ms" in row else "–",
        f"{row['prefill_ms']['median']:.1f} {ratios('prefill')}",
        "–" if share is None else f"{share:.2f}",
        f"{row['selection_ms']['median']:.2f} ({row['flops']['method'] / 1e9:.3f})",
        f"{row['ttft_ms']['median']:.1f} {ratios('ttft')}",
        f"{row['tokens_per_second']:.1f}",
        f"{row['latency_ms']['median']:.0f} ({row['latency_over_unpatched']['median']:.2f}x)",
        f"{row['peak_bytes'] / 2**20:.1f} ({row['peak_over_unpatched']:.2f}x)",
        f"{row['kv_bytes'] / 2**20:.2f} {'✓' if exact else '(theory %.2f)' % (row['kv_theory_bytes'] / 2**20)}",
    ]
