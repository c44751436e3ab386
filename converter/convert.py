"""Convert both ways: check, open, plan, execute. Start reading here.

The next rooms are converter/importing.py and exporting.py (the plan), execute.py (the commit protocol), worker.py (one
process's share) and run.py (pieces on threads).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Unpack

from converter.adapters.files import refuse_adapter, require
from converter.checks import check_execution, check_locations, check_options
from converter.execute import execute
from converter.execution import ExecutionOptions, Reporter, Summary
from converter.exporting import ExportOptions, plan_export
from converter.importing import ImportOptions, plan_import
from converter.memory import seldom_collected
from converter.sources import huggingface_source, open_source
from converter.values import KEEP
from formats.detect import Format
from formats.disk import user_errors
from formats.home import expanded
from formats.huggingface import HuggingFaceReader
from formats.torch_dist import TorchDistReader


@user_errors()
@seldom_collected()
def hf_to_mcore(
    source: str | Path,
    target: str | Path,
    *,
    tp: int = 1,
    pp: int = 1,
    vpp: int = 1,
    pp_layout: Sequence[int] | None = None,
    dtype: str = KEEP,
    vocab_divisible_by: int = 128,
    integrity: bool = True,
    reporter: Reporter | None = None,
    **options: Unpack[ExecutionOptions],
) -> Summary:
    """Write a Hugging Face model as a Megatron distributed checkpoint for `tp` × `pp` ranks.

    `source` is a directory, a URL or a Hub id; `target` a directory, s3:// or gs://; `integrity` writes the sha256 of every
    file, as megatron-core checks them, and the BLAKE3 of every tensor. Raises UserError before a byte moves for whatever
    cannot be converted exactly; after any failure nothing is at `target`.
    """
    check_execution(options)
    reporter, target, folder = reporter or Reporter(), expanded(target), open_source(source, or_hub=True)
    check_options(dtype=dtype, tp=tp, pp=pp, vpp=vpp, vocab_divisible_by=vocab_divisible_by)
    check_locations(target, [folder], options)
    wanted = ImportOptions(
        tp=tp,
        pp=pp,
        vpp=vpp,
        pp_layout=pp_layout,
        dtype=dtype,
        vocab_divisible_by=vocab_divisible_by,
        integrity=integrity,
    )
    require(folder, Format.HUGGINGFACE)
    with closing(HuggingFaceReader(folder, any_dtype=True)) as reader:
        conversion = plan_import(huggingface_source(reader), wanted, reporter)
        return execute(conversion, target, options=options, reporter=reporter, sources=[folder])


@user_errors()
@seldom_collected()
def mcore_to_hf(
    source: str | Path,
    target: str | Path,
    *,
    hf_config: str | Path | None = None,
    max_shard_size: int | None = None,
    dtype: str = KEEP,
    integrity: bool = True,
    reporter: Reporter | None = None,
    **options: Unpack[ExecutionOptions],
) -> Summary:
    """Write a Megatron distributed checkpoint as a Hugging Face model directory.

    `source` is the checkpoint's root or one iteration; `hf_config` a folder with a `config.json` to follow instead of the
    one that travelled; `max_shard_size` in bytes; `integrity` writes the BLAKE3 of every tensor. Raises UserError before a
    byte moves for whatever cannot be converted exactly; after any failure nothing is at `target`.
    """
    check_execution(options)
    reporter, target, root = reporter or Reporter(), expanded(target), open_source(source)
    check_options(dtype=dtype, max_shard_size=max_shard_size)
    given = open_source(hf_config) if hf_config else None
    sources = [root, *([given] if given else [])]
    check_locations(target, sources, options)
    wanted = ExportOptions(hf_config=given, max_shard_size=max_shard_size, dtype=dtype, integrity=integrity)
    require(root, Format.TORCH_DIST)
    with closing(TorchDistReader(root)) as reader:
        refuse_adapter(reader.folder)
        conversion = plan_export(reader, root, wanted, reporter)
        with closing(conversion.reader):
            return execute(conversion, target, options=options, reporter=reporter, sources=sources)
