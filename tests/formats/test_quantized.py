"""Codes and scales as numbers: the same as transformers' and compressed-tensors', and the same bytes back."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from formats.errors import UserError
from formats.quantized.fp8 import Fp8
from formats.quantized.int4 import PackedInt4
from formats.quantized.mxfp4 import Mxfp4
from formats.quantized.reader import DequantizedReader
from formats.quantized.scheme import BF16, QuantizedWeight, bits
from formats.spec import TensorSpec

E4M3, E5M2, E8M0 = (np.dtype(getattr(ml_dtypes, f"float8_{name}")) for name in ("e4m3fn", "e5m2", "e8m0fnu"))


class InMemory:
    """A reader of arrays."""

    def __init__(self, **arrays):
        self.arrays = arrays
        self.specs = {name: TensorSpec(name, array.shape, array.dtype) for name, array in arrays.items()}
        self.read_bytes = 0

    def read(self, name, region, out):
        out[...] = self.arrays[name][region]
        self.read_bytes = max(self.read_bytes, out.nbytes)

    def close(self):
        pass


def full(shape):
    return tuple(slice(0, size) for size in shape)


def decoded(scheme, codes, parameters, shape, dtype=BF16):
    out = np.empty(shape, dtype)
    scheme.decode(codes, parameters, full(shape), out)
    return out


def encoded(scheme, values, parameters, like):
    out = np.empty_like(like)
    scheme.encode(values, parameters, full(values.shape), out)
    return out


def random(shape, dtype=E4M3, *, seed=0):
    """Return every code, NaN among them."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8).view(dtype)


def as_torch(array):
    """Return an array as a tensor of torch's dtype of the same name."""
    plain = array.view(f"u{array.dtype.itemsize}")
    return torch.from_numpy(plain.copy()).view(getattr(torch, str(array.dtype)))


def same(ours, theirs):
    """Have they the same bits, but for those of NaN, whose sign torch drops?"""
    theirs = theirs.view(torch.uint16).numpy().view(BF16)
    nan = np.isnan(ours)
    return np.array_equal(nan, np.isnan(theirs)) and np.array_equal(bits(ours)[~nan], bits(theirs)[~nan])


GRIDS = {
    "ragged blocks": ((576, 300), (128, 128), (5, 3)),
    "experts": ((4, 256, 200), (128, 128), (4, 2, 2)),
    "narrow blocks": ((70, 96), (1, 32), (70, 3)),
    "the whole tensor": ((300, 40), (300, 40), ()),
    "each row": ((300, 2000), (1, 2000), (300, 1)),
    "each row, short": ((30, 20), (1, 20), (30,)),
}


def scales_of(shape, kind):
    g = np.random.default_rng(1)
    if kind == "ue8m0":
        return g.integers(100, 130, shape, dtype=np.uint8)
    return np.asarray(g.random(shape) * 1e-2 + 1e-6).astype(kind)


