"""From a Megatron adapter checkpoint to everything that making PEFT's folder does."""

from __future__ import annotations

from converter import provenance
from converter.adapters import description as described
from converter.adapters import peft_config, peft_format
from converter.adapters.megatron_format import MegatronAdapter, open_megatron
from converter.adapters.names import WEIGHT
from converter.comparison import CheckpointView
from converter.conversion_plan import ConversionPlan, manifest, outputs_for
from converter.plan import TensorPlan, as_stored
from converter.side_files import CONFIG, FILES
from formats.dcp_index import METADATA
from formats.folder import FileRef, Folder
from formats.huggingface import HuggingFaceReader, HuggingFaceWriter, Shard


def plan_export(root: Folder, target: str) -> ConversionPlan:
    """Everything an export does. Raises UserError for whatever PEFT's files cannot say exactly."""
    found = open_megatron(root)
    shards = peft_format.make_shard(tensor_plan.spec for tensor_plan in found.opened.tensor_plans.values())
    made = found.opened.tensor_plans
    tensor_plans = [made[name] for shard in shards.values() for name in shard.tensors]
    return _job(found, root, target, shards, tensor_plans)


def _job(
    found: MegatronAdapter, root: Folder, target: str, shards: dict[str, Shard], tensor_plans: list[TensorPlan]
) -> ConversionPlan:
    opened, folder = found.opened, found.reader.folder
    modules = [weight.removesuffix(WEIGHT) for weight in opened.parts]
    outputs = outputs_for(target, tensor_plans, {})
    read = [*found.reader.files, METADATA, described.FILE, f"{FILES}/{CONFIG}"]
    return ConversionPlan(
        command="adapter-to-hf",
        source=opened.label,
        target=target,
        reader=opened.reader,
        writer=HuggingFaceWriter(outputs, shards),
        outputs=outputs,
        tensor_plans=tensor_plans,
        manifest=manifest("adapter-to-hf", {}, {name: FileRef(folder, name) for name in read if folder.has(name)}),
        provenance_fields={
            "source": provenance.megatron_source(root, folder),
            "family": found.origin.config["model_type"],
            "tensors": {"in": len(found.reader.specs), "out": len(tensor_plans)},
        },
        tensors={tensor_plan.spec.name: tensor_plan.spec for tensor_plan in tensor_plans},
        passing="made",
        views=lambda written: (CheckpointView(opened.label, opened.reader, opened.tensor_plans), _written(written)),
        documents={peft_config.FILE: peft_config.make(opened.description, modules, layers=found.model.layers)},
        last=(peft_config.FILE,),
    )


def _written(folder: Folder) -> CheckpointView:
    reader = HuggingFaceReader(folder, files=[peft_format.FILE])
    return CheckpointView(folder.label, reader, as_stored(reader.specs))
