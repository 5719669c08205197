"""A connection to Ray: to a cluster, or to one on this machine that ends with the command."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants
from ray._private.node import Node

import models
import pipeline
import stages
from pipeline.cluster.stop_signals import keep_sigterm
from pipeline.errors import StorageFault, UserError

# glibc gives freed buffers of some MB back to the system at once, and the next clip's faults them
# in again, page by page: half the time of WORLD's estimators. A worker keeps them.
KEEP_FREED_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(256 << 20),
}

# Services of a head node that no run of ours uses: API and dashboard, autoscaler, logs.
_SERVICES = ("start_api_server", "start_monitor", "start_log_monitor")
_LOOPBACK = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # the name is Ray's; it holds on Linux as well
    "RAY_enable_metrics_collection": "0",
    "RAY_enable_open_telemetry": "0",
}


@contextmanager
def connected(
    address: str | None, threads: int = 1, object_store_gb: float | None = None
) -> Iterator[None]:
    """Connect to the cluster at `address`, or to a new one on this machine that ends with the run.

    threads: threads of a worker's libraries. object_store_gb: for a cluster on this machine; None:
    a tenth of the memory, at most 4.

    Raises: UserError: when no cluster answers; StorageFault: when Ray fails inside the block.
    """
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
    environment: dict[str, str] = dict.fromkeys(names, str(threads)) | KEEP_FREED_MEMORY
    with ExitStack() as stack:
        stack.callback(ray.shutdown)
        if address is None:
            stack.enter_context(on_loopback())
            path = os.pathsep.join([str(_source_root()), *_python_path()])
            # Ray's processes inherit it. A runtime environment would start each worker twice.
            stack.enter_context(_environment(environment | {"PYTHONPATH": path}))
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            store_gb = object_store_gb or min(4.0, max(0.1, memory / 2**30 / 10))
            _init(
                "local",
                num_cpus=len(os.sched_getaffinity(0)),
                object_store_memory=int(store_gb * 2**30),
                include_dashboard=False,
            )
        else:
            _require_answer(address)
            # Other machines get our code from here; the libraries must be installed there.
            modules = [str(Path(m.__path__[0])) for m in (pipeline, stages, models)]
            try:
                _init(address, runtime_env={"env_vars": environment, "py_modules": modules})
            except ConnectionError as error:
                raise UserError(f"no Ray cluster answers at {address}: {error}") from error
        try:
            yield
        except ray.exceptions.RayError as error:
            words = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise StorageFault(f"the Ray cluster failed: {words}") from error


@contextmanager
def on_loopback() -> Iterator[None]:
    """Let a cluster that is started in the block stay on this machine, in its fewest processes.

    Its servers listen on 127.0.0.1 only. It has no dashboard, whose process asks the metadata
    servers of clouds where it runs, no autoscaler and no metrics.
    """
    services = {name: getattr(Node, name) for name in _SERVICES if hasattr(Node, name)}
    network = ray_constants.ENABLE_RAY_CLUSTER
    for name in services:
        setattr(Node, name, lambda node, **options: None)
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        with _environment(_LOOPBACK):
            yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = network
        for name, start in services.items():
            setattr(Node, name, start)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for the block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _require_answer(address: str) -> None:
    """Refuse an address where nothing listens. Ray itself tries for five minutes."""
    host, _, port = address.rpartition(":")
    if address == "auto":
        return
    if "//" in address or not host or not port.isdigit():
        raise UserError(f"--ray-address {address} is not HOST:PORT (of `ray start --head`) or auto")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise UserError(f"no Ray cluster answers at {address}: {error}") from error


def _init(address: str, **options: Any) -> None:
    """Call `ray.init` without the line about its log level that it writes to stderr."""
    stderr = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        with keep_sigterm():
            ray.init(address, logging_level="error", log_to_driver=False, **options)
        # Ray prints the deaths of workers to stdout in many words; we handle and report those.
        ray._private.worker._worker_logs_enabled = False
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def _source_root() -> Path:
    return Path(pipeline.__path__[0]).parent


def _python_path() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
