"""Real processes for distributed code: each a rank of its own, over gloo on the CPU."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# Whoever holds a process group (FSDP's meshes do) keeps gloo's threads alive, and a thread that still runs when
# Python takes the process down aborts it, now and then: also after an error. What a script had to say is said by then.
_BEGIN = """import os, sys, traceback

def _end(*error):
    if error:  # torch.distributed's own hook calls this one with another sys.stderr
        traceback.print_exception(*error, file=sys.__stderr__)
    sys.stdout.flush()
    sys.__stderr__.flush()
    os._exit(1 if error else 0)

sys.excepthook = _end
"""
_END = "\n_end()\n"


def start(script: str, directory: Path, ranks: int = 2, **environment: str) -> list[subprocess.Popen[str]]:
    """Start `ranks` processes that run `script`, which calls ``torch.distributed.init_process_group`` itself.

    They find this folder's modules and what this process imports, one CPU thread each, and ``RANK``, ``WORLD_SIZE``,
    ``LOCAL_RANK``, ``MASTER_ADDR`` and ``MASTER_PORT`` in their environment.
    """
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / "rank.py"
    file.write_text(_BEGIN + script + _END)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(ranks),
        "OMP_NUM_THREADS": "1",
    }
    return [
        subprocess.Popen(
            [sys.executable, str(file)],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]


def finish(processes: Sequence[subprocess.Popen[str]], timeout: float = 240) -> list[str]:
    """What each process wrote to its standard output. AssertionError, with its errors, if one failed."""
    outputs = []
    try:
        for rank, process in enumerate(processes):
            output, errors = process.communicate(timeout=timeout)
            assert process.returncode == 0, f"rank {rank} ended with {process.returncode}:\n{errors[-4000:]}"
            outputs.append(output)
    finally:
        for process in processes:
            process.kill()
    return outputs


def run(script: str, directory: Path, ranks: int = 2, **environment: str) -> list[str]:
    """`start` and `finish`."""
    return finish(start(script, directory, ranks, **environment))