def spread(scales, shape, block):
    """Return the scale of each weight, by repetition."""
    grid = (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
    return scales.reshape(grid).repeat(block[0], -2)[..., : shape[-2], :].repeat(block[1], -1)[..., : shape[-1]]


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("kind", ["float32", BF16, "ue8m0", E8M0])
@pytest.mark.parametrize("name", GRIDS)
def test_fp8_is_the_product_in_fp32_rounded_once_and_its_bytes_come_back(name, kind, dtype):
    shape, block, grid = GRIDS[name]
    codes = random(shape, dtype)
    scales = scales_of(grid, "ue8m0" if kind == E8M0 else kind)
    scales = scales.view(E8M0) if kind == E8M0 else scales
    scheme = Fp8("", dtype, block, grid)
    ours = decoded(scheme, codes, [scales], shape)
    numbers = scales.view(E8M0) if scales.dtype == np.uint8 else scales
    theirs = (as_torch(codes).float() * torch.from_numpy(spread(numbers.astype("float32"), shape, block))).bfloat16()
    assert same(ours, theirs)
    back = encoded(scheme, ours, [scales], codes)
    kept = ~np.isnan(codes.astype("float32")) if dtype == E5M2 else np.ones(shape, bool)  # e5m2 has several NaN
    assert np.array_equal(back.view("uint8")[kept], codes.view("uint8")[kept])


def test_blocks_are_what_transformers_dequantizes():
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    codes, scales = random((256, 384)), scales_of((2, 3), "float32")
    theirs = Fp8Dequantize(None)._dequantize_one(as_torch(codes), torch.from_numpy(scales), torch.bfloat16)
    assert same(decoded(Fp8("", E4M3, (128, 128), (2, 3)), codes, [scales], (256, 384)), theirs)


def test_every_code_comes_back_under_any_scale_of_a_published_size():
    codes = np.tile(np.arange(256, dtype=np.uint8).view(E4M3), (2000, 8))
    scales = np.exp(np.random.default_rng(0).uniform(-14, 4, (2000, 1))).astype("float32")
    scheme = Fp8("", E4M3, (1, 2048), (2000, 1))
    back = encoded(scheme, decoded(scheme, codes, [scales], codes.shape), [scales], codes)
    assert np.array_equal(back.view("uint8"), codes.view("uint8"))


def test_a_scale_of_zero_gives_zeros_whose_codes_do_not_come_back():
    codes, scales = random((128, 128)), np.zeros((1, 1), "float32")
    scheme = Fp8("", E4M3, (128, 128), (1, 1))
    values = decoded(scheme, codes, [scales], codes.shape)
    nan = np.isnan(codes.astype("float32"))
    assert (values[~nan] == 0).all()
    assert np.isnan(values[nan]).all()
    assert not np.array_equal(encoded(scheme, values, [scales], codes).view("uint8"), codes.view("uint8"))


def test_mxfp4_is_what_transformers_dequantizes_under_every_scale_and_its_bytes_come_back():
    from transformers.integrations.mxfp4 import _convert_moe_packed_tensors

    codes = np.tile(np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16), (2, 253, 1, 1))
    scales = np.tile(np.arange(253, dtype=np.uint8)[None, :, None], (2, 1, 16))  # from 253 on, 6 × scale is infinite
    ours = decoded(Mxfp4(), codes, [scales], (2, 512, 253))
    assert same(ours, _convert_moe_packed_tensors(torch.from_numpy(codes), torch.from_numpy(scales)))
    assert np.array_equal(encoded(Mxfp4(), ours, [scales], codes), codes)


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("scale_dtype", [BF16, np.dtype("float32"), np.dtype("float16")])
def test_packed_int4_is_code_times_scale_and_its_bytes_come_back(zero_points, scale_dtype):
    g = np.random.default_rng(0)
    shape, group = (20, 96), 32
    codes, points = g.integers(0, 16, shape), g.integers(0, 16, (24, 3))
    scales = (g.random((20, 3)) * 1e-2 + 1e-4).astype(scale_dtype)
    scheme = PackedInt4(shape, group, zero_points)
    parameters = [scales, *([packed(points.T).T] if zero_points else [])]
    dtype = scale_dtype if scale_dtype == np.float16 else BF16
    ours = decoded(scheme, packed(codes), parameters, shape, dtype)
    zeros = points[:20].repeat(32, 1) if zero_points else 8
    products = (codes - zeros).astype("float32") * scales.astype("float32").repeat(32, 1)
    assert np.array_equal(bits(ours), bits(products.astype(dtype)))
    assert np.array_equal(encoded(scheme, ours, parameters, packed(codes)), packed(codes))


