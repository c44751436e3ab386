"""Convert adapters in both directions, from the outside in: check, open, plan, execute."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Unpack

from converter.adapter_files import refuse_adapter, require, require_peft
from converter.adapters.adapter import base_name
from converter.adapters.base import identify_base
from converter.adapters.exporting import plan_export
from converter.adapters.importing import plan_import
from converter.adapters.layout import EXPERTS, Experts
from converter.checks import check_execution, check_layout, check_locations
from converter.execute import execute
from converter.execution import ExecutionOptions, Reporter, Summary
from converter.sources import open_source
from formats.detect import Format
from formats.disk import user_errors
from formats.errors import UserError
from formats.home import expanded


@user_errors()
def adapter_to_mcore(
    source: str | Path,
    target: str | Path,
    *,
    base: str | Path,
    canonical: bool = True,
    layout: str | None = None,
    reporter: Reporter | None = None,
    **options: Unpack[ExecutionOptions],
) -> Summary:
    """Write a PEFT adapter as a Megatron checkpoint of the adapter's tensors, each in its dtype.

    `source` is PEFT's folder, its URL or Hub id; `base` is the model that it was trained on, in either format. `canonical` keeps
    separate adapters for query, key and value, and for gate and up, as PEFT has them. Without it each Megatron module gets one
    adapter, which requires that their A are equal. `layout` is that of the model to be trained: `gpt` or `hybrid`, by default the
    base's.

    Raises UserError before a byte moves if the adapter cannot be converted exactly. After any failure nothing is at `target`.

    >>> adapter_to_mcore("adapter", "lora-megatron", base="Llama-3.2-1B").tensors
    8
    """
    check_execution(options)
    check_layout(layout)
    reporter, target, folder = reporter or Reporter(), expanded(target), open_source(source, or_hub=True)
    base_folder = open_source(base, or_hub=True)
    check_locations(target, [folder, base_folder], options)
    with closing(folder), closing(base_folder):
        require_peft(folder)
        refuse_adapter(base_folder)
        model = identify_base(base_folder, name=base_name(base), layout=layout)
        conversion = plan_import(folder, model, reporter, canonical=canonical)
        return execute(conversion, target, options=options, reporter=reporter, sources=[folder, base_folder])


@user_errors()
def adapter_to_hf(
    source: str | Path,
    target: str | Path,
    *,
    experts: Experts = "fused",
    reporter: Reporter | None = None,
    **options: Unpack[ExecutionOptions],
) -> Summary:
    """Write a Megatron adapter checkpoint as the folder that PEFT's `save_pretrained` writes, each tensor in its dtype.

    `source` is the root of a checkpoint or one iteration. The adapter of a fused module becomes one adapter for each of the
    weights it changes, all with the same A. `experts`: `fused`, the adapters of a layer's experts together, as PEFT has them with
    transformers 5; or `separate`, a module for each expert, as vLLM loads them for most models.

    Raises UserError before a byte moves if the adapter cannot be converted exactly. After any failure nothing is at `target`.

    >>> list(adapter_to_hf("megatron-adapter", "lora").files)
    ['adapter_config.json', 'adapter_model.safetensors', 'conversion.json']
    """
    check_execution(options)
    if experts not in EXPERTS:
        raise UserError(f"`experts` is `{experts}`", hint=f"it is one of: {', '.join(EXPERTS)}")
    reporter, target, root = reporter or Reporter(), expanded(target), open_source(source)
    check_locations(target, [root], options)
    with closing(root):
        require(root, Format.TORCH_DIST, adapter=True)
        return execute(plan_export(root, experts), target, options=options, reporter=reporter, sources=[root])
