"""The demo as a Hugging Face Space. The variable CHECKPOINT of the Space names another checkpoint."""

import os

import torch

from vlmslim.demo.page import build, how
from vlmslim.loading import default_device, load

name = os.environ.get("CHECKPOINT", "bundled/tiny-llava")
device = default_device()
model, processor = load(name, dtype=torch.float32 if device == "cpu" else "auto", device=device)
build(model, processor, name).launch(**how(host="0.0.0.0", port=7860))
