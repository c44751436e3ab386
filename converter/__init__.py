"""Move model weights between Hugging Face directories and Megatron distributed checkpoints.

    from converter import hf_to_mcore, mcore_to_hf, verify, inspect, check, merge, adapter_to_hf, adapter_to_mcore

Nothing here imports torch, megatron-core or transformers. Each name is imported when it is first asked for, so that
`mbconvert --help` loads none of them and a conversion loads nothing of adapters.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from converter.adapters.convert import adapter_to_hf, adapter_to_mcore
    from converter.adapters.merge import merge
    from converter.convert import hf_to_mcore, mcore_to_hf
    from converter.execution import Reporter, Summary
    from converter.proof import check_directory as check
    from converter.proof import verify_directories as verify
    from converter.report import inspect
    from formats.errors import TransientError, UserError

_DEFINED_AS = {
    "Summary": "converter.execution.Summary",
    "Reporter": "converter.execution.Reporter",
    "TransientError": "formats.errors.TransientError",
    "UserError": "formats.errors.UserError",
    "adapter_to_hf": "converter.adapters.convert.adapter_to_hf",
    "adapter_to_mcore": "converter.adapters.convert.adapter_to_mcore",
    "check": "converter.proof.check_directory",
    "hf_to_mcore": "converter.convert.hf_to_mcore",
    "inspect": "converter.report.inspect",
    "mcore_to_hf": "converter.convert.mcore_to_hf",
    "merge": "converter.adapters.merge.merge",
    "verify": "converter.proof.verify_directories",
}

__all__ = [
    "Reporter",
    "Summary",
    "TransientError",
    "UserError",
    "adapter_to_hf",
    "adapter_to_mcore",
    "check",
    "hf_to_mcore",
    "inspect",
    "mcore_to_hf",
    "merge",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _DEFINED_AS:
        raise AttributeError(f"module `{__name__}` has no attribute `{name}`")
    module, _, defined = _DEFINED_AS[name].rpartition(".")
    globals()[name] = getattr(import_module(module), defined)
    return globals()[name]
