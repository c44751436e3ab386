"""Read zarr arrays whose chunks are compressed, which Megatron does not write, with the tensorstore library."""

from __future__ import annotations

from typing import Any

from formats.errors import UserError
from formats.faults import fault
from formats.folder import Folder, LocalFolder
from formats.spec import Array, Region


def read(folder: Folder, name: str, region: Region, out: Array) -> None:
    """Read a region of the array `name`. tensorstore takes a missing chunk for zeros: the caller checks that all are there.

    Raises UserError where tensorstore is not installed, for a folder that is not local, and for damaged data.
    """
    if not isinstance(folder, LocalFolder):
        raise UserError(f"`{name}` in `{folder.label}` is compressed: read from a local disk alone", hint="copy the checkpoint")
    store = _open(folder, name)
    try:
        out[...] = store[region].read().result()
    except (OSError, ValueError) as error:
        raise UserError(f"a chunk of `{name}` cannot be read: {fault(error)}", hint="the checkpoint is damaged") from error


def _open(folder: LocalFolder, name: str) -> Any:
    try:
        import tensorstore  # noqa: PLC0415 - seldom needed, and 66 MB
    except ImportError:
        raise UserError(
            f"`{name}` is compressed, and `tensorstore` is not installed", hint="`pip install 'mbtools[zarr]'`"
        ) from None
    spec = {
        "driver": "zarr", "kvstore": {"driver": "file", "path": str(folder.path / name)}, "recheck_cached_data": False,
        "context": {"cache_pool": {"total_bytes_limit": 0}},
    }  # fmt: skip
    library: Any = tensorstore
    try:
        return library.open(spec, read=True).result()
    except (OSError, ValueError) as error:
        raise UserError(f"`{name}` cannot be opened as a zarr array: {fault(error)}", hint="the file is damaged") from error
