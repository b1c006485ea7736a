"""The ablation's arms with rollouts by vLLM on the CPU, a few rollouts each, and the weights compared at their end.

Run by the engine's own Python (see `install.sh`), never by the package's, and only if Lightning is installed there:

    grpo.py OUTPUT_FOLDER          writes the curves and results that `lockstep.recipes.ablation` writes
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import serve  # noqa: E402, F401  sets what vLLM reads when it is imported

# isort: split
from lockstep.recipes import ablation  # noqa: E402

SIZE = """
    --device cpu --engine vllm --layers 1 --intermediate 128 --heads 2 --digits 1 --batch-size 64 --warmup-steps 60
    --warmup-reward 2 --prompts 8 --samples 8 --steps 3 --held-out 64 --evaluate-every 2
"""


def main() -> None:
    """A start, and the four arms from it, each with a vLLM of its own."""
    out = Path(sys.argv[1])
    arms = sys.argv[2:] or ablation.FOUR
    for run in ("start", *arms):
        options, size = ablation.parse([*SIZE.split(), "--out", str(out), "--run", run])
        ablation.run_one(options, size)


if __name__ == "__main__":
    main()
