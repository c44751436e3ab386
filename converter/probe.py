"""Files of an iteration that only conversions and Megatron-Bridge write. A web server lists no directory: each is asked for."""

from __future__ import annotations

from converter import provenance
from converter.run_config import FILE as RUN_CONFIG
from converter.side_files import EXTRAS, FILES, TOKENIZER_FILES
from formats.shard_files import INDEX, SINGLE, USUAL_FILES

PROBED = (
    RUN_CONFIG,
    provenance.FILE,
    EXTRAS,
    *(f"tokenizer/{name}" for name in (*TOKENIZER_FILES, "tiktoken.model")),
    *(f"{FILES}/{name}" for name in USUAL_FILES if name not in (INDEX, SINGLE)),
)
