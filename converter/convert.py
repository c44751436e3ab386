"""The straight line, both ways: open, find the family, plan, and carry out."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from converter import carried, exporting, families, hub, importing, reference
from converter.carried import CONFIG
from converter.config import make_model
from converter.job import Job, Summary, Talk, carry_out, partial_directory
from converter.layout import make_layout
from converter.plan import placed, to_huggingface, to_megatron
from converter.run import check_equal, check_zero
from converter.values import CHOICES
from formats.disk import explained
from formats.errors import UserError
from formats.huggingface import HuggingFaceReader, HuggingFaceWriter
from formats.json_objects import read_json
from formats.spec import Joined
from formats.staging import check_target
from formats.torch_dist import Placed, TorchDistReader, TorchDistWriter, iteration_folder


def _check_options(*, dtype: str, **counts: int | None) -> None:
    """What the command line checks already, for callers from Python."""
    if dtype not in CHOICES:
        raise UserError(f"dtype `{dtype}` is not one of {', '.join(CHOICES)}")
    for name, count in counts.items():
        if count is not None and count < 1:
            raise UserError(f"`{name}` is {count}, which should be 1 or more")


@explained()
def hf_to_mcore(
    source: str | Path,
    target: str | Path,
    *,
    tp: int = 1,
    pp: int = 1,
    vpp: int = 1,
    pp_layout: Sequence[int] | None = None,
    dtype: str = "keep",
    vocab_divisible_by: int = 128,
    workers: int | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    talk: Talk | None = None,
) -> Summary:
    """Write a Hugging Face model as a Megatron distributed checkpoint for `tp` × `pp` ranks.

    `source` is a directory or a Hub id. Raises UserError before a byte moves for whatever cannot be converted exactly;
    after any failure nothing is left at `target`.
    """
    _check_options(dtype=dtype, tp=tp, pp=pp, vpp=vpp, vocab_divisible_by=vocab_divisible_by, workers=workers)
    talk, target, directory = talk or Talk(), Path(target), hub.resolve(source)
    check_target(target, directory, overwrite=overwrite)
    config = read_json(directory / CONFIG)
    family = families.find(config.get("model_type"))
    reader = HuggingFaceReader(directory)
    model = make_model(family.CONFIG, config, vocab_multiple=vocab_divisible_by * tp)
    layout = make_layout(model, tp=tp, pp=pp, vpp=vpp, pp_layout=pp_layout)
    plan = to_megatron(family.RULES, family.EXTRAS, model, reader.specs, dtype=dtype)
    luggage = carried.pack(reader, plan.extras)
    for text in importing.notes(config, plan, luggage):
        talk.note(text)
    for name, other in plan.equal:
        check_equal(reader, name, other)
    documents = importing.documents(family, config, plan, layout, vocab_multiple=vocab_divisible_by)
    partial = partial_directory(target, plan.makings, {"layout": [tp, pp, vpp, *layout.stages]})
    chunked = [Placed(*item) for item in placed(plan, layout)]
    writer = TorchDistWriter(partial, chunked, documents={**luggage.documents, **documents})
    copies = {f"{iteration_folder(0)}/{file}": path for file, path in luggage.copies.items()}
    job = Job("hf-to-mcore", directory, target, reader, writer, plan.makings, partial, copies)
    with closing(job.reader):
        return carry_out(job, workers=workers, dry_run=dry_run, overwrite=overwrite, talk=talk)


@explained()
def mcore_to_hf(
    source: str | Path,
    target: str | Path,
    *,
    hf_config: str | Path | None = None,
    max_shard_size: int | None = None,
    dtype: str = "keep",
    workers: int | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    talk: Talk | None = None,
) -> Summary:
    """Write a Megatron distributed checkpoint as a Hugging Face model directory.

    `source` is the checkpoint's root or one iteration; `hf_config` a folder with a `config.json` to follow instead of the
    one that travelled; `max_shard_size` in bytes. Raises UserError before a byte moves for whatever cannot be converted
    exactly; after any failure nothing is left at `target`.
    """
    _check_options(dtype=dtype, max_shard_size=max_shard_size, workers=workers)
    talk, source, target = talk or Talk(), Path(source), Path(target)
    check_target(target, source, *([Path(hf_config)] if hf_config else []), overwrite=overwrite)
    reader = TorchDistReader(source)
    origin = reference.find(reader, Path(hf_config) if hf_config else None)
    family = families.find(origin.config.get("model_type"))
    model = make_model(family.CONFIG, origin.config)
    plan = to_huggingface(family.RULES, model, reader.specs, dtype=dtype)
    reader.check(one.megatron for one in plan.bound)
    makings, extras = exporting.with_carried(plan.makings, family, model, origin)
    shards = exporting.choose_shards(makings, origin, max_shard_size)
    for name in plan.zero:
        check_zero(reader, name)
    partial = partial_directory(target, makings, {"shards": {file: shard.size for file, shard in shards.items()}})
    documents, texts = exporting.documents(origin, shards, limited=max_shard_size is not None)
    for text in texts:
        talk.note(text)
    writer = HuggingFaceWriter(partial, shards)
    copies = {file: path for file, path in origin.files.items() if file not in documents}
    ordered = exporting.in_file_order(makings, shards)
    job = Job("mcore-to-hf", reader.directory, target, Joined(reader, *extras), writer, ordered, partial, copies, documents)
    with closing(job.reader):
        return carry_out(job, workers=workers, dry_run=dry_run, overwrite=overwrite, talk=talk)
