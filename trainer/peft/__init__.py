"""Training few parameters beside a model whose own stay as they are.

Names are imported when they are used, so that settings can be read without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.peft.adapted import Adapter, adapt
    from trainer.peft.attach import attach, trainable
    from trainer.peft.dora import DoRA
    from trainer.peft.lora import LoRA
    from trainer.peft.method import PEFT

_WHERE = {
    "PEFT": "method",
    "LoRA": "lora",
    "DoRA": "dora",
    "Adapter": "adapted",
    "adapt": "adapted",
    "attach": "attach",
    "trainable": "attach",
}
__all__ = ["PEFT", "Adapter", "DoRA", "LoRA", "adapt", "attach", "trainable"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module `{__name__}` has no `{name}`")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
