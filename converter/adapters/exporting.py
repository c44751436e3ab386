"""From a Megatron adapter checkpoint to everything that making PEFT's folder does."""

from __future__ import annotations

from converter import provenance
from converter.adapters import description as described
from converter.adapters import peft_config, peft_format
from converter.adapters.megatron_format import MegatronAdapter, open_megatron
from converter.adapters.names import WEIGHT
from converter.comparison import CheckpointView
from converter.conversion import Conversion
from converter.conversion_plan import ConversionPlan, OutputFiles, manifest
from converter.plan import as_stored
from converter.provenance import Provenance
from converter.side_files import CONFIG, FILES
from formats.dcp_index import METADATA
from formats.folder import FileRef, Folder
from formats.huggingface import HuggingFaceReader, HuggingFaceWriter


def plan_export(root: Folder) -> Conversion:
    """Return the conversion of an adapter checkpoint to PEFT. Raises UserError for what PEFT's files cannot say exactly."""
    found = open_megatron(root)
    opened = found.opened
    return Conversion(
        plan=_conversion_plan(found, root),
        reader=opened.reader,
        views=lambda written: (CheckpointView(opened.label, opened.reader, opened.tensor_plans), _written(written)),
    )


def _conversion_plan(found: MegatronAdapter, root: Folder) -> ConversionPlan:
    opened, folder = found.opened, found.reader.folder
    shards = peft_format.make_shard(tensor_plan.spec for tensor_plan in opened.tensor_plans.values())
    tensor_plans = [opened.tensor_plans[name] for shard in shards.values() for name in shard.tensors]
    modules = [weight.removesuffix(WEIGHT) for weight in opened.parts]
    read = [*found.reader.container.files, METADATA, described.FILE, f"{FILES}/{CONFIG}"]
    return ConversionPlan(
        source=opened.label,
        tensor_plans=tensor_plans,
        output=OutputFiles(
            writer=HuggingFaceWriter(shards),
            documents={peft_config.FILE: peft_config.make(opened.description, modules, layers=found.model.layers)},
            last=(peft_config.FILE,),
        ),
        provenance=Provenance(
            command="adapter-to-hf",
            fields={
                "source": provenance.megatron_source(root, folder),
                "family": found.origin.config["model_type"],
                "tensors": {"in": len(found.reader.specs), "out": len(tensor_plans)},
            },
            tensors={tensor_plan.spec.name: tensor_plan.spec for tensor_plan in tensor_plans},
            passing="made",
        ),
        manifest=manifest("adapter-to-hf", {}, {name: FileRef(folder, name) for name in read if folder.has(name)}),
        identity={},
    )


def _written(folder: Folder) -> CheckpointView:
    reader = HuggingFaceReader(folder, files=[peft_format.FILE])
    return CheckpointView(folder.label, reader, as_stored(reader.specs))
