"""The origin of numbers: library versions, git commit, hardware, and the identity of checkpoints and weights."""

import hashlib
import platform
import re
import subprocess
from importlib.metadata import distribution, packages_distributions, version
from pathlib import Path

import vlmslim

_PACKAGE = Path(vlmslim.__file__).resolve().parent
_INSTALLED = {"site-packages", "dist-packages"}
_WHOLE = 64 * 2**20  # bytes: files up to this size are hashed whole
_STRIDE, _SAMPLE = 2**20, 2**12  # of larger ones, bytes at the start of every stride


def versions() -> dict[str, str]:
    """Return the versions of all libraries that can change a number."""
    others = ("torch", "torchvision", "transformers", "tokenizers", "pillow", "lmms_eval")
    return {"vlmslim": vlmslim.__version__, **{name: version(name) for name in others}}


def git_commit(package: Path = _PACKAGE) -> str | None:
    """Return the commit of the checkout that holds a package, with "+" if `uncommitted` lists files.

    Outside of a checkout, as after `pip install`, the answer is None.
    """
    if not _is_tracked(package / "__init__.py"):  # installed, perhaps inside a stranger's repository
        return None
    return _head(package, _changes(package))


def uncommitted(package: Path = _PACKAGE) -> list[str]:
    """List the files of a package that its commit does not hold as they are, new files included."""
    return _changes(package) if _is_tracked(package / "__init__.py") else []


def file_version(name: str, file: Path) -> str:
    """Say which version of another author's file this is.

    Args:
        name: the path by which Python imports it, such as `package/file.py`.
        file: the file.

    Returns:
        The commit of its repository, with "+" if the file was changed since; or the name and version of the installed
        package that it belongs to; or "uncommitted".
    """
    if _is_tracked(file):
        return _head(file.parent, _changes(file)) or "uncommitted"
    known = packages_distributions() if _INSTALLED & set(file.parts) else {}
    for package in known.get(name.partition("/")[0].removesuffix(".py"), ()):
        if Path(str(distribution(package).locate_file(name))).resolve() == file:
            return f"{package} {version(package)}"
    return "uncommitted"


def _is_tracked(file: Path) -> bool:
    return _git(file.parent, "ls-files", "--error-unmatch", file.name) is not None


def _head(folder: Path, changes: list[str]) -> str | None:
    """Return the commit of a folder's repository, with "+" if there are changes; None before the first commit."""
    commit = _git(folder, "rev-parse", "--verify", "HEAD")
    return f"{commit}+" if commit and changes else commit


def _changes(path: Path) -> list[str]:
    """List what is changed or new in a file or folder of a repository, as paths within the repository."""
    folder = path if path.is_dir() else path.parent
    status = _git(folder, "status", "--porcelain", "--untracked-files=all", "--", str(path)) or ""
    return [line[3:] for line in status.splitlines()]


def _git(folder: Path, *arguments: str) -> str | None:
    """Run git in a folder and return what it prints; None if it fails, or if there is no git."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.rstrip("\n") if done.returncode == 0 else None


def hardware(device: str | None = None) -> str:
    """Name the device that computes; by default the GPU if there is one."""
    import torch

    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if place.type == "cuda":
        return torch.cuda.get_device_name(place)
    return f"{_cpu_name()}, {torch.get_num_threads()} threads"


def card(device: str) -> str:
    """Name the GPU of a device for a file's name, such as nvidia-h200; "cpu" for a processor."""
    if not device.startswith("cuda"):
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", hardware(device).lower()).strip("-")


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def fingerprint(checkpoint: str) -> str | None:
    """Hash the files of a local checkpoint, so that a retrained one is told from the old; None for one on the hub.

    Of files above 64 MiB only 4 KiB of every MiB are read, and the end. Training changes every region of a weight
    matrix, so this notices a retrained checkpoint, even if only its projector was trained.
    """
    directory = Path(checkpoint)
    if not directory.is_dir():
        return None
    seal = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        if path.suffix in (".json", ".jinja", ".safetensors", ".bin", ".model"):
            seal.update(f"{path.name} {path.stat().st_size}\n".encode())
            _read_into(seal, path)
    return seal.hexdigest()


def file_digest(path: Path) -> str:
    """Hash one file as `fingerprint` reads it. Its size counts, its name and time do not."""
    seal = hashlib.sha256(f"{path.stat().st_size}\n".encode())
    _read_into(seal, path)
    return seal.hexdigest()


def _read_into(seal: "hashlib._Hash", path: Path) -> None:
    """Add a file to a hash: all of it, or samples of a large file."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        for start in (0,) if size <= _WHOLE else (*range(0, size, _STRIDE), size - _SAMPLE):
            file.seek(start)
            seal.update(file.read(size if size <= _WHOLE else _SAMPLE))
