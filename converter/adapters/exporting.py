"""Plan PEFT's folder from a Megatron adapter checkpoint."""

from __future__ import annotations

from converter import provenance
from converter.adapter_files import DESCRIPTION, PEFT_CONFIG, PEFT_WEIGHTS
from converter.adapters import peft_config
from converter.adapters.layout import Experts, Layout, lay_out
from converter.adapters.megatron import MegatronAdapter, open_megatron_adapter
from converter.adapters.peft import make_shard
from converter.comparison import CheckpointView
from converter.conversion import Conversion
from converter.conversion_plan import ConversionPlan, OutputFiles, manifest
from converter.plan import as_stored
from converter.provenance import Provenance
from converter.side_files import CONFIG, FILES
from formats.folder import FileRef, Folder
from formats.huggingface import HuggingFaceReader, HuggingFaceWriter


def plan_export(root: Folder, experts: Experts) -> Conversion:
    """Plan an export. Raises UserError for whatever PEFT's files cannot represent exactly."""
    source = open_megatron_adapter(root)
    layout = lay_out(source, experts)
    adapter = layout.adapter
    return Conversion(
        plan=_conversion_plan(source, layout, root, experts),
        reader=adapter.reader,
        views=lambda written: (CheckpointView(adapter.label, adapter.reader, adapter.tensor_plans), _written(written)),
    )


def _conversion_plan(source: MegatronAdapter, layout: Layout, root: Folder, experts: Experts) -> ConversionPlan:
    adapter, folder, options = layout.adapter, source.reader.folder, {"experts": experts}
    plans = adapter.tensor_plans
    shards = make_shard(tensor_plan.spec for tensor_plan in plans.values())
    tensor_plans = [plans[name] for shard in shards.values() for name in shard.tensors]
    document = peft_config.encode(adapter.description, layout.targets, fan_in_fan_out=adapter.fan_in_fan_out)
    read = [*source.reader.files, *source.reader.index_files, DESCRIPTION, f"{FILES}/{CONFIG}"]
    return ConversionPlan(
        source=adapter.label,
        tensor_plans=tensor_plans,
        output=OutputFiles(
            writer=HuggingFaceWriter(shards),
            documents={PEFT_CONFIG: document},
            last=(PEFT_CONFIG,),
        ),
        provenance=Provenance(
            command="adapter-to-hf",
            fields={
                "source": provenance.megatron_source(root, source.reader),
                "options": options,
                "family": source.origin.config["model_type"],
                "tensors": {"in": len(source.reader.specs), "out": len(tensor_plans)},
            },
            tensors={tensor_plan.spec.name: tensor_plan.spec for tensor_plan in tensor_plans},
            passing="made",
        ),
        manifest=manifest("adapter-to-hf", options, {name: FileRef(folder, name) for name in read if folder.has(name)}),
        identity=options,
    )


def _written(folder: Folder) -> CheckpointView:
    reader = HuggingFaceReader(folder, files=[PEFT_WEIGHTS])
    return CheckpointView(folder.label, reader, as_stored(reader.specs))
