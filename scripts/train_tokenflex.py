"""Train TokenFLEX's projector, for many token counts or for one: OUT/final can patch the model.

    python scripts/train_tokenflex.py --out runs/tokenflex
    python scripts/train_tokenflex.py --out runs/fixed-36 'method={counts: [36], probabilities: [1.0]}'
    accelerate launch --num_processes 8 scripts/train_tokenflex.py --config my.yaml --out runs/tokenflex-7b

The settings are in scripts/tokenflex.yaml; docs/training.md explains them.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).with_name("bundled")))

from training_data import training_data

from vlmslim.training import tokenflex
from vlmslim.training.finetune import parse_arguments

if __name__ == "__main__":
    settings, args = parse_arguments(__doc__, Path(__file__).with_name("tokenflex.yaml"))
    tokenflex.train(settings, training_data(settings), args.out, args.stop)
