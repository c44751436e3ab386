"""Move model weights between Hugging Face directories and Megatron distributed checkpoints.

    from converter import hf_to_mcore, mcore_to_hf, verify, inspect, check, merge, adapter_to_hf, adapter_to_mcore

Nothing here imports torch, megatron-core or transformers.
"""

from converter.adapters.convert import adapter_to_hf, adapter_to_mcore
from converter.adapters.merge import merge
from converter.convert import hf_to_mcore, mcore_to_hf
from converter.inspect import inspect
from converter.job import Summary, Talk
from converter.proof import check_directory as check
from converter.proof import verify_directories as verify
from formats.errors import TransientError, UserError

__all__ = [
    "Summary",
    "Talk",
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
