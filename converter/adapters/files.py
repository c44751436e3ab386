"""The files that tell an adapter from a model, by their names."""

from __future__ import annotations

from formats.detect import Format, detect
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
    found = detect(folder)
    beside = any(folder.has(name) for name in (PEFT_WEIGHTS, PEFT_PICKLE)) and folder.has(PEFT_CONFIG)
    if found is Format.HUGGINGFACE and beside:
        raise UserError(
            f"`{folder.label}` holds a model and an adapter beside it, `{PEFT_CONFIG}`: transformers would load both",
            hint="`mbconvert merge DIR DIR DST`, with this folder as both, puts the adapter into the model; for the model alone "
            "move the files `adapter_*` elsewhere",
        )
    if found is Format.PEFT or folder.has(DESCRIPTION):
        raise UserError(
            f"`{folder.label}` is an adapter without its model",
            hint="`mbconvert adapter-to-hf` and `adapter-to-mcore` convert it, `mbconvert merge` puts it into its model",
        )


def require_peft(folder: Folder) -> None:
    """Raise UserError for what is no adapter of PEFT's; its base model may be beside it."""
    if not is_peft(folder):
        require(folder, Format.PEFT, adapter=True)


def require(folder: Folder, wanted: Format, *, adapter: bool = False) -> None:
    """Raise UserError for a folder of another format, and name the command for it. `adapter`: not a model is wanted but an
    adapter in that format."""
    if not adapter:
        refuse_adapter(folder)
    found = detect(folder)
    if found is wanted:
        return
    what, hint = _IS[found]
    should = {
        Format.HUGGINGFACE: "a Hugging Face model",
        Format.PEFT: "a PEFT adapter",
        Format.TORCH_DIST: f"a Megatron {'adapter ' if adapter else ''}checkpoint",
    }
    raise UserError(f"`{folder.label}` is {what}, not {should[wanted]}", hint=hint)


_IS = {
    Format.HUGGINGFACE: (
        "a Hugging Face model",
        "`mbconvert hf-to-mcore` converts it; `mbconvert merge BASE ADAPTER DST` takes the model first, then its adapter",
    ),
    Format.PEFT: ("a PEFT adapter", "`mbconvert adapter-to-mcore` converts it"),
    Format.TORCH_DIST: (
        "a Megatron checkpoint",
        "`mbconvert mcore-to-hf` converts it; where it holds an adapter, `adapter-to-hf`",
    ),
}
"""What a folder of each format is, and the commands that take it."""
