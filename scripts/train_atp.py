"""Train ATP's threshold modules for a budget of visual tokens: OUT/final can patch the model.

    python scripts/train_atp.py --out runs/atp-36
    python scripts/train_atp.py --out runs/atp-16 script.target=16
    accelerate launch --num_processes 8 scripts/train_atp.py --config my.yaml --out runs/atp-7b

The settings are in scripts/atp.yaml; docs/training.md explains them.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).with_name("bundled")))

from training_data import training_data

from vlmslim.training import atp
from vlmslim.training.finetune import parse_arguments

if __name__ == "__main__":
    settings, args = parse_arguments(__doc__, Path(__file__).with_name("atp.yaml"))
    atp.train(settings, training_data(settings), args.out, args.stop)
