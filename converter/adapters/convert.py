"""Convert adapters in both directions, from the outside in: check, open, plan, execute."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Unpack

from converter.adapters.adapter import base_name
from converter.adapters.base import identify_base
from converter.adapters.exporting import plan_export
from converter.adapters.files import refuse_adapter, require, require_peft
from converter.adapters.importing import plan_import
from converter.conversion_plan import ExecutionArguments, ExecutionOptions, Reporter, Summary
from converter.convert import check_place
from converter.execute import execute
from converter.sources import open_source
from formats.detect import Format
from formats.disk import user_errors
from formats.home import expanded


@user_errors()
def adapter_to_mcore(
    source: str | Path,
    target: str | Path,
    *,
    base: str | Path,
    canonical: bool = True,
    reporter: Reporter | None = None,
    **options: Unpack[ExecutionArguments],
) -> Summary:
    """Write a PEFT adapter as a Megatron checkpoint that holds its tensors alone, each in the dtype it has.

    `source` is PEFT's folder, its URL or Hub id; `base` the model that it was trained beside, in either format. `canonical`
    keeps the separate adapters that PEFT has; without it those of query, key and value, and of gate and up, become one, which
    needs their A to be the same. Raises UserError before a byte moves for whatever cannot be converted exactly.
    """
    how, reporter, target, folder = (
        ExecutionOptions(**options),
        reporter or Reporter(),
        expanded(target),
        open_source(source, or_hub=True),
    )
    beside = open_source(base, or_hub=True)
    check_place(target, [folder, beside], how)
    with closing(folder), closing(beside):
        require_peft(folder)
        refuse_adapter(beside)
        job = plan_import(folder, identify_base(beside, name=base_name(base)), target, reporter, canonical=canonical)
        return execute(job, how, reporter, sources=[folder, beside])


@user_errors()
def adapter_to_hf(
    source: str | Path, target: str | Path, *, reporter: Reporter | None = None, **options: Unpack[ExecutionArguments]
) -> Summary:
    """Write a Megatron adapter checkpoint as the folder that PEFT's `save_pretrained` would write, each tensor in its dtype.

    `source` is the checkpoint's root or one iteration. A fused adapter becomes one for each of the weights it changes, with
    the same A. Raises UserError before a byte moves for whatever cannot be converted exactly.
    """
    how, reporter, target, root = ExecutionOptions(**options), reporter or Reporter(), expanded(target), open_source(source)
    check_place(target, [root], how)
    with closing(root):
        require(root, Format.TORCH_DIST, adapter=True)
        return execute(plan_export(root, target), how, reporter, sources=[root])
