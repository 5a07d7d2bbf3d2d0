"""Checkpoints in the authors' format through every command that takes one, with a tokenizer of SentencePiece."""

import io
import json
from pathlib import Path

import pytest
from evaluation_doubles import write_config
from original_checkpoints import ROWS, original
from tokenizers import pre_tokenizers
from typer.testing import CliRunner

from vlmslim.cli import app
from vlmslim.loading import load
from vlmslim.originals.processor import mark_parts, why_no_sentencepiece

TEXTS = (
    "A chat between a curious user and an artificial intelligence assistant.",
    "USER: What colour is the square? Answer with one word. ASSISTANT: red",
    "Describe this picture in a few words, please.\nName three colours: blue, green, yellow.",
)
NO_SENTENCEPIECE = why_no_sentencepiece()
needs_sentencepiece = pytest.mark.skipif(NO_SENTENCEPIECE is not None, reason=f"vlmslim[originals]: {NO_SENTENCEPIECE}")


def sentencepiece_of(folder: Path, legacy: bool) -> "object":
    """Replace the tokenizer of an original by a trained file of SentencePiece, as LLaVA-1.5 has it; the model."""
    import sentencepiece

    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 20),
        model_writer=trained,
        model_type="bpe",
        vocab_size=ROWS,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        minloglevel=2,
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    (folder / "tokenizer.model").write_bytes(trained.getvalue())
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = names | {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": legacy, "pad_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps(names | {"pad_token": "<unk>"}))
    return sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())


@needs_sentencepiece
@pytest.mark.parametrize("legacy", [True, False])
def test_prompts_are_read_as_sentencepiece_reads_their_parts(tmp_path, legacy):
    """The authors' code cuts a prompt at its pictures, and reads each part as a text of its own."""
    folder = original("llava", tmp_path / "llava")
    theirs = sentencepiece_of(folder, legacy)
    model, processor = load(folder, dtype="float32")
    prompt = "USER: <image>\nWhat colour is the square? Answer with one word. ASSISTANT:"
    ids = processor.tokenizer(prompt)["input_ids"]
    before, after = prompt.split("<image>")
    assert ids == [1, *theirs.encode(before), model.config.image_token_id, *theirs.encode(after)]
    assert model.config.image_token_id == ROWS and processor.tokenizer.pad_token is not None


def test_what_reads_sentencepiece_is_named_where_it_lacks(tmp_path, monkeypatch):
    folder = original("llava", tmp_path / "llava")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"no model")
    monkeypatch.setattr("vlmslim.originals.processor.why_no_sentencepiece", lambda: "it is not installed")
    with pytest.raises(ImportError, match=r"it is not installed: pip install 'vlmslim\[originals\]'"):
        load(folder)


def test_each_part_begins_as_a_text_where_the_tokenizer_has_several_steps():
    class Fast:
        class backend_tokenizer:
            pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(prepend_scheme="first", split=False)])

    mark_parts(Fast)
    assert Fast.backend_tokenizer.pre_tokenizer[0].prepend_scheme == "always"


def test_doctor_and_bench(originals):
    """With the tokenizer in the form of `tokenizers`, which needs no more packages."""
    folder = str(originals["llava"])
    done = CliRunner().invoke(app, ["doctor", folder, "-m", "divprune:keep=4", "--device", "cpu", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["passed"]
    arguments = "-m random --budgets 4 --text-tokens 9 --new-tokens 2 --repeats 1 --device cpu"
    done = CliRunner().invoke(app, ["bench", folder, *arguments.split()])
    assert done.exit_code == 0, done.output
    assert "random-4" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["next", "onevision"])
def test_doctor_of_the_other_kinds(originals, kind):
    done = CliRunner().invoke(app, ["doctor", str(originals[kind]), "-m", "divprune", "--device", "cpu", "--json"])
    assert done.exit_code == 0, done.output


def test_a_run(originals, tmp_path):
    """Through lmms-eval, whose model gets the folder as `pretrained=`."""
    pytest.importorskip("lmms_eval", reason="the extra vlmslim[eval] is not installed")
    from vlmslim.evaluation.config import load_config
    from vlmslim.evaluation.run import run

    path = write_config(
        tmp_path,
        model={"pretrained": str(originals["llava"]), "device": "cpu"},
        tasks=["scenes_colour"],
        budgets=[4],
        limit=2,
        timing={"prompts": 1, "repeats": 1, "new_tokens": 2},
    )
    board = run(load_config(path))
    assert {row.label: row.cost.kept for row in board.rows} == {"none": 16, "random-4": 4, "divprune-4": 4}
