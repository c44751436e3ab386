"""Tell which program wrote a Megatron checkpoint, and which versions of megatron-core can have, by what only they write."""

from __future__ import annotations

from converter import provenance, run_config
from formats.detect import Format
from formats.iterations import COMMON
from formats.megatron_reader import MegatronReader
from formats.rank_files import RankFilesReader
from formats.torch_dist import COMMON_STATE

MBCONVERT = "mbconvert"


def writer_of(reader: MegatronReader) -> str:
    """Return the program that wrote a checkpoint."""
    if reader.settings:
        return "NeMo"
    if reader.folder.has(provenance.FILE):
        return MBCONVERT
    if reader.folder.has(run_config.FILE):
        return "Megatron-Bridge"
    if reader.args():
        return "Megatron-LM"
    return "a script, without `args`" if isinstance(reader, RankFilesReader) else "megatron-core"


def versions_of(reader: MegatronReader, kind: Format, optimizer: str) -> str:
    """Return the versions of megatron-core that write such a checkpoint; empty where the files do not tell.

    `optimizer` is how its optimizer state is stored. Sources: megatron-core 0.2 to 0.19, `core/dist_checkpointing`.
    """
    if reader.folder.has(provenance.FILE):
        return ""
    if kind is Format.ZARR:
        return "0.2 to 0.15"
    if optimizer.startswith("fully_sharded"):
        return "0.5 to 0.14"
    if kind is Format.TORCH_DIST and reader.folder.has(COMMON):
        return "up to 0.18"
    return "0.19 or later" if kind is Format.TORCH_DIST and COMMON_STATE.key in reader.contents else ""
