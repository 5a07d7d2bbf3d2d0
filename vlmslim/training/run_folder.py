"""The folder of a training run: its log and its checkpoint."""

import csv
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from vlmslim.io.files import atomically
from vlmslim.training.settings import Settings


class RunFolder:
    """The folder of a run: log.csv, TensorBoard's events if TensorBoard is installed, and the checkpoint last.pt.

    Files are replaced atomically.
    """

    def __init__(self, out: Path, settings: Settings, accelerator: Accelerator):
        self.out, self.settings, self.accelerator = Path(out), settings, accelerator
        self.started, self.seconds_before = time.time(), 0.0  # seconds of earlier calls
        self.sums: dict[str, tuple[float, int]] = {}  # of each number since the last line: total, and how many
        self.skipped = 0
        self.lines: list[dict[str, Any]] = []
        self.board: Any = None
        if accelerator.is_main_process:
            self.out.mkdir(parents=True, exist_ok=True)
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:  # the CSV has the same numbers
                return
            self.board = SummaryWriter(str(self.out / "tensorboard"))

    def count(self, skipped: int) -> None:
        """Count records that were left out because their pictures cannot be read."""
        self.skipped += skipped

    def mean(self, **numbers: float | Tensor) -> None:
        """Note numbers; the log shows the mean of each since the last line, over all processes."""
        for name, value in numbers.items():
            number = value.detach().float().item() if isinstance(value, Tensor) else float(value)
            total, times = self.sums.get(name, (0.0, 0))
            self.sums[name] = total + number, times + 1

    def log(self, step: int, **numbers: float) -> None:
        """Write one line. Every process must call this."""
        everyone = gather_object([(self.sums, self.skipped)])
        self.sums = {}
        if not self.accelerator.is_main_process:
            return
        line: dict[str, Any] = {"step": step}
        for name in dict.fromkeys(name for sums, _ in everyone for name in sums):  # a process may have seen no picture
            totals, times = zip(*(sums[name] for sums, _ in everyone if name in sums), strict=True)
            line[name] = sum(totals) / sum(times)
        line |= numbers | {"skipped": sum(n for _, n in everyone)}
        line["seconds"] = self.seconds_before + time.time() - self.started
        self.lines.append(line)
        with atomically(self.out / "log.csv") as part, part.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(name for line in self.lines for name in line)))
            writer.writeheader()
            writer.writerows(self.lines)
        print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in line.items()), flush=True)
        if self.board:
            for name, value in line.items():
                if name != "step":
                    self.board.add_scalar(name, value, step)
            self.board.flush()

    def save(self, step: int, named: dict[str, nn.Parameter], optimizer: Any, state: nn.Module) -> None:
        """Write a checkpoint after `step` steps."""
        if not self.accelerator.is_main_process:
            return
        saved = {"step": step, "settings": asdict(self.settings), "optimizer": optimizer.state_dict()}
        saved["processes"] = self.accelerator.num_processes
        saved["parameters"] = {name: p.detach() for name, p in named.items()}
        saved["state"] = state.state_dict()
        if self.accelerator.scaler is not None:
            saved["scaler"] = self.accelerator.scaler.state_dict()
        with atomically(self.out / "last.pt") as part:
            torch.save(saved, part)

    def resume(self, named: dict[str, nn.Parameter], optimizer: Any, state: nn.Module) -> int:
        """Load the last checkpoint, if there is one; return the steps done.

        Raises:
            ValueError: the checkpoint is of a run with other settings, with another number of processes, or of another
                version of vlmslim.
        """
        path = self.out / "last.pt"
        if not path.exists():
            return 0
        saved = torch.load(path, map_location="cpu", weights_only=True)
        ours = asdict(self.settings) | {"processes": self.accelerator.num_processes}
        theirs = saved["settings"] | {"processes": saved["processes"]}
        differs = [k for k in ours if k not in Settings.MAY_CHANGE and ours[k] != theirs.get(k)]
        if differs:
            raise ValueError(f"{path} was trained with other values of {', '.join(differs)}: use another --out")
        if saved.get("state", {}).keys() != state.state_dict().keys():
            raise ValueError(f"{path} is of a version of vlmslim that trained by other rules: use another --out")
        state.load_state_dict(saved.get("state", {}))
        with torch.no_grad():
            for name, p in named.items():
                p.copy_(saved["parameters"][name])
        optimizer.load_state_dict(saved["optimizer"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(saved["scaler"])
        if self.accelerator.is_main_process and (self.out / "log.csv").exists():
            with (self.out / "log.csv").open(newline="") as file:  # the run repeats the steps after the checkpoint
                self.lines = [line for line in csv.DictReader(file) if int(line["step"]) <= saved["step"]]
            if self.lines:
                self.seconds_before = float(self.lines[-1]["seconds"])
                self.skipped = int(self.lines[-1]["skipped"])
        return saved["step"]
