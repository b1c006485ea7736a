"""As layer_step.py, for weights and inputs in 8 bits: FP8 and INT8, eager and compiled, against plain bf16 and peers.

    python benchmarks/eight_bit_step.py [--device cuda] [--tokens 8192] [--paths "lockstep FP8"] [--modes eager]

The forward's GEMMs run in 8 bits; the backward's in bf16, but for "fp8 input gradient". The peers fake-quantize and
multiply in bf16.
"""

from __future__ import annotations

from layer_step import main
from paths import EIGHT_BIT

if __name__ == "__main__":
    main("eight_bit_step", __doc__ or "", EIGHT_BIT)
