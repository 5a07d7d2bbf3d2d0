"""The doctor on honest methods: they pass. And what it refuses, reports and prints."""

import copy
import io
import json

import pytest
import torch
from doctor_methods import Fixed, Late, Original, Plain
from lmms_fixtures import FAMILIES
from method_files import NORM, write
from rich.console import Console
from snapshots import changes, model_state, process_state
from typer.testing import CliRunner

import vlmslim
from vlmslim import doctor
from vlmslim.cli import app
from vlmslim.doctor.checks import CHECKS
from vlmslim.doctor.prompts import LONG, LONG_TEXT, VIDEO, Prompts
from vlmslim.doctor.runs import difference
from vlmslim.loading import load as load_checkpoint
from vlmslim.methods.uniform import Uniform


@pytest.mark.parametrize("family", FAMILIES)
def test_honest_methods_pass(load, family):
    model, processor = load(family)
    report = doctor.examine(
        model, processor, [Plain(), Late(), Fixed(), "none", "divprune", [{"method": "uniform", "keep": 0.5}, Late()]]
    )
    assert report.passed and not report.failures, str(report)
    given = {(finding.method, finding.check): finding.status for finding in report.findings}
    assert len(given) == 6 * len(CHECKS)
    skipped = {key for key, status in given.items() if status == "n/a"}
    late, both = "Late(keep=0.25)", "uniform-0.5+Late(keep=0.25)"
    fixed = {("Fixed()", check) for check in ("budget", "cache", "keep-all")}
    pictures_only = set() if family == "onevision" else {(method, "video") for method, _ in given}
    assert skipped == {(late, "cache"), (both, "cache")} | fixed | pictures_only
    assert report.receipts["Plain(keep=0.25)"]["kept"] < report.receipts["none"]["kept"]
    assert report.receipts["none"]["prompts"] == (4 if family == "onevision" else 3)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_passes(load, family):
    report = doctor.examine(*load(family))
    assert report.passed, str(report)
    assert {finding.method for finding in report.findings} == set(vlmslim.method_names())
    for finding in report.findings:
        if finding.check == "patch":
            assert finding.status == "n/a" and len(finding.note) > 20


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny-llava", "tiny-llava-next"])
def test_every_method_passes_on_the_bundled_checkpoints(name):
    report = doctor.examine(*load_checkpoint(f"bundled/{name}", dtype="float32"))
    assert report.passed, str(report)
    assert {finding.method for finding in report.findings} == set(vlmslim.method_names())


def test_the_model_and_the_processor_are_left_alone(load):
    model, processor = load()
    doctor.examine(model, processor, ["none"])  # transformers sets a few things up in a first run
    before, around, tokenizer = model_state(model), process_state(model), repr(processor.tokenizer)
    doctor.examine(model, processor, ["uniform"])
    assert changes(before, model_state(model)) == changes(around, process_state(model)) == []
    assert repr(processor.tokenizer) == tokenizer


@pytest.mark.slow
def test_trained_methods_pass():
    saved = ["bundled/tiny-atp-16", "bundled/tiny-tokenflex"]
    report = doctor.examine(*load_checkpoint("bundled/tiny-llava", dtype="float32"), saved)
    assert report.passed, str(report)
    skipped = {finding.method for finding in report.findings if finding.check == "keep-all" and finding.status == "n/a"}
    assert len(skipped) == 2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_judged_by_its_own_noise(load, dtype):
    model, processor = load(dtype=dtype)
    report = doctor.examine(model, processor, [Plain(), Late()])
    assert not report.failures, str(report)
    assert report.noise > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_agrees_with_honest_methods(check, family):
    for method in (Original(), [Original(keep=0.5), Late()], {"method": "pool", "keep": 0.25}):
        assert check("reference", method, family).passed


def test_a_stage_that_decides_itself_and_drops_nothing_is_said(load):
    report = doctor.examine(*load(), [{"method": "drop_visual", "layer": 2, "tau": 0.0}, "none"])
    assert not report.failures
    (sentence,) = report.abstentions
    assert "stage 1 (drop_visual, before layer 2) acted on 0 of 3 prompts. It decides itself" in sentence
    assert "the checks did not examine it" in sentence
    console = Console(width=300, record=True, file=io.StringIO())
    console.print(report.render())
    assert sentence in str(report) and sentence in console.export_text()


