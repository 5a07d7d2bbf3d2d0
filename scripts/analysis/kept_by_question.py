"""Print how many visual tokens a method that decides by itself keeps after each of its layers, by kind of question.

    python scripts/analysis/kept_by_question.py vlmslim/bundled/tiny-atp-36 --limit 100

The Markdown table has the mean and standard deviation over held-out questions and the range. Below it stand the
share of the variance between tasks, and the mean counts as options of the control `schedule`.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "bundled"))

import argparse
import io

import numpy as np
import pyarrow.parquet as pq
import torch
from make_benchmark import BENCHMARKS
from PIL import Image
from scenes import TASKS

import vlmslim


@torch.no_grad()
def kept(slim: vlmslim.Slim, rows: list[dict], batch: int = 16) -> np.ndarray:
    """Visual tokens that each decoder layer sees of each row's picture: (rows, layers)."""
    processor, counts = slim.processor, []
    processor.tokenizer.padding_side = "left"
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        pictures = [Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB") for row in part]
        prompts = [
            processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["question"]}]}],
                add_generation_prompt=True,
            )
            for row in part
        ]
        slim.model(**processor(images=pictures, text=prompts, padding=True, return_tensors="pt"), logits_to_keep=1)
        counts.append(np.array(slim.receipt.last.visual).T)
    return np.concatenate(counts)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("patch", help="a folder that save_pretrained wrote, or bundled/NAME")
    parser.add_argument("--limit", type=int, help="questions of each task")
    args = parser.parse_args()
    slim = vlmslim.from_pretrained(args.patch)
    counts = {}
    for task in TASKS:
        rows = pq.read_table(BENCHMARKS["scenes"].file(task)).to_pylist()[: args.limit]
        counts[task] = kept(slim, rows)
    everything = np.concatenate(list(counts.values()))
    steps = ((np.diff(everything.mean(0)) != 0).nonzero()[0] + 1).tolist()
    header = [
        "questions",
        "n",
        *(f"before layer {layer}" for layer in steps),
        "average of these",
        "range",
        "all layers",
    ]
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for name, seen in [*counts.items(), ("all", everything)]:
        average = seen[:, steps].mean(1)
        cells = [f"{seen[:, i].mean():.1f} ± {seen[:, i].std():.1f}" for i in steps]
        cells += [f"{average.mean():.1f} ± {average.std():.1f}", f"{average.min():.0f} – {average.max():.0f}"]
        print(f"| {name} | {len(seen)} | " + " | ".join(cells) + f" | {seen.mean():.1f} |")
    averages = [seen[:, steps].mean(1) for seen in counts.values()]
    whole = np.concatenate(averages)
    between = sum(len(a) * (a.mean() - whole.mean()) ** 2 for a in averages) / len(whole) / max(whole.var(), 1e-9)
    print(f"\n{between:.0%} of the variance of the average lies between tasks.")
    print(f"schedule: layer: {steps}, counts: {[max(1, round(everything[:, i].mean())) for i in steps]}")


if __name__ == "__main__":
    main()
