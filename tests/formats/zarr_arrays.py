"""Write arrays in the `zarr` format as megatron-core did, with the tensorstore library."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tensorstore


def write(folder: Path, value: np.ndarray, *, chunks: tuple[int, ...], compressor: str | None = None) -> None:
    """Write an array: every chunk, with those at its ends in the size of all others."""
    store = tensorstore.open({
        "driver": "zarr", "kvstore": {"driver": "file", "path": str(folder)}, "create": True,
        "store_data_equal_to_fill_value": True,
        "metadata": {
            "shape": value.shape, "chunks": chunks, "dtype": _name(value.dtype),
            "compressor": compressor and {"id": compressor}, "fill_value": None,
            "order": "C", "filters": None,
        },
    }).result()  # fmt: skip
    store.write(value).result()


def mark(folder: Path) -> None:
    """Write the file that megatron-core writes last."""
    (folder / "metadata.json").write_text('{"sharded_backend": "zarr", "sharded_backend_version": 1}')


def _name(dtype: np.dtype) -> str:
    return "bfloat16" if dtype.name == "bfloat16" else dtype.str