# --- the instruments --------------------------------------------------------------------------------------------------


def test_prompts(load):
    for family in FAMILIES:
        model, processor = load(family)
        videos = family == "onevision"
        prompts = Prompts(model, processor, videos)
        image = model.config.image_token_id
        media = torch.tensor([image, getattr(model.config, "video_token_id", image)])
        left, right = prompts.inputs(), prompts.inputs(side="right")
        assert left["input_ids"].shape == right["input_ids"].shape
        assert left["attention_mask"][:, -1].all() and right["attention_mask"][:, 0].all()
        assert not left["attention_mask"].all() and not right["attention_mask"].all()
        shown = [prompts.batch[i] for i, row in enumerate(left["input_ids"]) if torch.isin(row, media).any()]
        assert tuple(shown) == prompts.pictured and len(prompts.pictured) < len(prompts.batch)
        assert ("pixel_values_videos" in left) == videos == (VIDEO in prompts.batch)
        if videos:
            frames = left["pixel_values_videos"][0]
            assert len(frames) == 3 and all((a - b).abs().max() > 0.1 for a, b in zip(frames, frames[1:], strict=False))
        long = prompts.inputs((LONG,))["input_ids"]
        assert int((long != image).sum()) >= LONG_TEXT
        prompts.inputs()["attention_mask"].zero_()
        assert torch.equal(prompts.inputs()["attention_mask"], left["attention_mask"])


def test_differences():
    one, nan = torch.ones(2), torch.tensor([1.0, float("nan")])
    assert difference(one, one) == 0
    assert difference(one, 3 * one) == 2
    assert difference(nan, nan) == float("inf")
    assert difference(one, torch.ones(3)) == float("inf")


# --- what is refused, and the command ---------------------------------------------------------------------------------


def test_refusals(load):
    model, processor = load()
    with pytest.raises(ValueError, match="divprun"):
        doctor.examine(model, processor, ["divprun"])
    with pytest.raises(ValueError, match="training mode"):
        doctor.examine(model.train(), processor, ["none"])
    model.eval()
    broken = copy.deepcopy(model)
    broken.lm_head.weight.data[5] = float("nan")
    with pytest.raises(ValueError, match="logits in torch.float32 are not all finite.*another dtype"):
        doctor.examine(broken, processor, ["none"])  # differences to it are no numbers: everything would pass
    processor.tokenizer.pad_token = None
    with pytest.raises(ValueError, match="pad_token"):
        doctor.examine(model, processor, ["none"])
    with pytest.raises(TypeError, match="cannot patch"):
        doctor.examine(torch.nn.Linear(1, 1), processor, ["none"])


def test_an_empty_report_has_not_passed(load):
    report = doctor.examine(*load(), [])
    assert not report.passed


def test_a_narrow_terminal_shows_every_method_and_check():
    names = ["bipartite_merge", "divprune(keep=128) + fastv(keep=64)"]
    report = doctor.Report({"checkpoint": "x", "dtype": "float32", "device": "cpu", "attention": "sdpa"}, 1e-5, 10)
    report.findings = [doctor.Finding(name, check, "pass") for name in names for check in CHECKS]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(report.render())
    rows = [line for line in console.export_text().splitlines() if "✓" in line]
    assert [line.count("✓") for line in rows] == [len(CHECKS)] * 2
    assert all(line.startswith(name) for line, name in zip(rows, names, strict=True))


def test_methods_on_the_command_line(tmp_path):
    assert doctor.parse("none", 0.5) == [{"method": "none"}]
    assert doctor.parse("divprune", 0.5) == [{"keep": 0.5, "method": "divprune"}]
    assert doctor.parse("divprune:keep=9+fastv:layer=3", 4) == [
        {"keep": 9, "method": "divprune"},
        {"keep": 4, "method": "fastv", "layer": 3},
    ]
    for saved in (str(tmp_path), "bundled/tiny-atp-16"):
        assert doctor.parse(saved, 0.5) == saved
    with pytest.raises(ValueError, match="divprune"):
        doctor.parse("divprun", 0.5)


