"""Importing this silences what megatron-core and torch say on import of extras they do without; `resolve` says what matters.

Commands import it first, and so do the processes that read data, which inherit nothing else.
"""

import logging
import warnings

warnings.filterwarnings("ignore", module="megatron")
for _text in (
    "torch.distributed is disabled, unavailable or uninitialized",
    "The argument order of load has been changed",
    "Please use DTensor instead",
):  # torch's, of how megatron-core loads a checkpoint
    warnings.filterwarnings("ignore", _text)
for _name in ("torch.utils.cpp_extension", "megatron"):
    logging.getLogger(_name).setLevel(logging.ERROR)
