"""From a Megatron adapter checkpoint to everything that making PEFT's folder does."""

from __future__ import annotations

from converter import provenance
from converter.adapters import description as described
from converter.adapters import peft_config, peft_format
from converter.adapters.megatron_format import MegatronAdapter, open_megatron
from converter.adapters.names import WEIGHT
from converter.carried import CONFIG, FILES
from converter.comparison import Side
from converter.job import Job, manifest, outputs_for
from converter.plan import Making, as_stored
from formats.dcp_index import METADATA
from formats.folder import FileIn, Folder
from formats.huggingface import HuggingFaceReader, HuggingFaceWriter, Shard


def plan_export(root: Folder, target: str) -> Job:
    """Everything an export does. Raises UserError for whatever PEFT's files cannot say exactly."""
    found = open_megatron(root)
    shards = peft_format.make_shard(making.spec for making in found.opened.makings.values())
    made = found.opened.makings
    makings = [made[name] for shard in shards.values() for name in shard.tensors]
    return _job(found, root, target, shards, makings)


def _job(found: MegatronAdapter, root: Folder, target: str, shards: dict[str, Shard], makings: list[Making]) -> Job:
    opened, folder = found.opened, found.reader.folder
    modules = [weight.removesuffix(WEIGHT) for weight in opened.parts]
    outputs = outputs_for(target, makings, {})
    read = [*found.reader.container.files, METADATA, described.FILE, f"{FILES}/{CONFIG}"]
    return Job(
        command="adapter-to-hf",
        source=opened.label,
        target=target,
        reader=opened.reader,
        writer=HuggingFaceWriter(outputs, shards),
        outputs=outputs,
        makings=makings,
        manifest=manifest("adapter-to-hf", {}, {name: FileIn(folder, name) for name in read if folder.has(name)}),
        facts={
            "source": provenance.megatron_source(root, folder),
            "family": found.origin.config["model_type"],
            "tensors": {"in": len(found.reader.specs), "out": len(makings)},
        },
        tensors={making.spec.name: making.spec for making in makings},
        passing="made",
        sides=lambda written: (Side(opened.label, opened.reader, opened.makings), _written(written)),
        documents={peft_config.FILE: peft_config.make(opened.description, modules, layers=found.model.layers)},
        last=(peft_config.FILE,),
    )


def _written(folder: Folder) -> Side:
    reader = HuggingFaceReader(folder, files=[peft_format.FILE])
    return Side(folder.label, reader, as_stored(reader.specs))
