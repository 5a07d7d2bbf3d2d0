"""Reference vectors: inputs and outputs of the authors' releases, or of float64 references where there is no release.

Every `.npz` of `tests/vectors` is checked, or of the directory in VLMSLIM_VECTORS. A file's prefix, up to the first
underscore, names its check: the function `check(arrays)` of `vector_checks/<prefix>.py`.
"""

import importlib
import os
from pathlib import Path

import numpy as np
import pytest
from vector_checks.divprune import distances, scores

DIRECTORY = Path(os.environ.get("VLMSLIM_VECTORS") or Path(__file__).parents[1] / "vectors")
FILES = sorted(DIRECTORY.glob("*.npz"))
CHECKS = sorted(path.stem for path in (Path(__file__).parent / "vector_checks").glob("*.py"))


def run(path: Path) -> None:
    """Check the vectors of one file."""
    prefix = path.stem.split("_")[0]
    if prefix not in CHECKS:
        pytest.fail(f"{path.name}: no check for the prefix {prefix!r}; known are {', '.join(CHECKS)}")
    with np.load(path, allow_pickle=False) as arrays:
        importlib.import_module(f"vector_checks.{prefix}").check({key: arrays[key] for key in arrays.files})


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_reference_vectors(path: Path):
    run(path)


def test_there_are_vectors():
    assert FILES, f"{DIRECTORY} has no .npz file"
    if "VLMSLIM_VECTORS" not in os.environ:
        assert sorted({path.stem.split("_")[0] for path in FILES}) == CHECKS, "a check without a file checks nothing"


def test_an_unknown_prefix_fails(tmp_path):
    np.savez(tmp_path / "mystery_seed0.npz", x=np.zeros(1))
    with pytest.raises(pytest.fail.Exception, match="no check for the prefix 'mystery'"):
        run(tmp_path / "mystery_seed0.npz")


@pytest.mark.parametrize("fault", ["order", "swap", "keep"])
def test_a_wrong_vector_fails(fault, tmp_path):
    """The DivPrune check can fail: on a vector whose picks, or whose counts, are not the algorithm's."""
    x = np.random.default_rng(0).normal(size=(20, 8)).astype(np.float32)
    distance, picks = distances(x), []
    while len(picks) < 6:
        picks.append(int(scores(distance, picks).argmax()))
    good = dict(x=x, keeps=np.array([6]), order_k6=np.array(picks), sorted_k6=np.sort(picks))
    np.savez(tmp_path / "divprune_good.npz", **good, kind="exact", note="")
    run(tmp_path / "divprune_good.npz")
    if fault == "keep":
        bad = dict(n=np.array([7, 576]), ratio=np.array([0.5, 0.098]), keep=np.array([4, 57]))
    else:
        wrong = np.array(picks)
        if fault == "swap":
            wrong[[1, 4]] = wrong[[4, 1]]
        else:
            wrong[-1] = next(i for i in range(20) if i not in picks)
        bad = good | dict(order_k6=wrong, sorted_k6=np.sort(wrong))
    np.savez(tmp_path / "divprune_bad.npz", **bad, kind="exact", note="")
    with pytest.raises(AssertionError):
        run(tmp_path / "divprune_bad.npz")
