"""A cluster on this machine: few processes, all of them on loopback."""

from __future__ import annotations

import contextlib
import ipaddress
import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pipeline.cluster.ray_connection import connected

ROOT = Path(__file__).resolve().parents[3]


def _processes() -> Iterator[psutil.Process]:
    yield psutil.Process()
    yield from psutil.Process().children(recursive=True)


def _addresses() -> set[str]:
    """Addresses that this process and those below it listen on or are connected to."""
    found = set()
    for process in _processes():
        with contextlib.suppress(psutil.Error):
            for connection in process.net_connections("inet"):
                found |= {end.ip for end in (connection.laddr, connection.raddr) if end}
    return found


@pytest.mark.ray
def test_a_cluster_on_this_machine_is_small_and_cannot_be_reached_from_others() -> None:
    import ray

    names = ("OMP_NUM_THREADS", "MALLOC_TRIM_THRESHOLD_", "PYTHONPATH")
    before = {name: os.environ.get(name) for name in (*names, "RAY_enable_metrics_collection")}
    with connected(None, threads=3, object_store_gb=0.1):

        def look() -> tuple[list[str], str]:
            return [os.environ[name] for name in names], ray.util.get_node_ip_address()

        (threads, trim, path), ip = ray.get(ray.remote(look).remote())
        commands = {part for p in _processes() for part in p.cmdline()}
        programs = {os.path.basename(part) for part in commands}
        addresses = _addresses()
    assert (threads, trim, ip) == ("3", str(256 << 20), "127.0.0.1")
    assert Path(path.split(os.pathsep)[0]) == ROOT
    assert {"gcs_server", "raylet"} <= programs
    assert not programs & {"dashboard.py", "monitor.py", "log_monitor.py"}
    assert "127.0.0.1" in {address.removeprefix("::ffff:") for address in addresses}
    for address in addresses:
        assert ipaddress.ip_address(address.removeprefix("::ffff:")).is_loopback, addresses
    assert {name: os.environ.get(name) for name in before} == before