def test_a_method_that_takes_no_share_has_its_own_budget_unless_one_is_asked_for(tmp_path, load):
    counting, sharing = (
        write(tmp_path / "norm.py"),
        write(tmp_path / "share.py", NORM.replace("keep: int", "keep: float")),
    )
    assert doctor.parse(f"{counting}:Norm") == [{"method": f"{counting}:Norm"}]
    assert doctor.parse(f"{sharing}:Norm") == [{"method": f"{sharing}:Norm", "keep": 0.25}]
    assert doctor.parse("fastv") == [{"method": "fastv", "keep": 0.25}]  # it has no default
    assert doctor.parse(f"{counting}:Norm", 4) == [{"method": f"{counting}:Norm", "keep": 4}]
    asked = doctor.parse(f"{counting}:Norm", 0.5)
    with pytest.raises(ValueError, match="^keep=0.5: give an integer"):
        doctor.examine(*load(), [asked])


def test_a_method_among_all_has_its_own_budget_if_it_takes_no_share(built_in, load):
    built_in("norm.py")
    report = doctor.examine(*load(), ["norm"])
    assert report.receipts["norm"]["kept"] == 16 and not report.failures


def test_the_command(path, monkeypatch):
    runner = CliRunner()
    done = runner.invoke(app, ["doctor", path(), "-m", "uniform:keep=4", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    for text in (*CHECKS, "uniform-4", "16.0 -> 4.0", "0 failed", "11 checks passed"):
        assert text in done.output
    compress = Uniform.compress

    def wrong(self, image):
        kept = compress(self, image)
        kept.features = kept.vectors(image) * 1.00001
        return kept

    monkeypatch.setattr(Uniform, "compress", wrong)
    done = runner.invoke(app, ["doctor", path(), "-m", "uniform", "-m", "none", "--json", "--device", "cpu"])
    assert done.exit_code == 1, done.output
    read = json.loads(done.stdout)
    assert read["passed"] is False and read["model"]["dtype"] == "float32" and read["noise"] > 0
    (failure,) = (finding for finding in read["findings"] if finding["status"] == "fail")
    assert failure["method"] == "uniform-0.25" and failure["check"] == "keep-all"
    assert failure["measured"] > failure["tolerance"] == 0


@pytest.mark.slow
def test_a_saved_patch_is_examined_on_its_checkpoint():
    done = CliRunner().invoke(app, ["doctor", "bundled/tiny-tokenflex", "--device", "cpu", "--json"])
    assert done.exit_code == 0, done.output
    read = json.loads(done.stdout)
    assert {finding["method"] for finding in read["findings"]} == {"bundled/tiny-tokenflex"}
    assert read["model"]["checkpoint"].endswith("tiny-llava")


def test_a_package_that_a_method_lacks_is_told(path, monkeypatch):
    def lacking(self, model):
        raise ImportError("recoverable needs open_clip: pip install open_clip_torch")

    monkeypatch.setattr(Uniform, "setup", lacking)
    done = CliRunner().invoke(app, ["doctor", path(), "-m", "uniform", "--device", "cpu"])
    assert done.exit_code == 2 and "pip install open_clip_torch" in done.output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["bundled/nothing"], "no bundled checkpoint"),
        (["bundled/tiny-llava", "-m", "fastv:layer"], "option=value"),
        (["bundled/tiny-llava", "--dtype", "float33"], "float32, bfloat16"),
        (["bundled/tiny-llava", "--device", "foo"], "device='foo': there is no such device"),
        (["bundled/tiny-llava", "--keep", "inf"], "keep=inf"),
        (["bundled/tiny-llava", "--keep", "145"], "has 144 visual tokens"),
        (["bundled/tiny-llava", "-m", "uniform:keep=145"], "has 144 visual tokens"),
    ],
)
def test_wrong_commands(arguments, says):
    done = CliRunner().invoke(app, ["doctor", "--device", "cpu", *arguments])
    assert done.exit_code == 2, done.output
    assert says in done.output
