"""Adapters both ways, from the outside in: check, open, plan, carry out."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Unpack

from converter.adapters.description import base_name
from converter.adapters.exporting import plan_export
from converter.adapters.files import refuse_adapter, require, require_peft
from converter.adapters.importing import open_base, plan_import
from converter.checks import check_execution, check_locations
from converter.execute import execute
from converter.execution import ExecutionOptions, Reporter, Summary
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
    **options: Unpack[ExecutionOptions],
) -> Summary:
    """Write a PEFT adapter as a Megatron checkpoint that holds its tensors alone, each in the dtype it has.

    `source` is PEFT's folder, its URL or Hub id; `base` the model that it was trained beside, in either format. `canonical`
    keeps the separate adapters that PEFT has; without it those of query, key and value, and of gate and up, become one, which
    needs their A to be the same. Raises UserError before a byte moves for whatever cannot be converted exactly.
    """
    check_execution(options)
    reporter, target, folder = reporter or Reporter(), expanded(target), open_source(source, or_hub=True)
    beside = open_source(base, or_hub=True)
    check_locations(target, [folder, beside], options)
    with closing(folder), closing(beside):
        require_peft(folder)
        refuse_adapter(beside)
        conversion = plan_import(folder, open_base(beside, name=base_name(base)), reporter, canonical=canonical)
        return execute(conversion, target, options=options, reporter=reporter, sources=[folder, beside])


@user_errors()
def adapter_to_hf(
    source: str | Path, target: str | Path, *, reporter: Reporter | None = None, **options: Unpack[ExecutionOptions]
) -> Summary:
    """Write a Megatron adapter checkpoint as the folder that PEFT's `save_pretrained` would write, each tensor in its dtype.

    `source` is the checkpoint's root or one iteration. A fused adapter becomes one for each of the weights it changes, with
    the same A. Raises UserError before a byte moves for whatever cannot be converted exactly.
    """
    check_execution(options)
    reporter, target, root = reporter or Reporter(), expanded(target), open_source(source)
    check_locations(target, [root], options)
    with closing(root):
        require(root, Format.TORCH_DIST, adapter=True)
        return execute(plan_export(root), target, options=options, reporter=reporter, sources=[root])
