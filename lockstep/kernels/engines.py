"""The compiled operators of an installed engine, without importing the engine's Python.

That Python brings its own versions of half the ecosystem, starts processes and reads the environment; the kernels are
shared libraries that register operators with torch and need nothing else. So an operator is found in four steps, and
what fails in one of them is a reason in words, with the version and the path that were looked at:

1. the package's folder, from the import system's finders, which do not execute it;
2. the library that registers the operator: an operator moves from one to another between versions, so each is loaded
   until it is there, and none if the engine itself is imported in this process;
3. its schema, which must have every argument that Lockstep passes by name and need no other;
4. its CUDA kernel: some builds declare an operator that they were not compiled with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lockstep.layouts import words
from lockstep.scheme import TensorSpec, dtype_name


class EngineUnavailable(RuntimeError):
    """An engine's operator cannot be used in this process; the message says why."""


@dataclass(frozen=True)
class Engine:
    """An engine's package.

    Args:
        package: its import name.
        distributions: the names under which it was ever published.
        install: how to get one that has the operators.
        libraries: returns the patterns of its libraries within the folder, in the order in which to look.
    """

    package: str
    distributions: tuple[str, ...]
    install: str
    libraries: Callable[[], tuple[str, ...]]

    def folders(self) -> list[Path]:
        """Where it is installed; several folders without ``__init__.py`` are one namespace package to Python."""
        try:
            spec = find_spec(self.package)
        except ValueError:  # a stand-in in sys.modules
            return []
        return [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []

    def describe(self) -> str | None:
        """``"vllm 0.22.1 at /folder"``, the version from the metadata beside it: another copy has its own. Or None."""
        for folder in self.folders():
            beside = [str(folder.parent)]
            found = [one for name in self.distributions for one in metadata.distributions(name=name, path=beside)]
            return f"{self.package} {found[0].version if found else '(unknown version)'} at {folder}"
        return None


@dataclass(frozen=True)
class Operator:
    """One operator of an engine, and the arguments that Lockstep passes to it.

    Args:
        engine: whose it is.
        name: its qualified name, e.g. ``"_C::marlin_gemm"``.
        given: the arguments of each call, a tensor first.
        fixed: the arguments that are the same in every call.
    """

    engine: Engine
    name: str
    given: tuple[str, ...]
    fixed: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __call__(self, **arguments: Any) -> Any:
        """Run it on the device of its first argument. Raises EngineUnavailable if it cannot be used."""
        overload = resolve(self)
        with _current_device(arguments[self.given[0]].device):
            return overload(**arguments, **self.fixed)

    def origin(self) -> str | None:
        """Version and folder of the engine, or None if it is not installed. Loads nothing."""
        return self.engine.describe()


@lru_cache
def resolve(operator: Operator) -> Callable[..., Tensor]:
    """The operator itself, loaded and checked.

    Raises:
        EngineUnavailable: no such package, no library that loads into this torch, no such operator in them, an operator
            with other arguments, or one without a CUDA kernel.
    """
    _load_until_registered(operator)
    overload = _registered(operator.name)
    assert overload is not None
    found = f"{operator.name} of {operator.origin() or 'another package, registered in this process,'}"
    if problem := _schema_problem(operator, overload):
        raise EngineUnavailable(f"{found} {problem}; its schema is {overload._schema}")
    if not overload.has_kernel_for_dispatch_key(torch._C.DispatchKey.CUDA):
        raise EngineUnavailable(f"{found} was built without its CUDA kernel")
    return overload


def unresolved(*operators: Operator) -> str | None:
    """Why one of the operators cannot be used in this process, or None."""
    try:
        for operator in operators:
            resolve(operator)
    except EngineUnavailable as error:
        return str(error)
    return None


def _load_until_registered(operator: Operator) -> None:
    if _registered(operator.name):  # by a library that another operator needed, or by the engine itself
        return
    engine, namespace = operator.engine, operator.name.split("::")[0]
    where, patterns = engine.describe(), engine.libraries()
    if where is None:
        raise EngineUnavailable(f"{engine.package} is not installed: {engine.install}")
    found = [path for pattern in patterns for folder in engine.folders() for path in sorted(folder.glob(pattern))]
    if not found:
        raise EngineUnavailable(f"{where} has no compiled library {' or '.join(patterns)}: {engine.install}")
    # First the library that is named after the operator's namespace.
    libraries = sorted(found, key=lambda path: not path.name.startswith(f"{namespace}."))
    failures = []
    for library in libraries:
        if failure := _load(library):
            failures.append(f"{library}: {failure}")
        elif _registered(operator.name):
            return
    if failures:
        raise EngineUnavailable(
            f"{where} does not load into torch {torch.__version__}, it needs the torch and CUDA it was built for: "
            f"{failures[0]}"
        )
    looked = ", ".join(library.name for library in libraries)
    raise EngineUnavailable(f"{where} has no operator {operator.name} in {looked}: {engine.install}")


@lru_cache
def _load(library: Path) -> str | None:
    """Load a library of operators into this process, once; the loader's first line if it does not load."""
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return (str(error.__cause__ or error).splitlines() or ["it does not say why"])[0].removeprefix(f"{library}: ")
    return None


def _registered(name: str) -> Any:
    """The operator of that qualified name, or None if no library in this process registers it."""
    namespace, operator = name.split("::")
    return getattr(getattr(getattr(torch.ops, namespace), operator, None), "default", None)


def _schema_problem(operator: Operator, overload: Any) -> str | None:
    passed = {*operator.given, *operator.fixed}
    arguments = overload._schema.arguments
    absent = sorted(passed - {argument.name for argument in arguments})
    extra = [one.name for one in arguments if not one.has_default_value() and one.name not in passed]
    problems = [f"has no argument {', '.join(absent)}"] * bool(absent)
    problems += [f"needs {', '.join(extra)}, which Lockstep does not pass"] * bool(extra)
    return " and ".join(problems) or None


def _current_device(device: torch.device) -> AbstractContextManager:
    # An operator need not launch where its tensors are: the engines make that the current device for good.
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


# What the kernels of every engine have in common --------------------------------------------------------------------


def _type_id(exponent: int, mantissa: int, signed: bool, bias: int, finite_only: bool, nan: int) -> int:
    """The engines' number for a type of codes: six fields of 8, 8, 1, 32, 1 and 8 bits, the first lowest."""
    return exponent | mantissa << 8 | signed << 16 | bias << 17 | finite_only << 49 | nan << 50


UINT4B8 = _type_id(0, 4, False, 8, False, 1)  # unsigned, stored with 8 added
UINT4 = _type_id(0, 4, False, 0, False, 1)
UINT8B128 = _type_id(0, 8, False, 128, False, 1)
FLOAT8_E4M3FN = _type_id(4, 3, True, 0, True, 2)
FLOAT4_E2M1F = _type_id(2, 1, True, 0, True, 0)


def wrong_device(device: torch.device, capable: Callable[[tuple[int, int]], bool], needed: str) -> str | None:
    """Why kernels that need a GPU of compute capability `needed` do not run on `device`, or None."""
    if device.type != "cuda":
        return f"it runs on CUDA devices, the model is on {device}"
    found = capability(device)
    if found is None:
        return f"this machine has no device {device}"
    if not capable(found):
        return f"it needs a GPU of compute capability {needed}, {device} has {found[0]}.{found[1]}"
    return None


def wrong_served_dtype(spec: TensorSpec) -> str | None:
    """Why kernels with 16-bit outputs do not compute `spec`, or None."""
    if spec.served_dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bfloat16 and float16, the scheme is served in {dtype_name(spec.served_dtype)}"
    return None


def wrong_dtypes(spec: TensorSpec) -> str | None:
    """Why kernels that multiply codes by scales in a 16-bit dtype do not compute `spec`, or None."""
    if reason := wrong_served_dtype(spec):
        return reason
    if spec.scale_dtype != spec.served_dtype:
        stored, served = dtype_name(spec.scale_dtype), dtype_name(spec.served_dtype)
        return f"it takes scales in the dtype that it computes in, {served}: the scheme stores them in {stored}"
    return None


def capability(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of a CUDA device, None if there is no such device."""
    return torch.cuda.get_device_capability(device) if (device.index or 0) < torch.cuda.device_count() else None


def workspace(device: torch.device, per_multiprocessor: int = 1) -> Tensor:
    """Marlin's locks: int32 zeros, a fixed number for each multiprocessor."""
    return torch.zeros(multiprocessors(device) * per_multiprocessor, dtype=torch.int32, device=device)


def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors a CUDA device has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def rows(x: Tensor, spec: TensorSpec, bias: Tensor | None = None) -> Tensor:
    """`x` ``[..., K]`` as contiguous rows ``[M, K]``. ValueError if it or the bias is not in the served dtype."""
    for name, tensor in (("input", x), ("bias", bias)):
        if tensor is not None and tensor.dtype != spec.served_dtype:
            served, found = dtype_name(spec.served_dtype), dtype_name(tensor.dtype)
            raise ValueError(
                f"the {name} is {found} and {spec} is served in {served}: run the model in {served} or under "
                f"torch.autocast to it, or train a scheme with served_dtype=torch.{found}."
            )
    return x.reshape(-1, x.shape[-1]).contiguous()


def gptq_words(codes: Tensor, bits: int = 4) -> Tensor:
    """Codes int8 ``[N, K]`` as GPTQ's ``qweight``: int32 ``[K * bits / 32, N]``, its columns contiguous."""
    return words.pack(codes, bits).T
