"""Reference vectors: every `.npz` in the directory that VLMSLIM_VECTORS names (default: `tests/vectors`).

A file's prefix, up to the first underscore, chooses its check: `vector_checks/<prefix>.py`, which has one function
`check(arrays)`. A known family whose method is not there yet is reported as missing, an unknown prefix is a failure.
"""

import importlib
import os
from pathlib import Path

import numpy as np
import pytest
from vector_checks.divprune import distances, scores

from vlmslim import method_names

METHOD_OF = {
    "divprune": "divprune",
    "globalcom2": "globalcom2",
    "aim": "aim",
    "rc": "recoverable",
    "todre": "todre",
    "tokencorr": "tokencorr",
    "tokenflex": "tokenflex",
    "atp": "atp",
}
ROOT = Path(__file__).parents[1]
DIRECTORY = Path(os.environ.get("VLMSLIM_VECTORS") or ROOT / "vectors")
FILES = sorted(DIRECTORY.glob("*.npz")) if DIRECTORY.is_dir() else []


@pytest.mark.skipif(bool(FILES), reason="there are vectors: they are run below")
def test_there_are_vectors():
    if os.environ.get("VLMSLIM_VECTORS"):
        pytest.fail(f"VLMSLIM_VECTORS={DIRECTORY} has no .npz file")
    pytest.skip(f"no reference vectors in {DIRECTORY}; name their directory in VLMSLIM_VECTORS")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_reference_vectors(path: Path):
    run(path)


def run(path: Path) -> None:
    prefix = path.stem.split("_")[0]
    if prefix not in METHOD_OF:
        pytest.fail(f"{path.name}: unknown prefix {prefix!r}; known families are {', '.join(METHOD_OF)}")
    method = METHOD_OF[prefix]
    if method not in method_names():
        pytest.skip(f"missing: the method {method!r}, which {path.name} is for, is not in vlmslim yet")
    check = importlib.import_module(f"vector_checks.{prefix}").check
    with np.load(path, allow_pickle=False) as arrays:
        check({key: arrays[key] for key in arrays.files})


# --- the rules above are tested themselves ----------------------------------------------------------------------------


def test_an_unknown_prefix_fails(tmp_path):
    np.savez(tmp_path / "mystery_seed0.npz", x=np.zeros(1))
    with pytest.raises(pytest.fail.Exception, match="unknown prefix 'mystery'"):
        run(tmp_path / "mystery_seed0.npz")


def test_a_missing_method_is_reported_and_not_passed(tmp_path, monkeypatch):
    monkeypatch.setattr("test_reference_vectors.method_names", lambda: ("none",))
    np.savez(tmp_path / "divprune_x.npz", x=np.zeros(1))
    with pytest.raises(pytest.skip.Exception, match="missing: the method 'divprune'"):
        run(tmp_path / "divprune_x.npz")


@pytest.mark.parametrize("spoil", ["order", "swap", "keep"])
def test_a_wrong_vector_fails(spoil, tmp_path):
    """The DivPrune check can fail: on a vector whose picks, or whose counts, are not the algorithm's."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(20, 8)).astype(np.float32)
    distance, picks = distances(x), []
    while len(picks) < 6:
        picks.append(int(scores(distance, picks).argmax()))
    good = dict(x=x, keeps=np.array([6]), order_k6=np.array(picks), sorted_k6=np.sort(picks))
    np.savez(tmp_path / "divprune_good.npz", **good, kind="exact", note="")
    run(tmp_path / "divprune_good.npz")
    if spoil == "keep":
        bad = dict(n=np.array([7, 576]), ratio=np.array([0.5, 0.098]), keep=np.array([4, 57]))
    else:
        wrong = np.array(picks)
        if spoil == "swap":
            wrong[[1, 4]] = wrong[[4, 1]]
        else:
            wrong[-1] = next(i for i in range(20) if i not in picks)
        bad = good | dict(order_k6=wrong, sorted_k6=np.sort(wrong))
    np.savez(tmp_path / "divprune_bad.npz", **bad, kind="exact", note="")
    with pytest.raises(AssertionError):
        run(tmp_path / "divprune_bad.npz")
