"""Convert both ways, and reshard: check, open, plan, execute. Start reading here.

The next rooms are converter/importing.py, exporting.py and resharding.py (the plan), execute.py (the commit protocol),
worker.py (one process's share) and run.py (pieces on threads).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Unpack

from converter.adapter_files import refuse_adapter, require
from converter.checkpoint_files import CheckpointFormat
from converter.checks import (
    check_execution,
    check_format,
    check_layout,
    check_locations,
    check_options,
    check_quantize,
    check_values_from,
)
from converter.execute import execute
from converter.execution import ExecutionOptions, Reporter, Summary
from converter.keywords import IN_MEGATRON, other_names
from converter.memory import seldom_collected
from converter.sources import huggingface_source, open_source, workers_for
from converter.state_dicts import TRANSFORMER_ENGINE
from converter.values import KEEP, WEIGHTS
from formats.detect import Format, open_huggingface, open_megatron
from formats.disk import user_errors
from formats.home import expanded
from formats.iterations import TORCH_DIST


@other_names(vocab_divisible_by="make_vocab_size_divisible_by", **IN_MEGATRON)
@user_errors()
@seldom_collected()
def hf_to_mcore(
    source: str | Path,
    target: str | Path,
    *,
    layout: str | None = None,
    tp: int = 1,
    pp: int = 1,
    vpp: int = 1,
    pp_layout: str | Sequence[int] | None = None,
    ep: int = 1,
    etp: int | None = None,
    dtype: str = KEEP,
    make_vocab_size_divisible_by: int = 128,
    ckpt_format: str = TORCH_DIST,
    transformer_impl: str = TRANSFORMER_ENGINE,
    hf_config: str | Path | None = None,
    integrity: bool = True,
    reporter: Reporter | None = None,
    **options: Unpack[ExecutionOptions],
) -> Summary:
    """Write a Hugging Face model as a Megatron distributed checkpoint for `tp` × `pp` ranks.

    `source` is a directory, a URL or a Hub id; `target` is a directory, s3:// or gs://. `layout` is `gpt` or `hybrid`: for
    megatron-core's GPTModel, or for its HybridModel, the default of families that only it can express. `pp_layout` gives the
    layers of each pipeline stage, all ranks of the first virtual stage first: `[9, 9, 8, 6]`, or megatron-core's
    `"Et*9|t*9|t*8|t*6L"`. `ep` and `etp` divide experts; `etp` is `tp` unless given, or 1 if experts have biases. The vocabulary
    is padded to a multiple of `make_vocab_size_divisible_by` × `tp`. `ckpt_format` is `torch_dist`, `torch` (a file for each
    rank) or `fsdp_dtensor` (Megatron-FSDP); the latter two name weights as layers of `transformer_impl` do
    (`transformer_engine` or `local`). `hf_config` is a folder with the `config.json` of a source that has none. `integrity`
    writes the sha256 of every file, as megatron-core checks them, and the BLAKE3 of every tensor.

    Raises UserError before a byte moves if the model cannot be converted exactly. After any failure nothing is at `target`.

    >>> hf_to_mcore("Llama-3.2-1B", "llama-tp2-pp2", tp=2, pp=2, pp_layout="Et*3|tL").tensors
    27
    """
    from converter.importing import ImportOptions, plan_import  # noqa: PLC0415 - each direction brings formats along

    check_execution(options)
    reporter, target, folder = reporter or Reporter(), expanded(target), open_source(source, or_hub=True)
    check_layout(layout)
    check_options(dtype=dtype, tp=tp, pp=pp, vpp=vpp, ep=ep, etp=etp, make_vocab_size_divisible_by=make_vocab_size_divisible_by)
    check_format(ckpt_format, transformer_impl)
    kind, given = CheckpointFormat(ckpt_format, transformer_impl), open_source(hf_config) if hf_config else None
    sources = [folder, *([given] if given else [])]
    check_locations(target, sources, options)
    wanted = ImportOptions(layout=layout, tp=tp, pp=pp, vpp=vpp, pp_layout=pp_layout, ep=ep, etp=etp,
                           dtype=kind.dtype(dtype), make_vocab_size_divisible_by=make_vocab_size_divisible_by,
                           integrity=integrity, kind=kind)  # fmt: skip
    require(folder, Format.HUGGINGFACE)
    with closing(open_huggingface(folder, any_dtype=True)) as reader:
        conversion = plan_import(huggingface_source(reader, given), wanted, reporter)
        return execute(conversion, target, options=options, reporter=reporter, sources=sources)


@user_errors()
@seldom_collected()
def mcore_to_hf(
    source: str | Path,
    target: str | Path,
    *,
    hf_config: str | Path | None = None,
    max_shard_size: int | None = None,
    dtype: str = KEEP,
    quantize: str | None = None,
    values_from: str = WEIGHTS,
    integrity: bool = True,
    reporter: Reporter | None = None,
    **options: Unpack[ExecutionOptions],
) -> Summary:
    """Write a Megatron distributed checkpoint as a Hugging Face model directory.

    `source` is the root of a checkpoint or one iteration. `hf_config` is a folder whose `config.json` and side files are used
    instead of those in the checkpoint. `max_shard_size` is in bytes. `quantize` (fp8-block or mxfp4) quantizes linear weights
    anew. `values_from` is `weights`, or `master` for the fp32 masters in the optimizer state, each of which must round to its
    weight. `integrity` writes the BLAKE3 of every tensor.

    Raises UserError before a byte moves if the model cannot be converted exactly. After any failure nothing is at `target`.

    >>> sorted(mcore_to_hf("megatron", "llama-back").files)
    ['config.json', 'conversion.json', 'model.safetensors']
    """
    from converter.exporting import ExportOptions, plan_export  # noqa: PLC0415 - each direction brings formats along

    check_execution(options)
    reporter, target, root = reporter or Reporter(), expanded(target), open_source(source)
    check_options(dtype=dtype, max_shard_size=max_shard_size)
    check_quantize(quantize, dtype)
    check_values_from(values_from, quantize)
    given = open_source(hf_config) if hf_config else None
    sources = [root, *([given] if given else [])]
    check_locations(target, sources, options)
    wanted = ExportOptions(
        hf_config=given,
        max_shard_size=max_shard_size,
        dtype=dtype,
        integrity=integrity,
        quantize=quantize or "",
        values_from=values_from,
    )
    require(root, Format.TORCH_DIST)
    with closing(open_megatron(root)) as reader:
        refuse_adapter(reader.folder)
        workers = workers_for(options.get("workers"), sources, target)
        conversion = plan_export(reader, root, wanted, reporter, workers=workers)
        with closing(conversion.reader):
            return execute(conversion, target, options=options, reporter=reporter, sources=sources)


@other_names(vocab_divisible_by="make_vocab_size_divisible_by", **IN_MEGATRON)
@user_errors()
@seldom_collected()
def reshard(
    source: str | Path,
    target: str | Path,
    *,
    layout: str | None = None,
    tp: int = 1,
    pp: int = 1,
    vpp: int = 1,
    pp_layout: str | Sequence[int] | None = None,
    ep: int = 1,
    etp: int | None = None,
    make_vocab_size_divisible_by: int | None = None,
    hf_config: str | Path | None = None,
    weights_only: bool = False,
    values_from: str = WEIGHTS,
    dtype: str = KEEP,
    integrity: bool = True,
    reporter: Reporter | None = None,
    **options: Unpack[ExecutionOptions],
) -> Summary:
    """Write a Megatron checkpoint, its optimizer state too, as `torch_dist` for `tp` × `pp` ranks.

    `source` is the root of a checkpoint or one iteration. `layout` (`gpt` or `hybrid`) is that of `source` unless given. Parallel
    sizes are as for `hf_to_mcore`, and 1 unless given; `make_vocab_size_divisible_by` is what the source says, or 128.
    `hf_config` is a folder with the model's `config.json`, for a checkpoint that does not say what model it holds.
    `weights_only` leaves out optimizer state and what else resumes a run. `values_from` is as for `mcore_to_hf`: `master` writes
    weights in fp32. `integrity` writes the sha256 of every file, and the BLAKE3 of every tensor.

    Raises UserError before a byte moves if the layout does not fit the model. After any failure nothing is at `target`.

    >>> reshard("megatron", "megatron-tp4", tp=4).layout
    {'tp': 4, 'pp': 1, 'vpp': 1}
    """
    from converter.resharding import ReshardOptions, plan_reshard  # noqa: PLC0415 - each direction brings formats along

    check_execution(options)
    reporter, target, root = reporter or Reporter(), expanded(target), open_source(source)
    check_layout(layout)
    check_options(dtype=dtype, tp=tp, pp=pp, vpp=vpp, ep=ep, etp=etp, make_vocab_size_divisible_by=make_vocab_size_divisible_by)
    check_values_from(values_from)
    given = open_source(hf_config) if hf_config else None
    sources = [root, *([given] if given else [])]
    check_locations(target, sources, options)
    wanted = ReshardOptions(layout=layout, tp=tp, pp=pp, vpp=vpp, pp_layout=pp_layout, ep=ep, etp=etp,
                            make_vocab_size_divisible_by=make_vocab_size_divisible_by, hf_config=given, dtype=dtype,
                            weights_only=weights_only, values_from=values_from, integrity=integrity)  # fmt: skip
    require(root, Format.TORCH_DIST)
    with closing(open_megatron(root)) as reader:
        refuse_adapter(reader.folder)
        workers = workers_for(options.get("workers"), sources, target)
        conversion = plan_reshard(reader, root, wanted, reporter, workers=workers)
        with closing(conversion.reader):
            return execute(conversion, target, options=options, reporter=reporter, sources=sources)
