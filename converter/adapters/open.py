"""Any adapter, opened: PEFT's folder or a Megatron checkpoint."""

from __future__ import annotations

from pathlib import Path

from converter.adapters import description, peft_config
from converter.adapters.adapter import Adapter
from converter.adapters.megatron_format import open_megatron
from converter.adapters.opened import Opened
from converter.adapters.peft_format import FILE, PICKLED, open_peft
from converter.carried import CONFIG
from converter.sources import open_source
from formats.errors import UserError
from formats.folder import Folder


def open_adapter(path: str | Path) -> Adapter:
    """What an adapter changes. `path`: PEFT's folder, its Hub id or URL; or a Megatron checkpoint, its root or one iteration.

    Reads headers alone. Raises UserError for what is neither, is damaged, or is of a method that is not known here. Close it
    when done.
    """
    return open_either(open_source(path, or_hub=True)).adapter()


def open_either(folder: Folder) -> Opened:
    """The same of a folder, with its tensors under PEFT's names."""
    return open_peft(folder).opened if is_peft(folder) else open_megatron(folder).opened


def is_peft(folder: Folder) -> bool:
    return folder.has(peft_config.FILE) or folder.has(PICKLED)


def refuse_adapter(folder: Folder) -> None:
    """Raise UserError for an adapter where a model is asked for."""
    if folder.has(CONFIG) and any(folder.has(name) for name in (FILE, PICKLED)) and folder.has(peft_config.FILE):
        raise UserError(
            f"`{folder.label}` holds a model and an adapter beside it, `{peft_config.FILE}`: transformers would load both",
            hint="`mbconvert merge DIR DIR DST`, with this folder as both, puts the adapter into the model; for the model alone "
            "move the files `adapter_*` elsewhere",
        )
    if folder.has(description.FILE) or (is_peft(folder) and not folder.has(CONFIG)):
        raise UserError(
            f"`{folder.label}` is an adapter without its model",
            hint="`mbconvert adapter-to-hf` and `adapter-to-mcore` convert it, `mbconvert merge` puts it into its model",
        )
