"""The layouts: codes to packed words and back, against each format's own packer or its published index formulas."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8, unpack_fp4_from_uint8
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lockstep import Scheme, TensorSpec, grid
from lockstep.export import formats, gptq, pack_quantized
from lockstep.layouts import fp4, marlin, words

BITS = pytest.mark.parametrize("bits", [4, 8])
CHANNEL = TensorSpec(strategy="channel")
ASYMMETRIC = TensorSpec(symmetric=False)
INT8 = TensorSpec("int8")


def random_codes(n: int, k: int, bits: int = 4, seed: int = 0) -> Tensor:
    """Every code of the width, extremes included."""
    half = 1 << (bits - 1)
    return torch.randint(-half, half, (n, k), dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


def random_quantized(n: int, k: int, spec: TensorSpec, seed: int = 0) -> grid.Quantized:
    return grid.quantize(torch.randn(n, k, generator=torch.Generator().manual_seed(seed)), spec)


def unsigned(value: int) -> int:
    """The bits of an int32 word as a number from 0 on."""
    return value & 0xFFFFFFFF


seeds = st.integers(0, 2**32)
small = st.integers(1, 5)


# Words -------------------------------------------------------------------------------------------------------------


@given(n=small, per_row=small, bits=st.sampled_from([4, 8]), seed=seeds)
def test_words_are_those_of_compressed_tensors(n, per_row, bits, seed):
    """vLLM, SGLang and transformers unpack them by this layout."""
    codes = random_codes(n, per_row * 32 // bits, bits, seed)
    packed = words.pack(codes, bits)
    assert torch.equal(packed, pack_to_int32(codes, bits))
    assert torch.equal(words.unpack(packed, bits), codes)
    assert torch.equal(unpack_from_int32(packed, bits, codes.shape), codes)


@BITS
def test_words_of_views_are_those_of_their_values(bits):
    """Transposed or sliced codes must not be packed in the order of their memory."""
    codes = random_codes(16, 16, bits)
    assert torch.equal(words.pack(codes.T, bits), words.pack(codes.T.contiguous(), bits))
    assert torch.equal(
        words.unpack(words.pack(codes, bits).T, bits), words.unpack(words.pack(codes, bits).T.clone(), bits)
    )


@BITS
def test_words_of_a_stack_of_experts_are_those_of_each(bits):
    stack = torch.stack([random_codes(3, 16, bits, seed) for seed in range(4)])
    assert torch.equal(words.pack(stack, bits), torch.stack([words.pack(codes, bits) for codes in stack]))
    assert torch.equal(words.unpack(words.pack(stack, bits), bits), stack)


# One vector through every format -----------------------------------------------------------------------------------


def test_known_words_of_every_format():
    """Fields u[k, n] = (5k + 3n) mod 16 of a 16 x 64 tile; Marlin's words are those of its reference packer."""
    k, n = torch.meshgrid(torch.arange(16), torch.arange(64), indexing="ij")
    codes = ((5 * k + 3 * n) % 16 - 8).to(torch.int8).T
    tile = [unsigned(word) for word in marlin.pack_weight(codes)[0].tolist()]
    assert tile[:8] == [0x5DD50880] * 4 + [0xF77FA22A] * 4
    assert (tile[127], sum(tile) % 2**32) == (0x80083BB3, 0xBC3C4380)
    packed = words.pack(codes, 4)
    assert [unsigned(word) for word in packed[0].tolist()] == [0x3E94FA50, 0xB61C72D8]


# Round trips -------------------------------------------------------------------------------------------------------

integers = st.sampled_from([TensorSpec(group_size=32), TensorSpec(group_size=64), TensorSpec(), CHANNEL])
integers |= st.sampled_from([ASYMMETRIC, TensorSpec(group_size=32, symmetric=False), INT8])


@pytest.mark.parametrize("name", formats.PACKED)
@given(n=st.sampled_from([64, 128, 192, 320]), k=st.sampled_from([128, 256, 640]), spec=integers, seed=seeds)
def test_packed_integers_come_back_as_they_were_written(name, n, k, spec, seed):
    """The bits that train are the bits that ship."""
    layout = formats.find(name)
    quantized = random_quantized(n, k, spec, seed)
    assert layout.problem(n, k, Scheme(spec)) is None
    tensors = layout.write(quantized, spec)
    assert tuple(tensors) == layout.tensors(spec)
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    for found, expected in zip(layout.read(tensors, spec), quantized, strict=True):
        assert found is expected is None or (torch.equal(found, expected) and found.dtype == expected.dtype)


