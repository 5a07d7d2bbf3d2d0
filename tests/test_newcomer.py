"""The walk of a newcomer: the example of the documentation, in every place where a method may be, and the usual slips.

Every step goes through the commands. What `compress` and `retain` may return is the subject of `tests/engine`, and a
method that is edited between two runs that of `tests/evaluation`.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from evaluation_doubles import FakeHarness, write_config
from lmms_fixtures import checkpoint
from method_files import HELPER, NORM, write
from typer.testing import CliRunner

from vlmslim.cli import app

ROOT = Path(__file__).parents[1]
EXAMPLE = re.search(
    r'^```python\n("""norm: .*?)^```$', (ROOT / "docs/architecture.md").read_text(), re.DOTALL | re.MULTILINE
)[1]


def call(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def listed() -> dict[str, str]:
    """The lines of `vlmslim methods`, by method."""
    shown = call("methods")
    assert shown.exit_code == 0, shown.output
    return {line.split()[0]: line for line in shown.stdout.splitlines() if line[0] != " "}


def lines(shown) -> list[str]:
    """Return what a command that failed says on the terminal."""
    assert shown.exit_code == 2, shown.output
    return [line for line in shown.stderr.splitlines() if line]


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> str:
    return checkpoint("llava", tmp_path_factory.mktemp("checkpoints"))


# --- a method works, wherever it is -----------------------------------------------------------------------------------


def test_a_file_among_the_methods(built_in, llava):
    built_in("norm.py", EXAMPLE)
    assert "before the language model" in listed()["norm"] and "largest projected norm." in listed()["norm"]
    shown = call("doctor", llava, "-m", "norm:keep=4", "--device", "cpu")
    assert shown.exit_code == 0, shown.output
    assert "norm-4" in shown.stdout and "16.0 -> 4.0" in shown.stdout


def test_a_file_anywhere(tmp_path, llava, monkeypatch):
    write(tmp_path / "norm.py", EXAMPLE)
    monkeypatch.chdir(tmp_path)
    for name in ("norm.py", "norm.py:Norm"):
        shown = call("bench", llava, "-m", f"{name}:keep=4", "--device", "cpu", "--new-tokens", 2, "--repeats", 1)
        assert shown.exit_code == 0, shown.output
        assert "norm-4" in shown.stdout
    assert "Keep the tokens with the largest projected norm." in call("methods", "norm.py").stdout


def test_a_file_in_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr("vlmslim.evaluation.harness.Harness", FakeHarness())
    name = f"{write(tmp_path / 'norm.py', EXAMPLE)}:Norm"
    shown = call("run", write_config(tmp_path, methods=[name, {"method": name, "keep": 0.5, "label": "half"}]))
    assert shown.exit_code == 0, shown.output
    for label in ("norm-64", "norm-16", "half"):
        assert f"\n| {label} " in shown.stdout


def test_a_file_in_lmms_eval(tmp_path, llava):
    from vlmslim.evaluation.lmms_model import VlmSlim

    name = f"{write(tmp_path / 'norm.py', EXAMPLE)}:Norm"
    for arguments in (f"method={name},keep=4", f'method=[{{"method": "{name}", "keep": 4}}]'):
        lm = VlmSlim.create_from_arg_string(f"pretrained={llava},device=cpu,{arguments}")
        assert lm.receipt["method"].startswith("Norm(keep=4")
        lm.clean()


def test_an_installed_package(install, llava):
    install("norm = outside:Norm", EXAMPLE)
    assert "largest projected norm." in listed()["norm"] and listed()["norm"].rstrip().endswith("vlmslim-outside")
    shown = call("bench", llava, "-m", "norm:keep=4", "--device", "cpu", "--new-tokens", 2, "--repeats", 1)
    assert shown.exit_code == 0 and "norm-4" in shown.stdout, shown.output


def test_an_installed_package_in_a_process_of_its_own(install, tmp_path):
    install("norm = outside:Norm", EXAMPLE)
    environment = os.environ | {"PYTHONPATH": f"{tmp_path / 'site-outside'}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-m", "vlmslim.cli", "methods", "norm"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0 and "largest projected norm" in done.stdout, done.stderr


@pytest.mark.slow
def test_the_contract_of_a_file(tmp_path):
    file = write(tmp_path / "norm.py", EXAMPLE)
    test = ["tests/methods/test_contract.py", "--method", f"{file}:Norm", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run([sys.executable, "-m", "pytest", *test], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout
    assert re.search(r"\d\d passed", done.stdout) and "failed" not in done.stdout, done.stdout


# --- slips ------------------------------------------------------------------------------------------------------------


def test_a_helper_below_the_method_is_no_method(built_in):
    built_in("norm.py", NORM + HELPER)
    assert "Keep the tokens with the largest norm." in listed()["norm"]


def test_a_file_of_helpers(built_in):
    built_in("_shared.py", "def f(): pass")
    built_in("utils.py", "def f(): pass")
    built_in("norm.py", "from ._shared import f\n" + NORM)
    found = listed()
    assert "_shared" not in found and "largest norm" in found["norm"]
    assert "holds" in found["utils"] and "broken" in found["utils"]  # a long path ends the line there


SLIPS = {
    "No module named 'nowhere'": "import nowhere\n" + NORM,
    "No module named '_shared' .* write: from ._shared import": "from _shared import f\n" + NORM,
    "SyntaxError: expected ':' .*line 7": NORM.replace("(Compressor):", "(Compressor)"),
    r"does not say which class is its method \(Mine\): give one class the name of the file": NORM.replace(
        "class Norm", "class Mine"
    ),
    r"Norm lists options \(keep\); put @dataclass above it": NORM.replace("@dataclass\n", ""),
    "holds no method: define a subclass of vlmslim.Compressor": NORM.replace("(Compressor)", ""),
}


@pytest.mark.parametrize("message", SLIPS)
def test_a_slip_is_one_sentence_and_stops_nothing_else(built_in, tmp_path, llava, message):
    built_in("_shared.py", "def f(): pass")
    built_in("norm.py", SLIPS[message])
    file = write(tmp_path / "norm.py", SLIPS[message])
    write(tmp_path / "_shared.py", "def f(): pass")
    found = listed()
    assert "broken" in found["norm"] and "Before decoder layer K" in found["fastv"]
    config = write_config(tmp_path, methods=[str(file)])
    for command in (
        ("methods", "norm"),
        ("methods", file),
        ("doctor", llava, "-m", "norm", "--device", "cpu"),
        ("bench", llava, "-m", f"{file}:keep=4", "--device", "cpu"),
        ("run", config),
    ):
        (line,) = lines(call(*command))
        assert line.startswith("vlmslim: ") and re.search(message, line), line


@pytest.mark.parametrize(
    "name, message",
    [
        ("nrm", "unknown method 'nrm'. Did you mean 'norm'?"),
        ("norm:kep=4", "unknown option of norm 'kep'. Did you mean 'keep'? Known: keep"),
        ("norm:4", "'norm:4': write options as name:option=value, such as fastv:layer=3"),
        ("norm.py:Nrm:keep=4", "norm.py has no class Nrm. Did you mean 'Norm'?"),
        ("nrm.py", "there is no file nrm.py; the working directory is"),
        ("mine:Norm", "there is no module mine; for the file write mine.py:Class"),
        ("outside.norm", "there is no module outside.norm; is its package installed?"),
    ],
)
def test_names_that_are_misspelt(built_in, tmp_path, llava, monkeypatch, name, message):
    built_in("norm.py")
    write(tmp_path / "norm.py")
    write(tmp_path / "mine.py")
    monkeypatch.chdir(tmp_path)
    for command in ("doctor", "bench"):
        (line,) = lines(call(command, llava, "-m", name, "--device", "cpu"))
        assert line.startswith(f"vlmslim: {message}")


def test_a_package_that_takes_the_name_of_a_method(install, llava):
    install("divprune = outside:Norm")
    assert "several methods have the name divprune" in listed()["divprune"] and "Norm" not in listed()["fastv"]
    (line,) = lines(call("bench", llava, "-m", "divprune", "--device", "cpu"))
    assert "vlmslim itself (vlmslim.methods.divprune) and of the package vlmslim-outside (outside:Norm)" in line
