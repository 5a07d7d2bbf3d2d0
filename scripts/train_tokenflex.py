"""Train TokenFLEX's projector: one for many token counts, or, with a single count, a fixed one.

The backbone is frozen and the projector starts from scratch. Every micro-batch draws one count.

    python scripts/train_tokenflex.py --out runs/tokenflex
    python scripts/train_tokenflex.py --out runs/fixed-36 'method={counts: [36], probabilities: [1.0]}'
    accelerate launch --num_processes 8 scripts/train_tokenflex.py --config my.yaml --out runs/tokenflex-7b
"""

from pathlib import Path

from finetune import finetune, load, parse

import vlmslim


def main() -> None:
    """Train; a run that was interrupted goes on."""
    settings, args = parse(__doc__, Path(__file__).with_name("tokenflex.yaml"))
    model, processor, data = load(settings)
    options = {"weights": f"random:{settings.seed}", "keep": max(settings.method.get("counts", [256]))}
    slim = vlmslim.patch(model, "tokenflex", **options | settings.method)
    finetune(slim, processor, data, settings, args.out, stop=args.stop)


if __name__ == "__main__":
    main()
