"""Print the accuracy of a tiny LLaVA on a bundled benchmark: full, blind (a grey picture), and with random tokens kept.

An answer is right if each of its tokens, including the end, is the greedy one; in the choice task the likeliest option
counts. Official numbers come from lmms-eval; this script steers training and makes the table in assets/README.md.

    python scripts/bundled/eval_tiny.py scenes --model vlmslim/bundled/tiny-llava --keep 16 49
    python scripts/bundled/eval_tiny.py documents --model vlmslim/bundled/tiny-llava-next --keep 0.5 0.3
"""

import argparse
import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from make_benchmark import BENCHMARKS
from PIL import Image
from scenes import Question
from train_tiny_llava import pack

from vlmslim.loading import load


def picture(row: dict, blind: bool) -> Image.Image:
    """Return the picture of a row, all grey when `blind`."""
    image = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
    return Image.new("RGB", image.size, (128, 128, 128)) if blind else image


@torch.no_grad()
def accuracy(model, processor, rows: list[dict], keep: float | None, blind: bool, seed: int = 0) -> list[bool]:
    """Answer each row, and return which of the answers are right.

    `keep`: visual tokens kept at random, in order, a count (int) or a share (float); None = all.
    """
    rng, right, batch = np.random.default_rng(seed), [], 16
    embed, tokenizer = model.get_input_embeddings(), processor.tokenizer
    image_token = model.config.image_token_id
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        images = processor.image_processor(images=[[picture(r, blind)] for r in part], return_tensors="pt")
        features = list(model.model.get_image_features(**images).pooler_output)
        sequences, targets, owners = [], [], []
        for i, row in enumerate(part):
            n = len(features[i])
            kept = np.sort(rng.permutation(n)[: n if keep is None else keep if keep >= 1 else round(keep * n)])
            for answer in row.get("choices") or [row["answer"]]:
                packed = pack(tokenizer, [Question("", row["question"], answer)], chat=False, visual=n)
                at = (packed["ids"] == image_token).nonzero().flatten()
                ids, labels = packed["ids"], packed["labels"]
                tokens = [embed(ids[: at[0]]), features[i][kept], embed(ids[at[-1] + 1 :])]
                sequences.append(torch.cat(tokens))
                targets.append(torch.cat([labels[: at[0]], labels.new_full((len(kept),), -100), labels[at[-1] + 1 :]]))
                owners.append(i)
        inputs = torch.nn.utils.rnn.pad_sequence(sequences, True)
        hidden = model.model.language_model(inputs_embeds=inputs, use_cache=False).last_hidden_state
        best = np.full(len(part), -np.inf)
        answer_ok = np.zeros(len(part), bool)
        for states, target, owner in zip(hidden, targets, owners, strict=True):
            where = (target != -100).nonzero().flatten()
            logits = model.lm_head(states[where - 1]).float()
            row = part[owner]
            if not row.get("choices"):
                answer_ok[owner] = bool((logits.argmax(-1) == target[where]).all())
                continue
            score = logits.log_softmax(-1).gather(-1, target[where, None]).sum().item()
            if score > best[owner]:
                best[owner], answer_ok[owner] = score, tokenizer.decode(target[where][:-1]).strip() == row["answer"]
        right += answer_ok.tolist()
    return right


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("benchmark", choices=BENCHMARKS)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, help="folder of the parquet files, if not the bundled ones")
    parser.add_argument("--tasks", nargs="*", help="some of the benchmark's tasks")
    parser.add_argument("--keep", type=lambda v: float(v) if "." in v else int(v), nargs="*", default=[16])
    parser.add_argument("--seeds", type=int, default=1, help="seeds of random keep, averaged")
    parser.add_argument("--limit", type=int, help="questions per task")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    args = parser.parse_args()
    benchmark = BENCHMARKS[args.benchmark]
    model, processor = load(args.model, dtype="float32")
    header = ["task", "n", "full", "blind", *(f"random {k}" for k in args.keep)]
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    table = {}
    for task in args.tasks or benchmark.tasks:
        rows = pq.read_table(benchmark.file(task, args.data)).to_pylist()[: args.limit]
        cells = [np.mean(accuracy(model, processor, rows, None, blind)) for blind in (False, True)]
        for keep in args.keep:
            runs = [accuracy(model, processor, rows, keep, False, seed) for seed in range(args.seeds)]
            cells.append(np.mean(runs))
        table[task] = dict(zip(header[1:], [len(rows), *(round(100 * float(c), 1) for c in cells)], strict=True))
        print(f"| {task} | {len(rows)} | " + " | ".join(f"{100 * c:.1f}" for c in cells) + " |", flush=True)
    if args.json:
        args.json.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
