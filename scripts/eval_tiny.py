"""Fast accuracy of a tiny LLaVA on the bundled benchmark: full, blind (grey picture) and random keep.

An answer counts when every token of it, end included, is the greedy one; the choice task takes the likeliest option.
The project's official numbers come from lmms-eval; this script steers training and makes assets/README.md's table.

    python scripts/eval_tiny.py --model vlmslim/bundled/tiny-llava --keep 16 49
"""

import argparse
import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from make_benchmark import DATA
from PIL import Image
from scenes import GRID, TASKS, Question
from train_common import normalise, pixels
from train_tiny_llava import pack
from transformers import AutoProcessor, LlavaForConditionalGeneration


@torch.no_grad()
def accuracy(model, tokenizer, rows: list[dict], keep: int | None, blind: bool, seed: int = 0) -> list[bool]:
    """Whether each row is answered right. `keep`: visual tokens kept at random, in raster order; None = all."""
    rng, right, batch = np.random.default_rng(seed), [], 32
    embed = model.get_input_embeddings()
    image_token = model.config.image_token_id
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        images = torch.stack([pixels(Image.open(io.BytesIO(r["image"]["bytes"])).convert("RGB")) for r in part])
        images = torch.full_like(images, 128) if blind else images
        features = torch.stack(list(model.model.get_image_features(normalise(images)).pooler_output))
        sequences, targets, owners = [], [], []
        for i, row in enumerate(part):
            kept = np.sort(rng.permutation(GRID**2)[: keep or GRID**2])
            for answer in row.get("choices") or [row["answer"]]:
                packed = pack(tokenizer, [Question("", row["question"], answer)], chat=False)
                at = (packed["ids"] == image_token).nonzero().flatten()
                ids, labels = packed["ids"], packed["labels"]
                tokens = [embed(ids[: at[0]]), features[i, kept], embed(ids[at[-1] + 1 :])]
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
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=TASKS)
    parser.add_argument("--keep", type=int, nargs="*", default=[16])
    parser.add_argument("--seeds", type=int, default=1, help="seeds of random keep, averaged")
    parser.add_argument("--limit", type=int, help="questions per task")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    args = parser.parse_args()
    model = LlavaForConditionalGeneration.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoProcessor.from_pretrained(args.model).tokenizer
    header = ["task", "n", "full", "blind", *(f"random {k}" for k in args.keep)]
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    table = {}
    for task in args.tasks:
        rows = pq.read_table(args.data / f"scenes_{task}.parquet").to_pylist()[: args.limit]
        cells = [np.mean(accuracy(model, tokenizer, rows, None, blind)) for blind in (False, True)]
        for keep in args.keep:
            runs = [accuracy(model, tokenizer, rows, keep, False, seed) for seed in range(args.seeds)]
            cells.append(np.mean(runs))
        table[task] = dict(zip(header[1:], [len(rows), *(round(100 * float(c), 1) for c in cells)], strict=True))
        print(f"| {task} | {len(rows)} | " + " | ".join(f"{100 * c:.1f}" for c in cells) + " |", flush=True)
    if args.json:
        args.json.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
