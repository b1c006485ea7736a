"""All benchmarks, each in a process of its own.

    python benchmarks/run.py [--device cuda] [--quick] [--out benchmarks/results] [--only layer_step growth]

With ``--out`` each writes ``<name>_<cpu|gpu>.json``, ``.md`` and ``.png`` there; without it they only print.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

SCRIPTS = (
    *("layer_step", "eight_bit_step", "fp8_gradient", "reuse", "kernel_bandwidth", "growth", "kernel_agreement"),
    *("whole_model", "streaming_export", "weight_sync", "two_gpus", "rollout_two_gpus", "spikes", "warmup"),
)


def main() -> None:
    """Run the scripts one after another; exit with 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="cuda where there is one, else cpu")
    parser.add_argument("--quick", action="store_true", help="sizes for a CPU, so that the scripts cannot rot")
    parser.add_argument("--out", help="folder for the results")
    parser.add_argument("--only", nargs="+", choices=SCRIPTS, default=SCRIPTS)
    options = parser.parse_args()

    passed_on = ["--quick"] * options.quick
    for name in ("device", "out"):
        if value := getattr(options, name):
            passed_on += [f"--{name}", value]
    failed = []
    for script in options.only:
        started = time.monotonic()
        command = [sys.executable, str(Path(__file__).with_name(f"{script}.py")), *passed_on]
        if subprocess.run(command).returncode:
            failed.append(script)
        print(f"\n{script}: {time.monotonic() - started:.0f} s\n", flush=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
