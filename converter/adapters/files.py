"""The files that tell an adapter from a model, by their names."""

from __future__ import annotations

from converter.carried import CONFIG
from formats.errors import UserError
from formats.folder import Folder

DESCRIPTION = "adapter.json"
"""In the iteration's folder of a Megatron checkpoint."""

PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_PICKLE = "adapter_model.bin"


def is_peft(folder: Folder) -> bool:
    """Is it a folder of PEFT's?"""
    return folder.has(PEFT_CONFIG) or folder.has(PEFT_PICKLE)


def refuse_adapter(folder: Folder) -> None:
    """Raise UserError for an adapter where a model is asked for."""
    if folder.has(CONFIG) and any(folder.has(name) for name in (PEFT_WEIGHTS, PEFT_PICKLE)) and folder.has(PEFT_CONFIG):
        raise UserError(
            f"`{folder.label}` holds a model and an adapter beside it, `{PEFT_CONFIG}`: transformers would load both",
            hint="`mbconvert merge DIR DIR DST`, with this folder as both, puts the adapter into the model; for the model alone "
            "move the files `adapter_*` elsewhere",
        )
    if folder.has(DESCRIPTION) or (is_peft(folder) and not folder.has(CONFIG)):
        raise UserError(
            f"`{folder.label}` is an adapter without its model",
            hint="`mbconvert adapter-to-hf` and `adapter-to-mcore` convert it, `mbconvert merge` puts it into its model",
        )
