"""Codes come back from the numbers that they mean and the scales that they came with: all codes, under many scales."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from formats.errors import UserError
from formats.quantized.encoded import ChangedError, EncodedReader, comes_back, stored_name
from formats.quantized.fp8 import Fp8
from formats.quantized.int4 import PackedInt4
from formats.quantized.mxfp4 import Mxfp4
from formats.quantized.reader import DequantizedReader
from formats.quantized.scheme import BF16, QuantizedWeight
from formats.spec import RenamedReader, TensorSpec

E4M3, E5M2 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2)
DRAWN = np.random.default_rng(0)


class Arrays:
    """Tensors in memory."""

    def __init__(self, arrays):
        self.arrays = arrays
        self.specs = {name: TensorSpec(name, array.shape, array.dtype) for name, array in arrays.items()}

    def read(self, name, region, out):
        out[...] = self.arrays[name][region]

    def close(self):
        pass


def quantized(codes, scales, scheme, *, shape=None, zeros=None, dtype=BF16):
    arrays = {"codes": codes, "scales": scales, **({} if zeros is None else {"zeros": zeros})}
    raw = Arrays(arrays)
    spec = TensorSpec("weight", shape or codes.shape, np.dtype(dtype))
    return raw, QuantizedWeight(spec, raw.specs["codes"], tuple(raw.specs[name] for name in list(arrays)[1:]), scheme)


def numbers(raw, weight):
    out = np.empty(weight.spec.shape, weight.spec.dtype)
    DequantizedReader(raw, {"weight": weight}).read("weight", weight.spec.full_region, out)
    return out


def again(raw, weight, plain=None, kept=False):
    names = {spec.name: spec.name for spec in weight.side_tensors} | ({stored_name(weight): "codes"} if kept else {})
    reader = EncodedReader(
        Arrays({"weight": numbers(raw, weight) if plain is None else plain}), RenamedReader(raw, names), [weight]
    )
    out = np.empty(weight.codes.shape, weight.codes.dtype)
    reader.read("codes", weight.codes.full_region, out)
    return out


def same(first, second):
    return first.tobytes() == second.tobytes()


def scales(*shape):
    """Numbers of both signs and of many sizes, some of them powers of two."""
    sizes = np.exp2(DRAWN.uniform(-40, 40, shape))
    sizes = np.where(DRAWN.random(shape) < 0.2, np.exp2(np.rint(np.log2(sizes))), sizes)
    return (sizes * np.where(DRAWN.random(shape) < 0.2, -1, 1)).astype(np.float32)


def all_codes(rows, columns, *, groups=1):
    """Every byte, in some order, in each row or group of rows of 256 codes at least."""
    each = [DRAWN.permutation(np.resize(np.arange(256), rows // groups * columns)) for _ in range(groups)]
    return np.concatenate(each).reshape(rows, columns).astype(np.uint8)


def fp8(rows, columns, block, grid, *, dtype=E4M3, plain=BF16, without=()):
    codes = all_codes(rows, columns, groups=max(1, rows // 128))
    codes = np.where(np.isin(codes, list(without)), 0, codes)
    scale = scales(*grid)
    if plain != BF16:
        scale = (np.sign(scale) * (1e-4 + np.abs(scale) % 0.1)).astype(plain)
    return quantized(codes.view(dtype), scale, Fp8("FP8", dtype, block, grid), dtype=plain)


def ue8m0():
    """Every code under powers of 2, stored as exponents."""
    scale = np.arange(10, 245, dtype=np.uint8)[:, None]
    return quantized(all_codes(235, 256, groups=235).view(E4M3), scale, Fp8("FP8", E4M3, (1, 256), (235, 1)))


def mxfp4(exponents):
    """Each byte under each scale: a row for each."""
    blocks = np.stack([DRAWN.permutation(256) for _ in exponents]).astype(np.uint8).reshape(1, -1, 16, 16)
    spread = np.repeat(exponents[None, :, None], 16, axis=-1).astype(np.uint8)
    return quantized(blocks, spread, Mxfp4(), shape=(1, 16 * 32, len(exponents)))


def int4(rows, columns, group, dtype, *, points=False, tail=0):
    words = -(-columns // 8)
    codes = DRAWN.integers(0, 256, (rows, words, 4), dtype=np.uint8).view(np.int32)[..., 0]
    if columns % 8:
        codes[:, -1] &= (1 << 4 * (columns % 8)) - 1
        codes[:, -1] |= np.int32(tail << 28 if tail < 8 else -1 << 28)
    groups = columns // group
    scale = (np.abs(scales(rows, groups)) % 0.1 + 1e-3).astype(dtype) * np.where(DRAWN.random((rows, groups)) < 0.1, -1, 1)
    zeros = DRAWN.integers(0, 256, (-(-rows // 8), groups, 4), dtype=np.uint8).view(np.int32)[..., 0] if points else None
    scheme = PackedInt4((rows, columns), group, points)
    plain = np.float16 if dtype == np.float16 else BF16
    return quantized(codes, scale.astype(dtype), scheme, shape=(rows, columns), zeros=zeros, dtype=plain)


MADE = {
    "blocks": lambda: fp8(128 * 40, 256, (128, 128), (40, 2)),
    "ragged blocks": lambda: fp8(300, 400, (128, 128), (3, 4)),
    "small blocks": lambda: fp8(256, 64, (16, 16), (16, 4)),
    "long rows": lambda: fp8(384, 2048, (1, 2048), (384, 1)),
    "short rows": lambda: fp8(3840, 256, (1, 256), (3840, 1)),
    "a vector of rows": lambda: fp8(384, 256, (1, 256), (384,)),
    "one scale": lambda: fp8(128, 256, (128, 256), ()),
    "ue8m0": ue8m0,
    "fp16": lambda: fp8(256, 256, (128, 128), (2, 2), plain=np.dtype(np.float16)),
    "mxfp4": lambda: mxfp4(np.arange(0, 252)),
    "int4": lambda: int4(512, 256, 32, BF16),
    "int4 in fp16": lambda: int4(512, 256, 64, np.float16),
    "int4 in fp32": lambda: int4(512, 256, 128, np.float32),
    "int4 with zero points": lambda: int4(500, 256, 32, BF16, points=True),
    "int4 with part of a word": lambda: int4(64, 36, 36, BF16),
}


@pytest.mark.parametrize("name", MADE)
def test_every_code_comes_back(name):
    raw, weight = MADE[name]()
    assert comes_back(weight, raw)
    assert same(again(raw, weight), raw.arrays["codes"])


def test_the_codes_of_e5m2_come_back_but_for_those_that_are_no_number():
    raw, weight = fp8(256, 256, (128, 128), (2, 2), dtype=E5M2, without=range(0x7C, 0x80))
    codes = raw.arrays["codes"].view(np.uint8)
    codes[codes >= 0xFC] = 0
    assert comes_back(weight, raw)
    assert same(again(raw, weight), raw.arrays["codes"])
    codes[3, 3] = 0x7E
    assert not comes_back(weight, raw)
    assert same(again(raw, weight, kept=True), raw.arrays["codes"])


def zero_scale(raw):
    raw.arrays["scales"].reshape(-1)[0] = 0


def tiny_scale(raw):
    raw.arrays["scales"].reshape(-1)[0] = 1e-38


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("blocks", zero_scale), ("blocks", tiny_scale), ("short rows", zero_scale), ("one scale", tiny_scale),
        ("one scale", zero_scale), ("a vector of rows", zero_scale), ("ue8m0", zero_scale), ("fp16", zero_scale),
        ("int4", zero_scale), ("int4 in fp16", zero_scale), ("int4 with zero points", zero_scale),
    ],
)  # fmt: skip
def test_codes_that_numbers_and_scales_do_not_tell_are_kept(name, damage):
    raw, weight = MADE[name]()
    raw.arrays["scales"] = np.array(raw.arrays["scales"])
    damage(raw)
    assert not comes_back(weight, raw)
    assert same(again(raw, weight, kept=True), raw.arrays["codes"])


def test_bits_after_the_last_column_are_kept():
    raw, weight = int4(64, 36, 36, BF16, tail=9)
    assert not comes_back(weight, raw)
    assert same(again(raw, weight, kept=True), raw.arrays["codes"])


@pytest.mark.parametrize("name", MADE)
def test_any_other_number_is_noticed(name):
    raw, weight = MADE[name]()
    plain = numbers(raw, weight)
    changed = plain.copy()
    bits = changed.view(np.uint16).reshape(-1)
    bits[len(bits) // 2] ^= 1
    for kept in (False, True):
        with pytest.raises(ChangedError, match="`weight` is not what it was"):
            again(raw, weight, changed, kept=kept)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scales_that_are_not_finite_are_refused(value):
    raw, weight = MADE["blocks"]()
    raw.arrays["scales"][3, 1] = value
    with pytest.raises(UserError, match="`scales` holds scales that are not finite"):
        comes_back(weight, raw)
