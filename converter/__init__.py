"""Convert model weights between Hugging Face directories and Megatron distributed checkpoints.

    from converter import hf_to_mcore, mcore_to_hf, reshard, verify_checkpoints, inspect_checkpoint, check_checkpoint
    from converter import merge_adapter, adapter_to_hf, adapter_to_mcore, average_checkpoints, extend_vocab

Imports neither torch nor megatron-core nor transformers. Each name is imported on first use, so `mbconvert --help` loads no
conversion code and a conversion loads no adapter code.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mbtools import check_packages

if TYPE_CHECKING:
    from converter.adapters.convert import adapter_to_hf, adapter_to_mcore
    from converter.adapters.merge import merge as merge_adapter
    from converter.comparison import Comparison
    from converter.convert import hf_to_mcore, mcore_to_hf, reshard
    from converter.editing import average_checkpoints, extend_vocab
    from converter.execution import Reporter, Summary
    from converter.proof import check_checkpoint, verify_checkpoints
    from converter.ranks import Ranks
    from converter.report import Report, inspect_checkpoint
    from formats.errors import TransientError, UserError
    from formats.integrity import Check

DISTRIBUTION = "mbtools"

_DEFINED_AS = {
    "Check": "formats.integrity.Check",
    "Comparison": "converter.comparison.Comparison",
    "Ranks": "converter.ranks.Ranks",
    "Report": "converter.report.Report",
    "Reporter": "converter.execution.Reporter",
    "Summary": "converter.execution.Summary",
    "TransientError": "formats.errors.TransientError",
    "UserError": "formats.errors.UserError",
    "adapter_to_hf": "converter.adapters.convert.adapter_to_hf",
    "adapter_to_mcore": "converter.adapters.convert.adapter_to_mcore",
    "average_checkpoints": "converter.editing.average_checkpoints",
    "check_checkpoint": "converter.proof.check_checkpoint",
    "extend_vocab": "converter.editing.extend_vocab",
    "hf_to_mcore": "converter.convert.hf_to_mcore",
    "inspect_checkpoint": "converter.report.inspect_checkpoint",
    "mcore_to_hf": "converter.convert.mcore_to_hf",
    "merge_adapter": "converter.adapters.merge.merge",
    "reshard": "converter.convert.reshard",
    "verify_checkpoints": "converter.proof.verify_checkpoints",
}

_FORMER_NAMES = {
    "check": "check_checkpoint",
    "inspect": "inspect_checkpoint",
    "merge": "merge_adapter",
    "verify": "verify_checkpoints",
}
"""Still importable, but not in `__all__`: a star import must not replace a module or a function of the same name."""

__all__ = [
    "Check",
    "Comparison",
    "Ranks",
    "Report",
    "Reporter",
    "Summary",
    "TransientError",
    "UserError",
    "adapter_to_hf",
    "adapter_to_mcore",
    "average_checkpoints",
    "check_checkpoint",
    "extend_vocab",
    "hf_to_mcore",
    "inspect_checkpoint",
    "mcore_to_hf",
    "merge_adapter",
    "reshard",
    "verify_checkpoints",
]


def __getattr__(name: str) -> Any:
    """Import a name on first use. Raises ForeignPackageError if `formats` is not ours."""
    present = _FORMER_NAMES.get(name, name)
    if present not in _DEFINED_AS:
        raise AttributeError(f"module `{__name__}` has no attribute `{name}`")
    check_packages("formats")
    module, _, attribute = _DEFINED_AS[present].rpartition(".")
    globals()[name] = getattr(import_module(module), attribute)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
