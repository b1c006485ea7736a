"""`checksum`: one value for the same bits, wherever and however it is computed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lockstep import kernels
from lockstep.export.rollout import engine
from lockstep.export.rollout.engine import checksum, checksums_later, checksums_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.bfloat16, torch.float32, torch.int32, torch.int64, torch.int8, torch.float8_e4m3fn, torch.bool]


def by_the_definition(tensor: Tensor) -> int:
    """Splitmix's finalizer in Python's own integers, word by word."""

    def mix(x: int) -> int:
        x %= 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    data = bytes(tensor.cpu().contiguous().view(-1).view(torch.uint8).tolist())
    data += bytes(-len(data) % 4)
    places = range(0, len(data), 4)
    total = sum(mix(int.from_bytes(data[i : i + 4], "little", signed=True) + mix(i // 4 + 1)) for i in places)
    head = 0
    for byte in f"{tensor.dtype}{list(tensor.shape)}".encode():
        head = mix(head * 257 + byte)
    return mix(total + head)


@st.composite
def tensors(draw) -> Tensor:
    """Of any dtype, of no values up to more than a program sums, at any place in memory, some of them views."""
    count, skip = draw(st.sampled_from([0, 1, 3, 7, 64, 5000])), draw(st.sampled_from([0, 1, 3]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from(DTYPES))
    raw = torch.randint(0, 256, ((count + skip) * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    tensor = (raw.bool() if dtype == torch.bool else raw.view(dtype))[skip:]
    return tensor.view(2, -1).T if count == 64 and draw(st.booleans()) else tensor


@pytest.mark.parametrize("way", ["Python", "torch", "Triton"])
@given(tensor=tensors())
def test_every_way_gives_the_value_of_the_definition(way, tensor):
    """Trainer and engine may compute it on different devices, one with Triton and one without."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "SHORT", 2**20 if way == "Python" else -1)
        patch.setattr(engine, "CHUNK", 1000)
        if way == "Triton":
            triton_checksum = pytest.importorskip("lockstep.kernels.triton_checksum")
            patch.setattr(kernels, "add_sum_of_words", lambda device: triton_checksum.add_sum_of_words)
        assert checksum(tensor.to(DEVICE) if way == "Triton" else tensor) == by_the_definition(tensor)


def test_the_value_stays_what_it_was():
    """Processes of two versions of Lockstep compare theirs."""
    assert checksum(torch.arange(100, dtype=torch.int32).view(10, 10)) == 0xF16D2109C9FDE207
    assert checksum(torch.tensor([4096, 4096])) == 0x795F00CB1D5CC861
    assert checksum(torch.ones(3, dtype=torch.bfloat16)) == 0xEE7B23D0D276D87C


@pytest.mark.skipif(DEVICE.type != "cuda", reason="no GPU")
def test_on_a_gpu_it_is_tritons():
    assert kernels.add_sum_of_words(DEVICE) is not None
    w = torch.randn(3001, 77, device=DEVICE)
    assert checksum(w) == checksum(w.cpu())


def test_without_triton_torch_computes_it(monkeypatch):
    monkeypatch.setattr(kernels, "TRITON_PROBLEM", "Triton does not load")
    assert kernels.add_sum_of_words(torch.device("cuda")) is None


def test_many_are_those_of_each():
    some = {"a": torch.randn(100), "b": torch.ones(2, dtype=torch.int64), "c": torch.randn(100).to(DEVICE)}
    found = checksums_of(some)
    assert list(found) == ["a", "b", "c"]
    assert found == {name: checksum(tensor) for name, tensor in some.items()}
    assert checksums_of({}) == {}


def test_a_tensor_may_change_while_its_checksum_is_on_the_way():
    w = torch.randn(1000, 100).to(DEVICE)
    expected, read = checksum(w), checksums_later({"w": w})
    w.zero_()
    assert read() == {"w": expected}


def test_it_changes_with_bits_order_shape_and_dtype():
    w = torch.randn(64, 32)
    others = [w.view(32, 64), w.view(torch.int32), w.flip(0), w.T.contiguous(), w[:, [1, 0, *range(2, 32)]], -w]
    flipped = w.clone()
    flipped.view(torch.int32)[63, 31] ^= 1
    zero, minus_zero = torch.zeros(3), -torch.zeros(3)
    values = [checksum(one) for one in (w, *others, flipped, zero, minus_zero, torch.zeros(4), torch.zeros(3, 1))]
    assert len(set(values)) == len(values)
