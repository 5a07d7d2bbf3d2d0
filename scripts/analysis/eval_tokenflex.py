"""Print the cross-entropy of the answers under TokenFLEX projectors at several counts, on held-out scenes.

Cross-entropy resolves differences that the accuracy of a few hundred questions cannot. Accuracy comes from lmms-eval:
`vlmslim run eval_configs/tokenflex_tiny.yaml`.

    python scripts/analysis/eval_tokenflex.py runs/tokenflex/flex-0/final runs/tokenflex/fixed16-0/final pool
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "bundled"))

import argparse

import torch
from training_data import Scenes

import vlmslim
from vlmslim.training.conversations import Collator
from vlmslim.training.finetune import Settings, Tuned, load


@torch.no_grad()
def main() -> None:
    """Print a Markdown table with one row for each set of weights and one column for each count."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", nargs="+", help='folders of trained weights, or "pool" for the control')
    parser.add_argument("--keep", type=int, nargs="+", default=[16, 25, 36, 49, 64])
    parser.add_argument("--pictures", type=int, default=48)
    parser.add_argument("--questions", type=int, default=6, help="about each picture")
    args = parser.parse_args()
    model, processor = load(Settings(attn_implementation="eager"))
    data, collate = Scenes(args.pictures, args.questions, first=7_000_000, split="test"), Collator(processor)
    batches = [collate([data[i] for i in range(first, min(first + 8, len(data)))]) for first in range(0, len(data), 8)]
    batches = [{k: v for k, v in batch.items() if k not in ("skipped", "where")} for batch in batches]
    print("| weights | " + " | ".join(map(str, args.keep)) + " |\n|---|" + "---|" * len(args.keep))
    for weights in args.weights:
        cells = []
        for keep in args.keep:
            with vlmslim.patch(model, "tokenflex", weights=weights, keep=keep) as slim:
                answers = [Tuned(slim)(**batch) for batch in batches]
            tokens = sum(len(a.targets) for a in answers)
            cells.append(sum(a.loss.item() * len(a.targets) for a in answers) / tokens)
        print(f"| {weights} | " + " | ".join(f"{c:.3f}" for c in cells) + " |", flush=True)


if __name__ == "__main__":
    main()
