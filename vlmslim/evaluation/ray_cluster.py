"""Ray for `vlmslim run --workers`: imported without telemetry, started on this machine, or reached at a head node."""

import os
from types import ModuleType

import torch

from vlmslim.evaluation.config import RunConfig
from vlmslim.evaluation.errors import ConfigError
from vlmslim.io.messages import one_line


def check_workers(workers: str) -> str | int:
    """Read `--workers`.

    Raises:
        ConfigError: it is no number, nor "auto", nor the address of a head node.
    """
    if workers == "auto" or is_address(workers):
        return workers
    if workers.isdecimal() and int(workers) >= 1:
        return int(workers)
    raise ConfigError(f"--workers {workers}: give a number from 1 up, auto, or ray://HEAD:10001")


def is_address(workers: str | int) -> bool:
    """Tell whether `--workers` gives the address of a head node."""
    return isinstance(workers, str) and workers.startswith("ray://") and len(workers) > len("ray://")


def import_ray() -> ModuleType:
    """Import Ray, without its telemetry.

    Raises:
        ConfigError: it is not installed.
    """
    os.environ.update(
        RAY_USAGE_STATS_ENABLED="0",  # no telemetry
        RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",  # so that a node of its own binds to loopback, on Linux too
        RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
    )
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise ConfigError('--workers needs Ray: pip install "vlmslim[ray]"') from error
    return ray


def connect(ray: ModuleType, workers: str | int, config: RunConfig) -> tuple[int, float]:
    """Start Ray here, or connect to a head node.

    Args:
        ray: what `import_ray` returned.
        workers: how many on this machine, "auto", or the address of a head node.
        config: the comparison, with its device and its `resources`.

    Returns:
        How many workers to start, and the GPUs of each.

    Raises:
        ConfigError: no head node answers, or there are fewer GPUs than the workers need.
    """
    asked = config.resources.gpus_per_worker
    on_cpu = (config.model.device or "").startswith("cpu")
    if is_address(workers):
        try:
            ray.init(workers, log_to_driver=False, logging_level="ERROR")
        except Exception as error:  # gRPC and Ray have a class for each layer that fails; all mean the same to the user
            raise ConfigError(
                f"no Ray head node answers at {workers} ({one_line(error)}); start one with "
                "'ray start --head', and give the address of its client server: ray://HOST:10001"
            ) from error
        there = ray.cluster_resources()
        here, cores = there.get("GPU", 0), int(there.get("CPU", 1))
    else:
        here, cores = float(torch.cuda.device_count()), 1  # workers share the cores of one machine, so one is enough
    gpus = asked if asked is not None else float(here > 0 and not on_cpu)
    count = workers if isinstance(workers, int) else max(int(here // gpus) if gpus else cores, 1)
    if count * gpus > here:
        raise ConfigError(
            f"{count} workers of {gpus:g} GPUs need {count * gpus:g} GPUs, and there are {here:g}; give fewer "
            "--workers, or a smaller resources.gpus_per_worker"
        )
    if not ray.is_initialized():
        ray.init(
            num_cpus=count,
            num_gpus=int(here),
            include_dashboard=False,
            _node_ip_address="127.0.0.1",
            log_to_driver=False,
            logging_level="ERROR",
        )
    return count, gpus
