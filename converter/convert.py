"""Both ways, from the outside in: check, open, plan, carry out."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Unpack

from converter.adapters.files import refuse_adapter, require
from converter.conversion_plan import ExecutionArguments, ExecutionOptions, Reporter, Summary
from converter.execute import execute, rule
from converter.exporting import ExportOptions, plan_export
from converter.importing import ImportOptions, huggingface_source, plan_import
from converter.keywords import IN_MEGATRON, other_names
from converter.memory import seldom_collected
from converter.pipeline_layout import layers_per_stage
from converter.sources import open_source
from converter.values import CHOICES, KEEP
from formats.detect import Format, open_megatron
from formats.disk import user_errors
from formats.errors import UserError
from formats.folder import Folder, LocalFolder
from formats.home import expanded
from formats.huggingface import HuggingFaceReader
from formats.location import is_remote, without_secrets
from formats.target import check_target


@other_names(vocab_divisible_by="make_vocab_size_divisible_by", **IN_MEGATRON)
@user_errors()
@seldom_collected()
def hf_to_mcore(
    source: str | Path,
    target: str | Path,
    *,
    tp: int = 1,
    pp: int = 1,
    vpp: int = 1,
    pp_layout: str | Sequence[int] | None = None,
    ep: int = 1,
    etp: int | None = None,
    dtype: str = KEEP,
    make_vocab_size_divisible_by: int = 128,
    integrity: bool = True,
    reporter: Reporter | None = None,
    **options: Unpack[ExecutionArguments],
) -> Summary:
    """Write a Hugging Face model as a Megatron distributed checkpoint for `tp` × `pp` ranks.

    `source` is a directory, a URL or a Hub id; `target` is a directory, s3:// or gs://. `pp_layout` gives the layers of each
    pipeline stage, all ranks of the first virtual stage first: `[9, 9, 8, 6]`, or megatron-core's `"Et*9|t*9|t*8|t*6L"`. `ep` and
    `etp` divide experts; `etp` is `tp` unless given. The vocabulary is padded to a multiple of `make_vocab_size_divisible_by` ×
    `tp`. `integrity` writes the sha256 of every file, as megatron-core checks them, and the BLAKE3 of every tensor.

    Raises UserError before a byte moves if the model cannot be converted exactly. After any failure nothing is at `target`.

    >>> hf_to_mcore("Llama-3.2-1B", "llama-tp2-pp2", tp=2, pp=2, pp_layout="Et*3|tL").tensors
    27
    """
    how, reporter, target, folder = (
        ExecutionOptions(**options),
        reporter or Reporter(),
        expanded(target),
        open_source(source, or_hub=True),
    )
    check_options(dtype=dtype, tp=tp, pp=pp, vpp=vpp, ep=ep, etp=etp, make_vocab_size_divisible_by=make_vocab_size_divisible_by)
    check_place(target, [folder], how)
    wanted = ImportOptions(
        tp=tp,
        pp=pp,
        vpp=vpp,
        pp_layout=layers_per_stage(pp_layout),
        ep=ep,
        etp=etp,
        dtype=dtype,
        make_vocab_size_divisible_by=make_vocab_size_divisible_by,
        integrity=integrity,
    )
    require(folder, Format.HUGGINGFACE)
    with closing(HuggingFaceReader(folder, any_dtype=True)) as reader:
        return execute(plan_import(huggingface_source(reader), target, wanted, reporter), how, reporter, sources=[folder])


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
    **options: Unpack[ExecutionArguments],
) -> Summary:
    """Write a Megatron distributed checkpoint as a Hugging Face model directory.

    `source` is the root of a checkpoint or one iteration. `hf_config` is a folder whose `config.json` and side files are used
    instead of those in the checkpoint. `max_shard_size` is in bytes. `integrity` writes the BLAKE3 of every tensor.

    Raises UserError before a byte moves if the model cannot be converted exactly. After any failure nothing is at `target`.

    >>> sorted(mcore_to_hf("megatron", "llama-back").files)
    ['config.json', 'conversion.json', 'model.safetensors']
    """
    how, reporter, target, root = ExecutionOptions(**options), reporter or Reporter(), expanded(target), open_source(source)
    check_options(dtype=dtype, max_shard_size=max_shard_size)
    given = open_source(hf_config) if hf_config else None
    sources = [root, *([given] if given else [])]
    check_place(target, sources, how)
    wanted = ExportOptions(hf_config=given, max_shard_size=max_shard_size, dtype=dtype, integrity=integrity)
    require(root, Format.TORCH_DIST)
    with closing(open_megatron(root)) as reader:
        refuse_adapter(reader.folder)
        job = plan_export(reader, root, target, wanted, reporter)
        with closing(job.reader):
            return execute(job, how, reporter, sources=sources)


def check_place(target: str, sources: Sequence[Folder], how: ExecutionOptions) -> None:
    """Refuse what would harm something, and what an object store cannot do."""
    if not is_remote(target):
        check_target(Path(target), *(one.path for one in sources if isinstance(one, LocalFolder)), rule=rule(how))
        return
    from formats.remote.upload import TARGETS  # noqa: PLC0415 - the clients of object stores

    kind = target.partition("://")[0].lower()
    if kind not in TARGETS:
        raise UserError(f"`{kind}://` cannot be written to", hint="a directory, s3:// and gs:// can")
    if how.resume or how.verify:
        raise UserError(
            f"`--{'resume' if how.resume else 'verify'}` needs a directory as target, `{without_secrets(target)}` is none",
            hint="nothing can be read there before all of it is; afterwards `mbconvert verify SRC DST` compares",
        )
    for source in sources:
        if _prefix(source.label).startswith(_prefix(without_secrets(target))):
            raise UserError(
                f"the source `{source.label}` lies in `{without_secrets(target)}`, which the output is to be",
                hint="choose another place",
            )


def _prefix(url: str) -> str:
    """What the names of all objects below a URL begin with; a path has none of a URL's."""
    kind, _, path = url.partition("://")
    bucket, _, folder = path.partition("/")
    return f"{kind}://{bucket}/{folder.strip('/')}".rstrip("/") + "/"


def check_options(*, dtype: str, **counts: int | None) -> None:
    """What the command line checks already, for callers from Python."""
    if dtype not in CHOICES:
        raise UserError(f"dtype `{dtype}` is not one of {', '.join(CHOICES)}")
    for name, count in counts.items():
        if count is not None and count < 1:
            raise UserError(f"`{name}` is {count}, which should be 1 or more")
