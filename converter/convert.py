"""The straight line, both ways: open, find the family, plan, and carry out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Unpack

from converter import carried, exporting, families, hub, importing, provenance, reference
from converter.carried import CONFIG
from converter.carry import carry_out
from converter.config import make_model
from converter.job import How, HowOptions, Job, Summary, Talk, partial_directory
from converter.layout import make_layout
from converter.plan import as_stored, placed, to_huggingface, to_megatron
from converter.run import check_equal, check_zero
from converter.sides import huggingface_side, megatron_side
from converter.values import CHOICES, KEEP
from converter.verify import Side
from formats.disk import explained
from formats.errors import UserError
from formats.folder import FileIn, Folder, LocalFolder
from formats.huggingface import HuggingFaceReader, HuggingFaceWriter
from formats.json_objects import read_json
from formats.outputs import LocalOutputs
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
    config = read_json(folder, CONFIG)
    family = families.find(config.get("model_type"))
    reader = HuggingFaceReader(folder)
    model = make_model(family.CONFIG, config, vocab_multiple=vocab_divisible_by * tp)
    layout = make_layout(model, tp=tp, pp=pp, vpp=vpp, pp_layout=pp_layout)
    plan = to_megatron(family.RULES, family.EXTRAS, model, reader.specs, dtype=dtype)
    luggage = carried.pack(reader, plan.extras)
    for text in importing.notes(config, plan, luggage):
        talk.note(text)
    for name, other in plan.equal:
        check_equal(reader, name, other)
    what = {"tp": tp, "pp": pp, "vpp": vpp, "layers": list(layout.stages), "dtype": dtype,
               "vocab_divisible_by": vocab_divisible_by, "integrity": integrity}  # fmt: skip
    partial = partial_directory(target, plan.makings, what)
    outputs = LocalOutputs(partial)
    writer = TorchDistWriter(outputs, [Placed(*item) for item in placed(plan, layout)])
    documents = importing.documents(family, config, plan, layout, vocab_multiple=vocab_divisible_by)
    inside = f"{iteration_folder(0)}/"
    files = {name: FileIn(folder, name) for name in reader.shards}

    def sides(written: Folder) -> tuple[Side, Side]:
        back = TorchDistReader(written)
        origin = carried.unpack(back.folder) or reference.find(back, None)
        one = huggingface_side(reader) if dtype == KEEP else huggingface_side(reader).cast(dtype)
        other = megatron_side(back, origin, zero=importing.padding(plan, model))
        return one, other if dtype == KEEP else other.cast(dtype)

    job = Job(
        command="hf-to-mcore",
        source=folder.label,
        target=target,
        reader=reader,
        writer=writer,
        outputs=outputs,
        makings=plan.makings,
        manifest=_manifest("hf-to-mcore", what, {**files, **luggage.copies}),
        facts={
            "source": provenance.huggingface_source(folder, reader.shards),
            "options": what,
            "family": config["model_type"],
            **importing.facts(plan, tensors_in=len(reader.specs)),
        },
        tensors={copy.source: reader.specs[copy.source] for making in plan.makings for copy in making.copies},
        passing="read",
        sides=sides,
        hashes=luggage.hashes,
        aliases=dict(plan.equal),
        copies={f"{inside}{name}": file for name, file in luggage.copies.items()},
        documents={f"{inside}{name}": data for name, data in {**luggage.documents, **documents}.items()},
        folder=inside,
        integrity=integrity,
    )
    with closing(reader):
        return carry_out(job, how, talk)


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
    reader = TorchDistReader(root)
    origin = reference.find(reader, given)
    family = families.find(origin.config.get("model_type"))
    model = make_model(family.CONFIG, origin.config)
    plan = to_huggingface(family.RULES, model, reader.specs, dtype=dtype)
    reader.check(one.megatron for one in plan.bound)
    makings, extras = exporting.with_carried(plan.makings, family, model, origin)
    shards = exporting.choose_shards(makings, origin, max_shard_size)
    for name in plan.zero:
        check_zero(reader, name)
    what = {"max_shard_size": max_shard_size, "dtype": dtype, "hf_config": given.name if given else None}
    laid_out = {file: shard.size for file, shard in shards.items()}
    outputs = LocalOutputs(partial_directory(target, makings, {**what, "shards": laid_out}))
    documents, texts = exporting.documents(origin, shards, limited=max_shard_size is not None)
    for text in texts:
        talk.note(text)
    copies = {file: path for file, path in origin.files.items() if file not in {*documents, provenance.FILE}}
    files = {name: FileIn(reader.folder, name) for name in reader.container.files}
    both = Joined(reader, *extras)
    made = {making.spec.name: making for making in makings}

    def sides(written: Folder) -> tuple[Side, Side]:
        return Side(root.label, both, made), Side(written.label, back := HuggingFaceReader(written), as_stored(back.specs))

    job = Job(
        command="mcore-to-hf",
        source=reader.folder.label,
        target=target,
        reader=both,
        writer=HuggingFaceWriter(outputs, shards),
        outputs=outputs,
        makings=exporting.in_file_order(makings, shards),
        manifest=_manifest("mcore-to-hf", what, {**files, **copies}),
        facts={
            "source": provenance.megatron_source(root, reader.folder),
            "options": what,
            "family": origin.config["model_type"],
            "casts": importing.casts(makings),
            "tensors": {"in": len(reader.specs), "out": len(makings)},
        },
        tensors={name: making.spec for name, making in made.items()},
        passing="made",
        sides=sides,
        copies=copies,
        documents=documents,
    )
    with closing(both):
        return carry_out(job, how, talk)


def _manifest(command: str, options: Mapping[str, Any], files: Mapping[str, FileIn]) -> dict[str, Any]:
    """What must be the same for a run to go on with what another began."""
    versions = {f"the source's `{name}`": file.folder.version(file.name) for name, file in files.items()}
    said = {f"`{name}`": value for name, value in options.items()}
    return {"command": command, **said, **versions}
