"""Plan PEFT's folder from a Megatron adapter checkpoint."""

from __future__ import annotations

from converter import provenance
from converter.adapters import peft_config
from converter.adapters.files import DESCRIPTION, PEFT_CONFIG, PEFT_WEIGHTS
from converter.adapters.megatron import MegatronAdapter, open_megatron_adapter
from converter.adapters.names import module_of
from converter.adapters.peft import make_shard
from converter.comparison import CheckpointView
from converter.conversion_plan import ConversionPlan, manifest, outputs_for
from converter.plan import TensorPlan, as_stored
from converter.side_files import CONFIG, FILES
from formats.dcp_index import METADATA
from formats.folder import FileRef, Folder
from formats.huggingface import HuggingFaceReader, HuggingFaceWriter, Shard


def plan_export(root: Folder, target: str) -> ConversionPlan:
    """Plan an export. Raises UserError for whatever PEFT's files cannot represent exactly."""
    source = open_megatron_adapter(root)
    plans = source.adapter.tensor_plans
    shards = make_shard(tensor_plan.spec for tensor_plan in plans.values())
    return _job(source, root, target, shards, [plans[name] for shard in shards.values() for name in shard.tensors])


def _job(
    source: MegatronAdapter, root: Folder, target: str, shards: dict[str, Shard], tensor_plans: list[TensorPlan]
) -> ConversionPlan:
    opened, folder = source.adapter, source.reader.folder
    modules = [module_of(weight) for weight in opened.parts]
    outputs = outputs_for(target, tensor_plans, {})
    read = [*source.reader.container.files, METADATA, DESCRIPTION, f"{FILES}/{CONFIG}"]
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
            "family": source.origin.config["model_type"],
            "tensors": {"in": len(source.reader.specs), "out": len(tensor_plans)},
        },
        tensors={tensor_plan.spec.name: tensor_plan.spec for tensor_plan in tensor_plans},
        passing="made",
        views=lambda written: (CheckpointView(opened.label, opened.reader, opened.tensor_plans), _written(written)),
        documents={PEFT_CONFIG: peft_config.encode(opened.description, modules, layers=source.model.layers)},
        last=(PEFT_CONFIG,),
    )


def _written(folder: Folder) -> CheckpointView:
    reader = HuggingFaceReader(folder, files=[PEFT_WEIGHTS])
    return CheckpointView(folder.label, reader, as_stored(reader.specs))
