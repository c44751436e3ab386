"""Arithmetic on bits rounds every number of bf16 to the code that a cast gives."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from formats.quantized.rounding import e2m1_codes, e4m3_codes
from formats.quantized.scheme import BF16

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
EVERY = np.arange(1 << 16, dtype=np.uint16).view(BF16)
FINITE = EVERY[np.isfinite(EVERY.astype(np.float32))]


@pytest.mark.parametrize("seed", range(8))
def test_e4m3_codes_are_those_of_a_cast(seed):
    """Under scales for which the largest number becomes 448, from those of tiny numbers to those of huge ones."""
    largest = np.exp2(np.random.default_rng(seed).uniform(-110, 127, 32)).astype(BF16)
    for most in largest:
        values = FINITE[np.abs(FINITE) <= most].reshape(1, -1)
        scales = np.full(values.shape[1], most.astype(np.float32) / np.float32(448))
        out = np.empty(values.shape, np.uint8)
        e4m3_codes(values, scales, out)
        expected = (values.astype(np.float32) / scales).astype(E4M3).view(np.uint8)
        assert np.array_equal(out, expected), most


def test_e4m3_codes_of_ties_and_their_neighbours_are_those_of_a_cast():
    codes = np.arange(0x7F, dtype=np.uint8).view(E4M3).astype(np.float32)
    ties = ((codes[1:] + codes[:-1]) / 2).astype(BF16)
    values = np.stack([ties, np.nextafter(ties, BF16.type(0)), np.nextafter(ties, BF16.type(500))])
    out = np.empty(values.shape, np.uint8)
    e4m3_codes(values, np.ones(values.shape[1], np.float32), out)
    assert np.array_equal(out, values.astype(np.float32).astype(E4M3).view(np.uint8))


def test_e2m1_codes_are_those_of_a_cast_under_every_scale():
    values = FINITE[:, None]
    for exponent in range(255):
        with np.errstate(over="ignore"):
            scaled = np.ldexp(values.astype(np.float64), 127 - exponent).clip(-6, 6)
        expected = scaled.astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
        assert np.array_equal(e2m1_codes(values, np.array([exponent], np.uint8)), expected), exponent
