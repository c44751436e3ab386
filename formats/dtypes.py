"""The dtypes that are known here, and what every format calls them. Strings only: reading the table imports no numpy."""

from __future__ import annotations

from typing import NamedTuple


class Dtype(NamedTuple):
    """One dtype, by its name in each format."""

    name: str
    """In commands, reports and messages."""

    torch: str
    """In torch, and in numpy or ml_dtypes, which use the same name."""

    safetensors: str

    storage: str = ""
    """The class of torch's typed storage. Newer dtypes have none: their tensors name the dtype, their storage counts bytes."""

    zarr: str = ""
    """In `.zarray`; "" for what Megatron never wrote there. Its `bfloat16` is not zarr's name: that would be `<V2`."""


CONVERTED = (
    Dtype("bf16", "bfloat16", "BF16", "BFloat16Storage", "bfloat16"),
    Dtype("fp16", "float16", "F16", "HalfStorage", "<f2"),
    Dtype("fp32", "float32", "F32", "FloatStorage", "<f4"),
    Dtype("fp64", "float64", "F64", "DoubleStorage", "<f8"),
    Dtype("fp8_e4m3", "float8_e4m3fn", "F8_E4M3"),
    Dtype("fp8_e5m2", "float8_e5m2", "F8_E5M2"),
    Dtype("int8", "int8", "I8", "CharStorage", "|i1"),
    Dtype("int16", "int16", "I16", "ShortStorage", "<i2"),
    Dtype("int32", "int32", "I32", "IntStorage", "<i4"),
    Dtype("int64", "int64", "I64", "LongStorage", "<i8"),
    Dtype("uint8", "uint8", "U8", "ByteStorage", "|u1"),
    Dtype("bool", "bool", "BOOL", "BoolStorage", "|b1"),
)
"""Dtypes that are converted."""

COMPARED = (
    Dtype("uint16", "uint16", "U16"),
    Dtype("uint32", "uint32", "U32"),
    Dtype("uint64", "uint64", "U64"),
    Dtype("complex64", "complex64", "C64"),
    Dtype("fp8_e8m0", "float8_e8m0fnu", "F8_E8M0"),
    Dtype("fp8_e4m3fnuz", "float8_e4m3fnuz", "F8_E4M3FNUZ"),
    Dtype("fp8_e5m2fnuz", "float8_e5m2fnuz", "F8_E5M2FNUZ"),
)
"""Dtypes that are reported and compared, and not converted."""

MODEL_DTYPES = ("bf16", "fp16", "fp32")
"""Names of the dtypes that models are trained and run in."""

QUANTIZED = ("fp8-block", "mxfp4")
"""Names of the ways in which weights can be quantized anew."""

FLOATS = (*MODEL_DTYPES, "fp64")
"""Names of the dtypes whose numbers need no scale."""

BY_NAME = {dtype.name: dtype for dtype in CONVERTED + COMPARED}
