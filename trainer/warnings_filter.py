"""Importing this silences the warnings of megatron-core and torch about missing extras; `resolve` reports those that matter.

Commands import it first, and so do the worker processes that read data, since they do not inherit filters.
"""

import logging
import warnings

warnings.filterwarnings("ignore", module="megatron")
for _text in (
    "torch.distributed is disabled, unavailable or uninitialized",
    "The argument order of load has been changed",
    "Please use DTensor instead",
):  # torch's, about how megatron-core loads a checkpoint
    warnings.filterwarnings("ignore", _text)
for _name in ("torch.utils.cpp_extension", "megatron"):
    logging.getLogger(_name).setLevel(logging.ERROR)
