"""Provenance of numbers: checkpoints, commits, hardware."""

import subprocess
from importlib import metadata
from pathlib import Path

import pytest
import yaml

from vlmslim.io import provenance


def test_a_checkpoint_is_known_by_its_files(tmp_path):
    assert provenance.fingerprint("org/on-the-hub") is None
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"12")
    first = provenance.fingerprint(str(tmp_path))
    (tmp_path / "README.md").write_text("words do not matter")
    assert provenance.fingerprint(str(tmp_path)) == first
    (tmp_path / "model.safetensors").write_bytes(b"13")
    assert provenance.fingerprint(str(tmp_path)) != first


def test_training_any_part_of_a_large_file_is_noticed(tmp_path):
    """A file of 70 MiB and a few bytes, without blocks on the disk: its start, one MiB in the middle, its last byte."""
    mib, size, seen = 2**20, 70 * 2**20 + 7, set()
    (tmp_path / "config.json").write_text("{}")
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.truncate(size)
        for start, count in ((0, 0), (0, 1), (40 * mib + mib // 2, mib), (size - 1, 1)):
            file.seek(start)
            file.write(b"1" * count)
            file.flush()
            seen.add(provenance.fingerprint(str(tmp_path)))
    assert len(seen) == 4


def test_the_cpu_is_named_with_its_threads():
    assert "threads" in provenance.hardware("cpu")


def run_git(folder, *arguments):
    name = ("-c", "user.name=test", "-c", "user.email=test@example.org")
    subprocess.run(["git", "-C", str(folder), *name, *arguments], check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path):
    """A package in a repository."""
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").touch()
    (tmp_path / ".gitignore").write_text("__pycache__")
    run_git(tmp_path, "init")
    run_git(tmp_path, "add", ".")
    run_git(tmp_path, "commit", "-m", "first")
    return package


def test_new_and_changed_files_mark_the_commit(tmp_path, repository):
    commit = provenance.git_commit(repository)
    assert len(commit) == 40 and provenance.uncommitted(repository) == []
    (repository / "__pycache__").mkdir()
    (repository / "__pycache__" / "norm.pyc").touch()
    (tmp_path / "notes.txt").touch()  # outside of the package
    assert provenance.git_commit(repository) == commit
    (repository / "methods").mkdir()
    (repository / "methods" / "norm.py").touch()
    assert provenance.git_commit(repository) == f"{commit}+"
    (repository / "__init__.py").write_text("x = 1")
    assert provenance.uncommitted(repository) == ["package/__init__.py", "package/methods/norm.py"]


def test_there_is_no_commit_without_a_checkout_of_the_package(tmp_path, repository):
    elsewhere = repository / "venv"
    elsewhere.mkdir()
    (elsewhere / "__init__.py").touch()  # in a stranger's repository, which does not track it
    assert provenance.git_commit(elsewhere) is None
    assert provenance.uncommitted(elsewhere) == []


def test_the_file_of_another_author_has_its_own_version(tmp_path, repository):
    method = repository / "norm.py"
    method.write_text("x = 1")
    assert provenance.file_version("norm.py", method) == "uncommitted"
    run_git(tmp_path, "add", ".")
    run_git(tmp_path, "commit", "-m", "second")
    commit = provenance.git_commit(repository)
    (repository / "other.py").touch()
    assert provenance.file_version("norm.py", method) == commit
    method.write_text("x = 2")
    assert provenance.file_version("norm.py", method) == f"{commit}+"


def test_a_file_of_an_installed_package_has_the_version_of_the_package(tmp_path):
    installed = Path(yaml.__file__).resolve()
    assert provenance.file_version("yaml/__init__.py", installed) == f"PyYAML {metadata.version('PyYAML')}"
    (tmp_path / "yaml.py").touch()
    assert provenance.file_version("yaml.py", tmp_path / "yaml.py") == "uncommitted"
