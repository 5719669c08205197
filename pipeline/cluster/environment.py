"""The environment in which data was made: libraries, machine, threads.

Tested by tests/pipeline/extract/test_command.py, tests/pipeline/convert/test_folder.py.
"""

from __future__ import annotations

import functools
import importlib.metadata
import platform
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from pipeline.cluster.workload import Job, WorkersConfig

_PACKAGE_OF = {"crepe": "torchcrepe", "crepe-tiny": "torchcrepe", "fcpe": "torchfcpe"}
_DISTRIBUTION_OF = {"pyworld": "pyworld-prebuilt"}  # datasets record the module's name


@functools.cache
def environment(threads: int) -> dict[str, str]:
    """Return everything that may change last bits of the output without changing its meaning."""
    libraries = ("numpy", "scipy", "torch", "librosa", "soxr", "av", "soundfile", "pyloudnorm")
    estimators = ("praat-parselmouth", "pyworld", "pyarrow")
    versions = {
        name: importlib.metadata.version(_DISTRIBUTION_OF.get(name, name))
        for name in (*libraries, *estimators)
    }
    import torch

    return versions | {
        "machine": platform.machine(),
        "cpu": _cpu_model(),
        "threads": str(threads),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def environment_of_networks(f0_networks: Collection[str], onnx: bool) -> dict[str, str]:
    """Return further entries of the environment for networks.

    onnx: some network ran in onnxruntime.
    """
    packages = {_PACKAGE_OF[name] for name in f0_networks if name in _PACKAGE_OF}
    versions = {name: importlib.metadata.version(name) for name in sorted(packages)}
    if onnx:
        import onnxruntime

        versions["onnxruntime"] = onnxruntime.__version__
    return versions


def threads_before(environments: Iterable[Mapping[str, str]], workers: WorkersConfig) -> int | None:
    """Return the threads of the workers that made the committed part.

    None: they differ, or the settings fix them.
    """
    threads = {environment.get("threads") for environment in environments}
    before = threads.pop() if len(threads) == 1 else None
    return None if before is None or workers.cpus_per_worker else int(before)


def mixed(what: str, environments: Collection[Mapping[str, str]]) -> list[str]:
    """Return a warning when parts were made with different libraries, machines or numerics.

    what: the parts and the whole, such as "shards of one dataset".
    """
    absent = {"dtype": "float32"}
    keys = {key: None for environment in environments for key in environment}
    values = {
        key: sorted({environment.get(key, absent.get(key, "?")) for environment in environments})
        for key in keys
    }
    words = "; ".join(f"{key} {' and '.join(v)}" for key, v in values.items() if len(v) > 1)
    if not words:
        return []
    return [f"{what} made in different environments may differ in last bits: {words}"]


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def threads_of(job: Job[Any]) -> int:
    """Return the threads of a worker: one for each of its CPUs, so that workers do not compete."""
    return job.threads or max(1, int(job.config.workers.cpus_per_worker or 1))


def limit_threads(job: Job[Any]) -> None:
    """Limit torch in this process to the threads of a worker."""
    import torch

    torch.set_num_threads(threads_of(job))
