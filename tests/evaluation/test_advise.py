"""`vlmslim advise`: one race through the real model, and bad input."""

import pytest
import yaml
from typer.testing import CliRunner

pytest.importorskip("lmms_eval", reason="the extra vlmslim[eval] is not installed")

from vlmslim.cli import app
from vlmslim.evaluation.config import load_config

TINY = ("bundled/tiny-llava", "--tasks", "scenes_colour", "--device", "cpu")


def call(*arguments):
    return CliRunner().invoke(app, ["advise", *map(str, arguments)])


def test_a_race_gives_a_row_and_the_configuration_to_run_it(tmp_path):
    small = ("--budgets", "100,4", "--limit", 24, "--share", 0.9, "-m", "divprune")
    shown = call(*TINY, "--target", "60% of unpatched", *small)
    assert shown.exit_code == 0, shown.output
    told = dict(line.split(maxsplit=1) for line in shown.stdout.split("\n\n")[0].splitlines()[1:])
    assert told["choice"] in ("divprune-renumbered-100", "divprune-original-100")
    assert told["budget"] == "keep=100" and "% of the unpatched model's" in told["score"]
    assert told["predicted"].startswith("0.") and "TTFT" in told["measured"]
    assert "of 4 rows" in told["dropped"] and "at most 5%" in told["dropped"]
    (tmp_path / "advice.yaml").write_text(shown.stdout.split("\n\n")[1])
    config = load_config(tmp_path / "advice.yaml")
    positions = told["choice"].split("-")[1]
    assert config.variants()[-1].stages == ({"method": "divprune", "positions": positions, "keep": 100},)
    assert yaml.safe_load(shown.stdout.split("\n\n")[1])["tasks"] == ["scenes_colour"]


@pytest.mark.parametrize(
    "options, message",
    [
        ((), 'give one of --target "98% of unpatched" and --ttft 0.5'),
        (("--target", "98%", "--ttft", 0.5), 'give one of --target "98% of unpatched" and --ttft 0.5'),
        (("--target", "98 of all"), "give a share of the unpatched score, such as"),
        (("--target", "120%"), "give a share of the unpatched score, such as"),
        (("--ttft", 2), "give a share of the unpatched model's TTFT, such as 0.5"),
        (("--target", "98%", "--share", 1.5), "--share 1.5: give a number between 0 and 1"),
        (("--target", "98%", "--error", 0), "--error 0: give a number between 0 and 1"),
        (("--target", "98%", "--budgets", "some"), "write numbers with commas between them"),
        (("--target", "98%", "-m", "divprun"), "unknown method 'divprun'. Did you mean 'divprune'?"),
    ],
)
def test_bad_input_is_one_sentence(options, message):
    shown = call(*TINY, *options)
    assert shown.exit_code == 2 and message in shown.stderr, shown.output
    assert len(shown.stderr.strip().splitlines()) == 1
