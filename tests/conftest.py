"""What holds for every test."""

import os
from importlib.util import find_spec

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


class Specialized:
    """Stands in, under the interpreter, for a kernel that Triton has compiled: it takes what it was made for alone.

    On a GPU, a compiled kernel that is launched on another dtype, or with a tensor where there was none, reads wherever
    its registers happen to point.
    """

    def __init__(self, kernel, arguments=None):
        self.kernel, self.facts = kernel, arguments and self.facts_of(arguments)

    @staticmethod
    def facts_of(arguments):
        tensors = [
            (one.dtype, one.data_ptr() % 16 == 0) if isinstance(one, torch.Tensor) else ("constant", one)
            for one in arguments
        ]
        return tuple(tensors)

    def __getitem__(self, programs):
        def launch(*arguments, **options):
            assert self.facts in (None, self.facts_of(arguments)), "a compiled kernel is launched on something else"
            self.kernel[programs](*arguments, **options)
            return Specialized(self.kernel, arguments)

        return launch


if not torch.cuda.is_available() and find_spec("triton"):
    from lockstep.kernels import triton_grid

    for name in (
        "_groups_kernel",
        "_rows_kernel",
        "_marlin_kernel",
        "_dequantize_kernel",
        "_tensor_kernel",
        "_tiles_kernel",
        "_gradients_kernel",
    ):
        setattr(triton_grid, name, Specialized(getattr(triton_grid, name)))
