"""A benchmark's module on several processes of this machine, started with torchrun, gloo, one thread each."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

from benchmarks.common.paths import ROOT

__all__ = ["run_processes"]


def _port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def run_processes(module: str, count: int, *options: str) -> str:
    """Start a module with ``--here`` and return what rank 0 printed last.

    Args:
        module: name for ``python -m``.
        count: number of processes.
        options: options of each process.

    Raises:
        RuntimeError: a process failed. The message has the end of its output.
    """
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={count}"]
    command += [f"--master-port={_port()}", "-m", module, "--here", *options]
    # One thread per process, also of a single one, to which torchrun would leave all cores.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    if process.returncode:
        raise RuntimeError(process.stderr[-3000:])
    return process.stdout.strip().splitlines()[-1]
