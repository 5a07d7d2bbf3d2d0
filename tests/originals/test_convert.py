"""`vlmslim convert` writes what transformers alone loads, or says why not."""

import json

import torch
from original_checkpoints import ROWS as VOCABULARY
from original_checkpoints import translated
from PIL import Image
from prompts import ROWS, batch
from tiny import tiny
from transformers import AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

from vlmslim.cli import app
from vlmslim.loading import load


def test_transformers_alone_loads_what_is_written(originals, kind, tmp_path):
    folder = tmp_path / "new"
    result = CliRunner().invoke(app, ["convert", str(originals[kind]), str(folder)])
    assert result.exit_code == 0 and result.output.startswith(f"{folder} holds")
    model = AutoModelForImageTextToText.from_pretrained(folder)
    inputs = batch(tiny(kind), ROWS)
    with torch.no_grad():
        theirs, ours = tiny(kind)(**inputs).logits, model(**translated(inputs, model.config)).logits
    assert torch.equal(ours[..., :VOCABULARY], theirs)

    own = load(str(originals[kind]))[1]
    processor = AutoProcessor.from_pretrained(folder)
    assert processor.chat_template == own.chat_template
    given = {"images": [Image.new("RGB", (60, 30), "red")], "text": ["<image>\nWhat?"], "return_tensors": "pt"}
    assert torch.equal(processor(**given)["input_ids"], own(**given)["input_ids"])
    written = json.loads((folder / "processor_config.json").read_text())
    assert not written["image_processor"]["image_processor_type"].endswith("Pil")


def test_what_is_not_converted(originals, tmp_path):
    def refused(*arguments) -> str:
        result = CliRunner().invoke(app, ["convert", *map(str, arguments)])
        assert result.exit_code == 2
        return " ".join(result.output.split())

    source = originals["llava"]
    assert "is not empty; give a new folder" in refused(source, source)
    tiny("llava").save_pretrained(tmp_path / "hf")
    assert "there is nothing to convert" in refused(tmp_path / "hf", tmp_path / "new")
    assert not (tmp_path / "new").exists()
