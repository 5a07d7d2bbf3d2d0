"""Where numbers come from: library versions, git commit, hardware, and the identity of checkpoints and weights."""

import hashlib
import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import vlmslim
from vlmslim import bundled
from vlmslim.saving.folder import seals

_WHOLE = 64 * 2**20  # bytes: files up to this size are hashed whole
_STRIDE, _SAMPLE = 2**20, 2**12  # of larger ones, bytes at the start of every stride


def versions() -> dict[str, str]:
    """Versions of everything that can change a number."""
    others = ("torch", "torchvision", "transformers", "tokenizers", "pillow", "lmms_eval")
    return {"vlmslim": vlmslim.__version__, **{name: version(name) for name in others}}


def git_commit() -> str | None:
    """The commit of the checkout that this package is imported from, with "+" if files differ; None elsewhere."""
    package = Path(vlmslim.__file__).parent

    def git(*arguments: str) -> str | None:
        done = subprocess.run(["git", "-C", str(package), *arguments], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        if git("ls-files", "--error-unmatch", "__init__.py") is None:  # installed, or inside a stranger's repository
            return None
        commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no", ".")
    except FileNotFoundError:  # no git on this machine
        return None
    return f"{commit}+" if commit and changes else commit


def hardware(device: str | None = None) -> str:
    """The device that computes, in words; by default the GPU if there is one."""
    import torch

    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_name()}, {torch.get_num_threads()} threads"


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def fingerprint(checkpoint: str) -> str | None:
    """A hash of a local checkpoint's files, so that a retrained one is not taken for the old; None on the hub.

    Of files above 64 MiB it reads 4 KiB in every MiB, and the end: training changes a matrix all over, so whichever was
    trained, be it the projector alone, it shows; a gigabyte is looked through in a moment.
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
    """A hash of one file, as `fingerprint` reads it; its size is in it, its name and time are not."""
    seal = hashlib.sha256(f"{path.stat().st_size}\n".encode())
    _read_into(seal, path)
    return seal.hexdigest()


def _read_into(seal, path: Path) -> None:
    size = path.stat().st_size
    with open(path, "rb") as file:
        for start in (0,) if size <= _WHOLE else (*range(0, size, _STRIDE), size - _SAMPLE):
            file.seek(start)
            seal.update(file.read(size if size <= _WHOLE else _SAMPLE))


def weights(stages: Iterable[dict]) -> dict[str, str | None]:
    """What stages load beside the checkpoint, by the name they give it: a hash, or None where nothing can be read.

    Of trained weights that is the hash that their folder vouches for, and that loading checks; of a local CLIP, its
    `fingerprint`. Words ("random", "pool") are no files, and names on the hub are read there.

    Raises:
        ValueError: a folder that no method could load either.
    """
    found = {}
    for stage in stages:
        if name := stage.get("weights"):
            seal = next(iter(seals([stage])), None)
            if seal is not None or "/" in name:
                found[name] = seal
        if (name := stage.get("clip")) and (seal := fingerprint(bundled.resolve(name))):
            found[name] = seal
    return found
