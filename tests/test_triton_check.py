"""The quick check of packed words against reading them back: on a GPU where there is one, else interpreted.

The oracles are `grid` and `layouts`, which have tests of their own against other people's arithmetic and packers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import groupby
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import TinyMlp, grouped, prepared
from strategies import BF16, DTYPES, FP16, FP32, Q4_0, bits, specs, weights
from torch import Tensor

from lockstep import TensorSpec, grid
from lockstep.export import checks, stream
from lockstep.export.directory import ExportError
from lockstep.grid import Quantized
from lockstep.kernels import reference, triton_grid
from lockstep.layouts import marlin, words

pytest.importorskip("triton")
import triton
import triton.language as tl

from lockstep.kernels import triton_check

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|All-NaN):RuntimeWarning")  # NumPy's
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
G32, CHANNEL = TensorSpec(group_size=32), TensorSpec(strategy="channel")
SPECS = [
    TensorSpec(),
    G32,
    CHANNEL,
    TensorSpec(group_size=64, scale_rule="amax/7.5"),
    TensorSpec(scale_dtype=FP32, served_dtype=FP32),
    TensorSpec(**Q4_0, served_dtype=FP16),
    TensorSpec("int8", group_size=64),
    TensorSpec("int8", "channel", scale_rule="amax/127.5", scale_dtype=FP16, served_dtype=FP16),
]
PACK = {"rows": reference.pack_quantized, "marlin": reference.pack_marlin}

every_spec = pytest.mark.parametrize("spec", SPECS, ids=str)
every_order = pytest.mark.parametrize("order", PACK)


def found(w: Tensor, packed: Tensor, scale: Tensor, spec: TensorSpec, order: Any) -> bool:
    on_device = (one.to(DEVICE) for one in (w, packed, scale))
    result = triton_check.check_packed(*on_device, spec, order)
    assert result is not None
    return bool(result)


def gives_back(w: Tensor, packed: Tensor, scale: Tensor, spec: TensorSpec, order: str) -> bool:
    """The verdict of who reads back: the words are finite numbers, and those that the forward multiplies with."""
    if order == "rows":
        read = Quantized(words.unpack(packed, spec.bits), scale)
    else:
        read = Quantized(marlin.unpack_weight(packed, spec.bits), marlin.unpack_scales(scale))
    served = grid.dequantize(read, spec)
    same = torch.equal(bits(served), bits(grid.fake_quantize(w, spec)))
    return same and bool(w.isfinite().all()) and bool(served.isfinite().all())


def some_weights(shape: tuple[int, ...], dtype: torch.dtype = BF16) -> Tensor:
    """Ordinary weights, with groups of zeros and weights half way between two codes."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
    w[..., 3, :] = 0.0
    w[..., 5, :] = -0.0
    w[..., 7, ::2] = 7.0
    w[..., 7, 1::2] = (torch.arange(shape[-1] // 2) % 13 - 6.5) / 1.0
    return w.to(dtype)


# Words that are right ------------------------------------------------------------------------------------------------


@every_spec
@every_order
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_is_found_in_what_the_grid_packs(spec, order, dtype):
    """Each false alarm would cost a sync the time of reading a layer back."""
    w = some_weights((64, 128), dtype)
    assert not found(w, *PACK[order](w, spec), spec, order)


@pytest.mark.parametrize(
    ("shape", "spec", "order"),
    [
        ((1, 96), G32, "rows"),
        ((41, 352), G32, "rows"),
        ((2, 3, 96), CHANNEL, "rows"),
        ((5, 4104), CHANNEL, "rows"),  # longer than what a program reads at a time
        ((2, 1, 64, 64), G32, "marlin"),
        ((64, 144), CHANNEL, "marlin"),  # K fills no tile of the kernel
        ((128, 128), TensorSpec(), "marlin"),  # one group a row: scales in another order
    ],
    ids=str,
)
def test_shapes_that_do_not_fill_a_program(shape, spec, order):
    w = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.02).to(BF16)
    packed, scale = PACK[order](w, spec)
    assert not found(w, packed, scale, spec, order)
    assert not found(w.mT.contiguous().mT, packed, scale, spec, order)
    for place in (0, packed.numel() - 1):
        wrong = packed.clone()
        wrong.view(-1)[place] ^= 1 << 28
        assert found(w, wrong, scale, spec, order)


# Words that are wrong ------------------------------------------------------------------------------------------------

Fault = Callable[[Tensor, Tensor, TensorSpec, str], tuple[Tensor, Tensor]]


def flip(packed: Tensor, scale: Tensor, spec: TensorSpec, order: str, field: int) -> tuple[Tensor, Tensor]:
    packed.view(-1)[packed.numel() // 3] ^= 1 << (spec.bits * field)
    return packed, scale


def swap(tensor: Tensor, dim: int, a: int, b: int) -> Tensor:
    """`tensor` with the slices `a` and `b` of a dimension in each other's place."""
    order = list(range(tensor.shape[dim]))
    order[a], order[b] = b, a
    return tensor.index_select(dim, torch.tensor(order))


def shift_scale(scale: Tensor, by: int) -> Tensor:
    scale = scale.clone()
    bits(scale).view(-1)[9] += by
    return scale


def set_scale(scale: Tensor, to: float) -> Tensor:
    scale = scale.clone()
    scale.view(-1)[9] = to
    return scale


def transposed_tile(packed: Tensor, spec: TensorSpec, order: str) -> Tensor:
    """The codes of 16 rows and 16 columns transposed."""
    of_rows = order == "rows"
    codes = words.unpack(packed, spec.bits) if of_rows else marlin.unpack_weight(packed, spec.bits)
    codes[16:32, 16:32] = codes[16:32, 16:32].T.clone()
    return words.pack(codes, spec.bits) if of_rows else marlin.pack_weight(codes, spec.bits)


FAULTS: dict[str, Fault] = {
    "lowest field flipped": partial(flip, field=0),
    "highest field flipped": lambda p, s, spec, order: flip(p, s, spec, order, 32 // spec.bits - 1),
    "two fields swapped": lambda p, s, spec, order: (
        words.pack(words.unpack(p, spec.bits).unflatten(-1, (-1, 2)).flip(-1).flatten(-2), spec.bits),
        s,
    ),
    "words of two rows swapped": lambda p, s, spec, order: (swap(p, 0, 0, 1), s),
    "two words swapped": lambda p, s, spec, order: (swap(p, 1, 1, 2), s),
    "words of two threads swapped": lambda p, s, spec, order: (swap(p, 1, 4, 8), s),
    "scales of two rows swapped": lambda p, s, spec, order: (p, swap(s, 0 if order == "rows" else 1, 9, 10)),
    "scale a unit up": lambda p, s, spec, order: (p, shift_scale(s, 1)),
    "scale a unit down": lambda p, s, spec, order: (p, shift_scale(s, -1)),
    "scale of the other sign": lambda p, s, spec, order: (p, -s),
    "scale NaN": lambda p, s, spec, order: (p, set_scale(s, torch.nan)),
    "scale infinite": lambda p, s, spec, order: (p, set_scale(s, torch.inf)),
    "scale zero": lambda p, s, spec, order: (p, set_scale(s, 0.0)),
    "a tile transposed": lambda p, s, spec, order: (transposed_tile(p, spec, order), s),
}


@pytest.mark.parametrize("fault", FAULTS)
@every_order
@pytest.mark.parametrize("spec", [SPECS[0], CHANNEL, SPECS[3], SPECS[6]], ids=str)
def test_a_planted_fault_is_found(fault, order, spec):
    """The engine would serve weights that never trained."""
    w = (torch.randn(64, 128, generator=torch.Generator().manual_seed(2)) * 0.02).to(BF16)
    packed, scale = PACK[order](w, spec)
    wrong = FAULTS[fault](packed.clone(), scale, spec, order)
    assert not gives_back(w, *wrong, spec, order)
    assert found(w, *wrong, spec, order)


@pytest.mark.parametrize("spec", [G32, TensorSpec(group_size=64)], ids=str)
@every_order
def test_swapped_groups_are_found(spec, order):
    w = (torch.randn(64, 128, generator=torch.Generator().manual_seed(2)) * 0.02).to(BF16)
    packed, scale = PACK[order](w, spec)
    assert found(w, packed, swap(scale, 1 if order == "rows" else 0, 0, 1), spec, order)
    codes = grid.quantize(w, spec).codes.unflatten(-1, (-1, spec.group_size))
    codes = swap(codes, 1, 0, 1).flatten(-2)
    packed = words.pack(codes, 4) if order == "rows" else marlin.pack_weight(codes)
    assert found(w, packed, scale, spec, order)


def test_the_words_of_the_other_order_are_found():
    w = (torch.randn(64, 128, generator=torch.Generator().manual_seed(2)) * 0.02).to(BF16)
    (rows, rows_scale), (tiles, tiles_scale) = (pack(w, G32) for pack in PACK.values())
    assert found(w, tiles.view(rows.shape), rows_scale, G32, "rows")
    assert found(w, rows.view(tiles.shape), tiles_scale, G32, "marlin")
    assert found(w, tiles, rows_scale.T.contiguous(), G32, "marlin")  # transposed, and not permuted


@every_order
@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("spec", [G32, CHANNEL, TensorSpec(**Q4_0)], ids=str)
def test_a_weight_that_is_no_number_is_found(order, value, spec):
    """Its code and scale may be those of the grid, and still nobody wants them served."""
    w = some_weights((64, 128))
    w[9, 77] = value
    assert found(w, *PACK[order](w, spec), spec, order)


def test_what_is_served_as_infinity_is_found():
    """A master in bf16 reaches further than an engine in fp16."""
    w = some_weights((64, 128))
    w[9, 77] = 1e6
    spec = TensorSpec(group_size=32, served_dtype=FP16)
    packed, scale = reference.pack_quantized(w, spec)
    assert grid.dequantize(Quantized(words.unpack(packed, 4), scale), spec).isinf().any()
    assert found(w, packed, scale, spec, "rows")


@settings(max_examples=25)
@given(
    weights(lead=((),), rows=(64,), columns=(128,)), specs, st.sampled_from([*PACK]), st.sampled_from([None, *FAULTS])
)
def test_what_is_found_clean_gives_back_the_weight(w, spec, order, fault):
    """Of weights of every magnitude, damaged or not: the quick check may suspect more than is wrong, never less."""
    packed, scale = PACK[order](w, spec)
    if fault is not None:
        packed, scale = FAULTS[fault](packed.clone(), scale, spec, order)
    if not gives_back(w, packed, scale, spec, order):
        assert found(w, packed, scale, spec, order)


# One code ------------------------------------------------------------------------------------------------------------


@triton.jit
def _beyond_kernel(w, divisor, out, n, grid: tl.constexpr, block: tl.constexpr):
    at = (tl.program_id(0) * block + tl.arange(0, block))[:, None]
    value, step = tl.load(w + at, mask=at < n, other=0.0), tl.load(divisor + at, mask=at < n, other=1.0)
    field = tl.arange(0, 1 << grid.bits)[None, :]
    beyond = triton_check._beyond(field, value, step, grid)
    tl.store(out + at * (1 << grid.bits) + field, (beyond > 0).to(tl.int8), mask=at < n)


@pytest.mark.parametrize("master", [BF16, FP16], ids=str)
@pytest.mark.parametrize("scale_dtype", [BF16, FP16], ids=str)
def test_one_code_fits_each_weight_whatever_the_significands(master, scale_dtype):
    """All pairs of a weight's and a scale's significands, quotients from 1/4 to 8, ties among them.

    The oracle is exact: a quotient of two numbers of 11 bits is half an integer in float64 too, or far from one.
    """
    w, scale = (1 + torch.arange(n) / n for n in (int(1 / torch.finfo(dtype).eps) for dtype in (master, scale_dtype)))
    w, scale = w[:: len(w) // 128], scale[:: len(scale) // 128]
    w = (w[:, None] * 2.0 ** torch.arange(-1, 3))[..., None] * (1 - 2 * (torch.arange(128) % 2))
    w, scale = (one.flatten().double() for one in torch.broadcast_tensors(w, scale))
    inside = (w / scale).abs() <= 7.5
    w, scale = w[inside], scale[inside]
    expected = (w / scale).round().clamp(-7, 7)
    ties = (w / scale).frac().abs() == 0.5
    assert ties.sum() > 100
    out = torch.empty(len(w), 16, dtype=torch.int8, device=DEVICE)
    rule = triton_check._grid(TensorSpec(scale_dtype=scale_dtype), master)
    assert rule.short
    block = 2**16 if DEVICE.type == "cpu" else 128
    arguments = (w.float().to(DEVICE), scale.float().to(DEVICE), out, len(w), rule, block)
    _beyond_kernel[(triton.cdiv(len(w), block),)](*arguments, enable_fp_fusion=False)
    fits = out.cpu() == 0
    atop = (w / scale).abs() == 7.5  # 7.5 rounds to 8, which is no code: such a weight is suspected
    assert torch.equal(fits[~atop], torch.arange(-8, 8) == expected[~atop, None])
    assert not fits[atop][:, 1:].any()


# What it leaves to others --------------------------------------------------------------------------------------------


def test_what_it_does_not_serve_it_leaves_to_who_reads_back():
    w = torch.randn(64, 128).to(BF16).to(DEVICE)
    packed, scale = (one.to(DEVICE) for one in reference.pack_quantized(w.cpu(), G32))
    check = triton_check.check_packed
    assert check(w, packed, scale, TensorSpec(symmetric=False), "rows") is None
    assert check(w, packed, scale, TensorSpec("fp8_e4m3", "channel", scale_dtype=FP32), "rows") is None
    assert check(w, packed[:, :-1], scale, G32, "rows") is None
    assert check(w, packed, scale.T, G32, "rows") is None
    assert check(w, packed, scale.float(), G32, "rows") is None
    assert check(w, packed.view(FP32), scale, G32, "rows") is None
    assert check(w[:40], packed[:40], scale[:40].T, G32, "marlin") is None
    assert check(w[:0], packed[:0], scale[:0], G32, "rows") is None


# In the stream -------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(monkeypatch) -> Any:
    """Layers that Triton's kernels train and export, none of which was read back before."""
    monkeypatch.setenv("LOCKSTEP_KERNEL", "triton")
    monkeypatch.setattr(checks, "_READ_BACK", set())
    return prepared(TinyMlp(64).to(DEVICE), grouped(32))


def counting(monkeypatch: Any, module: Any, name: str) -> list[str]:
    """The calls of a function from now on."""
    function, calls = getattr(module, name), []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, counted)
    return calls


@pytest.mark.parametrize("format", ["pack-quantized", "marlin"])
def test_one_layer_of_a_kind_is_read_back_and_then_none(model, monkeypatch, format):
    """Reading back costs a hundred times what packing does."""
    before = dict(stream(model, format))
    forwards, checks = (counting(monkeypatch, triton_grid, name) for name in ("fake_quantize", "check_packed"))
    after = dict(stream(model, format))
    assert (len(forwards), len(checks)) == (0, 2)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("format", ["pack-quantized", "marlin"])
def test_a_fault_of_a_later_sync_stops_it_and_names_the_layer(model, monkeypatch, format):
    """Before the engine has the tensor."""
    dict(stream(model, format))
    name = "pack_quantized" if format == "pack-quantized" else "pack_marlin"
    pack = getattr(triton_grid, name)

    def faulty(weight: Tensor, spec: TensorSpec) -> tuple[Tensor, Tensor]:
        packed, scale = pack(weight, spec)
        if weight.shape[0] == 64:
            packed.view(-1)[77] ^= 1
        return packed, scale

    monkeypatch.setattr(triton_grid, name, faulty)
    received = []
    with pytest.raises(ExportError, match=r"^second: the packed words do not give back the weight"):
        received += [name for name, _ in stream(model, format)]
    assert not any(one.startswith("second") for one in received)


@pytest.mark.parametrize("format", ["pack-quantized", "marlin"])
def test_a_layer_leaves_after_its_own_verdict_and_the_next_is_made_while_that_is_waited_for(model, monkeypatch, format):
    """The GPU has work while Python waits, and nobody gets a tensor that may yet be found wrong."""
    dict(stream(model, format))
    name, arriving, happened = "pack_quantized" if format == "pack-quantized" else "pack_marlin", checks.arriving, []
    pack = getattr(triton_grid, name)

    def made(weight: Tensor, spec: TensorSpec) -> tuple[Tensor, Tensor]:
        happened.append(f"made {weight.shape[0]}")
        return pack(weight, spec)

    def launched(values: Tensor) -> Callable[[], list[Any]]:
        read = arriving(values)
        return lambda: happened.append("verdict") or read()

    monkeypatch.setattr(triton_grid, name, made)
    monkeypatch.setattr(checks, "arriving", launched)
    for stored, _ in stream(model, format):
        happened.append(stored.rpartition(".")[0])
    assert [what for what, _ in groupby(happened)] == [
        *("made 128", "", "verdict", "first"),  # "": buffers, of which none is checked
        *("made 64", "verdict", "norm"),
        *("verdict", "second"),
    ]


def test_a_forward_that_multiplies_with_something_else_stops_the_first_sync(model, monkeypatch):
    """The quick check knows the grid, not the forward's kernel: the first layer of a kind is compared with that."""
    forward = triton_grid.fake_quantize
    monkeypatch.setattr(triton_grid, "fake_quantize", lambda *args: forward(*args).neg())
    with pytest.raises(ExportError, match=r"^first: the packed words do not give back the weight"):
        dict(stream(model))


def test_a_suspicion_that_reading_back_does_not_share_is_no_error(model):
    """Where a scale is the smallest number there is, a code may leave much of its weight, and be right."""
    dict(stream(model))
    with torch.no_grad():
        model.first.weight[3, :32] = 0.0
        model.first.weight[3, 5] = 10 * 2.0**-133
    on_cpu = model.first.weight.detach().cpu()
    assert found(on_cpu, *reference.pack_quantized(on_cpu, G32), G32, "rows")
    words_of, scale = (dict(stream(model))[f"first.weight_{what}"] for what in ("packed", "scale"))
    read = grid.dequantize(Quantized(words.unpack(words_of, 4), scale), G32).cpu()
    assert torch.equal(bits(read), bits(grid.fake_quantize(on_cpu, G32)))


def test_a_weight_that_broke_in_training_is_named_after_the_first_sync_too(model):
    dict(stream(model))
    with torch.no_grad():
        model.second.weight[3, 5] = torch.nan
    with pytest.raises(ExportError, match=r"^second\.weight: 1 of 8192 values are NaN or infinite in bfloat16"):
        dict(stream(model))
