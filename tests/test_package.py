"""An installed package has its data files, and the packages that its base commands import."""

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_data_file_ships():
    package = ROOT / "vlmslim"
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["vlmslim"]

    def data(paths):
        return {path for path in paths if path.is_file() and path.suffix not in {".py", ".pyc"}}

    assert data(package.rglob("*")) == data(path for pattern in patterns for path in package.glob(pattern))
    assert (package / "py.typed").exists()


# The commands that a plain `pip install vlmslim` offers, while packages are missing that only the extras bring.
BASE_COMMANDS = """
import sys
from importlib.machinery import PathFinder

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        missing = {"av", "datasets", "lmms_eval", "loguru", "open_clip", "scipy", "tensorboard"}
        return None if name.partition(".")[0] in missing else PathFinder.find_spec(name, path, target)

sys.meta_path = [Finder if finder is PathFinder else finder for finder in sys.meta_path]
import vlmslim.cost.bench.report, vlmslim.doctor.report
from vlmslim.cli import app
app(["methods"])
"""


def test_base_commands_need_no_extra():
    done = subprocess.run([sys.executable, "-c", BASE_COMMANDS], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "divprune" in done.stdout
    assert {"rich", "typer"} <= {line.partition(">")[0] for line in PROJECT["project"]["dependencies"]}
