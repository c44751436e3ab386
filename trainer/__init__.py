"""Train language models with megatron-core: from scratch, from a Hugging Face directory, or from a Megatron checkpoint.

    from trainer import AutoBridge, Callback, RunConfig, forward_step, pretrain
    from trainer.recipes import llama32_1b

Each name is imported on first use: `import trainer` alone imports neither torch nor megatron-core, and filters no warnings.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mbtools import check_packages

if TYPE_CHECKING:
    from trainer import recipes
    from trainer.bridge import AutoBridge
    from trainer.config import RunConfig
    from trainer.loop import pretrain
    from trainer.loss import forward_step
    from trainer.model import GPTModelProvider, ModelProvider
    from trainer.state import Callback, Run, Step

DISTRIBUTION = "mbtools"

_DEFINED_IN = {
    "AutoBridge": "trainer.bridge",
    "Callback": "trainer.state",
    "GPTModelProvider": "trainer.model",
    "ModelProvider": "trainer.model",
    "Run": "trainer.state",
    "RunConfig": "trainer.config",
    "Step": "trainer.state",
    "forward_step": "trainer.loss",
    "pretrain": "trainer.loop",
}
__all__ = [
    "AutoBridge",
    "Callback",
    "GPTModelProvider",
    "ModelProvider",
    "Run",
    "RunConfig",
    "Step",
    "forward_step",
    "pretrain",
    "recipes",
]


def __getattr__(name: str) -> Any:
    """Import a name on first use. Raises ForeignPackageError if `formats` or `converter` is not ours."""
    check_packages("formats", "converter")
    if name == "recipes":
        return import_module("trainer.recipes")
    if name not in _DEFINED_IN:
        raise AttributeError(f"module `{__name__}` has no `{name}`")
    import_module("trainer.warnings_filter")
    return getattr(import_module(_DEFINED_IN[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
