"""Families beyond LLaVA with real processors, through the real lmms-eval: pictures, prompts, scores, receipts."""

import pytest
from evaluation_doubles import write_config
from PIL import Image

pytest.importorskip("lmms_eval", reason="the extra vlmslim[eval] is not installed")

from transformers import AutoModelForImageTextToText, AutoProcessor
from zoo_checkpoints import PROCESSORS, checkpoint

import vlmslim
from vlmslim.evaluation.config import load_config
from vlmslim.evaluation.conversation import Prompter, user_message
from vlmslim.evaluation.run import run

every_family = pytest.mark.parametrize(
    "name", [name if name == "qwen2_5_vl" else pytest.param(name, marks=pytest.mark.slow) for name in PROCESSORS]
)


@every_family
def test_a_picture_of_the_processor_is_one_image(name, tmp_path):
    folder = checkpoint(name, tmp_path)
    prompter = Prompter(AutoProcessor.from_pretrained(folder))
    model = AutoModelForImageTextToText.from_pretrained(folder)
    picture = Image.radial_gradient("L").convert("RGB")
    asked = [[picture.resize((96, 64))], [picture, picture.resize((60, 90))]]
    prompts = [prompter.render(user_message("What colour is the cross?", pictures)) for pictures in asked]
    with vlmslim.patch(model, "divprune", keep=2) as slim:
        together = model.generate(**prompter.encode(prompts), max_new_tokens=4, do_sample=False)[:, -4:]
        assert (slim.receipt.images, slim.receipt.kept.range) == (3, [2, 2])
        for prompt, answer in zip(prompts, together.tolist(), strict=True):
            alone = model.generate(**prompter.encode([prompt]), max_new_tokens=4, do_sample=False)
            assert alone[0, -4:].tolist() == answer


@every_family
def test_a_run(name, tmp_path):
    path = write_config(
        tmp_path,
        model={"pretrained": checkpoint(name, tmp_path / "model"), "device": "cpu"},
        tasks=["scenes_colour", "scenes_choice"],
        methods=["divprune", {"method": "fastv", "layer": 2}],
        budgets=[0.5],
        batch_size=2,
        limit=2,
        timing={"prompts": 1, "repeats": 1, "new_tokens": 2},
    )
    board = run(load_config(path))
    rows = {row.label: row.cost for row in board.rows}
    assert list(rows) == ["none", "random-0.5", "divprune-0.5", "fastv-0.5-layer=2"]
    assert rows["divprune-0.5"].kept == rows["divprune-0.5"].requested < rows["none"].kept
    assert rows["fastv-0.5-layer=2"].kept == rows["none"].kept
