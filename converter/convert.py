"""Both ways, from the outside in: check, open, plan, carry out."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Unpack

from converter import hub
from converter.carry import carry_out
from converter.exporting import ExportOptions, plan_export
from converter.importing import ImportOptions, plan_import
from converter.job import How, HowOptions, Summary, Talk
from converter.values import CHOICES, KEEP
from formats.disk import explained
from formats.errors import UserError
from formats.folder import LocalFolder
from formats.huggingface import HuggingFaceReader
from formats.staging import check_target
from formats.torch_dist import TorchDistReader


@explained()
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
    talk: Talk | None = None,
    **options: Unpack[HowOptions],
) -> Summary:
    """Write a Hugging Face model as a Megatron distributed checkpoint for `tp` × `pp` ranks.

    `source` is a directory or a Hub id; `integrity` writes the sha256 of every file, as megatron-core checks them. Raises
    UserError before a byte moves for whatever cannot be converted exactly; after any failure nothing is at `target`.
    """
    how, talk, target, folder = How(**options), talk or Talk(), Path(target), hub.resolve(source)
    _check_options(dtype=dtype, tp=tp, pp=pp, vpp=vpp, vocab_divisible_by=vocab_divisible_by, workers=how.workers)
    check_target(target, folder.path, overwrite=how.overwrite)
    wanted = ImportOptions(
        tp=tp,
        pp=pp,
        vpp=vpp,
        pp_layout=pp_layout,
        dtype=dtype,
        vocab_divisible_by=vocab_divisible_by,
        integrity=integrity,
    )
    with closing(HuggingFaceReader(folder)) as reader:
        return carry_out(plan_import(reader, target, wanted, talk), how, talk)


@explained()
def mcore_to_hf(
    source: str | Path,
    target: str | Path,
    *,
    hf_config: str | Path | None = None,
    max_shard_size: int | None = None,
    dtype: str = KEEP,
    talk: Talk | None = None,
    **options: Unpack[HowOptions],
) -> Summary:
    """Write a Megatron distributed checkpoint as a Hugging Face model directory.

    `source` is the checkpoint's root or one iteration; `hf_config` a folder with a `config.json` to follow instead of the
    one that travelled; `max_shard_size` in bytes. Raises UserError before a byte moves for whatever cannot be converted
    exactly; after any failure nothing is at `target`.
    """
    how, talk, target, root = How(**options), talk or Talk(), Path(target), LocalFolder(Path(source))
    _check_options(dtype=dtype, max_shard_size=max_shard_size, workers=how.workers)
    given = LocalFolder(Path(hf_config)) if hf_config else None
    check_target(target, root.path, *([given.path] if given else []), overwrite=how.overwrite)
    wanted = ExportOptions(hf_config=given, max_shard_size=max_shard_size, dtype=dtype)
    with closing(TorchDistReader(root)) as reader:
        job = plan_export(reader, root, target, wanted, talk)
        with closing(job.reader):
            return carry_out(job, how, talk)


def _check_options(*, dtype: str, **counts: int | None) -> None:
    """What the command line checks already, for callers from Python."""
    if dtype not in CHOICES:
        raise UserError(f"dtype `{dtype}` is not one of {', '.join(CHOICES)}")
    for name, count in counts.items():
        if count is not None and count < 1:
            raise UserError(f"`{name}` is {count}, which should be 1 or more")