@BITS
@given(n=st.integers(1, 4), k=st.integers(1, 6), seed=seeds)
def test_marlin_words_give_back_the_codes(bits, n, k, seed):
    codes = random_codes(64 * n, 16 * k, bits, seed)
    packed = marlin.pack_weight(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (k, 64 * n * bits // 2)
    assert torch.equal(marlin.unpack_weight(packed, bits), codes)


@given(n=st.integers(1, 4), groups=st.integers(1, 5), seed=seeds)
def test_marlin_scales_come_back(n, groups, seed):
    scale = torch.randn(64 * n, groups, generator=torch.Generator().manual_seed(seed)).bfloat16()
    assert torch.equal(marlin.unpack_scales(marlin.pack_scales(scale)), scale)


@BITS
@given(n=st.integers(1, 4), groups=st.integers(1, 5), seed=seeds)
def test_marlin_zero_points_come_back(bits, n, groups, seed):
    zeros = random_codes(64 * n, groups, bits, seed)
    packed = marlin.pack_zero_points(zeros, bits)
    assert (packed.dtype, tuple(packed.shape)) == (torch.int32, (groups, 2 * n * bits))
    assert torch.equal(marlin.unpack_zero_points(packed, bits), zeros)


@given(n=small, k=small, seed=seeds)
def test_fp4_codes_come_back_and_are_stored_as_compressed_tensors_stores_them(n, k, seed):
    """Every value, -0 among them."""
    values = torch.tensor([*fp4.MAGNITUDES, *(-magnitude for magnitude in fp4.MAGNITUDES)])
    places = torch.randint(16, (n, 2 * k), generator=torch.Generator().manual_seed(seed))
    codes = values[places].to(torch.float8_e4m3fn)
    packed = fp4.pack(codes)
    assert torch.equal(packed, pack_fp4_to_uint8(values[places].bfloat16()))
    assert torch.equal(fp4.unpack(packed).view(torch.int8), codes.view(torch.int8))
    assert torch.equal(fp4.unpack(packed).bfloat16(), unpack_fp4_from_uint8(packed, n, 2 * k))


@pytest.mark.parametrize("codes", [[0.5, 5.0], [float("nan"), 0.0], [1.0, 2.0, 3.0]], ids=str)
def test_what_is_no_fp4_code_is_not_packed(codes):
    """The nearest nibble would be another weight."""
    with pytest.raises(ValueError, match="do not fill bytes, or hold what is no E2M1 value"):
        fp4.pack(torch.tensor([codes]).to(torch.float8_e4m3fn))


def test_fp4_words_of_another_dtype_are_refused():
    with pytest.raises(ValueError, match=r"packed FP4 codes are torch\.uint8, found torch\.int32"):
        fp4.unpack(torch.zeros(2, 2, dtype=torch.int32))


def test_unknown_format_lists_those_there_are():
    with pytest.raises(
        ValueError, match="no export format 'ggml': there are pack-quantized, int-quantized, float-quantized"
    ):
        formats.find("ggml")


# pack-quantized ----------------------------------------------------------------------------------------------------


def test_pack_quantized_tensors_are_what_engines_load():
    spec = TensorSpec(group_size=32)
    quantized = random_quantized(24, 96, spec)
    tensors = pack_quantized.write(quantized, spec)
    assert torch.equal(tensors["weight_packed"], pack_to_int32(quantized.codes, 4))
    assert torch.equal(tensors["weight_scale"], quantized.scale)
    assert tensors["weight_shape"].tolist() == [24, 96]
    assert tensors["weight_shape"].dtype == torch.int64


@pytest.mark.parametrize("spec", [ASYMMETRIC, INT8], ids=str)
def test_zero_points_and_eight_bits_are_packed_as_compressed_tensors_packs_them(spec):
    quantized = random_quantized(32, 256, spec)
    tensors = pack_quantized.write(quantized, spec)
    assert torch.equal(tensors["weight_packed"], pack_to_int32(quantized.codes, spec.bits))
    assert tensors["weight_shape"].tolist() == [32, 256]
    assert ("weight_zero_point" in tensors) is not spec.symmetric
    if not spec.symmetric:
        packed = pack_to_int32(quantized.zero_point, 4, packed_dim=0)
        assert torch.equal(tensors["weight_zero_point"], packed)


# GPTQ --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("spec", "groups"), [(TensorSpec(group_size=32), 3), (CHANNEL, 1)], ids=str)
def test_gptq_tensors_are_what_engines_load(spec, groups):
    """v1, as AutoGPTQ wrote it: transposed, zero points minus one along the outputs, inputs in their order."""
    quantized = random_quantized(24, 96, spec)
    tensors = gptq.write(quantized, spec)
    assert torch.equal(tensors["qweight"], pack_to_int32(quantized.codes.T, 4, packed_dim=0))
    assert torch.equal(tensors["qweight"], pack_quantized.write(quantized, spec)["weight_packed"].T)
    assert tensors["qzeros"].shape == (groups, 3)
    assert (tensors["qzeros"] == 0x77777777).all()
    assert torch.equal(tensors["scales"], quantized.scale.T)
    assert tensors["g_idx"].dtype == torch.int32
    assert tensors["g_idx"].tolist() == [k // (96 // groups) for k in range(96)]


def test_gptq_zero_points_are_stored_minus_one():
    """Readers of version 1 add 1 to each field: ``W = (u - (stored + 1)) * scale``, u and stored from 0 on."""
    quantized = random_quantized(32, 256, ASYMMETRIC)
    tensors = gptq.write(quantized, ASYMMETRIC)
    place = torch.arange(8) * 4
    stored = (tensors["qzeros"].unsqueeze(-1) >> place & 0xF).flatten(-2)  # [G, N]
    u = (tensors["qweight"].unsqueeze(1) >> place[:, None] & 0xF).flatten(0, 1)  # [K, N]
    groups = tensors["g_idx"].long()
    weight = ((u - (stored + 1)[groups]) * tensors["scales"].float()[groups]).T
    assert torch.equal(weight.bfloat16(), grid.dequantize(quantized, ASYMMETRIC))


def test_gptq_refuses_a_zero_point_that_it_cannot_say():
    """Minus one it is 15 in four bits, and readers make 16 or 0 of it."""
    with pytest.raises(ValueError, match=r"32 groups have no negative weight.*store it as pack-quantized"):
        gptq.write(grid.quantize(torch.rand(32, 128), ASYMMETRIC), ASYMMETRIC)


def test_gptq_of_eight_bits_has_zeros_of_127():
    tensors = gptq.write(random_quantized(32, 256, INT8), INT8)
    assert (tensors["qzeros"] == 0x7F7F7F7F).all()
    assert tensors["qweight"].shape == (64, 32)


@pytest.mark.parametrize(
    ("name", "tamper", "message"),
    [
        ("qzeros", lambda zeros: zeros + 0x11111111, "qzeros are not those of a symmetric GPTQ v1 grid"),
        ("qzeros", lambda zeros: zeros ^ torch.tensor([[1, 0, 0]]), "qzeros are not those"),
        ("g_idx", lambda index: index.flip(0), "g_idx is not k // 32: the inputs are in another order"),
    ],
    ids=["v2-zeros", "one-zero", "act-order"],
)
def test_gptq_of_another_grid_is_refused(name: str, tamper: Callable[[Tensor], Tensor], message: str):
    """Read as ours it would be other weights: off by one step, or in other columns."""
    spec = TensorSpec(group_size=32)
    tensors = gptq.write(random_quantized(24, 96, spec), spec)
    tensors[name] = tamper(tensors[name]).to(torch.int32)
    with pytest.raises(ValueError, match=message):
        gptq.read(tensors, spec)


# Marlin ------------------------------------------------------------------------------------------------------------


def marlin_place(k: int, n: int, bits: int) -> tuple[int, int, int]:
    """Row, column and field of weight (k, n), after IST-DASLab/marlin (``_get_perms``) and vLLM's ``get_weight_perm``.

    Of a 16 x 64 tile, thread (``a``, ``e``) holds what ``mma.m16n8k16`` wants, for each of four column blocks ``w``.
    """
    row, in_k, tile, in_n = k // 16, k % 16, n // 64, n % 64
    w, h, e = in_n // 16, in_n % 16 // 8, in_n % 8
    a, p, d = in_k % 8 // 2, in_k % 2, in_k // 8
    thread = 4 * e + a
    if bits == 4:
        return row, 128 * tile + 4 * thread + w, [0, 2, 4, 6, 1, 3, 5, 7].index(4 * h + 2 * d + p)
    return row, 256 * tile + 8 * thread + 2 * w + h, [0, 2, 1, 3].index(2 * d + p)


@BITS
def test_marlin_words_are_in_the_order_of_the_kernel(bits):
    """The kernel reads words by address: a permutation of them is another layer."""
    n, k = 128, 32
    codes = random_codes(n, k, bits)
    expected = [[0] * (n * bits // 2) for _ in range(k // 16)]
    for in_feature in range(k):
        for out_feature in range(n):
            row, column, field = marlin_place(in_feature, out_feature, bits)
            expected[row][column] |= (int(codes[out_feature, in_feature]) + (1 << bits - 1)) << bits * field
    assert [[unsigned(word) for word in row] for row in marlin.pack_weight(codes, bits).tolist()] == expected


@pytest.mark.parametrize("groups", [1, 2, 5])
def test_marlin_scales_are_in_the_order_of_the_kernel(groups):
    """One scale a channel is applied to the accumulators, several to the weights: other threads, other order."""
    n = 128
    scale = torch.arange(n * groups).view(n, groups)
    packed = marlin.pack_scales(scale)
    assert packed.shape == (groups, n)
    for group, row in enumerate(packed.tolist()):
        for place, value in enumerate(row):
            if groups == 1:
                i, m = place % 32 // 8, place % 8
                source = 32 * (place // 32) + 2 * i + 8 * (m // 2) + m % 2
            else:
                i, j = place % 64 // 8, place % 8
                source = 64 * (place // 64) + i + 8 * j
            assert value == scale[source, group]


@BITS
def test_marlin_zero_points_are_in_the_order_of_the_kernel(bits):
    """After ``marlin_zero_points`` of vLLM: scales' order within 64 outputs, then interleaved within a word."""
    n, groups, fields = 128, 3, 32 // bits
    zeros = random_codes(n, groups, bits)
    interleaved = [0, 2, 4, 6, 1, 3, 5, 7] if bits == 4 else [0, 2, 1, 3]
    for group, row in enumerate(marlin.pack_zero_points(zeros, bits).tolist()):
        for word, value in enumerate(row):
            for field in range(fields):
                place = word * fields + interleaved[field]
                source = 64 * (place // 64) + place % 64 // 8 + 8 * (place % 8)
                stored = unsigned(value) >> bits * field & ((1 << bits) - 1)
                assert stored == int(zeros[source, group]) + (1 << bits - 1)


# Refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "k"), [(64, 128), (128, 64)])
def test_marlin_takes_its_smallest_tiles_in_16_bits_alone(n, k):
    assert marlin.problem(n, k, CHANNEL) is None
    assert "served in float32" in marlin.problem(n, k, TensorSpec(strategy="channel", served_dtype=torch.float32))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: marlin.pack_weight(random_codes(32, 16)),
            r"N=32, K=16: Marlin tiles need N % 64 == 0 and K % 16 == 0",
        ),
        (lambda: marlin.pack_weight(random_codes(64, 24)), "N=64, K=24"),
        (lambda: marlin.pack_weight(random_codes(64, 16), bits=2), "packs 4 or 8 bits, not 2"),
        (lambda: marlin.unpack_weight(torch.zeros(1, 100, dtype=torch.int32)), "N=50, K=16"),
        (lambda: marlin.pack_scales(torch.ones(48, 2)), "N=48"),
        (lambda: marlin.unpack_scales(torch.ones(2, 48)), "N=48"),
    ],
    ids=["narrow", "short", "two-bits", "cut-words", "cut-scales-in", "cut-scales-out"],
)
def test_marlin_functions_refuse_what_has_no_tile(call, message):
    """A reshape that happened to work would scramble the layer."""
    with pytest.raises(ValueError, match=message):
        call()
