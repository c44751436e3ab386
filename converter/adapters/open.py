"""Any adapter, opened: PEFT's folder or a Megatron checkpoint."""

from __future__ import annotations

from pathlib import Path

from converter.adapters.adapter import Adapter
from converter.adapters.files import is_peft, require
from converter.adapters.megatron_format import open_megatron
from converter.adapters.opened import AdapterReader
from converter.adapters.peft_format import open_peft
from converter.sources import open_source
from formats.detect import Format
from formats.folder import Folder


def open_adapter(path: str | Path) -> Adapter:
    """What an adapter changes. `path`: PEFT's folder, its Hub id or URL; or a Megatron checkpoint, its root or one iteration.

    Reads headers alone. Raises UserError for what is neither, is damaged, or is of a method that is not known here. Close it
    when done.
    """
    return open_either(open_source(path, or_hub=True)).adapter()


def open_either(folder: Folder) -> AdapterReader:
    """The same of a folder, with its tensors under PEFT's names."""
    if is_peft(folder):
        return open_peft(folder).opened
    require(folder, Format.TORCH_DIST, adapter=True)
    return open_megatron(folder).opened
