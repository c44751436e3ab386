"""What happens to values on the way, apart from where they go: a cast, or nothing.

Where no cast is asked for, bytes are moved untouched. A cast never makes a number infinite.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from math import prod
from typing import Any, cast

import ml_dtypes
import numpy as np

from formats.dtypes import FLOATS, MODEL_DTYPES
from formats.errors import UserError
from formats.spec import DTYPES, Array, TensorSpec, dtype_name

WEIGHTS, MASTERS = SOURCES = ("weights", "master")
"""What the values of weights may be taken from."""

KEEP = "keep"
CHOICES = (KEEP, *MODEL_DTYPES)
_CASTABLE = frozenset(DTYPES[name] for name in FLOATS)


def target_dtype(spec: TensorSpec, choice: str) -> np.dtype[Any]:
    """Return the dtype a tensor is written in; UserError if its own has no plain cast to the chosen one."""
    if choice == KEEP:
        return spec.dtype
    if spec.dtype not in _CASTABLE:
        raise UserError(
            f"`{spec.name}` is {spec.stored_dtype}, which cannot be cast to {choice} without its scales",
            hint="convert it with `--dtype keep`",
        )
    return DTYPES[choice]


def dtype_of_most_parameters(specs: Iterable[TensorSpec]) -> np.dtype[Any]:
    """Return the dtype that most parameters have: what a model is trained in. Of equals, the one that comes first."""
    return _heaviest((spec.dtype, prod(spec.shape)) for spec in specs)


def dtype_of_most_bytes(specs: Iterable[TensorSpec]) -> np.dtype[Any]:
    """Return the dtype that most bytes have: what `config.json` names for the files. Of equals, the one that comes first."""
    return _heaviest((spec.dtype, spec.nbytes) for spec in specs)


def _heaviest(weights: Iterable[tuple[np.dtype[Any], int]]) -> np.dtype[Any]:
    sums: dict[np.dtype[Any], int] = {}
    for dtype, weight in weights:
        sums[dtype] = sums.get(dtype, 0) + weight
    return max(sums, key=lambda dtype: sums[dtype])


def cast_into(out: Array, data: Array, *, name: str) -> None:
    """Round to nearest even, as torch's `.to(dtype)` does. What is not finite stays; a number too small for `out` becomes zero.

    UserError, with the tensor's `name`, for a number beyond what `out` can hold: it would become infinite.
    """
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        np.copyto(out, data, casting="unsafe")
    if _is_shorter(out.dtype, data.dtype) and _has_infinite(out):
        _check_finite(out, data, name)


def _has_infinite(values: Array) -> bool:
    """Does any value have the bits of an infinity? In integers: numpy's own question takes longer than the cast."""
    plus = np.array(np.inf, values.dtype).view(f"u{values.dtype.itemsize}")
    minus = np.array(-np.inf, values.dtype).view(plus.dtype)
    bits = values.view(plus.dtype)
    return bool((bits == plus).any() or (bits == minus).any())


def _check_finite(out: Array, data: Array, name: str) -> None:
    lost = np.isinf(out) & np.isfinite(data)
    count = int(np.count_nonzero(lost))
    if not count:
        return
    largest = float(np.max(np.abs(data[lost].astype(np.float64))))
    raise UserError(
        f"`{name}` has numbers that {dtype_name(out.dtype)} cannot hold: up to `{largest:.6g}`, and its largest is "
        f"`{_largest(out.dtype):.6g}`; {count} of the {data.size} looked at would become infinite",
        hint="cast to bf16 or fp32, or convert with `--dtype keep`",
    )


@cache
def _is_shorter(dtype: np.dtype[Any], other: np.dtype[Any]) -> bool:
    """Does it end before the other one does?"""
    return _largest(dtype) < _largest(other)


def _largest(dtype: np.dtype[Any]) -> float:
    return float(cast("Any", ml_dtypes.finfo(dtype)).max)
