"""What happens to values on the way, apart from where they go: a cast, or nothing.

Where no cast is asked for, bytes are moved untouched.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from formats.errors import UserError
from formats.spec import DTYPES, Array, TensorSpec, dtype_name

KEEP = "keep"
CHOICES = (KEEP, "bf16", "fp16", "fp32")
_CASTABLE = frozenset(DTYPES[name] for name in ("bf16", "fp16", "fp32", "fp64"))


def target_dtype(spec: TensorSpec, choice: str) -> np.dtype[Any]:
    """The dtype a tensor is written in; UserError if its own has no plain cast to the chosen one."""
    if choice == KEEP:
        return spec.dtype
    if spec.dtype not in _CASTABLE:
        raise UserError(
            f"`{spec.name}` is {dtype_name(spec.dtype)}, which cannot be cast to {choice} without its scales",
            hint="convert it with `--dtype keep`",
        )
    return DTYPES[choice]


def cast_into(out: Array, data: Array) -> None:
    """Round to nearest even, as torch's `.to(dtype)` does; what is too large becomes infinite."""
    with np.errstate(over="ignore", invalid="ignore"):
        np.copyto(out, data, casting="unsafe")
