"""Parameter-efficient fine-tuning: train a few added parameters beside a frozen model.

    from trainer.peft import DoRA, LoRA            # methods
    from trainer.peft import PEFT, Adapter, adapt  # to write a method of your own

Modules are imported when a name is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.peft.adapter_layer import Adapter, adapt
    from trainer.peft.attach import trainable
    from trainer.peft.dora import DoRA
    from trainer.peft.lora import LoRA
    from trainer.peft.peft import PEFT

_MODULES = {
    "PEFT": "peft",
    "LoRA": "lora",
    "DoRA": "dora",
    "Adapter": "adapter_layer",
    "adapt": "adapter_layer",
    "trainable": "attach",
}
__all__ = ["PEFT", "Adapter", "DoRA", "LoRA", "adapt", "trainable"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module `{__name__}` has no `{name}`")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
