"""What holds for every test."""

import os

import torch
from hypothesis import settings

# No deadline: the first example of a run pays for imports. In CI the examples are the same each time.
settings.register_profile("lockstep", deadline=None, derandomize="CI" in os.environ, max_examples=40)
settings.load_profile("lockstep")

# pytest runs one worker for each core; several spinning OpenMP threads in each would wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

# Without a GPU the Triton kernels run in Triton's interpreter. It asks for this before anything imports Triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