def packed(codes):
    """Return 4-bit codes in int32 words, eight along the last axis."""
    rows, columns = codes.shape
    shifts = np.arange(0, 32, 4, dtype="uint32")
    return np.bitwise_or.reduce(codes.reshape(rows, columns // 8, 8).astype("uint32") << shifts, axis=-1).view("int32")


def weight(name, scheme, reader, dtype=BF16, shape=None):
    codes = reader.specs["codes"]
    parameters = tuple(spec for spec in reader.specs.values() if spec.name in ("scales", "zeros"))
    return QuantizedWeight(TensorSpec(name, shape or codes.shape, dtype), codes, parameters, scheme, reader.specs.get("shape"))


def readers():
    g = np.random.default_rng(0)
    fp8 = InMemory(codes=random((300, 260)), scales=scales_of((3, 3), "float32"))
    mxfp4 = InMemory(
        codes=g.integers(0, 256, (3, 20, 4, 16), dtype=np.uint8), scales=g.integers(110, 130, (3, 20, 4), dtype=np.uint8)
    )
    int4 = InMemory(
        codes=packed(g.integers(0, 16, (20, 96))),
        scales=scales_of((20, 3), BF16),
        zeros=packed(g.integers(0, 16, (24, 3)).T).T.copy(),
        shape=np.array([20, 96]),
    )
    yield "fp8", fp8, Fp8("", E4M3, (128, 128), (3, 3)), (300, 260)
    yield "mxfp4", mxfp4, Mxfp4(), (3, 128, 20)
    yield "int4", int4, PackedInt4((20, 96), 32, zero_points=True), (20, 96)


@pytest.mark.parametrize("kind", list(readers()), ids=lambda kind: kind[0])
def test_any_region_is_that_of_the_whole_tensor(kind, monkeypatch):
    _, raw, scheme, shape = kind
    reader = DequantizedReader(raw, {"w": weight("w", scheme, raw, shape=shape)})
    whole = np.empty(shape, BF16)
    reader.read("w", full(shape), whole)
    monkeypatch.setattr("formats.quantized.reader.BAND", 512)
    g = np.random.default_rng(2)
    for _ in range(60):
        region = tuple(slice(*sorted(g.choice(size + 1, 2, replace=False).tolist())) for size in shape)
        out = np.empty([part.stop - part.start for part in region], BF16)
        reader.read("w", region, out)
        assert np.array_equal(bits(out), bits(whole[region]))


def test_reading_a_whole_weight_takes_a_band_of_codes_at_a_time(monkeypatch):
    monkeypatch.setattr("formats.quantized.reader.BAND", 512)
    raw = InMemory(codes=random((300, 260)), scales=scales_of((3, 3), "float32"))
    reader = DequantizedReader(raw, {"w": weight("w", Fp8("", E4M3, (128, 128), (3, 3)), raw)})
    reader.read("w", full((300, 260)), np.empty((300, 260), BF16))
    assert raw.read_bytes <= 520


def test_plain_tensors_stay_and_scales_are_hidden_in_the_order_of_the_source():
    raw = InMemory(norm=np.ones(3, BF16), codes=random((128, 128)), scales=scales_of((1, 1), "float32"), head=np.ones(2, BF16))
    reader = DequantizedReader(raw, {"w": weight("w", Fp8("", E4M3, (128, 128), (1, 1)), raw)})
    assert list(reader.specs) == ["norm", "w", "head"]
    assert list(reader.side_tensors) == ["scales"]
    out = np.empty(3, BF16)
    reader.read("norm", full((3,)), out)
    assert (out == 1).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_scale_that_is_not_finite_is_named(value):
    raw = InMemory(codes=random((300, 260)), scales=np.array([[1, 1, 1], [1, value, 1], [1, 1, 1]], "float32"))
    reader = DequantizedReader(raw, {"w": weight("w", Fp8("", E4M3, (128, 128), (3, 3)), raw)})
    reader.read("w", (slice(0, 128), slice(0, 260)), np.empty((128, 260), BF16))
    with pytest.raises(UserError, match=r"^`scales` holds scales that are not finite\n\nhint: "):
        reader.read("w", (slice(0, 129), slice(0, 260)), np.empty((129, 260), BF16))


def test_the_nan_of_ue8m0_is_not_finite():
    raw = InMemory(codes=np.zeros((1, 1, 1, 16), np.uint8), scales=np.full((1, 1, 1), 255, np.uint8))
    reader = DequantizedReader(raw, {"w": weight("w", Mxfp4(), raw, shape=(1, 32, 1))})
    with pytest.raises(UserError, match=r"^`scales` holds scales that are not finite"):
        reader.read("w", full((1, 32, 1)), np.empty((1, 32, 1), BF16))


def test_a_number_that_bf16_cannot_hold_is_refused_and_smaller_ones_under_the_same_scale_are_not():
    raw = InMemory(codes=np.full((1, 1, 1, 16), 0x22, np.uint8), scales=np.full((1, 1, 1), 253, np.uint8))
    reader = DequantizedReader(raw, {"w": weight("w", Mxfp4(), raw, shape=(1, 32, 1))})
    out = np.empty((1, 32, 1), BF16)
    reader.read("w", full(out.shape), out)
    assert (out == BF16.type(2.0**126)).all()
    raw.arrays["codes"][...] = 0x77
    with pytest.raises(UserError, match=r"^`codes` with `scales` has numbers up to `5.10424e.38`, which bf16 cannot hold"):
        reader.read("w", full(out.shape), out)


def test_a_stored_shape_that_is_not_the_weight_s_is_refused():
    _, raw, scheme, shape = list(readers())[2]
    raw.arrays["shape"] = np.array([20, 95])
    reader = DequantizedReader(raw, {"w": weight("w", scheme, raw, shape=shape)})
    with pytest.raises(UserError, match=r"^`shape` holds \[20, 95\], but codes and scales are of a weight of \[20, 96\]"):
        reader.read("w", full(shape), np.empty(shape, BF16))
